"""The functions of the exercises, one by one, in the order of the data flow: worked by hand first.

They are called through `impl`, which is minioutro.model, or the module given to --impl. Everything
else here is the model's own, so that an exercise is judged by itself; only the layer (10) runs the
module's functions together. Asserts say in words what is wrong: PYTEST_DONT_REWRITE leaves it there.
"""

import math
from dataclasses import replace

import pytest
import torch

from minioutro import Cache
from minioutro.model import causal_mask, cosine, fused_attention, open_sink_rows, rope_tables, show_mask


def fail_unless(equal, sentence):
    """An assert whose report is the sentence, and the line of the test that called."""
    __tracebackhide__ = True
    if not equal:
        raise AssertionError(sentence)


def assert_mask(may_attend, rows, call):
    __tracebackhide__ = True
    expected = torch.tensor(rows, dtype=torch.bool)
    fail_unless(may_attend.dtype == torch.bool,
                f"{call} is {may_attend.dtype}, not bool with True = may attend")
    fail_unless(may_attend.shape == expected.shape,
                f"{call} is {tuple(may_attend.shape)}, not {tuple(expected.shape)}")
    fail_unless(may_attend.equal(expected),
                f"{call} is\n{show_mask(may_attend)}\nand should be\n{show_mask(expected)}")


def assert_values(values, expected, why, tolerance=1e-4):
    __tracebackhide__ = True
    expected = torch.as_tensor(expected, dtype=torch.float32)
    fail_unless(values.shape == expected.shape,
                f"{why}: shape {tuple(values.shape)}, not {tuple(expected.shape)}")
    away = ((values.float() - expected).abs() - 1e-5 * expected.abs()).nan_to_num(math.inf)
    if values.numel() > 40:
        worst = tuple(torch.unravel_index(away.argmax(), away.shape))
        why = f"{why}\n{(away > tolerance).sum()} of {away.numel()} numbers are others; the farthest is at " \
              f"{[i.item() for i in worst]}"
        shown = values[worst], expected[worst]
    else:
        shown = values, expected
    fail_unless((away <= tolerance).all(), "{}\nfound\n{}\nexpected\n{}".format(why, *shown))


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
    assert_values(impl.pixel_shuffle(x, 2), squares,
                  "each token is one square, its rows one after another")


@pytest.mark.exercise_1
def test_pixel_shuffle_concatenates_squares_of_patches(impl):
    """Token (Y, X) of a 6 x 6 grid at scale 3 is the 9 patches (3Y + dy, 3X + dx), dy outside."""
    x = torch.randn(2, 36, 5)
    grid, folded = x.view(2, 6, 6, 5), impl.pixel_shuffle(x, 3)
    assert folded.shape == (2, 4, 45), \
        f"36 patches of size 5 at scale 3: {tuple(folded.shape)}, not (2, 4, 45)"
    for Y in range(2):
        for X in range(2):
            patches = [grid[:, 3 * Y + dy, 3 * X + dx] for dy in range(3) for dx in range(3)]
            assert folded[:, 2 * Y + X].equal(torch.cat(patches, dim=-1)), \
                f"token ({Y}, {X}) is not the 9 patches of its square, 5 values of each together"


# ---- exercise 2: norm and positions ----


@pytest.mark.exercise_2
def test_rms_norm_by_hand(impl):
    """The mean square of (3, 4, 0, 0) is 25/4, its root 2.5: the norm is (1.2, 1.6, 0, 0)."""
    norm = impl.RMSNorm(4, 0.0)
    assert_values(norm(torch.tensor([3.0, 4.0, 0.0, 0.0])), [1.2, 1.6, 0.0, 0.0],
                  "x over its root mean square")
    assert_values(norm(torch.ones(4)), [1.0] * 4, "no mean is subtracted")
    tokens = torch.tensor([[[3.0, 4.0, 0.0, 0.0], [30.0, 40.0, 0.0, 0.0]]])
    assert_values(norm(tokens), [[[1.2, 1.6, 0.0, 0.0]] * 2], "each token has its own mean square")
    norm.weight.data = torch.tensor([1.0, 10.0, 1.0, 1.0])
    assert_values(norm(tokens[0, 0]), [1.2, 16.0, 0.0, 0.0],
                  "the weight multiplies each coordinate")


@pytest.mark.exercise_2
def test_eps_is_added_to_the_mean_square(impl):
    """x = 0.001 everywhere and eps = 3e-6: 0.001 / sqrt(1e-6 + 3e-6) = 1/2."""
    assert_values(impl.RMSNorm(4, 3e-6)(torch.full((4,), 1e-3)), [0.5] * 4,
                  "eps belongs below the root")


@pytest.mark.exercise_2
def test_the_norm_of_a_massive_activation_does_not_overflow(impl):
    """15,000 squared is beyond float16; the norm of (15000, 0, 0, 0) is (2, 0, 0, 0) still."""
    x = torch.tensor([15000.0, 0, 0, 0], dtype=torch.float16)
    normed = impl.RMSNorm(4, 1e-5).half()(x)
    assert normed.tolist() == [2.0, 0.0, 0.0, 0.0], \
        "square it in float32: the largest float16 is 65504"
    assert normed.dtype == torch.float16, f"float16 goes in and {normed.dtype} comes out"


@pytest.mark.exercise_2
def test_rotation_by_hand(impl):
    """D = 4, theta 100: frequencies 1 and 1/10; at position 2, (x0, x2) turns by 2, (x1, x3) by .2."""
    cos, sin = rope_tables(torch.tensor([2]), 4, 100.0, like=torch.zeros(()))
    x = impl.rotate(torch.tensor([1.0, 1.0, 0.0, 0.0]), cos[0], sin[0])
    expected = [math.cos(2), math.cos(0.2), math.sin(2), math.sin(0.2)]
    assert_values(x, expected, "(x0, x2) turns by 2 radians, (x1, x3) by 0.2, counterclockwise")


@pytest.mark.exercise_2
def test_rotation_depends_on_the_distance_only(impl):
    """<R(i) q, R(j) k> is the same for (i, j) = (3, 1) and (9, 7), and another for (3, 2)."""
    q, k = torch.randn(2, 10, generator=torch.Generator().manual_seed(1))
    cos, sin = rope_tables(torch.arange(12), 10, 10000.0, like=q)
    score = lambda i, j: impl.rotate(q, cos[i], sin[i]) @ impl.rotate(k, cos[j], sin[j])
    assert torch.allclose(score(3, 1), score(9, 7), atol=1e-5), \
        "the same distance gives another score"
    assert not torch.allclose(score(3, 1), score(3, 2), atol=1e-3), \
        "another distance gives the same score"


@pytest.mark.exercise_2
def test_every_head_is_rotated_by_position_alone(impl):
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(2))
    cos, sin = rope_tables(torch.arange(5), 4, 100.0, like=x)
    rotated = impl.rotate(x, cos, sin)
    assert rotated[:, :, 0].equal(x[:, :, 0]), "position 0 is turned by nothing"
    assert_values(rotated[1, 2, 3], impl.rotate(x[1, 2, 3], cos[3], sin[3]),
                  "item 1, head 2, position 3")


# ---- exercise 3: masks ----


@pytest.mark.exercise_3
def test_causal_mask_by_hand(impl):
    """Each of four sees itself and what came before. The last two of four see three and four."""
    square = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert_mask(impl.causal_mask(4, 4), square, "causal_mask(4, 4)")
    assert_mask(impl.causal_mask(2, 4), [[1, 1, 1, 0], [1, 1, 1, 1]],
                "causal_mask(2, 4), with a cache of two,")
    assert_mask(impl.causal_mask(1, 5), [[1, 1, 1, 1, 1]], "causal_mask(1, 5), one new token,")


@pytest.mark.exercise_3
def test_row_sums_of_the_causal_mask(impl):
    """With K keys, query i of Q sees K - Q + i + 1 of them."""
    for Q, K in ((1, 1), (1, 7), (3, 7), (7, 7)):
        expected = [K - Q + i + 1 for i in range(Q)]
        sums = impl.causal_mask(Q, K).sum(1).tolist()
        assert sums == expected, \
            f"keys seen by each query of causal_mask({Q}, {K}): {sums}, not {expected}"


@pytest.mark.exercise_3
def test_opened_rows_by_hand(impl):
    """Item 0 has sinks at 0 and 2, item 1 none: two rows of item 0 become full, no other."""
    is_sink = torch.tensor([[True, False, True], [False] * 3])
    closed = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    opened = impl.open_sink_rows(causal_mask(3, 3), is_sink)
    assert opened.shape == (2, 3, 3), f"one mask an item: (2, 3, 3), not {tuple(opened.shape)}"
    assert_mask(opened[0], [[1, 1, 1], [1, 1, 0], [1, 1, 1]],
                "the mask with the rows of sinks 0 and 2 opened")
    assert_mask(opened[1], closed, "the mask of the item without sinks")
    assert impl.open_sink_rows(opened, is_sink).equal(opened), "a row that is open stays open"


@pytest.mark.exercise_3
def test_only_the_rows_of_sinks_grow(impl):
    is_sink = torch.tensor([[False, True, False, False, True]])
    sums = impl.open_sink_rows(causal_mask(5, 5), is_sink).sum(2).tolist()
    assert sums == [[1, 5, 3, 4, 5]], f"keys that each row sees, with sinks at 1 and 4: {sums}"


@pytest.mark.exercise_3
def test_more_rows_are_opened_in_the_mask_of_each_item(impl):
    """All layers are given the same mask, and only one of them may open a row."""
    given = open_sink_rows(causal_mask(3, 3), torch.tensor([[True, False, False], [False] * 3]))
    opened = impl.open_sink_rows(given, torch.tensor([[False, True, False], [True, False, False]]))
    assert_mask(opened[0], [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
                "the mask with row 0 open, and now row 1,")
    assert_mask(opened[1], [[1, 1, 1], [1, 1, 0], [1, 1, 1]], "the mask of the other item")


# ---- exercise 4: attention ----


def random_heads(B=2, H=6, G=3, Q=7, K=7, D=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((B, H, Q, D), (B, G, K, D), (B, G, K, D))
    return [torch.randn(*size, generator=generator) for size in sizes]


@pytest.mark.exercise_4
def test_neighbouring_query_heads_share_a_key_value_head(impl):
    assert_values(impl.repeat_heads(torch.tensor([[10.0, 20.0, 30.0]]), 6), [[10, 10, 20, 20, 30,
                  30]],
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
    assert_values(out, [[[[3.0] * 4]]], "the weighted mean of the values")
    out, weights = impl.attention(q, k, v, torch.tensor([[True, False]]))
    assert_values(weights, [[[[1.0, 0.0]]]], "the only key that the mask allows has all the weight")


@pytest.mark.exercise_4
def test_attention_equals_a_loop_over_its_definition(impl):
    """Head h of 6 reads key-value head h // 2 of 3, and only what its mask allows."""
    q, k, v = random_heads(Q=4)
    may_attend = causal_mask(4, 7)
    out, weights = impl.attention(q, k, v, may_attend)
    for b in range(2):
        for h in range(6):
            for i in range(4):
                keys = [j for j in range(7) if may_attend[i, j]]
                scores = [math.exp(q[b, h, i] @ k[b, h // 2, j] / math.sqrt(10)) for j in keys]
                expected = sum(s / sum(scores) * v[b, h // 2, j] for s, j in zip(scores, keys))
                assert_values(out[b, h, i], expected,
                              f"item {b}, query head {h} on head {h // 2}, query {i}", 1e-5)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 6, 4)), \
        "the weights of a query sum to 1 over its keys"
    assert (weights[:, :, ~may_attend] == 0).all(), "a key that is not allowed has a weight"


@pytest.mark.exercise_4
def test_explicit_and_fused_attention_agree(impl):
    q, k, v = random_heads()
    opened = open_sink_rows(causal_mask(7, 7), torch.tensor([[True] + [False] * 6, [False] * 7]))
    for name, may_attend in (("causal", causal_mask(7, 7)), ("with the row of sink 0 opened", opened)):
        assert_values(impl.attention(q, k, v, may_attend)[0], fused_attention(q, k, v, may_attend),
                      f"the mask is {name}: the outputs of scaled_dot_product_attention", 1e-5)
        one_row = may_attend[..., 3:4, :]                   # a single query goes another way
        assert not one_row.all()
        assert_values(impl.attention(q[:, :, 3:4], k, v, one_row)[0],
                      fused_attention(q[:, :, 3:4], k, v, one_row), "a single query", 1e-5)


@pytest.mark.exercise_4
def test_in_one_attention_call_only_opened_rows_see_the_future(impl):
    q, k, v = random_heads(B=1)
    is_sink = torch.tensor([[False, False, True, False, False, False, False]])
    may_attend = open_sink_rows(causal_mask(7, 7), is_sink)
    before = impl.attention(q, k, v, may_attend)[0]
    v[:, :, 6] += 1.0                                               # the last token changes
    after = impl.attention(q, k, v, may_attend)[0]
    changed = (before != after).any(-1).any(1)[0].nonzero().flatten().tolist()
    assert changed == [2, 6], \
        f"token 6 changed, and only 6 and the opened row 2 may see it: {changed} did"


# ---- exercise 5: the cache ----


def told(first, n, layer=0):
    """Keys and values (1,2,n,3) of n positions that tell which they are: position 7 has the keys 7 and, in
    head 1, 7.5; its values are 100 more. Each layer adds 1000."""
    k = torch.arange(first, first + n)[:, None].expand(n, 3) + torch.tensor([0.0, 0.5])[:, None, None]
    return k[None] + 1000 * layer, k[None] + 1000 * layer + 100


def assert_positions(found, first, n, layer, what):
    """Both are keys, or both are values, (1,2,.,3)."""
    __tracebackhide__ = True
    expected = told(first, n, layer)[what.startswith("values")]
    fail_unless(found.shape == expected.shape,
                f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    fail_unless(found.equal(expected),
                f"{what} should be {expected[0, 0, :, 0].tolist()} in head 0 and "
                f"{expected[0, 1, :, 0].tolist()} in head 1, and are {found[0, 0, :, 0].tolist()} and "
                f"{found[0, 1, :, 0].tolist()}")


def add(cache, n):
    """What the model does with a cache for n new tokens: every layer extends it, then length moves."""
    __tracebackhide__ = True
    start = cache.length
    for layer in (0, 1):
        k, v = cache.extend(layer, *told(start, n, layer))
        call = f"behind {start} tokens, of extend({layer}, k, v) with {n} new"
        assert_positions(k, 0, start + n, layer, f"keys {call}")
        assert_positions(v, 0, start + n, layer, f"values {call}")
        fail_unless(cache.length == start, "extend changes length; the model does when all layers are done")
    cache.length = start + n


@pytest.mark.exercise_5
def test_a_cache_by_hand(impl):
    """Two layers, three tokens of a prompt, then one, two at once, and one."""
    cache = impl.Cache()
    for n in (3, 1, 2, 1):
        add(cache, n)
        for layer in (0, 1):
            assert_positions(cache.keys(layer), 0, cache.length, layer, f"keys({layer})")
            assert_positions(cache.values(layer), 0, cache.length, layer, f"values({layer})")


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
    (k, _), (_, v) = cache.extend(0, *told(3, 1)), cache.extend(1, *told(3, 1, layer=1))
    assert (k[:, :, 1] == -1).all(), "keys(0) was edited, and extend(0, k, v) knows nothing of it"
    assert (v[:, :, 2] == -2).all(), "values(1) was edited, and extend(1, k, v) knows nothing of it"


@pytest.mark.exercise_5
def test_cached_decoding_gives_the_logits_of_one_pass(impl, golden):
    """A prompt, one token, two at once, one."""
    g, cache = golden("dev_a"), impl.Cache()
    new = torch.tensor([[5, 9, 7, 6]])
    expected = g.model(torch.cat([g.input_ids, new], dim=1), g.pixels)[:, -5:]
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
    assert_values(median, [[1]],
                  "the median |h| of the item: the lower of the two middle values, 1 and 2")


@pytest.mark.exercise_6
def test_find_sinks_by_hand(impl):
    """Six values, |h| = 0, 1, 1, 2, 5, 40, with a median of 1.

    Multiple 40: token 2 (40 >= 40) is a sink. Multiple 40.02, or a floor of 41: none is,
    though the length of token 2, sqrt(2^2 + 40^2), is 40.05.
    """
    hidden = torch.tensor([[[1.0, -1.0], [0.0, 5.0], [2.0, -40.0]]])
    for floor, multiple, expected, why in (
            (0.0, 40.0, [False, False, True], "-40 is 40 times the median, which is enough"),
            (40.0, 5.1, [False, False, True], "-40 reaches a floor of exactly 40"),
            (0.0, 5.0, [False, True, True], "5 is 5 times the median"),
            (0.0, 40.02, [False] * 3, "no coordinate is 40.02 times the median"),
            (41.0, 1.0, [False] * 3, "both must hold, and nothing reaches the floor of 41")):
        found = impl.find_sinks(hidden, floor, multiple).tolist()
        assert found == [expected], f"find_sinks(hidden, {floor}, {multiple}): {why}"


@pytest.mark.exercise_6
def test_the_median_is_of_the_item_not_of_the_token_or_the_batch(impl):
    """Item 0 has median 1, item 1 median 10; 100 is 100 times the one and 10 times the other."""
    hidden = torch.tensor([[[1.0, 1.0], [1.0, 100.0]], [[10.0, 10.0], [10.0, 100.0]]])
    assert impl.find_sinks(hidden, 0.0, 50.0).tolist() == [[False, True], [False, False]], \
        "each item of the batch is compared with its own median"
    hidden = torch.tensor([[[1.0, 1.0], [90.0, 100.0]]])
    assert impl.find_sinks(hidden, 0.0, 90.0).tolist() == [[False, True]], \
        "token 1 is 100 times the median of its item (1), though not of itself (90)"


# ---- exercise 7: a second detector ----


def assert_clear_cases(impl, variant, weights, v, where):
    """What the text calls clear; in between everything is right."""
    __tracebackhide__ = True
    found, shape = impl.looks_like_a_sink(weights, v), (weights.shape[0], weights.shape[-1])
    fail_unless(found.dtype == torch.bool and found.shape == shape,
                f"looks_like_a_sink gives {found.dtype} {tuple(found.shape)}, not bool {shape}")
    n_queries = torch.arange(weights.shape[-1], 0, -1)              # that may see each key
    given = weights.sum(-2) / n_queries                             # (B,H,S)
    for b, token in (n_queries >= 16).expand(shape).nonzero().tolist():
        least, most = given[b, :, token].min(), given[b, :, token].max()
        fail_unless(least <= variant.sink_from or found[b, token],
                    f"{where}: every head gives token {token} {least:.2f} of its attention or more, on average "
                    f"over the {n_queries[token]} queries that may see it, and you do not call it a sink")
        fail_unless(most >= variant.none_below or not found[b, token],
                    f"{where}: no head gives token {token} more than {most:.2f} of its attention, on average "
                    f"over the {n_queries[token]} queries that may see it, and you call it a sink")


@pytest.mark.exercise_7
def test_clear_cases_by_hand(impl, variant):
    """64 tokens. Nobody is a sink where all attend evenly to what they see, nor where all attend to
    themselves alone. Then token 40 is given a share of all attention, from where it can be seen."""
    v = torch.randn(1, 2, 64, 5, generator=torch.Generator().manual_seed(4))
    evenly = causal_mask(64, 64) / torch.arange(1, 65)[:, None]

    def to_token_40(share):
        part = (share - evenly[40:, 40].mean()) / (1 - evenly[40:, 40].mean())
        weights = evenly.clone()
        weights[40:] *= 1 - part
        weights[40:, 40] += part
        return weights
    for where, weights in (("all attend evenly", evenly), ("each attends to itself", torch.eye(64)),
                           ("from token 40 on, all attend to 40", to_token_40((1 + variant.sink_from) / 2)),
                           ("from token 40 on, 40 is given enough", to_token_40(variant.sink_from + 0.01)),
                           ("from token 40 on, 40 is given too little", to_token_40(variant.none_below - 0.01))):
        assert_clear_cases(impl, variant, weights.expand(1, 4, 64, 64), v, where)


@pytest.mark.exercise_7
def test_clear_cases_of_the_three_traces(impl, variant, three_traces):
    for name, layers in three_traces.items():
        for l, (weights, v) in enumerate(layers):
            assert_clear_cases(impl, variant, weights, v, f"{name}, layer {l}")


@pytest.mark.exercise_7
def test_an_item_of_a_batch_looks_as_it_does_alone(impl, three_traces):
    for l, ((one, v_one), (two, v_two)) in enumerate(zip(three_traces["toy"], three_traces["without"])):
        both = impl.looks_like_a_sink(torch.cat([one, two]), torch.cat([v_one, v_two]))
        assert both[:1].equal(impl.looks_like_a_sink(one, v_one)), f"layer {l}, toy, of a batch with without"
        assert both[1:].equal(impl.looks_like_a_sink(two, v_two)), f"layer {l}, without, of a batch with toy"


# ---- exercise 8: the sink's value, and alignment ----


@pytest.mark.exercise_8
def test_sink_value_by_hand(impl):
    """One head of size 2, sinks at 0 and 2: the mean of (1, 2) and (5, 10) is (3, 6)."""
    v = torch.tensor([[1.0, 2.0], [100.0, 100.0], [5.0, 10.0]])[None, None]
    assert_values(impl.sink_value(v, torch.tensor([[True, False, True]])), [[[3, 6]]],
                  "the mean over the sinks")
    assert_values(impl.sink_value(v, torch.tensor([[False, False, True]])), [[[5, 10]]],
                  "the value of the only sink")


@pytest.mark.exercise_8
def test_sink_value_is_the_mean_over_sinks_by_head_and_item(impl):
    v = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)              # (B,G,S,D)
    is_sink = torch.tensor([[True, False, True, False], [False] * 4])
    v_sink = impl.sink_value(v, is_sink)
    assert v_sink.shape == (2, 3, 5), \
        f"one vector for each item and head: (2, 3, 5), not {tuple(v_sink.shape)}"
    assert v_sink[0].equal((v[0, :, 0] + v[0, :, 2]) / 2), \
        "each head has the mean of its own values at 0 and 2"
    assert (v_sink[1] == 0).all(), f"an item without sinks has zeros, not {v_sink[1, 0].tolist()}"


def heads(B=2, H=6, G=3, S=5, D=4):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(B, H, S, D, generator=generator), torch.randn(B, G, D, generator=generator)


NEVER = torch.zeros(2, 5, dtype=torch.bool)         # ever_sink for `heads`: nothing was a sink


def turned_in_a_plane(impl, o, v, temperature=0.1):
    """One token, one head of size 2."""
    out, v_sink = torch.tensor(o).view(1, 1, 1, 2), torch.tensor(v).view(1, 1, 2)
    return impl.align_with_sink(out, v_sink, torch.tensor([[False]]), 3.0, temperature).flatten()


@pytest.mark.exercise_8
def test_alignment_by_hand(impl, variant):
    """o = (3, 4), v = (2, 0): c = 0.6, g = tanh(6) = 1, p = (3, 0), o + 3p = (12, 4), of length
    sqrt(160); scaled to the length 5 of o: (4.743, 1.581). Temperature 0.6: g = tanh(1) = 0.762.
    The gate opens at a cosine of `cosine_from`, which is 0 here, and in other variants is not."""
    for temperature, with_0 in ((0.1, [4.743, 1.581]), (0.6, [4.633, 1.881])):
        x = 3 + 9 * math.tanh((0.6 - variant.cosine_from) / temperature)
        expected = [5 * x / math.hypot(x, 4), 5 * 4 / math.hypot(x, 4)]
        assert variant.cosine_from or expected == pytest.approx(with_0, abs=1e-3)
        assert_values(turned_in_a_plane(impl, [3.0, 4.0], [2.0, 0.0], temperature), expected,
                      f"o = (3, 4), v = (2, 0), gamma 3, temperature {temperature}", 1e-3)
    assert_values(turned_in_a_plane(impl, [-3.0, 4.0], [2.0, 0.0]), [-3.0, 4.0],
                  "o points away from v and stays")


@pytest.mark.exercise_8
def test_alignment_of_small_numbers_by_hand(impl):
    """o = (3e-4, 4e-4), v = (1e-4, 0): 1e-8 is as much as |v|^2, so p is half of what it was, 1.5e-4, and
    o + 3p = (7.5e-4, 4e-4), of length 8.5e-4, is scaled to 5e-4. o = (3e-8, 4e-8), v = (2, 0): o + 3p is
    (12e-8, 4e-8), of length 12.65e-8; with 1e-8 more it is scaled by 5 / 13.65."""
    assert_values(1e4 * turned_in_a_plane(impl, [3e-4, 4e-4], [1e-4, 0.0]), [4.412, 2.353],
                  "1e-8 is added to |v|^2, in units of 1e-4", 1e-3)
    assert_values(1e8 * turned_in_a_plane(impl, [3e-8, 4e-8], [2.0, 0.0]), [4.396, 1.465],
                  "1e-8 is added to |o'|, in units of 1e-8", 2e-3)


@pytest.mark.exercise_8
def test_alignment_angles(impl, variant):
    """With v_sink along x, o at angle a becomes ((1 + 3g) cos a, sin a), g = tanh(cos a / 0.1), where the
    gate opens at a cosine of 0."""
    for before, with_0 in ((85, 74.8), (80, 56.0), (70, 34.5), (60, 23.4), (45, 14.0), (30, 8.2)):
        angle = math.radians(before)
        g = math.tanh(max(0, math.cos(angle) - variant.cosine_from) / 0.1)
        after = math.degrees(math.atan2(math.sin(angle), (1 + 3 * g) * math.cos(angle)))
        assert variant.cosine_from or after == pytest.approx(with_0, abs=0.06)
        o = [7 * math.cos(angle), 7 * math.sin(angle)]
        x, y = turned_in_a_plane(impl, o, [0.3, 0.0]).tolist()
        assert math.degrees(math.atan2(y, x)) == pytest.approx(after, abs=0.06), \
            f"an angle of {before} degrees to v_sink becomes {after:.1f}"
        assert math.hypot(x, y) == pytest.approx(7, rel=1e-5), "the length of o is kept"


@pytest.mark.exercise_8
def test_alignment_keeps_length_and_plane_and_turns_only_towards_the_sink(impl, variant):
    out, v_sink = heads()
    turned = impl.align_with_sink(out, v_sink, NEVER, 3.0, 0.1)
    assert_values(turned.norm(dim=-1), out.norm(dim=-1),
                  "the length of each head's output is kept", 1e-5)
    for h in range(6):
        v = v_sink[:, h // 2, None]                         # two query heads share one of G = 3
        before = torch.cosine_similarity(out[:, h], v, dim=-1)
        after = torch.cosine_similarity(turned[:, h], v, dim=-1)
        turns = before > variant.cosine_from
        assert (after[turns] > before[turns]).all(), \
            f"query head {h} does not turn towards the value of its key-value head {h // 2}"
        assert torch.allclose(turned[:, h][~turns], out[:, h][~turns], atol=1e-6), \
            f"an output whose cosine is not above {variant.cosine_from} must stay"
        basis = torch.stack([out[:, h], v.expand_as(out[:, h])], dim=-1)        # (B,S,D,2)
        new = turned[:, h, :, :, None]
        residual = new - basis @ torch.linalg.pinv(basis) @ new
        assert residual.abs().max() < 1e-5, \
            f"query head {h} leaves the plane of its output and its v_sink"


@pytest.mark.exercise_8
def test_alignment_of_no_strength_of_sinks_and_without_sinks(impl):
    out, v_sink = heads()
    ever_sink = torch.tensor([[True, False, False, True, False], [False] * 5])
    assert_values(impl.align_with_sink(out, v_sink, ever_sink, 0.0, 0.1), out,
                  "gamma 0 changes nothing", 1e-6)
    v_sink[1] = 0
    turned = impl.align_with_sink(out, v_sink, ever_sink, 3.0, 0.1)
    assert_values(turned[0][:, ever_sink[0]], out[0][:, ever_sink[0]],
                  "a token that was a sink is left alone", 1e-6)
    assert not torch.allclose(turned[0][:, ~ever_sink[0]], out[0][:, ~ever_sink[0]]), \
        "the others are turned"
    assert_values(turned[1], out[1], "an item whose v_sink is zero is left alone", 1e-6)


@pytest.mark.exercise_8
def test_alignment_of_half_precision_is_computed_in_float32(impl):
    """In float16 the squares of 1e-4 are zero, and so is the 1e-8 that is added to them."""
    out, v_sink = heads()
    small = impl.align_with_sink(out.half() * 1e-3, v_sink.half() * 1e-3, NEVER, 3.0, 0.1)
    assert small.dtype == torch.float16, f"float16 goes in and {small.dtype} comes out"
    expected = impl.align_with_sink(out, v_sink, NEVER, 3.0, 0.1)
    assert_values(small.float() * 1e3, expected,
                  "the squares of small numbers are zero in float16", 0.05)


# ---- exercise 10: the layer ----


def model_of(impl, g):
    """The model of a fixture, with the decoder layers of the implementation."""
    return impl.in_model(g.model) if hasattr(impl, "in_model") else g.model


def places(found):
    """(L,S) -> "layer 0: [8, 9], layer 4: [7]"."""
    return ", ".join(f"layer {l}: {row.nonzero().flatten().tolist()}" for l, row in enumerate(found) if row.any())


def assert_logits(found, expected, what):
    __tracebackhide__ = True
    away = ((found - expected).abs().max() / expected.std()).item()
    fail_unless(away <= 1e-4, f"{what}: the logits are {away:.2g} of their standard deviation away")


@pytest.mark.exercise_10
def test_sinks_and_opened_rows_are_those_of_the_published_code(impl, golden):
    """Steps 1 and 3, in every layer. In dev_late token 0 is a sink from layer 3 on, and layers 0, 2, 4, ...
    may open rows. In dev_natural sinks come and go, and nobody is opened twice."""
    for case in ("dev_late", "dev_natural"):
        g, trace = golden(case), {}
        model_of(impl, g)(g.input_ids, g.pixels, outro=g.outro(), trace=trace)
        for name, stored in (("is_sink", "is_sink"), ("relaxed", "is_relaxed")):
            found = torch.cat([trace[f"layers.{l}.{name}"] for l in range(g.meta["L"])])
            expected, what = g.tensors[stored].bool(), "opened" if name == "relaxed" else "is_sink"
            assert found.equal(expected), f"{case}, {what}\nfound    {places(found)}\nexpected {places(expected)}"


@pytest.mark.exercise_10
def test_prompts_are_read_as_by_the_published_code(impl, golden):
    for case in ("dev_late", "dev_natural"):
        g = golden(case)
        model = model_of(impl, g)
        for what, outro, name in (("without OutRo", None, "logits_off"),
                                  ("with relaxation alone", g.outro(align=False), "logits.relax_only"),
                                  ("with alignment alone", g.outro(relax=False), "logits.align_only"),
                                  ("with both", g.outro(), "logits_on")):
            assert_logits(model(g.input_ids, g.pixels, outro=outro), g.tensors[name], f"{case} {what}")


@pytest.mark.exercise_10
def test_the_constants_of_outro_are_obeyed(impl, golden):
    """Other layers, another strength, against the project's own layer. In dev_late token 0 is a sink from
    layer 3 on, so the first multiple of 5 opens its row; the last 6 of 16 layers are left alone."""
    g, trace = golden("dev_late"), {}
    outro = replace(g.outro(), relax_every=5, skip_last=6, gamma=1.0, temperature=0.5)
    found = model_of(impl, g)(g.input_ids, g.pixels, outro=outro, trace=trace)
    opened = [l for l in range(16) if trace[f"layers.{l}.relaxed"].any()]
    searched = [l for l in range(16) if trace[f"layers.{l}.is_sink"].any()]
    assert opened == [5], f"rows are opened in layers {opened}, and with relax_every 5 should be in [5]"
    assert searched == list(range(3, 10)), f"sinks in layers {searched}, and with skip_last 6 in 3 to 9"
    assert_logits(found, g.model(g.input_ids, g.pixels, outro=outro), "gamma 1.0, temperature 0.5")


@pytest.mark.exercise_10
def test_each_item_of_a_batch_is_read_as_alone(impl, golden):
    """The prompt of dev_natural, and its text in reverse, which has other sinks."""
    g = golden("dev_natural")
    is_text = g.input_ids[0] != g.model.config.image_token_id
    ids = g.input_ids.repeat(2, 1)
    ids[1, is_text] = ids[0, is_text].flip(0)
    features = g.model.encode(g.pixels)
    found = model_of(impl, g)(ids, features=features.repeat(2, 1, 1), outro=g.outro())
    for b in (0, 1):
        alone = g.model(ids[b:b + 1], features=features, outro=g.outro())
        assert_logits(found[b:b + 1], alone, f"item {b} of a batch of two, against itself alone")


@pytest.mark.exercise_10
def test_tokens_after_the_prompt_are_turned_at_every_layer_that_had_sinks(impl, variant, golden):
    """In dev_late token 0 of the prompt is a sink; the first 12 of dev_natural end in one. One new
    token is read, then two at once, as of an answer that is known."""
    for case, n_prompt, n_image in (("dev_late", 29, 8), ("dev_natural", 12, 4)):
        g, prompt, cache = golden(case), {}, Cache()
        model, outro = model_of(impl, g), g.outro()
        ids, features = g.input_ids[:, :n_prompt], g.model.encode(g.pixels)[:, :n_image]
        logits = model(ids, features=features, outro=outro, cache=cache, trace=prompt)
        token = logits[:, -1:].argmax(-1)
        for new in (token, token.repeat(1, 2)):
            step = {}
            model(new, outro=outro, cache=cache, trace=step)
            for l in range(variant.aligned_from, g.meta["L"]):
                where, n = f"{case}, layer {l}", new.shape[1]
                assert not step[f"layers.{l}.is_sink"].any(), \
                    f"{where}: of {n} tokens after the prompt one is called a sink; only prompts are searched"
                v_sink, out = step[f"layers.{l}.v_sink"], step[f"layers.{l}.out"]
                assert v_sink.equal(prompt[f"layers.{l}.v_sink"]), \
                    f"{where}: this is not the value of the prompt's sinks"
                before, after = cosine(out, v_sink), cosine(step[f"layers.{l}.aligned"], v_sink)
                turns = (variant.cosine_from + 0.01 < before) & (before < 0.99)
                stays = turns & (after - before < 1e-4)
                assert not stays.any(), \
                    f"{where} has sinks; of {n} tokens after the prompt not all were turned: are they " \
                    f"taken for sinks?"


@pytest.mark.exercise_10
def test_generated_tokens_are_aligned_unlike_in_the_published_code(impl, golden, decoded):
    """The release looks up index 0 of the prompt for them: in a layer by which that was a sink, as
    in dev_late, it aligns none. In dev_natural index 0 is no sink, and the release aligns as well."""
    for case in ("dev_late", "dev_natural"):
        g = golden(case)
        model = model_of(impl, g)
        token_ids = model.generate(g.input_ids, g.pixels, max_new_tokens=12, outro=g.outro())
        if case == "dev_late":
            assert token_ids != decoded[case]["no_decode_alignment"][:12], \
                f"{case}: the answer is that of a model which aligns the prompt only"
        assert token_ids == decoded[case]["ids"][:12], \
            f"{case}: the answer is {token_ids}, not {decoded[case]['ids'][:12]}"
