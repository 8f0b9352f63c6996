"""The functions of the exercises, one by one, in the order of the data flow: worked by hand first.

They are called through `impl`: minioutro.model, or the module given to --impl. Everything else here is the project's
own, so that an exercise is judged by itself. `check` instead of assert, so that a student reads one sentence.
"""

import itertools
import math
from contextlib import contextmanager

import pytest
import torch
from helpers import check
from torch.overrides import TorchFunctionMode

from minioutro import OutRo, model
from minioutro.lab.analysis import attention_mass, sink_share
from minioutro.model import align_with_sink, causal_mask, rope_tables, show_mask, sink_value


def drawn(*sizes, seed=0):
    """Random tensors of these sizes, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


@contextmanager
def explained(sentence):
    """Tell with a sentence what a solution raises, because a shape alone explains little."""
    __tracebackhide__ = True
    try:
        yield
    except NotImplementedError:
        raise
    except Exception as error:
        raise AssertionError(f"{sentence}\n{type(error).__name__}: {error}") from error


def assert_mask(may_attend, rows, call):
    __tracebackhide__ = True
    expected = torch.tensor(rows, dtype=torch.bool)
    check(may_attend.dtype == torch.bool, f"{call} is {may_attend.dtype}, not bool with True = may attend")
    check(may_attend.shape == expected.shape, f"{call} is {tuple(may_attend.shape)}, not {tuple(expected.shape)}")
    check(may_attend.equal(expected), f"{call} is\n{show_mask(may_attend)}\nand should be\n{show_mask(expected)}")


def assert_values(found, expected, what, tolerance=1e-4):
    """Equal numbers. Of more than 16, only the place of the largest difference is shown."""
    __tracebackhide__ = True
    expected = torch.as_tensor(expected, dtype=torch.float32)
    check(found.shape == expected.shape, f"{what}: the shape is {tuple(found.shape)}, not {tuple(expected.shape)}")
    away = ((found.float() - expected).abs() - 1e-5 * expected.abs()).nan_to_num(math.inf)
    if found.numel() > 16:
        place = (away == away.max()).nonzero()[0].tolist()
        worst = tuple(place)
        what = f"{what}\n{(away > tolerance).sum()} of {away.numel()} numbers differ, most of all the one at {place}"
        shown = f"found {found[worst]:.6g}, expected {expected[worst]:.6g}"
    else:
        shown = f"found\n{found}\nexpected\n{expected}"
    check((away <= tolerance).all(), f"{what}\n{shown}")


class Calls(TorchFunctionMode):
    """The names of the functions of torch that are called in a `with` block, however they were imported."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def assert_no_loop(name, function, few, many):
    """Without a loop, a function calls torch as often for large arguments as for small ones."""
    __tracebackhide__ = True
    counts = []
    for arguments in (few, many):
        with Calls() as calls:
            function(*arguments)
        counts.append(len(calls.names))
    check(counts[0] == counts[1],
          f"{name} calls torch {counts[0]} times for small arguments and {counts[1]} times for large ones. Is there a "
          "loop? Write it without one")


# ---- exercise 1: pixel shuffle ----


@pytest.mark.exercise_1
def test_pixel_shuffle_by_hand(impl):
    """Patches 0 to 15 in four rows of four; every 2 x 2 square becomes one token:

         0  1 |  2  3
         4  5 |  6  7
        -------------       token 0 is (0, 1, 4, 5), its right neighbour (2, 3, 6, 7)
         8  9 | 10 11
        12 13 | 14 15
    """
    x = torch.arange(16.0).view(1, 16, 1)
    squares = [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    assert_values(impl.pixel_shuffle(x, 2), squares, "each token is one square, its rows one after another")


@pytest.mark.exercise_1
def test_pixel_shuffle_of_longer_patches(impl):
    """Token (Y, X) of a 6 x 6 grid at scale 3 is the 9 patches (3Y + dy, 3X + dx), dy outside."""
    x = torch.arange(2 * 36 * 5.0).view(2, 36, 5)
    grid = x.view(2, 6, 6, 5)
    folded = impl.pixel_shuffle(x, 3)
    check(folded.shape == (2, 4, 45), f"36 patches of size 5 at scale 3 become {tuple(folded.shape)}, not (2, 4, 45)")
    for Y, X in itertools.product((0, 1), (0, 1)):
        square = grid[:, 3 * Y:3 * Y + 3, 3 * X:3 * X + 3].flatten(1)
        check(folded[:, 2 * Y + X].equal(square),
              f"token ({Y}, {X}) is not the 9 patches of its square, the 5 values of each together")


@pytest.mark.exercise_1
def test_pixel_shuffle_has_no_loop(impl):
    """A loop over squares is slow: a video has thousands of them."""
    assert_no_loop("pixel_shuffle", impl.pixel_shuffle, (torch.ones(1, 16, 1), 2), (torch.ones(3, 256, 5), 4))


# ---- exercise 2: norm and positions ----


@pytest.mark.exercise_2
def test_rms_norm_by_hand(impl):
    """The mean square of (3, 4, 0, 0) is 25/4, its root 2.5: the norm is (1.2, 1.6, 0, 0). With eps, x = 0.001
    everywhere and eps = 3e-6: 0.001 / sqrt(1e-6 + 3e-6) = 1/2."""
    norm = impl.RMSNorm(4, 0.0)
    assert_values(norm(torch.tensor([3.0, 4.0, 0.0, 0.0])), [1.2, 1.6, 0.0, 0.0], "x divided by its root mean square")
    assert_values(norm(torch.ones(4)), [1.0] * 4, "no mean is subtracted")
    tokens = torch.tensor([[[3.0, 4.0, 0.0, 0.0], [30.0, 40.0, 0.0, 0.0]]])
    assert_values(norm(tokens), [[[1.2, 1.6, 0.0, 0.0]] * 2], "each token has its own mean square")
    norm.weight.data = torch.tensor([1.0, 10.0, 1.0, 1.0])
    assert_values(norm(tokens[0, 0]), [1.2, 16.0, 0.0, 0.0], "the weight multiplies each coordinate")
    assert_values(impl.RMSNorm(4, 3e-6)(torch.full((4,), 1e-3)), [0.5] * 4, "eps is added under the root")


@pytest.mark.exercise_2
def test_norm_of_a_massive_activation_in_float16(impl):
    """15,000 squared overflows float16; the norm of (15000, 0, 0, 0) is still (2, 0, 0, 0)."""
    x = torch.tensor([15000.0, 0, 0, 0], dtype=torch.float16)
    normed = impl.RMSNorm(4, 1e-5).half()(x)
    check(normed.tolist() == [2.0, 0.0, 0.0, 0.0],
          f"in float16 the norm of (15000, 0, 0, 0) is {normed.tolist()}, and should be [2, 0, 0, 0]: square in "
          f"float32, because the largest float16 is 65,504")
    check(normed.dtype == torch.float16, f"float16 goes in and {normed.dtype} comes out")


@pytest.mark.exercise_2
def test_rotation_by_hand(impl):
    """D = 4, theta 100: frequencies 1 and 1/10; at position 2, (x0, x2) turns by 2, (x1, x3) by 0.2. Every head of
    every item is turned alike, and position 0 not at all."""
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(2, 3, 5, 4)
    cos, sin = rope_tables(torch.arange(5), 4, 100.0, like=x)
    rotated = impl.rotate(x, cos, sin)
    expected = torch.tensor([math.cos(2), math.cos(0.2), math.sin(2), math.sin(0.2)])
    assert_values(rotated[:, :, 0], x[:, :, 0], "position 0 is not turned")
    assert_values(rotated[0, 0, 2], expected, "(1, 1, 0, 0): (x0, x2) turns by 2, (x1, x3) by 0.2, counterclockwise")
    assert_values(rotated[:, :, 2], expected.expand(2, 3, 4), "position 2 is turned alike in every item and head")


@pytest.mark.exercise_2
def test_rotation_of_items_with_their_own_positions(impl):
    """In a layer the angles are (1,1,S,D), or (B,1,S,D) if each item has its own positions."""
    x, = drawn((2, 3, 5, 4))
    for positions in (torch.arange(5)[None], torch.stack([torch.arange(5), torch.arange(7, 12)])):
        cos, sin = rope_tables(positions[:, None], 4, 100.0, like=x)
        given = f"cos and sin of shape {tuple(cos.shape)}"
        with explained(f"rotate stops at {given}"):
            rotated = impl.rotate(x, cos, sin)
        check(rotated.shape == x.shape, f"{given}: x is {tuple(x.shape)}, and rotate returns {tuple(rotated.shape)}")
        for b in (0, 1):
            c, s = cos.expand(2, 1, 5, 4)[b, 0], sin.expand(2, 1, 5, 4)[b, 0]
            expected = x[b] * c + torch.cat([-x[b, ..., 2:], x[b, ..., :2]], dim=-1) * s
            assert_values(rotated[b], expected, f"{given}: item {b} is not turned by the angles of its own positions")


# ---- exercise 3: masks ----


@pytest.mark.exercise_3
def test_causal_mask_by_hand(impl):
    """Each of four sees itself and what came before. The last two of four see three and four."""
    square = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert_mask(impl.causal_mask(4, 4), square, "causal_mask(4, 4)")
    assert_mask(impl.causal_mask(2, 4), [[1, 1, 1, 0], [1, 1, 1, 1]], "causal_mask(2, 4), with a cache of two,")
    assert_mask(impl.causal_mask(1, 5), [[1, 1, 1, 1, 1]], "causal_mask(1, 5), one new token,")


@pytest.mark.exercise_3
def test_opened_rows_by_hand(impl):
    """Item 0 has sinks at 0 and 2, item 1 none. Then row 1 of item 0 and row 0 of item 1 are opened as well."""
    is_sink = torch.tensor([[True, False, True], [False] * 3])
    opened = impl.open_sink_rows(causal_mask(3, 3), is_sink)
    check(opened.shape == (2, 3, 3), f"two items, one mask each: (2, 3, 3), not {tuple(opened.shape)}")
    assert_mask(opened[0], [[1, 1, 1], [1, 1, 0], [1, 1, 1]], "the mask with the rows of sinks 0 and 2 opened")
    assert_mask(opened[1], [[1, 0, 0], [1, 1, 0], [1, 1, 1]], "the mask of the item without sinks")
    more = impl.open_sink_rows(opened, torch.tensor([[False, True, False], [True, False, False]]))
    assert_mask(more[0], [[1, 1, 1], [1, 1, 1], [1, 1, 1]], "the mask with rows 0 and 2 open, and now row 1,")
    assert_mask(more[1], [[1, 1, 1], [1, 1, 0], [1, 1, 1]], "the mask of the other item, with row 0 opened now,")


# ---- exercise 4: attention ----


@pytest.mark.exercise_4
def test_repeat_heads_by_hand(impl):
    assert_values(impl.repeat_heads(torch.tensor([[10.0, 20.0, 30.0]]), 6), [[10, 10, 20, 20, 30, 30]],
                  "G = 3 heads for H = 6: heads 0 and 1 read the first, 2 and 3 the second")


@pytest.mark.exercise_4
def test_attention_by_hand(impl):
    """D = 4, q = (1,1,1,1), keys 0 and (ln 3)/2 q: the scores are 0 and 2 ln 3 / sqrt(4) = ln 3,
    their exponentials 1 and 3, the weights 1/4 and 3/4. With values 0 and 4 the output is 3."""
    q = torch.ones(1, 1, 1, 4)
    k = torch.stack([torch.zeros(4), torch.full((4,), math.log(3) / 2)])[None, None]
    v = torch.tensor([0.0, 4.0])[:, None].expand(2, 4)[None, None]
    out, weights = impl.attention(q, k, v, torch.ones(1, 2, dtype=torch.bool))
    assert_values(weights, [[[[0.25, 0.75]]]], "both keys are allowed. The weights are the softmax of q k^T / sqrt(D)")
    assert_values(out, [[[[3.0] * 4]]], "the mean of the values by these weights")


@pytest.mark.exercise_4
def test_a_forbidden_key_gets_no_weight(impl):
    """Two keys, of which the mask allows the first. It has all the weight, although its score is -100,000. A second
    query, to which the same key has a score of 0, changes nothing."""
    q = torch.stack([torch.ones(4), torch.zeros(4)])[None, None]
    k = torch.stack([torch.full((4,), -50_000.0), torch.zeros(4)])[None, None]        # q k^T / sqrt(4) = -100,000
    for n, why in ((1, "Is a forbidden score -inf?"), (2, "A second query must not change this: each query has a "
                                                          "softmax of its own.")):
        _, weights = impl.attention(q[:, :, :n], k, torch.ones(1, 1, 2, 4), torch.tensor([[True, False]]).repeat(n, 1))
        assert_values(weights[:, :, 0], [[[1.0, 0.0]]],
                      f"the only allowed key, whose score is -100,000, should have all the weight. {why}")


@pytest.mark.exercise_4
def test_attention_equals_a_loop(impl):
    """Head h of 6 reads key-value head h // 2 of 3, and only what its mask allows."""
    q, k, v = drawn((2, 6, 3, 10), (2, 3, 5, 10), (2, 3, 5, 10))          # (B,H,Q,D), (B,G,K,D) twice
    closed = causal_mask(3, 5)
    for may_attend in (closed, torch.stack([torch.ones_like(closed), closed])):
        with explained(f"attention stops with may_attend of shape {tuple(may_attend.shape)}. Is may_attend[b] given to "
                       "all heads of item b?"):
            out, weights = impl.attention(q, k, v, may_attend)
        check(weights.shape == (2, 6, 3, 5), f"the weights are {tuple(weights.shape)}, not (B,H,Q,K) = (2, 6, 3, 5)")
        for b, h, i in itertools.product(range(2), range(6), range(3)):
            allowed = may_attend.expand(2, 3, 5)[b, i]
            scores = k[b, h // 2] @ q[b, h, i] / math.sqrt(10)
            expected = torch.zeros(5)
            expected[allowed] = scores[allowed].softmax(0)
            where = (f"of item {b}, query head {h} on key-value head {h // 2}, query {i}, which may attend to keys "
                     f"{allowed.nonzero().flatten().tolist()}. Scores are divided by sqrt(D) = sqrt(10)")
            assert_values(weights[b, h, i], expected, f"weights {where}", 1e-5)
            assert_values(out[b, h, i], expected @ v[b, h // 2], f"out {where}", 1e-5)


@pytest.mark.exercise_4
def test_attention_is_written_out(impl):
    with Calls() as calls:
        impl.attention(*drawn((1, 2, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4)), causal_mask(3, 3))
    check("scaled_dot_product_attention" not in calls.names,
          "attention calls scaled_dot_product_attention: exercise 4 is for writing it out")


# ---- exercise 5: the cache ----


def made_of_positions(first, n, layer=0):
    """Keys and values (2,2,n,3) in float64 that tell their position. Position 7 has the keys 7 and, in head 1, 7.5. In
    item 1 they are 7.25 and 7.75. Its values are 100 more. Each layer adds 1000."""
    heads = torch.tensor([[0.0, 0.5], [0.25, 0.75]], dtype=torch.float64)                   # (B,G)
    k = torch.arange(first, first + n)[:, None].expand(n, 3) + heads[:, :, None, None] + 1000 * layer
    return k, k + 100


def assert_positions(found, n, layer, what):
    """Keys or values (2,2,n,3) of positions 0 to n - 1. `what` begins with the word."""
    __tracebackhide__ = True
    expected = made_of_positions(0, n, layer)[what.startswith("values")]
    check(found.shape[2] == n, f"{what}: {found.shape[2]} positions, not {n}")
    check(found.shape == expected.shape, f"{what}: the shape is {tuple(found.shape)}, not {tuple(expected.shape)}")
    check(found.dtype == torch.float64, f"{what}: torch.float64 went in, and {found.dtype} comes out")
    for b, head in itertools.product((0, 1), (0, 1)):
        differ = (found[b, head] != expected[b, head]).any(-1).nonzero().flatten().tolist()
        p = differ[0] if differ else 0
        check(not differ, f"{what}: item {b}, head {head} has {found[b, head, p, 0]:g} at position {p}, not "
                          f"{expected[b, head, p, 0]:g}. {len(differ)} of {n} positions differ, this is the first")


def add(cache, n):
    """What the model does with a cache for n new tokens: every layer extends it, then length moves."""
    __tracebackhide__ = True
    start = cache.length
    for layer in (0, 1):
        call = f"extend({layer}, k, v) of two items, with n = {n} after length = {start}"
        with explained(f"{call} stops"):
            k, v = cache.extend(layer, *made_of_positions(start, n, layer))
        assert_positions(k, start + n, layer, f"keys returned by {call}")
        assert_positions(v, start + n, layer, f"values returned by {call}")
        check(cache.length == start, "extend changes length, which the model does when all layers are done")
        if start:
            assert_positions(cache.keys(layer), start, layer, f"keys({layer}) after extend, before length moves")
            assert_positions(cache.values(layer), start, layer, f"values({layer}) after extend, before length moves")
    cache.length = start + n


@pytest.mark.exercise_5
def test_a_cache_by_hand(impl):
    """Two layers, three tokens of a prompt, then one, two at once, and one, and a long answer."""
    cache = impl.Cache()
    for n in (3, 1, 2, 1, 300, 1, 300):
        add(cache, n)
        for layer in (0, 1):
            assert_positions(cache.keys(layer), cache.length, layer, f"keys({layer})")
            assert_positions(cache.values(layer), cache.length, layer, f"values({layer})")


@pytest.mark.exercise_5
def test_keys_and_values_of_a_cache_can_be_edited(impl):
    """As `logits_of` of analysis.py does: later tokens meet the edited ones."""
    cache = impl.Cache()
    add(cache, 3)
    cache.keys(0)[:, :, 1] = -1.0
    cache.values(0)[:, :, 2] = -2.0
    k, v = cache.extend(0, *made_of_positions(3, 1))
    check((k[:, :, 1] == -1).all(), "keys(0) was edited, and extend(0, k, v) returns the keys from before the edit")
    check((v[:, :, 2] == -2).all(), "values(0) was edited, and extend(0, k, v) returns the values from before the edit")


# ---- exercise 6: sinks ----


@pytest.mark.exercise_6
def test_activation_ratio_by_hand(impl):
    """Six values, |h| = 0, 1, 1, 2, 5, 40: the lower of the two middle ones is 1."""
    largest, median = impl.activation_ratio(torch.tensor([[[1.0, -1.0], [0.0, 5.0], [2.0, -40.0]]]))
    assert_values(largest, [[1, 5, 40]], "the largest |h| of each token")
    assert_values(median, [[1]], "the median |h| of the item, the lower of the two middle values 1 and 2")
    _, median = impl.activation_ratio(torch.tensor([[[1.0, 2.0, 9.0], [3.0, 4.0, 10.0], [11.0, 12.0, 13.0]]]))
    assert_values(median, [[9]], "the median of all nine numbers of the item. The tokens have medians of 2, 4 and 12, "
                                 "whose median is 4")


@pytest.mark.exercise_6
def test_find_sinks_by_hand(impl):
    """The same six values, with a median of 1. Token 2 has 40, which is enough for a multiple of 40 and not for 40.02,
    though the length of token 2, sqrt(2^2 + 40^2), is 40.05."""
    hidden = torch.tensor([[[1.0, -1.0], [0.0, 5.0], [2.0, -40.0]]])
    for floor, multiple, expected, why in (
            (0.0, 40.0, [2], "-40 is 40 times the median, which is enough"),
            (40.0, 5.0, [2], "only -40 reaches a floor of 40"),
            (0.0, 5.0, [1, 2], "5 is 5 times the median"),
            (0.0, 40.02, [], "no coordinate is 40.02 times the median"),
            (41.0, 1.0, [], "both must hold, and nothing reaches the floor of 41")):
        found = sinks_in(impl.find_sinks(hidden, floor, multiple))
        check(found == [expected],
              f"find_sinks(hidden, {floor:g}, {multiple:g}) finds tokens {found[0]}, not {expected}: {why}")


@pytest.mark.exercise_6
def test_the_median_is_that_of_the_item(impl):
    """Item 0 has median 1, item 1 median 10; 100 is 100 times the one and 10 times the other. In item 0 the token with
    100 has itself a median of 90."""
    hidden = torch.tensor([[[1.0, 1.0], [90.0, 100.0]], [[10.0, 10.0], [10.0, 100.0]]])
    found = sinks_in(impl.find_sinks(hidden, 0.0, 95.0))
    check(found == [[1], []],
          f"items with medians 1 and 10, and 100 in token 1 of each, multiple 95: found {found}, not [[1], []]. Each "
          "item is compared with the median of all its tokens")


def sinks_in(is_sink):
    """bool[B,S] -> the positions of each item."""
    __tracebackhide__ = True
    check(is_sink.dtype == torch.bool and is_sink.dim() == 2,
          f"is_sink is {is_sink.dtype} {tuple(is_sink.shape)}, not bool (B,S)")
    return [item.nonzero().flatten().tolist() for item in is_sink]


# ---- exercise 7: a second detector ----

SINK_FROM = 0.6         # a token that gets more than this from every head is clearly a sink
NONE_BELOW = 0.1        # one that gets less than this from every head is clearly not


def assert_clear_cases(impl, weights, v, names):
    """What the text calls clear, in each item of a batch; in between everything is right."""
    __tracebackhide__ = True
    B, S = weights.shape[0], weights.shape[-1]
    with explained(f"looks_like_a_sink stops at weights of shape {tuple(weights.shape)}"):
        found = impl.looks_like_a_sink(weights, v)
        alone = torch.cat([impl.looks_like_a_sink(weights[b:b + 1], v[b:b + 1]) for b in range(B)])
    check(found.dtype == torch.bool and found.shape == (B, S),
          f"looks_like_a_sink gives {found.dtype} {tuple(found.shape)}, not bool {(B, S)}")
    for b, (mine, mine_alone) in enumerate(zip(sinks_in(found), sinks_in(alone), strict=True)):
        check(mine == mine_alone, f"{names[b]}: in a batch of {B} you find tokens {mine}, and in the item alone "
                                  f"{mine_alone}. Each item has its own sinks")
    n_queries = torch.arange(S, 0, -1)                              # that may see each key
    given = weights.sum(-2) / n_queries                             # (B,H,S)
    for b, token in itertools.product(range(B), range(S - 15)):     # 16 queries or more may see it
        least, most = given[b, :, token].aminmax()
        mean = f"on average over the {n_queries[token]} queries that may see it"
        check(least <= SINK_FROM or found[b, token],
              f"{names[b]}: every head gives token {token} {least:.2f} of its attention or more, {mean}, and you do "
              f"not call it a sink. What token {token} gets is column {token} of the weights")
        check(most >= NONE_BELOW or not found[b, token],
              f"{names[b]}: no head gives token {token} more than {most:.2f} of its attention, {mean}, and you call "
              "it a sink")


def evenly():
    """64 tokens, each of which attends evenly to itself and to all before it."""
    return causal_mask(64, 64) / torch.arange(1, 65)[:, None]


def with_share_for_40(share):
    """From token 40 on, each gives token 40 this share of its attention, and divides the rest evenly."""
    weights = evenly()
    weights[40:] *= 1 - share
    weights[40:, 40] += share
    return weights


@pytest.mark.exercise_7
def test_clear_cases_by_hand(impl):
    """A batch of 64 tokens each. Nobody is a sink where all attend evenly to what they see, nor where all attend to
    themselves alone. Then token 40 is given a share of all attention, from where it can be seen."""
    last_elsewhere, last_alone = with_share_for_40(0.8), evenly()
    last_elsewhere[63] = torch.eye(64)[63]
    last_alone[40:, 40] = 0
    last_alone[63] = torch.eye(64)[40]
    cases = {"all attend evenly": evenly(), "each attends to itself": torch.eye(64),
             "from token 40 on, 40 is given enough": with_share_for_40(SINK_FROM),         # and its even part
             "from token 40 on, 40 is given too little": with_share_for_40(NONE_BELOW - 0.02),
             "from token 40 on, all but the last attend to 40": last_elsewhere,
             "from token 41 on, only the last attends to 40": last_alone}
    weights = torch.stack(list(cases.values()))[:, None].expand(-1, 4, -1, -1)
    v, = drawn((len(cases), 2, 64, 5))
    assert_clear_cases(impl, weights, v, list(cases))


@pytest.mark.exercise_7
def test_the_measure_is_your_own(impl, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("looks_like_a_sink calls attention_mass or sink_share: write the measure yourself")
    for function in (attention_mass, sink_share):
        monkeypatch.setattr(function, "__code__", forbidden.__code__)       # under whatever name it was imported
    impl.looks_like_a_sink(evenly().expand(1, 4, -1, -1), *drawn((1, 2, 64, 5)))


# ---- exercise 8: the sink's value, and alignment ----


@pytest.mark.exercise_8
def test_sink_value_by_hand(impl):
    """Two heads of size 2, sinks at 0 and 2: the mean of (1, 2) and (5, 10) is (3, 6), that of (10, 20) and (30, 40) is
    (20, 30). Item 1 has the same values and one sink, item 2 has none."""
    v = torch.tensor([[[1.0, 2.0], [100.0, 100.0], [5.0, 10.0]], [[10.0, 20.0], [0.0, 0.0], [30.0, 40.0]]])
    is_sink = torch.tensor([[True, False, True], [False, False, True], [False, False, False]])
    v_sink = impl.sink_value(v.repeat(3, 1, 1, 1), is_sink)
    check(v_sink.shape == (3, 2, 2), f"one vector for each item and head: (3, 2, 2), not {tuple(v_sink.shape)}")
    assert_values(v_sink[0], [[3, 6], [20, 30]], "the mean over the sinks, by head")
    assert_values(v_sink[1], [[5, 10], [30, 40]], "the value of the only sink, by head")
    assert_values(v_sink[2], [[0, 0], [0, 0]], "an item without sinks has zeros")


HEADS = (2, 6, 5, 4), (2, 3, 4)                     # sizes of out (B,H,S,D) and v_sink (B,G,D)
NEVER = torch.zeros(2, 5, dtype=torch.bool)         # ever_sink: nothing was a sink


def turned_in_a_plane(impl, o, v, gamma=3.0, temperature=0.1):
    """One token, one head of size 2."""
    __tracebackhide__ = True
    out, v_sink = torch.tensor(o).view(1, 1, 1, 2), torch.tensor(v).view(1, 1, 2)
    return impl.align_with_sink(out, v_sink, torch.tensor([[False]]), gamma, temperature).flatten()


@pytest.mark.exercise_8
def test_alignment_by_hand(impl):
    """o = (3, 4), v = (2, 0): c = 0.6, g = tanh(6) = 1, p = (3, 0), o + 3p = (12, 4), of length
    sqrt(160); scaled to the length 5 of o: (4.743, 1.581). Temperature 0.6: g = tanh(1) = 0.762.
    v = (1e-4, 0) and o = (3e-4, 4e-4): 1e-8 is as much as |v|^2, so that p is half of what it was."""
    for o, gamma, temperature, expected, why in (
            ((3.0, 4.0), 3.0, 0.1, (4.743, 1.581), "o turns towards v and keeps its length"),
            ((3.0, 4.0), 3.0, 0.6, (4.633, 1.881), "the gate is half open"),
            ((3.0, 4.0), 1.0, 0.1, (4.160, 2.774), "gamma is the strength"),
            ((-3.0, 4.0), 3.0, 0.1, (-3.0, 4.0), "o points away from v and stays"),
            ((0.0, 0.0), 3.0, 0.1, (0.0, 0.0), "o is zero and stays")):
        assert_values(turned_in_a_plane(impl, o, (2.0, 0.0), gamma, temperature), expected,
                      f"o = {o}, v = (2, 0), gamma {gamma:g}, temperature {temperature:g}: {why}", 1e-3)
    small = 1e4 * turned_in_a_plane(impl, (3e-4, 4e-4), (1e-4, 0.0))
    assert_values(small, (4.412, 2.353), "o = (3, 4), v = (1, 0) in units of 1e-4. The numbers before are right, and "
                                         "not these small ones, where the 1e-8 counts that is added to |v|^2", 1e-3)


@pytest.mark.exercise_8
def test_alignment_equals_a_loop(impl):
    """Head h of 6 turns towards the value of key-value head h // 2 of 3, by the formula for one vector."""
    out, v_sink = drawn(*HEADS)
    turned = impl.align_with_sink(out, v_sink, NEVER, 3.0, 0.1)
    for b, h, s in itertools.product(range(2), range(6), range(5)):
        o, v = out[b, h, s], v_sink[b, h // 2]
        c = o @ v / (o.norm() * v.norm())
        expected = o + torch.tanh(c.relu() / 0.1) * 3.0 * (o @ v) / (v @ v) * v
        expected *= o.norm() / expected.norm()
        assert_values(turned[b, h, s], expected, f"item {b}, query head {h} on the value of head {h // 2}, token {s}")


@pytest.mark.exercise_8
def test_who_is_not_turned(impl):
    """Item 0 has sinks at 0 and 3, item 1 has one at 1, item 2 has none."""
    out, v_sink = [numbers.abs() for numbers in drawn((3, 6, 5, 4), (3, 3, 4))]      # all angles below 90 degrees
    ever_sink = torch.zeros(3, 5, dtype=torch.bool)
    ever_sink[0, [0, 3]] = ever_sink[1, 1] = True
    v_sink[2] = 0
    turned = impl.align_with_sink(out, v_sink, ever_sink, 3.0, 0.1)
    expected = align_with_sink(out, v_sink, ever_sink, 3.0, 0.1)
    for b, who in enumerate(("an item with sinks at 0 and 3: these stay, and the others turn",
                             "an item with a sink at 1: it stays, and the others turn",
                             "an item without sinks, whose v_sink is zero: all stay")):
        assert_turned(turned[b:b + 1], out[b:b + 1], expected[b:b + 1], f"item {b} of a batch of three, {who}")


@pytest.mark.exercise_8
def test_values_and_alignment_have_no_loop(impl):
    few, many = [(torch.ones(B, 3, S, 4), torch.ones(B, S, dtype=torch.bool)) for B, S in ((1, 5), (4, 9))]
    assert_no_loop("sink_value", impl.sink_value, few, many)
    few, many = [(torch.ones(B, 6, S, 4), torch.ones(B, 3, 4), torch.zeros(B, S, dtype=torch.bool), 3.0, 0.1)
                 for B, S in ((1, 5), (4, 9))]
    assert_no_loop("align_with_sink", impl.align_with_sink, few, many)


@pytest.mark.exercise_8
def test_alignment_in_half_precision(impl):
    """In float16 the squares of 1e-4 are zero, and so is the 1e-8 that is added to them."""
    out, v_sink = [1e-4 * numbers.half() for numbers in drawn(*HEADS)]
    expected = align_with_sink(out.float(), v_sink.float(), NEVER, 3.0, 0.1)
    in_float32 = impl.align_with_sink(out.float(), v_sink.float(), NEVER, 3.0, 0.1)
    assert_values(1e4 * in_float32, 1e4 * expected,
                  "float32 in units of 1e-4, not yet float16. Do the tests before this one pass?", 0.01)
    turned = impl.align_with_sink(out, v_sink, NEVER, 3.0, 0.1)
    check(turned.dtype == torch.float16, f"float16 goes in and {turned.dtype} comes out")
    assert_values(1e4 * turned.float(), 1e4 * expected,
                  "float16 in units of 1e-4, against float32: in float16 the squares of small numbers are zero", 0.01)


# ---- exercise 10: the method ----

L = 16          # layers in the tests by hand: rows may be opened in layers 0, 2, 4, ..., and 14 and 15 are left alone
NEW = {1: "one new token", 2: "two new tokens at once", 5: "five new tokens, as many as the prompt has,"}
WHAT_CASES_ARE = {
    "dev_late": "in the test case dev_late, where token 0 is a sink from layer 3 on",
    "dev_natural": "in the test case dev_natural, where other tokens are sinks in some layers and not in others"}


def new_sinks(impl, **constants):
    """A student's Sinks for a prompt of one item with five tokens."""
    __tracebackhide__ = True
    with explained("Sinks(outro, n_layers, nobody) stops; its __init__ is given and need not be changed"):
        return impl.Sinks(OutRo(**constants), L, NEVER[:1].clone())


def as_written(constants):
    return f"OutRo({', '.join(f'{name}={value}' for name, value in constants.items())})"


def hidden_with(*sinks, n_tokens=5):
    """Hidden states in which the rule finds these tokens: float[1,S,3]."""
    hidden = torch.ones(1, n_tokens, 3)
    hidden[:, list(sinks), 1] = -5000.0
    return hidden


def heads_of(layer, n_tokens=5, n_keys=5):
    """Outputs (1,6,S,4) and values (1,3,K,4), others in each layer."""
    return drawn((1, 6, n_tokens, 4), (1, 3, n_keys, 4), seed=100 * layer + n_tokens)


def read_layer(sinks, l, found):
    """What a decoder does in layer l of a prompt. Returns: which rows are open beyond the causal mask, the aligned
    outputs, and whether open_rows has returned the mask itself."""
    __tracebackhide__ = True
    closed = causal_mask(5, 5)
    with explained(f"layer {l} of a prompt of 5 tokens: your Sinks stops"):
        sinks.find(l, hidden_with(*found))
        may_attend = sinks.open_rows(l, closed)
        aligned = sinks.align(l, *heads_of(l))
    check(torch.is_tensor(may_attend), f"open_rows returns {type(may_attend).__name__}; it should return the mask")
    check(torch.is_tensor(aligned), f"align returns {type(aligned).__name__}; it should return the outputs")
    check(closed.equal(causal_mask(5, 5)), "open_rows changes the mask it is given; all layers share that mask")
    rows = (may_attend & ~closed).any(-1).view(-1, 5)
    return rows[0].nonzero().flatten().tolist(), aligned, may_attend is closed


@pytest.mark.exercise_10
def test_find_by_hand(impl):
    """Token 0 is a sink in layer 3, token 2 in layer 5. Layer 14 is one of the last two. Another rule finds others."""
    sinks = new_sinks(impl)
    for l, found in ((3, [0]), (4, []), (5, [2])):
        sinks.find(l, hidden_with(*found))
        check(l in sinks.is_sink, f"find({l}, hidden) leaves no is_sink[{l}]")
        mine = sinks_in(sinks.is_sink[l])[0]
        check(mine == found, f"is_sink[{l}] has tokens {mine}, and the rule finds {found} in layer {l}")
    mine = sinks_in(sinks.ever_sink)[0]
    check(mine == [0, 2], f"ever_sink has tokens {mine} after layers with sinks [0], [] and [2], not [0, 2]")
    check(not sinks.opened.any(), "find changes `opened` as well. At first ever_sink and opened are the same tensor. "
                                  "So assign a new one, and do not change it in place")
    sinks.find(14, hidden_with(4))
    check(14 not in sinks.is_sink and not sinks.ever_sink[0, 4],
          "find searches layer 14 of 16, and with skip_last 2 the last two layers are left alone")
    sinks = new_sinks(impl, rule=lambda hidden: hidden[..., 1] > 0)
    sinks.find(3, hidden_with(0, 2))
    mine = sinks_in(sinks.is_sink[3])[0]
    check(mine == [1, 3, 4], f"with OutRo(rule=...) is_sink[3] has {mine}, not [1, 3, 4]. Does outro.find decide?")


@pytest.mark.exercise_10
def test_rows_open_once_and_in_turn(impl):
    """Token 0 is a sink from layer 3 on, token 2 in layers 5 and 6, token 3 in layer 7 alone. Rows may be opened
    in layers 0, 2, 4, ...: that of token 0 in layer 4, that of token 2 in layer 6, that of token 3 never."""
    found = dict.fromkeys(range(L), [0]) | {0: [], 1: [], 2: [], 5: [0, 2], 6: [0, 2], 7: [0, 3]}
    for constants, expected in (({}, {4: [0], 6: [2]}), ({"relax": False}, {}), ({"relax_every": 5}, {5: [0, 2]}),
                                ({"relax_every": 1, "skip_last": 0}, {3: [0], 5: [2], 7: [3]})):
        sinks, open_already = new_sinks(impl, **constants), []
        for l in range(L):
            opened, _, is_closed = read_layer(sinks, l, found[l])
            right = expected.get(l, [])
            where = f"{as_written(constants)}, layer {l}"
            check(opened == right,
                  f"{where}: rows {opened} are opened, and should be {right}. Sinks of this layer are {found[l]}, and "
                  f"earlier layers have opened rows {open_already}")
            check(right or is_closed, f"{where}: no row is opened, and open_rows returns a copy of the mask. It should "
                                      "return may_attend itself: then the layer knows that a faster kernel will do")
            kept = sinks_in(sinks.opened_in[l])[0] if l in sinks.opened_in else []
            check(kept == right, f"{where}: opened_in[{l}] has tokens {kept}, and rows {right} are opened")
            open_already = sorted(open_already + right)
            mine = sinks_in(sinks.opened)[0]
            check(mine == open_already, f"{where}: now `opened` has tokens {mine}, and should have {open_already}")


@pytest.mark.exercise_10
def test_alignment_of_a_prompt(impl):
    """Tokens 0 and 2 are sinks in layer 3, token 1 in layer 5. In layer 5 all three are left alone. In layer 14, one
    of the last two, all are."""
    for constants in ({}, {"relax": False}, {"gamma": 1.0, "temperature": 0.5}, {"align": False}):
        sinks, outro, ever_sink = new_sinks(impl, **constants), OutRo(**constants), NEVER[:1]
        for l, found in ((0, []), (3, [0, 2]), (4, []), (5, [1])):
            where = f"{as_written(constants)}, layer {l} of a prompt, with sinks {found}"
            _, aligned, _ = read_layer(sinks, l, found)
            out, v = heads_of(l)
            is_sink = hidden_with(*found)[..., 1] < 0
            v_sink = sink_value(v, is_sink)
            ever_sink = ever_sink | is_sink
            check(l in sinks.v_sink, f"{where}: align leaves no v_sink[{l}], which every searched layer is to have")
            assert_values(sinks.v_sink[l], v_sink, f"{where}: v_sink[{l}] is the mean of the values that they have in "
                                                   "this layer, and zero if there are none")
            mine, right = sinks_in(sinks.ever_sink)[0], sinks_in(ever_sink)[0]
            check(mine == right, f"{where}: ever_sink has {mine}, and should have {right}")
            if outro.align:
                expected = align_with_sink(out, v_sink, ever_sink, outro.gamma, outro.temperature)
                assert_turned(aligned, out, expected,
                              f"{where}: tokens {right}, sinks of this or an earlier layer, stay, and the others turn "
                              f"towards v_sink[{l}]")
            else:
                check(aligned.equal(out), f"{where}: the outputs change, and alignment is off")
        _, aligned, _ = read_layer(sinks, 14, [3])
        check(aligned.equal(heads_of(14)[0]) and 14 not in sinks.v_sink,
              "layer 14 of 16, with skip_last 2: align changes the outputs or leaves v_sink[14]")


@pytest.mark.exercise_10
def test_tokens_after_the_prompt_are_turned(impl):
    """One new token, two at once, five. The index of a new token in its call is not a position of the prompt."""
    sinks, found = new_sinks(impl), dict.fromkeys(range(L), [3]) | {0: [], 1: [], 4: [0, 1]}
    for l in range(L):
        read_layer(sinks, l, found[l])
    ever_sink, opened = sinks.ever_sink, sinks.opened
    for l, n, n_keys in ((1, 1, 6), (3, 1, 6), (4, 1, 6), (13, 1, 6), (3, 2, 8), (4, 2, 8), (13, 2, 8),
                         (4, 5, 13)):
        out, v = heads_of(l, n, n_keys)
        closed, where = causal_mask(n, n_keys), f"layer {l}, {NEW[n]} after the prompt"
        stops = f"{where}: your Sinks stops. Only prompts are searched, and v_sink[{l}] stays as it is"
        with explained(stops):
            sinks.find(l, hidden_with(*range(n), n_tokens=n))
        check(sinks.ever_sink.equal(ever_sink), f"{where}: ever_sink changes, and only prompts are searched")
        with explained(stops):
            may_attend = sinks.open_rows(l, closed)
            aligned = sinks.align(l, out, v)
        check(may_attend is closed and sinks.opened.equal(opened),
              f"{where}: open_rows returns another mask or changes `opened`, and rows are opened in prompts only")
        v_sink = sink_value(heads_of(l)[1], hidden_with(*found[l])[..., 1] < 0)
        expected = align_with_sink(out, v_sink, NEVER[:1, :n], 3.0, 0.1)
        what = f"the prompt has no sink in this layer, so v_sink[{l}] is zero and nothing turns"
        if found[l]:
            what = (f"each is turned towards v_sink[{l}] of the prompt, whose sinks here are {found[l]}. A new token is "
                    "not a sink, whatever its index in the call")
        assert_turned(aligned, out, expected, f"{where}: {what}")


def assert_turned(aligned, out, expected, where):
    """(1,H,S,D) each: what align returns, what it is given, and what it should return."""
    __tracebackhide__ = True
    check(aligned.shape == expected.shape, f"{where}\nshape {tuple(aligned.shape)}, not {tuple(expected.shape)}")
    for token in range(out.shape[2]):
        mine, before, right = aligned[:, :, token], out[:, :, token], expected[:, :, token]
        what = f"{where}\nfound: the token at index {token}"
        if not torch.allclose(mine, right, atol=1e-4):
            check(not torch.allclose(mine, before, atol=1e-6), f"{what} stays as it is")
            check(not torch.allclose(right, before, atol=1e-6), f"{what} is turned")
            assert_values(mine, right, f"{what} is not turned as it should be")


@pytest.mark.exercise_10
def test_prompts_as_in_the_published_code(impl, golden, monkeypatch):
    monkeypatch.setattr(model, "Sinks", impl.Sinks)
    for case, when in WHAT_CASES_ARE.items():
        g = golden(case)
        for what, outro, name in (("relaxation alone", g.outro(align=False), "logits.relax_only"),
                                  ("alignment alone", g.outro(relax=False), "logits.align_only"),
                                  ("both", g.outro(), "logits_on")):
            trace = {}
            with explained(f"{what}, {when}: the model stops with your Sinks"):
                logits = g.model(g.input_ids, g.pixels, outro=outro, trace=trace)
            away = ((logits - g.tensors[name]).abs().max() / g.tensors[name].std()).item()
            if away > 1e-4:
                right = {}
                monkeypatch.undo()
                g.model(g.input_ids, g.pixels, outro=outro, trace=right)
                raise AssertionError(f"{what}, {when}: {first_difference(trace, right)}. The logits then differ by "
                                     f"{away:.2g} standard deviations, and at most 0.0001 is rounding")


STEPS = {"is_sink": "the sinks that find leaves in is_sink[{l}]",
         "relaxed": "the rows that open_rows opens in layer {l}",
         "out": "what the heads read through the mask that open_rows returns in layer {l}",
         "v_sink": "the value that align leaves in v_sink[{l}]",
         "aligned": "the outputs that align returns in layer {l}"}


def first_difference(mine, right):
    """The first step of the method in which two traces of one prompt differ, in words."""
    for l, name in itertools.product(range(L), STEPS):
        if f"layers.{l}.{name}" in right:
            found, expected = mine[f"layers.{l}.{name}"], right[f"layers.{l}.{name}"]
            step = f"the first thing that differs is {STEPS[name].format(l=l)}"
            if expected.dtype == torch.bool:
                if not found.equal(expected):
                    return f"{step}, tokens {sinks_in(found)[0]} and not {sinks_in(expected)[0]}"
            elif (found - expected).abs().max() > 1e-4 * expected.abs().max():
                return step
    return "no step differs by itself"


@pytest.mark.exercise_10
def test_generated_tokens_are_aligned(impl, golden, decoded, monkeypatch):
    """The release looks up index 0 in the prompt's sinks: in a layer in whose own sinks it is, as in dev_late, it
    does not align a call with one new token. In dev_natural index 0 is not a sink, and the release aligns as well."""
    monkeypatch.setattr(model, "Sinks", impl.Sinks)
    for case, when in WHAT_CASES_ARE.items():
        g, right = golden(case), decoded[case]["ids"][:8]
        with explained(f"the model stops when it writes an answer {when}. Are only prompts searched and opened?"):
            found = g.model.generate(g.input_ids, g.pixels, max_new_tokens=8, outro=g.outro())
        n = next((n for n, (mine, theirs) in enumerate(zip(found, right)) if mine != theirs), None)
        check(n != 0, f"{when}, the first token of the answer is {found[0]}, and {right[0]} is right. It comes from the "
                      f"prompt, so begin with the tests of prompts")
        check(found == right, f"{when}, token {n} of the answer is the first that differs: {found} is written, and "
                              f"{right} is right. If the tests of prompts pass: does your code align the tokens that "
                              f"follow the prompt?")


@pytest.mark.exercise_10
def test_each_item_of_a_batch_has_its_own_sinks(impl):
    """Item 0 has the sink 0 in layers 2 and 4. Item 1 has the sinks 0 and 2 in layer 4. Its row 0 is still closed then,
    although item 0 has opened one. Two items are read as each alone."""
    sinks, alone = impl.Sinks(OutRo(), L, NEVER.clone()), [new_sinks(impl), new_sinks(impl)]
    for l, *found in ((2, [0], []), (4, [0], [0, 2])):
        out, v = heads_of(l)
        with explained(f"layer {l} of a batch of two: your Sinks stops"):
            sinks.find(l, torch.cat([hidden_with(*item) for item in found]))
            may_attend = sinks.open_rows(l, causal_mask(5, 5))
            aligned = sinks.align(l, out.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1))
        for b in (0, 1):
            opened, expected, _ = read_layer(alone[b], l, found[b])
            mine = (may_attend.expand(2, 5, 5)[b] & ~causal_mask(5, 5)).any(-1).nonzero().flatten().tolist()
            where = f"layer {l}, item {b} of a batch of two, with sinks {found[b]}"
            check(mine == opened, f"{where}: rows {mine} are opened, and on that item alone your code opens {opened}")
            assert_turned(aligned[b:b + 1], out, expected, f"{where}, compared with your own code on that item alone")
