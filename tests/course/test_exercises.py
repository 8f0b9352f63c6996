"""The functions of the exercises, one by one, in the order of the data flow: worked by hand first.

They are called through `impl`: minioutro.model, or the module given to --impl. Everything else here is the project's
own, so that an exercise is judged by itself. `check` instead of assert, so that a student reads one sentence.
"""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from helpers import check

from minioutro import OutRo, model
from minioutro.model import (
    align_with_sink,
    causal_mask,
    fused_attention,
    open_sink_rows,
    rope_tables,
    show_mask,
    sink_value,
)


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
        worst = tuple(torch.unravel_index(away.argmax(), away.shape))
        place = [index.item() for index in worst]
        what = f"{what}\n{(away > tolerance).sum()} of {away.numel()} numbers differ, most of all the one at {place}"
        shown = f"found {found[worst]:.6g}, expected {expected[worst]:.6g}"
    else:
        shown = f"found\n{found}\nexpected\n{expected}"
    check((away <= tolerance).all(), f"{what}\n{shown}")


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
    x = torch.randn(2, 36, 5)
    grid = x.view(2, 6, 6, 5)
    folded = impl.pixel_shuffle(x, 3)
    check(folded.shape == (2, 4, 45), f"36 patches of size 5 at scale 3 become {tuple(folded.shape)}, not (2, 4, 45)")
    for Y in range(2):
        for X in range(2):
            square = grid[:, 3 * Y:3 * Y + 3, 3 * X:3 * X + 3].flatten(1)
            check(folded[:, 2 * Y + X].equal(square),
                  f"token ({Y}, {X}) is not the 9 patches of its square, the 5 values of each together")


# ---- exercise 2: norm and positions ----


@pytest.mark.exercise_2
def test_rms_norm_by_hand(impl):
    """The mean square of (3, 4, 0, 0) is 25/4, its root 2.5: the norm is (1.2, 1.6, 0, 0)."""
    norm = impl.RMSNorm(4, 0.0)
    assert_values(norm(torch.tensor([3.0, 4.0, 0.0, 0.0])), [1.2, 1.6, 0.0, 0.0], "x divided by its root mean square")
    assert_values(norm(torch.ones(4)), [1.0] * 4, "no mean is subtracted")
    tokens = torch.tensor([[[3.0, 4.0, 0.0, 0.0], [30.0, 40.0, 0.0, 0.0]]])
    assert_values(norm(tokens), [[[1.2, 1.6, 0.0, 0.0]] * 2], "each token has its own mean square")
    norm.weight.data = torch.tensor([1.0, 10.0, 1.0, 1.0])
    assert_values(norm(tokens[0, 0]), [1.2, 16.0, 0.0, 0.0], "the weight multiplies each coordinate")


@pytest.mark.exercise_2
def test_eps_is_added_to_the_mean_square(impl):
    """x = 0.001 everywhere and eps = 3e-6: 0.001 / sqrt(1e-6 + 3e-6) = 1/2."""
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
    """D = 4, theta 100: frequencies 1 and 1/10; at position 2, (x0, x2) turns by 2, (x1, x3) by 0.2."""
    cos, sin = rope_tables(torch.tensor([2]), 4, 100.0, like=torch.zeros(()))
    x = impl.rotate(torch.tensor([1.0, 1.0, 0.0, 0.0]), cos[0], sin[0])
    expected = [math.cos(2), math.cos(0.2), math.sin(2), math.sin(0.2)]
    assert_values(x, expected, "(1, 1, 0, 0): (x0, x2) turns by 2 radians, (x1, x3) by 0.2, counterclockwise")


@pytest.mark.exercise_2
def test_every_head_is_rotated_by_position_alone(impl):
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(2))
    cos, sin = rope_tables(torch.arange(5), 4, 100.0, like=x)
    rotated = impl.rotate(x, cos, sin)
    assert_values(rotated[:, :, 0], x[:, :, 0], "position 0 is not turned")
    assert_values(rotated[1, 2, 3], impl.rotate(x[1, 2, 3], cos[3], sin[3]), "item 1, head 2, position 3")


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
    """Item 0 has sinks at 0 and 2, item 1 none: two rows of item 0 become full, no other."""
    is_sink = torch.tensor([[True, False, True], [False] * 3])
    closed = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    opened = impl.open_sink_rows(causal_mask(3, 3), is_sink)
    check(opened.shape == (2, 3, 3), f"two items, one mask each: (2, 3, 3), not {tuple(opened.shape)}")
    assert_mask(opened[0], [[1, 1, 1], [1, 1, 0], [1, 1, 1]], "the mask with the rows of sinks 0 and 2 opened")
    assert_mask(opened[1], closed, "the mask of the item without sinks")
    check(impl.open_sink_rows(opened, is_sink).equal(opened), "a row that is open stays open")


@pytest.mark.exercise_3
def test_more_rows_are_opened_in_the_mask_of_each_item(impl):
    """A mask may already have open rows, and be different for each item."""
    given = open_sink_rows(causal_mask(3, 3), torch.tensor([[True, False, False], [False] * 3]))
    opened = impl.open_sink_rows(given, torch.tensor([[False, True, False], [True, False, False]]))
    assert_mask(opened[0], [[1, 1, 1], [1, 1, 1], [1, 1, 1]], "the mask with row 0 open, and now row 1,")
    assert_mask(opened[1], [[1, 1, 1], [1, 1, 0], [1, 1, 1]], "the mask of the other item")


# ---- exercise 4: attention ----


def random_heads(B=2, H=6, G=3, Q=7, K=7, D=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((B, H, Q, D), (B, G, K, D), (B, G, K, D))
    return [torch.randn(*size, generator=generator) for size in sizes]


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
    assert_values(weights, [[[[0.25, 0.75]]]], "weights: softmax of q k^T / sqrt(D)")
    assert_values(out, [[[[3.0] * 4]]], "the mean of the values by these weights")


@pytest.mark.exercise_4
def test_a_forbidden_key_gets_no_weight(impl):
    """Two keys, of which the mask allows the first. It has all the weight, however low its score."""
    q = torch.ones(1, 1, 1, 4)
    for score in (0.0, -100_000.0):
        k = torch.stack([torch.full((4,), score / 2), torch.zeros(4)])[None, None]    # q k^T / sqrt(4) = score
        _, weights = impl.attention(q, k, torch.ones(1, 1, 2, 4), torch.tensor([[True, False]]))
        assert_values(weights, [[[[1.0, 0.0]]]],
                      f"the only allowed key, whose score is {score:,.0f}, has all the weight. Is a forbidden score "
                      "-inf?")


@pytest.mark.exercise_4
def test_attention_equals_a_loop(impl):
    """Head h of 6 reads key-value head h // 2 of 3, and only what its mask allows."""
    q, k, v = random_heads(Q=4)
    may_attend = causal_mask(4, 7)
    out, weights = impl.attention(q, k, v, may_attend)
    for b in range(2):
        for h in range(6):
            for i in range(4):
                keys = [j for j in range(7) if may_attend[i, j]]
                scores = torch.stack([q[b, h, i] @ k[b, h // 2, j] / math.sqrt(10) for j in keys])
                expected = scores.softmax(0)
                where = f"item {b}, query head {h} on head {h // 2}, query {i}"
                assert_values(weights[b, h, i][keys], expected, f"weights of {where}", 1e-5)
                assert_values(out[b, h, i], expected @ v[b, h // 2, keys], f"out of {where}", 1e-5)
    check((weights[:, :, ~may_attend] == 0).all(), "a key that the mask forbids has a weight that is not 0")


@pytest.mark.exercise_4
def test_attention_is_written_out(impl, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("attention calls scaled_dot_product_attention: exercise 4 is for writing it out")
    monkeypatch.setattr(F, "scaled_dot_product_attention", forbidden)
    impl.attention(*random_heads(), causal_mask(7, 7))


@pytest.mark.exercise_4
def test_attention_with_a_mask_for_each_item(impl):
    """The mask of item 0 has the row of a sink opened, that of item 1 has not."""
    q, k, v = random_heads()
    opened = open_sink_rows(causal_mask(7, 7), torch.tensor([[True] + [False] * 6, [False] * 7]))
    with explained("attention stops at may_attend (B,Q,K) = (2, 7, 7). Is may_attend[b] given to all heads of item b?"):
        out, _ = impl.attention(q, k, v, opened)
    for b in (0, 1):
        expected = fused_attention(q[b:b + 1], k[b:b + 1], v[b:b + 1], opened[b])
        assert_values(out[b:b + 1], expected, f"item {b} of two, each with its own mask", 1e-5)


# ---- exercise 5: the cache ----


def made_of_positions(first, n, layer=0):
    """Keys and values (1,2,n,3) that tell their position: position 7 has the keys 7 and, in head 1, 7.5; its
    values are 100 more. Each layer adds 1000."""
    k = torch.arange(first, first + n)[:, None].expand(n, 3) + torch.tensor([0.0, 0.5])[:, None, None]
    return k[None] + 1000 * layer, k[None] + 1000 * layer + 100


def assert_positions(found, n, layer, what):
    """Keys or values (1,2,n,3) of positions 0 to n - 1; `what` begins with the word."""
    __tracebackhide__ = True
    expected = made_of_positions(0, n, layer)[what.startswith("values")]
    check(found.shape[2] == n, f"{what}: {found.shape[2]} positions, not {n}")
    check(found.shape == expected.shape, f"{what}: the shape is {tuple(found.shape)}, not {tuple(expected.shape)}")
    for head in (0, 1):
        differ = (found[0, head] != expected[0, head]).any(-1).nonzero().flatten().tolist()
        p = differ[0] if differ else 0
        check(not differ,
              f"{what}: head {head} has {found[0, head, p, 0]:g} at position {p}, not {expected[0, head, p, 0]:g}. "
              f"{len(differ)} of {n} positions differ, this is the first")


def add(cache, n):
    """What the model does with a cache for n new tokens: every layer extends it, then length moves."""
    __tracebackhide__ = True
    start = cache.length
    for layer in (0, 1):
        call = f"extend({layer}, k, v) with n = {n} after length = {start}"
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
    """Two layers, three tokens of a prompt, then one, two at once, and one."""
    cache = impl.Cache()
    for n in (3, 1, 2, 1):
        add(cache, n)
        for layer in (0, 1):
            assert_positions(cache.keys(layer), cache.length, layer, f"keys({layer})")
            assert_positions(cache.values(layer), cache.length, layer, f"values({layer})")


@pytest.mark.exercise_5
def test_a_cache_holds_a_long_answer(impl):
    cache = impl.Cache()
    for n in (5, *[150] * 5):
        add(cache, n)


@pytest.mark.exercise_5
def test_keys_and_values_of_a_cache_can_be_edited(impl):
    """As `logits_of` of analysis.py does: later tokens meet the edited ones."""
    cache = impl.Cache()
    add(cache, 3)
    cache.keys(0)[:, :, 1] = -1.0
    cache.values(1)[:, :, 2] = -2.0
    k, _ = cache.extend(0, *made_of_positions(3, 1))
    _, v = cache.extend(1, *made_of_positions(3, 1, layer=1))
    check((k[:, :, 1] == -1).all(), "keys(0) was edited, and extend(0, k, v) returns the keys from before the edit")
    check((v[:, :, 2] == -2).all(), "values(1) was edited, and extend(1, k, v) returns the values from before the edit")


@pytest.mark.exercise_5
def test_cached_decoding_equals_one_pass(impl, golden):
    """A prompt, one token, two at once, one."""
    g, cache = golden("dev_a"), impl.Cache()
    new = torch.tensor([[5, 9, 7, 6]])
    expected = g.model(torch.cat([g.input_ids, new], dim=1), g.pixels)[:, -5:]
    with explained("the model stops when it decodes with your cache"):
        steps = [g.model(g.input_ids, g.pixels, cache=cache)[:, -1:]]
        steps += [g.model(part, cache=cache) for part in new.split([1, 2, 1], dim=1)]
    for position, found in enumerate(torch.cat(steps, dim=1)[0], -1):
        what = "the prompt's last token" if position < 0 else f"new token {position} of (0), (1, 2), (3)"
        assert_values(found, expected[0, position + 1],
                      f"the logits at {what} are not those of one pass over all tokens")


# ---- exercise 6: sinks ----


@pytest.mark.exercise_6
def test_activation_ratio_by_hand(impl):
    """Six values, |h| = 0, 1, 1, 2, 5, 40: the lower of the two middle ones is 1."""
    largest, median = impl.activation_ratio(torch.tensor([[[1.0, -1.0], [0.0, 5.0], [2.0, -40.0]]]))
    assert_values(largest, [[1, 5, 40]], "the largest |h| of each token")
    assert_values(median, [[1]], "the median |h| of the item, the lower of the two middle values 1 and 2")


@pytest.mark.exercise_6
def test_find_sinks_by_hand(impl):
    """Six values, |h| = 0, 1, 1, 2, 5, 40, with a median of 1.

    Multiple 40: token 2 (40 >= 40) is a sink. Multiple 40.02, or a floor of 41: none is,
    though the length of token 2, sqrt(2^2 + 40^2), is 40.05.
    """
    hidden = torch.tensor([[[1.0, -1.0], [0.0, 5.0], [2.0, -40.0]]])
    for floor, multiple, expected, why in (
            (0.0, 40.0, [2], "-40 is 40 times the median, which is enough"),
            (40.0, 5.1, [2], "-40 reaches a floor of exactly 40"),
            (0.0, 5.0, [1, 2], "5 is 5 times the median"),
            (0.0, 40.02, [], "no coordinate is 40.02 times the median"),
            (41.0, 1.0, [], "both must hold, and nothing reaches the floor of 41")):
        found = sinks_in(impl.find_sinks(hidden, floor, multiple))
        check(found == [expected],
              f"find_sinks(hidden, {floor:g}, {multiple:g}) finds tokens {found[0]}, not {expected}: {why}")


@pytest.mark.exercise_6
def test_the_median_is_that_of_the_item(impl):
    """Item 0 has median 1, item 1 median 10; 100 is 100 times the one and 10 times the other."""
    hidden = torch.tensor([[[1.0, 1.0], [1.0, 100.0]], [[10.0, 10.0], [10.0, 100.0]]])
    found = sinks_in(impl.find_sinks(hidden, 0.0, 50.0))
    check(found == [[1], []],
          f"items with medians 1 and 10, and 100 in token 1 of each, multiple 50: found {found}, not [[1], []]. Each "
          "item is compared with its own median")
    hidden = torch.tensor([[[1.0, 1.0], [90.0, 100.0]]])
    found = sinks_in(impl.find_sinks(hidden, 0.0, 90.0))
    check(found == [[1]],
          f"token 1 is 100 times the median of its item (1), though not of itself (90): found {found[0]}, not [1]")


def sinks_in(is_sink):
    """bool[B,S] -> the positions of each item."""
    __tracebackhide__ = True
    check(is_sink.dtype == torch.bool and is_sink.dim() == 2,
          f"is_sink is {is_sink.dtype} {tuple(is_sink.shape)}, not bool (B,S)")
    return [item.nonzero().flatten().tolist() for item in is_sink]


# ---- exercise 7: a second detector ----

SINK_FROM = 0.6         # a token that gets more than this from every head is clearly a sink
NONE_BELOW = 0.1        # one that gets less than this from every head is clearly not


def assert_clear_cases(impl, weights, v, where):
    """What the text calls clear; in between everything is right."""
    __tracebackhide__ = True
    found = impl.looks_like_a_sink(weights, v)
    shape = weights.shape[0], weights.shape[-1]
    check(found.dtype == torch.bool and found.shape == shape,
          f"looks_like_a_sink gives {found.dtype} {tuple(found.shape)}, not bool {shape}")
    n_queries = torch.arange(weights.shape[-1], 0, -1)              # that may see each key
    given = weights.sum(-2) / n_queries                             # (B,H,S)
    for b, token in (n_queries >= 16).expand(shape).nonzero().tolist():
        least, most = given[b, :, token].min(), given[b, :, token].max()
        mean = f"on average over the {n_queries[token]} queries that may see it"
        check(least <= SINK_FROM or found[b, token],
              f"{where}: every head gives token {token} {least:.2f} of its attention or more, {mean}, and you do not "
              "call it a sink")
        check(most >= NONE_BELOW or not found[b, token],
              f"{where}: no head gives token {token} more than {most:.2f} of its attention, {mean}, and you call it "
              "a sink")


def evenly():
    """64 tokens, each of which attends evenly to itself and to all before it."""
    return causal_mask(64, 64) / torch.arange(1, 65)[:, None]


def with_share_for_40(share):
    """From token 40 on, token 40 is given this share of all attention, on average."""
    weights = evenly()
    part = (share - weights[40:, 40].mean()) / (1 - weights[40:, 40].mean())
    weights[40:] *= 1 - part
    weights[40:, 40] += part
    return weights


@pytest.mark.exercise_7
def test_clear_cases_by_hand(impl):
    """64 tokens. Nobody is a sink where all attend evenly to what they see, nor where all attend to
    themselves alone. Then token 40 is given a share of all attention, from where it can be seen."""
    last_elsewhere, last_alone = with_share_for_40(0.8), evenly()
    last_elsewhere[63] = torch.eye(64)[63]
    last_alone[40:, 40] = 0
    last_alone[63] = torch.eye(64)[40]
    v = torch.randn(1, 2, 64, 5, generator=torch.Generator().manual_seed(4))
    for where, weights in (("all attend evenly", evenly()), ("each attends to itself", torch.eye(64)),
                           ("from token 40 on, all attend to 40", with_share_for_40((1 + SINK_FROM) / 2)),
                           ("from token 40 on, 40 is given enough", with_share_for_40(SINK_FROM + 0.01)),
                           ("from token 40 on, 40 is given too little", with_share_for_40(NONE_BELOW - 0.01)),
                           ("from token 40 on, all but the last attend to 40", last_elsewhere),
                           ("from token 41 on, only the last attends to 40", last_alone)):
        assert_clear_cases(impl, weights.expand(1, 4, 64, 64), v, where)


@pytest.mark.exercise_7
def test_clear_cases_of_the_three_traces(impl, three_traces):
    for name, layers in three_traces.items():
        for l, (weights, v) in enumerate(layers):
            assert_clear_cases(impl, weights, v, f"{name}, layer {l}")


@pytest.mark.exercise_7
def test_batch_items_look_as_they_do_alone(impl, three_traces):
    for l, ((one, v_one), (two, v_two)) in enumerate(zip(three_traces["toy"], three_traces["without"])):
        both = impl.looks_like_a_sink(torch.cat([one, two]), torch.cat([v_one, v_two]))
        for b, (name, weights, v) in enumerate((("toy", one, v_one), ("without", two, v_two))):
            alone = impl.looks_like_a_sink(weights, v)
            check(both[b:b + 1].equal(alone), f"layer {l}, {name}: in a batch of two you find tokens "
                                              f"{sinks_in(both)[b]}, alone {sinks_in(alone)[0]}")


# ---- exercise 8: the sink's value, and alignment ----


@pytest.mark.exercise_8
def test_sink_value_by_hand(impl):
    """One head of size 2, sinks at 0 and 2: the mean of (1, 2) and (5, 10) is (3, 6)."""
    v = torch.tensor([[1.0, 2.0], [100.0, 100.0], [5.0, 10.0]])[None, None]
    assert_values(impl.sink_value(v, torch.tensor([[True, False, True]])), [[[3, 6]]], "the mean over the sinks")
    assert_values(impl.sink_value(v, torch.tensor([[False, False, True]])), [[[5, 10]]], "the value of the only sink")


@pytest.mark.exercise_8
def test_sink_value_by_head_and_item(impl):
    v = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)              # (B,G,S,D)
    is_sink = torch.tensor([[True, False, True, False], [False] * 4])
    v_sink = impl.sink_value(v, is_sink)
    check(v_sink.shape == (2, 3, 5), f"one vector for each item and head: (2, 3, 5), not {tuple(v_sink.shape)}")
    assert_values(v_sink[0], (v[0, :, 0] + v[0, :, 2]) / 2, "each head has the mean of its own values at 0 and 2")
    assert_values(v_sink[1], torch.zeros(3, 5), "an item without sinks has zeros")


def heads(B=2, H=6, G=3, S=5, D=4):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(B, H, S, D, generator=generator), torch.randn(B, G, D, generator=generator)


NEVER = torch.zeros(2, 5, dtype=torch.bool)         # ever_sink for `heads`: nothing was a sink


def turned_in_a_plane(impl, o, v, gamma=3.0, temperature=0.1):
    """One token, one head of size 2."""
    __tracebackhide__ = True
    out, v_sink = torch.tensor(o).view(1, 1, 1, 2), torch.tensor(v).view(1, 1, 2)
    with explained("align_with_sink stops at one token with one head of size 2"):
        return impl.align_with_sink(out, v_sink, torch.tensor([[False]]), gamma, temperature).flatten()


@pytest.mark.exercise_8
def test_alignment_by_hand(impl):
    """o = (3, 4), v = (2, 0): c = 0.6, g = tanh(6) = 1, p = (3, 0), o + 3p = (12, 4), of length
    sqrt(160); scaled to the length 5 of o: (4.743, 1.581). Temperature 0.6: g = tanh(1) = 0.762."""
    for gamma, temperature, expected in ((3.0, 0.1, [4.743, 1.581]), (3.0, 0.6, [4.633, 1.881]),
                                         (1.0, 0.1, [4.160, 2.774])):
        assert_values(turned_in_a_plane(impl, [3.0, 4.0], [2.0, 0.0], gamma, temperature), expected,
                      f"o = (3, 4), v = (2, 0), gamma {gamma:g}, temperature {temperature:g}", 1e-3)
    assert_values(turned_in_a_plane(impl, [-3.0, 4.0], [2.0, 0.0]), [-3.0, 4.0],
                  "o = (-3, 4), v = (2, 0): o points away from v and stays")


@pytest.mark.exercise_8
def test_alignment_of_small_numbers_by_hand(impl):
    """o = (3e-4, 4e-4), v = (1e-4, 0): 1e-8 is as much as |v|^2, so p is half of what it was, 1.5e-4, and
    o + 3p = (7.5e-4, 4e-4), of length 8.5e-4, is scaled to 5e-4. o = (3e-8, 4e-8), v = (2, 0): o + 3p is
    (12e-8, 4e-8), of length 12.65e-8; with 1e-8 more it is scaled by 5 / 13.65."""
    ordinary = turned_in_a_plane(impl, [3.0, 4.0], [1.0, 0.0])
    assert_values(ordinary, [4.743, 1.581], "o = (3, 4), v = (1, 0), gamma 3, temperature 0.1", 1e-3)
    small_v = 1e4 * turned_in_a_plane(impl, [3e-4, 4e-4], [1e-4, 0.0])
    assert_values(small_v, [4.412, 2.353],
                  "(3, 4) and (1, 0) are right, and not 1e-4 times both, where the 1e-8 that is added to |v|^2 "
                  "counts. In units of 1e-4:", 1e-3)
    small_o = 1e8 * turned_in_a_plane(impl, [3e-8, 4e-8], [2.0, 0.0])
    assert_values(small_o, [4.396, 1.465],
                  "(3, 4) and (1, 0) are right, and not 1e-8 times (3, 4), where the 1e-8 that is added to |o'| "
                  "counts. In units of 1e-8:", 2e-3)


@pytest.mark.exercise_8
def test_alignment_angles(impl):
    """With v_sink along x, o at angle a becomes ((1 + 3g) cos a, sin a), g = tanh(cos a / 0.1)."""
    for before, after in ((85, 74.8), (80, 56.0), (70, 34.5), (60, 23.4), (45, 14.0), (30, 8.2)):
        angle = math.radians(before)
        x, y = turned_in_a_plane(impl, [7 * math.cos(angle), 7 * math.sin(angle)], [0.3, 0.0]).tolist()
        found, length = math.degrees(math.atan2(y, x)), math.hypot(x, y)
        check(abs(found - after) < 0.06,
              f"an angle of {before} degrees to v_sink becomes {found:.1f} in yours, and should become {after}")
        check(abs(length - 7) < 1e-4,
              f"an output of length 7 has length {length:.4f} after the turn, and should keep it")


@pytest.mark.exercise_8
def test_alignment_turns_in_the_plane_of_each_head(impl):
    out, v_sink = heads()
    turned = impl.align_with_sink(out, v_sink, NEVER, 3.0, 0.1)
    assert_values(turned.norm(dim=-1), out.norm(dim=-1), "the length of each head's output is kept", 1e-5)
    for h in range(6):
        v = v_sink[:, h // 2, None]                         # two query heads share one of G = 3
        before = torch.cosine_similarity(out[:, h], v, dim=-1)
        after = torch.cosine_similarity(turned[:, h], v, dim=-1)
        turns = before > 0
        check((after[turns] > before[turns]).all(),
              f"query head {h} does not turn towards the value of its key-value head {h // 2}")
        assert_values(turned[:, h][~turns], out[:, h][~turns], f"outputs of head {h} at 90 degrees or more stay", 1e-6)
        basis = torch.stack([out[:, h], v.expand_as(out[:, h])], dim=-1)        # (B,S,D,2)
        new = turned[:, h, :, :, None]
        outside = (new - basis @ torch.linalg.pinv(basis) @ new).abs().max()
        check(outside < 1e-5, f"query head {h} leaves the plane of its output and its v_sink by {outside:.2g}")


@pytest.mark.exercise_8
def test_who_is_not_turned(impl):
    """Everybody at gamma 0, sinks, and an item without sinks."""
    out, v_sink = heads()
    ever_sink = torch.tensor([[True, False, False, True, False], [False] * 5])
    assert_values(impl.align_with_sink(out, v_sink, ever_sink, 0.0, 0.1), out, "gamma 0 changes nothing", 1e-6)
    v_sink[1] = 0
    turned = impl.align_with_sink(out, v_sink, ever_sink, 3.0, 0.1)
    assert_values(turned[0][:, ever_sink[0]], out[0][:, ever_sink[0]], "a token that was a sink is left alone", 1e-6)
    check(not torch.allclose(turned[0][:, ~ever_sink[0]], out[0][:, ~ever_sink[0]]),
          "in an item with sinks at 0 and 3, the other tokens are not turned")
    assert_values(turned[1], out[1], "an item whose v_sink is zero is left alone", 1e-6)


@pytest.mark.exercise_8
def test_alignment_in_half_precision(impl):
    """In float16 the squares of 1e-4 are zero, and so is the 1e-8 that is added to them."""
    out, v_sink = heads()
    small = impl.align_with_sink(out.half() * 1e-3, v_sink.half() * 1e-3, NEVER, 3.0, 0.1)
    check(small.dtype == torch.float16, f"float16 goes in and {small.dtype} comes out")
    expected = impl.align_with_sink(out, v_sink, NEVER, 3.0, 0.1)
    assert_values(small.float() * 1e3, expected,
                  "float16 in units of 0.001, against float32: in float16 the squares of small numbers are zero", 0.05)


# ---- exercise 10: the method ----

L = 16          # layers in the tests by hand: rows may be opened in layers 0, 2, 4, ..., and 14 and 15 are left alone
NEW = {1: "one new token", 2: "two new tokens at once"}
WHAT_CASES_ARE = {
    "dev_late": "in the test case dev_late, where token 0 is a sink from layer 3 on",
    "dev_natural": "in the test case dev_natural, where other tokens are sinks in some layers and not in others"}


def new_sinks(impl, n_tokens=5, **constants):
    """A student's Sinks for a prompt of one item."""
    __tracebackhide__ = True
    with explained("Sinks(outro, n_layers, nobody) stops; its __init__ is given and need not be changed"):
        return impl.Sinks(OutRo(**constants), L, torch.zeros(1, n_tokens, dtype=torch.bool))


def as_written(constants):
    return f"OutRo({', '.join(f'{name}={value}' for name, value in constants.items())})"


def hidden_with(*sinks, n_tokens=5):
    """Hidden states in which the rule finds these tokens: float[1,S,3]."""
    hidden = torch.ones(1, n_tokens, 3)
    hidden[:, list(sinks), 1] = -5000.0
    return hidden


def heads_of(layer, n_tokens=5, n_keys=5):
    """Outputs (1,6,S,4) and values (1,3,K,4), others in each layer."""
    generator = torch.Generator().manual_seed(100 * layer + n_tokens)
    return torch.randn(1, 6, n_tokens, 4, generator=generator), torch.randn(1, 3, n_keys, 4, generator=generator)


def read_layer(sinks, l, found, n_tokens=5):
    """What a decoder does in layer l of a prompt. Returns: which rows are open beyond the causal mask, and the
    aligned outputs."""
    __tracebackhide__ = True
    closed = causal_mask(n_tokens, n_tokens)
    with explained(f"layer {l} of a prompt of {n_tokens} tokens: your Sinks stops"):
        sinks.find(l, hidden_with(*found, n_tokens=n_tokens))
        may_attend = sinks.open_rows(l, closed)
        aligned = sinks.align(l, *heads_of(l, n_tokens, n_tokens))
    check(torch.is_tensor(may_attend), f"open_rows returns {type(may_attend).__name__}; it should return the mask")
    check(torch.is_tensor(aligned), f"align returns {type(aligned).__name__}; it should return the outputs")
    rows = (may_attend & ~closed).any(-1).view(-1, n_tokens)
    check(closed.equal(causal_mask(n_tokens, n_tokens)),
          "open_rows changes the mask it is given; all layers share that mask")
    return rows[0].nonzero().flatten().tolist(), aligned


@pytest.mark.exercise_10
def test_find_by_hand(impl):
    """Token 0 is a sink in layer 3, token 2 in layer 5. Layer 14 is one of the last two."""
    sinks = new_sinks(impl)
    for l, found in ((3, [0]), (4, []), (5, [2])):
        with explained(f"find({l}, hidden) stops"):
            sinks.find(l, hidden_with(*found))
        check(l in sinks.is_sink, f"find({l}, hidden) leaves no is_sink[{l}]")
        mine = sinks_in(sinks.is_sink[l])[0]
        check(mine == found, f"is_sink[{l}] has tokens {mine}, and the rule finds {found} in layer {l}")
    ever = sinks_in(sinks.ever_sink)[0]
    check(ever == [0, 2],
          f"ever_sink has tokens {ever} after layers with sinks [0], [] and [2], and should have [0, 2]")
    sinks.find(14, hidden_with(4))
    check(14 not in sinks.is_sink and not sinks.ever_sink[0, 4],
          "find searches layer 14 of 16, and with skip_last 2 the last two layers are left alone")


@pytest.mark.exercise_10
def test_the_rule_of_outro_finds_the_sinks(impl):
    """Its thresholds, or another rule in their place."""
    for constants, expected in (({"abs_threshold": 6000.0}, []), ({"median_multiple": 6000.0}, []),
                                ({"rule": lambda hidden: hidden[..., 1] > 0}, [1, 3, 4])):
        sinks = new_sinks(impl, **constants)
        sinks.find(3, hidden_with(0, 2))
        mine = sinks_in(sinks.is_sink[3])[0]
        check(mine == expected,
              f"with OutRo({', '.join(constants)}=...) is_sink[3] has {mine}, not {expected}; is it outro.find that "
              "decides?")


@pytest.mark.exercise_10
def test_rows_open_once_and_in_turn(impl):
    """Token 0 is a sink from layer 3 on, token 2 in layers 5 and 6, token 3 in layer 7 alone. Rows may be opened
    in layers 0, 2, 4, ...: that of token 0 in layer 4, that of token 2 in layer 6, that of token 3 never."""
    found = dict.fromkeys(range(L), [0]) | {0: [], 1: [], 2: [], 5: [0, 2], 6: [0, 2], 7: [0, 3]}
    for constants, expected in (({}, {4: [0], 6: [2]}), ({"relax": False}, {}), ({"relax_every": 5}, {5: [0, 2]}),
                                ({"align": False}, {4: [0], 6: [2]}), ({"skip_last": 12}, {}),
                                ({"relax_every": 1, "skip_last": 0}, {3: [0], 5: [2], 7: [3]})):
        sinks, open_already, outro = new_sinks(impl, **constants), [], as_written(constants)
        for l in range(L):
            opened, _ = read_layer(sinks, l, found[l])
            right = expected.get(l, [])
            check(opened == right,
                  f"{outro}, layer {l}: rows {opened} are opened, and should be {right}. Sinks of this layer are "
                  f"{found[l]}, and earlier layers have opened rows {open_already}")
            kept = sinks_in(sinks.opened_in[l])[0] if l in sinks.opened_in else []
            check(kept == right, f"{outro}, layer {l}: opened_in[{l}] has tokens {kept}, and rows {right} are opened")
            open_already = sorted(open_already + right)
        mine = sinks_in(sinks.opened)[0]
        check(mine == open_already,
              f"{outro}: after the prompt `opened` has tokens {mine}, and should have {open_already}")


@pytest.mark.exercise_10
def test_alignment_of_a_prompt(impl):
    """Tokens 0 and 2 are sinks in layer 3, token 1 in layer 5. In layer 5 all three are left alone."""
    for constants in ({}, {"relax": False}, {"gamma": 1.0, "temperature": 0.5}, {"align": False}):
        sinks, outro, ever_sink = new_sinks(impl, **constants), OutRo(**constants), NEVER[:1]
        for l, found in ((0, []), (3, [0, 2]), (4, []), (5, [1])):
            where = f"{as_written(constants)}, layer {l} of a prompt, with sinks {found}"
            _, aligned = read_layer(sinks, l, found)
            out, v = heads_of(l)
            is_sink = hidden_with(*found)[..., 1] < 0
            v_sink, ever_sink = sink_value(v, is_sink), ever_sink | is_sink
            check(l in sinks.v_sink, f"{where}: align leaves no v_sink[{l}], which every searched layer is to have")
            assert_values(sinks.v_sink[l], v_sink, f"{where}: v_sink[{l}] is the mean of this layer's values of them")
            mine = sinks_in(sinks.ever_sink)
            check(mine == sinks_in(ever_sink),
                  f"{where}: ever_sink has {mine[0]}, and should have {sinks_in(ever_sink)[0]}")
            if not outro.align:
                check(aligned.equal(out), f"{where}: the outputs change, and alignment is off")
                continue
            expected = align_with_sink(out, v_sink, ever_sink, outro.gamma, outro.temperature)
            assert_turned(aligned, out, expected,
                          f"{where}: tokens {sinks_in(ever_sink)[0]}, sinks of this or an earlier layer, stay, and "
                          f"the others turn towards v_sink[{l}]")


@pytest.mark.exercise_10
def test_the_last_layers_are_left_alone(impl):
    sinks = new_sinks(impl)
    for l in (14, 15):
        opened, aligned = read_layer(sinks, l, [0])
        check(not opened and aligned.equal(heads_of(l)[0]),
              f"layer {l} of 16, with skip_last 2: the mask or the outputs change")
        check(l not in sinks.v_sink, f"layer {l} of 16, with skip_last 2: align leaves v_sink[{l}]")


@pytest.mark.exercise_10
def test_tokens_after_the_prompt_are_turned(impl):
    """One new token, then two at once. The index of a new token in its call is not a position of the prompt."""
    sinks, found = new_sinks(impl), dict.fromkeys(range(L), [3]) | {0: [], 1: [], 4: [0, 1]}
    for l in range(L):
        read_layer(sinks, l, found[l])
    ever_sink, opened = sinks.ever_sink, sinks.opened
    for n, n_keys in ((1, 6), (2, 8)):
        for l in range(L):
            assert_new_tokens_are_turned(sinks, l, found[l], n, n_keys)
        check(sinks.ever_sink.equal(ever_sink),
              f"{NEW[n]} after the prompt: ever_sink changes, and only prompts are searched")
        check(sinks.opened.equal(opened),
              f"{NEW[n]} after the prompt: `opened` changes, and only rows of prompts are opened")


def assert_new_tokens_are_turned(sinks, l, found, n, n_keys):
    """n new tokens in layer l; `found` are the sinks of the prompt in this layer."""
    __tracebackhide__ = True
    out, v = heads_of(l, n, n_keys)
    closed, where = causal_mask(n, n_keys), f"layer {l}, {NEW[n]} after the prompt"
    with explained(f"{where}: your Sinks stops. Only prompts are searched and opened; after them v_sink[{l}] is there"):
        sinks.find(l, hidden_with(*range(n), n_tokens=n))
        may_attend = sinks.open_rows(l, closed)
        aligned = sinks.align(l, out, v)
    check(may_attend.equal(closed), f"{where}: open_rows changes the mask, and rows are opened in prompts only")
    if l >= 14:
        check(aligned.equal(out),
              f"{where}: the outputs change, and with skip_last 2 layers 14 and 15 leave them as they are")
        return
    v_sink = sink_value(heads_of(l)[1], hidden_with(*found)[..., 1] < 0)
    assert_values(sinks.v_sink[l], v_sink, f"{where}: v_sink[{l}] is still that of the prompt's sinks {found}")
    expected = align_with_sink(out, v_sink, NEVER[:1, :n], 3.0, 0.1)
    assert_turned(aligned, out, expected,
                  f"{where}: each is turned towards v_sink[{l}] of the prompt, whose sinks here are {found}. A new "
                  "token is not a sink, whatever its index in the call")


def assert_turned(aligned, out, expected, where):
    """(1,H,S,D) each: what align returns, what it is given, and what it should return."""
    __tracebackhide__ = True
    check(aligned.shape == expected.shape, f"{where}\nshape {tuple(aligned.shape)}, not {tuple(expected.shape)}")
    for token in range(out.shape[2]):
        mine, before, right = aligned[:, :, token], out[:, :, token], expected[:, :, token]
        if torch.allclose(mine, right, atol=1e-4):
            continue
        if torch.allclose(mine, before, atol=1e-6):
            found = "stays as it is"
        elif torch.allclose(right, before, atol=1e-6):
            found = "is turned"
        else:
            worst = (mine - right).abs().argmax()
            found = f"has a coordinate {mine.flatten()[worst]:.4g} that should be {right.flatten()[worst]:.4g}"
        raise AssertionError(f"{where}\nfound: the token at index {token} {found}")


def with_sinks_of(impl, monkeypatch, g):
    """The model of a test case, with a student's Sinks in it."""
    monkeypatch.setattr(model, "Sinks", impl.Sinks)
    return g.model


def assert_logits(found, expected, what):
    __tracebackhide__ = True
    away = ((found - expected).abs().max() / expected.std()).item()
    check(away <= 1e-4, f"{what}: the logits differ by {away:.2g} standard deviations; at most 0.0001 is rounding")


def by_layer(is_sink):
    """bool[L,S] -> "layer 3: [0], layer 4: [0]"."""
    return ", ".join(f"layer {l}: {row.nonzero().flatten().tolist()}" for l, row in enumerate(is_sink) if row.any())


@pytest.mark.exercise_10
def test_prompts_as_in_the_published_code(impl, golden, monkeypatch):
    for case in ("dev_late", "dev_natural"):
        g = golden(case)
        model = with_sinks_of(impl, monkeypatch, g)
        for what, outro, name in (("relaxation alone", g.outro(align=False), "logits.relax_only"),
                                  ("alignment alone", g.outro(relax=False), "logits.align_only"),
                                  ("both", g.outro(), "logits_on")):
            trace, what = {}, f"{what}, {WHAT_CASES_ARE[case]}"
            with explained(f"{what}: the model stops with your Sinks"):
                logits = model(g.input_ids, g.pixels, outro=outro, trace=trace)
            if outro.relax and outro.align:
                for key, stored, word in (("is_sink", "is_sink", "sinks"), ("relaxed", "is_relaxed", "opened rows")):
                    found = torch.cat([trace[f"layers.{l}.{key}"] for l in range(g.meta["L"])])
                    expected = g.tensors[stored].bool()
                    check(found.equal(expected),
                          f"{what}: {word}\nfound    {by_layer(found)}\nexpected {by_layer(expected)}")
            assert_logits(logits, g.tensors[name], what)


@pytest.mark.exercise_10
def test_each_item_of_a_batch_has_its_own_sinks(impl, golden, monkeypatch):
    """The prompt of dev_natural, and its text in reverse, which has other sinks."""
    g = golden("dev_natural")
    model, outro = with_sinks_of(impl, monkeypatch, g), g.outro()
    is_text = g.input_ids[0] != g.model.config.image_token_id
    ids = g.input_ids.repeat(2, 1)
    ids[1, is_text] = ids[0, is_text].flip(0)
    features = g.model.encode(g.pixels)
    with explained("the model stops at a batch of two"):
        found = model(ids, features=features.repeat(2, 1, 1), outro=outro)
        alone = [model(ids[b:b + 1], features=features, outro=outro) for b in (0, 1)]
    for b in (0, 1):
        assert_logits(found[b:b + 1], alone[b],
                      f"item {b} of a batch of two, compared with your own code on that item alone")


@pytest.mark.exercise_10
def test_generated_tokens_are_aligned(impl, golden, decoded, monkeypatch):
    """The release looks up index 0 in the prompt's sinks: in a layer in whose own sinks it is, as in dev_late, it
    does not align a call with one new token. In dev_natural index 0 is not a sink, and the release aligns as well."""
    for case in ("dev_late", "dev_natural"):
        g, right, prompt_alone = golden(case), decoded[case]["ids"][:12], decoded[case]["no_decode_alignment"][:12]
        model = with_sinks_of(impl, monkeypatch, g)
        with explained(f"the model stops when it writes an answer {WHAT_CASES_ARE[case]}"):
            token_ids = model.generate(g.input_ids, g.pixels, max_new_tokens=12, outro=g.outro())
        check(token_ids != prompt_alone or token_ids == right,
              f"{WHAT_CASES_ARE[case]}, the answer is that of a model which aligns the prompt alone")
        first = next((n for n, pair in enumerate(zip(token_ids, right)) if pair[0] != pair[1]), len(right))
        check(token_ids == right,
              f"{WHAT_CASES_ARE[case]}, the answer is {token_ids}, not {right}; token {first} is the first that "
              "differs")
