"""The plain model: equal to transformers, and equal to itself in every way in which it can be computed.

Its functions are tested one by one in test_exercises.py.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from minioutro import Cache, Trace, VideoLM
from minioutro.model import align_with_sink, causal_mask, find_sinks, open_sink_rows, show_mask, sink_value

CASES = ("dev_a", "dev_c")


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(golden, case):
    g, trace = golden(case), {}
    logits = g.model(g.input_ids, g.pixels, trace=trace)
    assert_close(trace["vision.features"], g.tensors["vision.features"])
    assert_close(trace["projected"], g.tensors["projected"])
    for l in range(1, len(g.model.model.text_model.layers)):        # the input of l is the output of l-1
        assert_close(trace[f"layers.{l}.hidden"], g.tensors[f"text.layer.{l - 1}"])
    assert_close(logits, g.tensors["logits"])
    assert trace["logits"] is logits


@pytest.mark.parametrize("case", CASES)
def test_text_alone_and_given_features(golden, case):
    g = golden(case)
    assert_close(g.model(g.tensors["text_only.input_ids"]), g.tensors["text_only.logits"])
    assert_close(g.model(g.input_ids, features=g.model.encode(g.pixels)), g.tensors["logits"])


@pytest.mark.parametrize("case", CASES)
def test_answers_equal_transformers(golden, case):
    g = golden(case)
    token_ids = g.model.generate(g.input_ids, g.pixels, max_new_tokens=12)
    assert token_ids == g.meta["generated_ids"]
    assert len(token_ids) == (8 if case == "dev_c" else 12)
    assert (token_ids[-1] in g.model.eos_token_ids) == (case == "dev_c")


def test_context_is_not_overrun(golden):
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


def test_wrong_arguments(golden):
    g, cache = golden("dev_a"), Cache()
    g.model(g.input_ids, g.pixels, cache=cache)
    elsewhere = Cache([k.to("meta") for k in cache.k], [v.to("meta") for v in cache.v], cache.length)
    one = g.input_ids[:, :1]
    for name, call in {
            "pixel_values": lambda: g.model.encode((127 * g.pixels + 128).to(torch.uint8)),
            "input_ids has 128": lambda: g.model(one * 0 + 128), "input_ids has -1": lambda: g.model(one * 0 - 1),
            r"input_ids .* \(1, 0\)": lambda: g.model(one[:, :0]), r"input_ids .* \(1,\)": lambda: g.model(one[0]),
            "input_ids has B = 2 on cpu, and .* 1 on cpu": lambda: g.model(one.repeat(2, 1), cache=cache),
            "input_ids has B = 1 on cpu, and .* 1 on meta": lambda: g.model(one, cache=elsewhere),
            "max_new_tokens must be at least 1, not 0": lambda: g.model.generate(one, max_new_tokens=0),
            "trace must be empty": lambda: g.model(one, trace={"logits": None})}.items():
        with pytest.raises(ValueError, match=name) as error:
            call()
        assert "\n" not in str(error.value)
    assert cache.length == g.input_ids.shape[1]                             # a refused call changes nothing
    g.model(torch.tensor([[0, 127]]))                                       # the first token and the last


def test_trace_of_an_answer(golden):
    g, trace = golden("dev_a"), {}
    answer = g.model.stream(g.input_ids, g.pixels, max_new_tokens=3, trace=trace)
    next(answer)
    assert_close(trace["logits"], g.tensors["logits"][:, -1:])
    of_prompt = dict(trace)
    assert len(list(answer)) == 2 and trace.keys() == of_prompt.keys()
    assert all(trace[name] is of_prompt[name] for name in trace)


def test_answers_end_after_64_tokens(golden):
    g = golden("dev_a")
    answer = g.model.generate(g.input_ids, g.pixels)
    assert len(answer) == 64 and answer[:12] == g.meta["generated_ids"] and answer[-1] != g.meta["eos_token_id"]


@pytest.mark.parametrize("n_good", [0, 2])
def test_logits_that_are_not_finite(golden, monkeypatch, n_good):
    g, head, calls = golden("dev_a"), VideoLM.head, []

    def failing(model, hidden):
        calls.append(hidden)
        return head(model, hidden) * (1 if len(calls) <= n_good else float("nan"))
    monkeypatch.setattr(VideoLM, "head", failing)
    answer = g.model.stream(g.input_ids, g.pixels)
    assert [next(answer) for _ in range(n_good)] == g.meta["generated_ids"][:n_good]
    with pytest.raises(ValueError, match="no finite numbers as float32"):
        next(answer)


def test_inputs_that_do_not_fit(golden):
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
    with pytest.raises(ValueError, match="shorter"):
        show_mask(causal_mask(2, 3), ["one label"])


def test_assertions_show_shapes():
    flags = torch.zeros(2, 3, dtype=torch.bool)
    for call, shapes in ((lambda: causal_mask(3, 2), "3 queries .* 2 positions"),
                         (lambda: causal_mask(0, 2), "0 queries .* 2 positions"),
                         (lambda: open_sink_rows(causal_mask(4, 4), flags), r"4, 4.*2, 3"),
                         (lambda: find_sinks(torch.zeros(3, 5), 1.0, 1.0), r"3, 5"),
                         (lambda: sink_value(torch.zeros(2, 1, 4, 5), flags), r"2, 1, 4, 5.*2, 3"),
                         (lambda: align_with_sink(torch.zeros(2, 1, 4, 5), torch.zeros(2, 1, 5), flags, 3.0, 0.1),
                          r"2, 1, 4, 5.*2, 3")):
        with pytest.raises(AssertionError, match=shapes):
            call()


# ---- attention: written out and fused ----


@pytest.mark.parametrize("case", CASES)
def test_explicit_and_fused_attention(golden, case):
    g = golden(case)
    L = len(g.model.model.text_model.layers)
    trace = Trace(weights_of=range(L))
    assert_close(g.model(g.input_ids, g.pixels, trace=trace), g.model(g.input_ids, g.pixels), 5e-5)
    S = g.input_ids.shape[1]
    for l in range(L):
        weights = trace[f"layers.{l}.weights"]
        assert weights.shape == (1, g.model.config.text_config.num_attention_heads, S, S)
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    only_one = Trace(weights_of=[1])
    g.model(g.input_ids, g.pixels, trace=only_one)
    assert [name for name in only_one if name.endswith(("weights", "may_attend"))] == \
        ["layers.1.weights", "layers.1.may_attend"]


@pytest.mark.parametrize("case", CASES)
def test_causal_by_name(golden, case, monkeypatch):
    """A prompt is causal by name, one new token has no mask, two have one. masks= always reach the kernel."""
    g, calls, fused = golden(case), [], F.scaled_dot_product_attention
    S, L, cache = g.input_ids.shape[1], len(g.model.model.text_model.layers), Cache()
    masks = [causal_mask(S, S)] * L
    shown = g.model.hidden_states(g.input_ids, g.pixels, masks=masks)

    def spy(q, k, v, attn_mask=None, is_causal=False):
        if q.shape[0] == 1 and k.shape[2] >= S:                                 # not those of the encoder
            calls.append("by name" if is_causal else attn_mask if attn_mask is None else attn_mask.shape)
        return fused(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    features = g.model.encode(g.pixels)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    by_name = g.model.hidden_states(g.input_ids, features=features, cache=cache)
    g.model(g.input_ids[:, :1], cache=cache)
    g.model(g.input_ids[:, :2], cache=cache)
    g.model.hidden_states(g.input_ids, features=features, masks=masks)
    assert calls == ["by name"] * L + [None] * L + [(2, S + 3)] * L + [(S, S)] * L
    assert_close(by_name, shown, 1e-5)


# ---- one way and another ----


@pytest.mark.parametrize("case", CASES)
def test_batch_equals_singles(golden, case):
    g = golden(case)
    other = g.pixels.flip(1) * 0.5
    both = g.model(g.input_ids.repeat(2, 1), torch.cat([g.pixels, other]))
    assert_close(both[:1], g.model(g.input_ids, g.pixels), 1e-5)
    assert_close(both[1:], g.model(g.input_ids, other), 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_cached_equals_uncached(golden, case):
    g, cache = golden(case), Cache()
    whole = g.model(g.input_ids, g.pixels)
    prompt = g.model(g.input_ids[:, :-3], g.pixels, cache=cache)
    two = g.model(g.input_ids[:, -3:-1], cache=cache)               # two new tokens in one call, then one
    one = g.model(g.input_ids[:, -1:], cache=cache)
    assert cache.length == g.input_ids.shape[1]
    assert_close(torch.cat([prompt, two, one], dim=1), whole, 1e-5)


def test_keys_and_values_of_a_cache(golden):
    g, cache, whole = golden("dev_c"), Cache(), Cache()
    g.model(g.input_ids[:, :-2], g.pixels, cache=cache)
    g.model(g.input_ids[:, -2:], cache=cache)
    g.model(g.input_ids, g.pixels, cache=whole)
    G, D = g.model.config.text_config.num_key_value_heads, g.model.config.text_config.head_dim
    for l in range(len(cache.k)):
        assert cache.k[l].shape[2] > cache.length                           # spare room after them
        for ours, theirs in ((cache.keys(l), whole.keys(l)), (cache.values(l), whole.values(l))):
            assert ours.shape == (1, G, g.input_ids.shape[1], D)
            assert_close(ours, theirs, 1e-5)
        assert not cache.keys(l).equal(cache.values(l))
    cache.keys(1)[:, 2, 5] = 7.0
    assert (cache.k[1][:, 2, 5] == 7).all()


def test_own_masks_and_positions(golden):
    """Rotary positions encode distances, so shifting all of them changes nothing, and shifting some does. If no
    later token may attend to a token, later states do not depend on it."""
    g, S = golden("dev_a"), golden("dev_a").input_ids.shape[1]
    features, L = g.model.encode(g.pixels), len(g.model.model.text_model.layers)
    states = lambda ids=g.input_ids, **options: g.model.hidden_states(ids, features=features, **options)
    count = torch.arange(S)[None]
    assert states(positions=count).equal(states())
    assert_close(states(positions=count + 5), states(), 1e-4)
    assert (states(positions=count + (count > 9))[0, 10:] != states()[0, 10:]).any()
    hidden_from_all = causal_mask(S, S)
    hidden_from_all[3:, 2] = False
    other = g.input_ids.clone()
    other[0, 2] += 1
    one, two = (states(ids, masks=[hidden_from_all[None]] * L)[0] for ids in (g.input_ids, other))
    assert one[3:].equal(two[3:]) and not one[2].equal(two[2])
    with pytest.raises(ValueError, match="shorter"):
        states(masks=[hidden_from_all] * (L - 1))


def test_frames_do_not_see_each_other(golden):
    g = golden("dev_a")
    together, alone = g.model.encode(g.pixels), g.model.encode(g.pixels[:, 1:])
    assert torch.allclose(together[:, alone.shape[1]:], alone, atol=1e-6)


def test_gradients(golden):
    g = golden("dev_a")
    assert all(parameter.requires_grad for parameter in VideoLM(g.model.config).parameters())
    assert not any(parameter.requires_grad for parameter in g.model.parameters())


def test_half_precision(golden):
    g = golden("dev_c")
    for dtype, tolerance in ((torch.bfloat16, 0.15), (torch.float16, 0.02)):
        half = VideoLM.from_pretrained(g.folder, dtype=dtype)
        logits = half(g.input_ids, g.pixels)
        assert logits.dtype == dtype
        assert_close(logits.float(), g.tensors["logits"], tolerance)
