"""The plain model: equal to transformers, and equal to itself along every way that it can be computed."""

import math

import pytest
import torch
from conftest import assert_close

from minioutro import Cache, VideoLM
from minioutro.model import (RMSNorm, attention, causal_mask, fused_attention, open_sink_rows, pixel_shuffle,
                             position_ids, rope_tables, rotate, show_mask)

CASES = ("dev_a", "dev_c")


@pytest.mark.parametrize("case", CASES)
def test_encoder_connector_and_logits_equal_transformers(golden, case):
    g, trace = golden(case), {}
    logits = g.model(g.input_ids, g.pixels, trace=trace)
    assert_close(trace["vision.features"], g.tensors["vision.features"])
    assert_close(trace["projected"], g.tensors["projected"])
    for l in range(1, len(g.model.model.text_model.layers)):        # the input of l is the output of l-1
        assert_close(trace[f"layers.{l}.hidden"], g.tensors[f"text.layer.{l - 1}"])
    assert_close(logits, g.tensors["logits"])
    assert trace["logits"] is logits


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_without_images_and_with_features_given(golden, case):
    g = golden(case)
    assert_close(g.model(g.tensors["text_only.input_ids"]), g.tensors["text_only.logits"])
    assert_close(g.model(g.input_ids, features=g.model.encode(g.pixels)), g.tensors["logits"])


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_where_frames_are_padded(golden, case):
    g = golden(case)
    mask = g.tensors["padded.pixel_attention_mask"]
    assert not mask.bool().all()
    logits = g.model(g.input_ids, g.tensors["padded.pixel_values"], pixel_attention_mask=mask)
    assert_close(logits, g.tensors["padded.logits"])


@pytest.mark.parametrize("case", CASES)
def test_greedy_answers_equal_transformers_and_stop_at_eos(golden, case):
    g = golden(case)
    token_ids = g.model.generate(g.input_ids, g.pixels, max_new_tokens=12)
    assert token_ids == g.meta["generated_ids"]
    assert len(token_ids) == (8 if case == "dev_c" else 12)
    assert (token_ids[-1] in g.model.eos_token_ids) == (case == "dev_c")


def test_the_context_is_never_overrun(golden):
    g, S = golden("dev_a"), golden("dev_a").input_ids.shape[1]
    text = g.model.config.text_config
    object.__setattr__(text, "max_position_embeddings", S + 2)
    try:
        assert len(g.model.generate(g.input_ids, g.pixels, max_new_tokens=12)) == 3
        object.__setattr__(text, "max_position_embeddings", S - 1)
        with pytest.raises(ValueError, match=f"{S} tokens .* {S - 1}"):
            g.model(g.input_ids, g.pixels)
    finally:
        object.__setattr__(text, "max_position_embeddings", 8192)


def test_inputs_that_do_not_fit_each_other_are_refused(golden):
    g = golden("dev_a")
    features = g.model.encode(g.pixels)                             # (1,8,48)
    for wrong in (features[:, :4], features.repeat(2, 1, 1), features[..., :24]):
        with pytest.raises(ValueError, match=r"\[8\] image tokens of size 48"):
            g.model(g.input_ids, features=wrong)
    with pytest.raises(ValueError, match="not both"):
        g.model(g.input_ids, g.pixels, features)
    with pytest.raises(ValueError, match="pixel_values"):
        g.model.encode(g.pixels[..., :8])
    with pytest.raises(ValueError, match="one prompt"):
        g.model.generate(g.input_ids.repeat(2, 1))


# ---- masks ----


def test_causal_mask_by_hand():
    """Four positions: each sees itself and what came before. The last two of four see three and four."""
    assert causal_mask(4, 4).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(1, 5).all()


def test_opened_rows_by_hand():
    """Item 0 has sinks at 0 and 2, item 1 none: of item 0 two rows become full, of item 1 nothing."""
    is_sink = torch.tensor([[True, False, True], [False] * 3])
    opened = open_sink_rows(causal_mask(3, 3), is_sink)
    assert opened[0].int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert opened[1].equal(causal_mask(3, 3))
    assert open_sink_rows(opened, is_sink).equal(opened)


def test_row_sums_of_every_mask():
    """With K keys, query i of Q sees K - Q + i + 1 of them, and an opened row all."""
    for Q, K in ((1, 1), (1, 7), (3, 7), (7, 7)):
        assert causal_mask(Q, K).sum(1).tolist() == [K - Q + i + 1 for i in range(Q)]
    is_sink = torch.tensor([[False, True, False, False, True]])
    assert open_sink_rows(causal_mask(5, 5), is_sink).sum(2).tolist() == [[1, 5, 3, 4, 5]]


def test_show_mask_draws_rows_with_labels():
    is_sink = torch.tensor([[True, False, False, True, False]])
    text = show_mask(open_sink_rows(causal_mask(5, 5), is_sink)[0], ["sink 0", "", "", "sink 3", ""])
    assert text == "■ ■ ■ ■ ■   <- sink 0\n■ ■ · · ·\n■ ■ ■ · ·\n■ ■ ■ ■ ■   <- sink 3\n■ ■ ■ ■ ■"
    assert show_mask(causal_mask(2, 3)) == "■ ■ ·\n■ ■ ■"


# ---- attention ----


def random_heads(B=2, H=6, G=3, Q=7, K=7, D=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((B, H, Q, D), (B, G, K, D), (B, G, K, D))
    return [torch.randn(*size, generator=generator) for size in sizes]


def test_attention_equals_a_loop_over_its_definition():
    """Head h of 6 reads key-value head h // 2 of 3, and only what its mask allows."""
    q, k, v = random_heads(Q=4)
    may_attend = causal_mask(4, 7)
    out, weights = attention(q, k, v, may_attend)
    for b in range(2):
        for h in range(6):
            for i in range(4):
                keys = [j for j in range(7) if may_attend[i, j]]
                scores = [math.exp(q[b, h, i] @ k[b, h // 2, j] / math.sqrt(10)) for j in keys]
                expected = sum(s / sum(scores) * v[b, h // 2, j] for s, j in zip(scores, keys))
                assert torch.allclose(out[b, h, i], expected, atol=1e-5)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 6, 4))
    assert (weights[:, :, ~may_attend] == 0).all()


def test_explicit_and_fused_attention_agree():
    q, k, v = random_heads()
    opened = open_sink_rows(causal_mask(7, 7), torch.tensor([[True] + [False] * 6, [False] * 7]))
    for may_attend in (causal_mask(7, 7), opened):
        assert_close(fused_attention(q, k, v, may_attend), attention(q, k, v, may_attend)[0], 5e-6)
        one_row = may_attend[..., 3:4, :]                           # a single query goes another way
        assert not one_row.all()
        assert_close(fused_attention(q[:, :, 3:4], k, v, one_row),
                     attention(q[:, :, 3:4], k, v, one_row)[0], 5e-6)


def test_in_one_attention_call_only_opened_rows_see_the_future():
    q, k, v = random_heads(B=1)
    is_sink = torch.tensor([[False, False, True, False, False, False, False]])
    before = attention(q, k, v, open_sink_rows(causal_mask(7, 7), is_sink))[0]
    v[:, :, 6] += 1.0                                               # the last token changes
    after = attention(q, k, v, open_sink_rows(causal_mask(7, 7), is_sink))[0]
    changed = (before != after).any(-1).any(1)[0].tolist()
    assert changed == [False, False, True, False, False, False, True]


@pytest.mark.parametrize("case", CASES)
def test_the_two_paths_give_the_same_logits(golden, case):
    g = golden(case)
    L = len(g.model.model.text_model.layers)
    trace = {"weights_of": range(L)}
    assert_close(g.model(g.input_ids, g.pixels, trace=trace), g.model(g.input_ids, g.pixels), 5e-5)
    S = g.input_ids.shape[1]
    for l in range(L):
        weights = trace[f"layers.{l}.weights"]
        assert weights.shape == (1, g.model.config.text_config.num_attention_heads, S, S)
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    only_one = {"weights_of": [1]}
    g.model(g.input_ids, g.pixels, trace=only_one)
    assert [name for name in only_one if name.endswith(("weights", "may_attend"))] == \
        ["layers.1.weights", "layers.1.may_attend"]


# ---- one way and another ----


@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_two_equals_two_singles(golden, case):
    g = golden(case)
    other = g.pixels.flip(1) * 0.5
    both = g.model(g.input_ids.repeat(2, 1), torch.cat([g.pixels, other]))
    assert_close(both[:1], g.model(g.input_ids, g.pixels), 1e-5)
    assert_close(both[1:], g.model(g.input_ids, other), 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_with_a_cache_equals_without(golden, case):
    g, cache = golden(case), Cache()
    whole = g.model(g.input_ids, g.pixels)
    prompt = g.model(g.input_ids[:, :-3], g.pixels, cache=cache)
    two = g.model(g.input_ids[:, -3:-1], cache=cache)               # two new tokens at once, then one
    one = g.model(g.input_ids[:, -1:], cache=cache)
    assert cache.length == g.input_ids.shape[1]
    assert_close(torch.cat([prompt, two, one], dim=1), whole, 1e-5)


def test_a_step_of_decoding_copies_no_keys_until_the_buffer_is_full():
    """5 positions of a prompt, then one at a time: 1 + 256 fit behind them before the next copy."""
    generator, cache = torch.Generator().manual_seed(2), Cache()
    k, v = torch.randn(2, 2, 3, 270, 10, generator=generator)       # twice (B,G,K,D)
    cache.extend(0, k[:, :, :5], v[:, :, :5])
    cache.length, places = 5, []
    while cache.length < 270:
        new = slice(cache.length, cache.length + 1)
        all_k, all_v = cache.extend(0, k[:, :, new], v[:, :, new])
        cache.length += 1
        assert all_k.equal(k[:, :, :cache.length]) and all_v.equal(v[:, :, :cache.length])
        places.append(all_k.data_ptr())
    assert len(set(places[:257])) == 1 and places[257] != places[256]


def test_rotation_depends_on_the_distance_only():
    """<R(i) q, R(j) k> is the same for (i, j) = (3, 1) and (9, 7); it is not the same for (3, 2)."""
    q, k = torch.randn(2, 10, generator=torch.Generator().manual_seed(1))
    cos, sin = rope_tables(0, 12, 10, 10000.0, like=q)
    score = lambda i, j: rotate(q, cos[i], sin[i]) @ rotate(k, cos[j], sin[j])
    assert torch.allclose(score(3, 1), score(9, 7), atol=1e-5)
    assert not torch.allclose(score(3, 1), score(3, 2), atol=1e-3)


def test_rotation_by_hand():
    """D = 4, theta 100: frequencies 1 and 1/10; at position 2, pair (0, 2) turns by 2, (1, 3) by 0.2."""
    cos, sin = rope_tables(2, 3, 4, 100.0, like=torch.zeros(()))
    x = rotate(torch.tensor([1.0, 1.0, 0.0, 0.0]), cos[0], sin[0])
    expected = [math.cos(2), math.cos(0.2), math.sin(2), math.sin(0.2)]
    assert torch.allclose(x, torch.tensor(expected))


def test_pixel_shuffle_concatenates_squares_of_patches():
    """Token (Y, X) of a 6 x 6 grid at scale 3 is the 9 patches (3Y + dy, 3X + dx), dy outside."""
    x = torch.randn(2, 36, 5)
    grid, folded = x.view(2, 6, 6, 5), pixel_shuffle(x, 3)
    assert folded.shape == (2, 4, 45)
    for Y in range(2):
        for X in range(2):
            patches = [grid[:, 3 * Y + dy, 3 * X + dx] for dy in range(3) for dx in range(3)]
            assert folded[:, 2 * Y + X].equal(torch.cat(patches, dim=-1))


def test_position_ids_spread_a_smaller_picture_over_the_same_square():
    """A full frame counts 0, 1, 2, ...; one row of 2 of 4 patches takes columns 0 and 2."""
    full = torch.ones(1, 4, 4, dtype=torch.bool)
    assert position_ids(full).tolist() == [list(range(16))]
    part = torch.zeros(1, 4, 4, dtype=torch.bool)
    part[0, :2, :2] = True
    assert position_ids(part).view(4, 4).tolist() == [[0, 2, 0, 0], [8, 10, 0, 0], [0] * 4, [0] * 4]


def test_vision_frames_do_not_see_each_other(golden):
    g = golden("dev_a")
    together, alone = g.model.encode(g.pixels), g.model.encode(g.pixels[:, 1:])
    assert torch.allclose(together[:, alone.shape[1]:], alone, atol=1e-6)


def test_the_norm_of_a_massive_activation_does_not_overflow():
    """15,000 squared is beyond float16; the norm of (15000, 0, 0, 0) is (2, 0, 0, 0) all the same."""
    x = torch.tensor([15000.0, 0, 0, 0], dtype=torch.float16)
    assert RMSNorm(4, 1e-5).half()(x).tolist() == [2.0, 0.0, 0.0, 0.0]


def test_half_precision_follows_float32(golden):
    g = golden("dev_c")
    for dtype, tolerance in ((torch.bfloat16, 0.15), (torch.float16, 0.02)):
        half = VideoLM.from_pretrained(g.folder, dtype=dtype)
        logits = half(g.input_ids, g.pixels)
        assert logits.dtype == dtype
        assert_close(logits.float(), g.tensors["logits"], tolerance)
