"""The plain model: equal to transformers, and equal to itself along every way that it can be computed.

Its functions are tested one by one in test_exercises.py.
"""

import pytest
import torch
from conftest import assert_close

from minioutro import Cache, VideoLM
from minioutro.model import causal_mask, open_sink_rows, position_ids, show_mask

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


def test_show_mask_draws_rows_with_labels():
    is_sink = torch.tensor([[True, False, False, True, False]])
    text = show_mask(open_sink_rows(causal_mask(5, 5), is_sink)[0], ["sink 0", "", "", "sink 3", ""])
    assert text == "■ ■ ■ ■ ■   <- sink 0\n■ ■ · · ·\n■ ■ ■ · ·\n■ ■ ■ ■ ■   <- sink 3\n■ ■ ■ ■ ■"
    assert show_mask(causal_mask(2, 3)) == "■ ■ ·\n■ ■ ■"


# ---- attention: written out and fused ----


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


def test_half_precision_follows_float32(golden):
    g = golden("dev_c")
    for dtype, tolerance in ((torch.bfloat16, 0.15), (torch.float16, 0.02)):
        half = VideoLM.from_pretrained(g.folder, dtype=dtype)
        logits = half(g.input_ids, g.pixels)
        assert logits.dtype == dtype
        assert_close(logits.float(), g.tensors["logits"], tolerance)
