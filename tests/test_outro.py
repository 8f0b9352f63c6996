"""The method in the model: equal to the published code, and to a second, slower implementation.

Its functions are tested one by one in test_exercises.py.
"""

import math
from dataclasses import replace

import pytest
import torch
from helpers import assert_close

from minioutro import Cache, OutRo, Trace
from minioutro import model as module
from minioutro.model import (
    align_with_sink,
    attention,
    causal_mask,
    open_sink_rows,
    rope_tables,
    rotate,
)

CASES = ("dev_late", "dev_natural")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unturned_tokens_stay_the_same(dtype):
    """Bit for bit: item 0 has no sink, and in item 1 token 2 is one and token 4 is zero. Two memory layouts."""
    generator = torch.Generator().manual_seed(6)
    v_sink = torch.randn(2, 3, 10, generator=generator).to(dtype)
    v_sink[0], ever_sink = 0, torch.zeros(2, 7, dtype=torch.bool)
    ever_sink[1, 2] = True
    for scale in (1e-3, 1.0, 100.0):
        out = torch.randn(2, 7, 6, 11, generator=generator).mul(scale).to(dtype)
        out[1, 4] = 0
        for laid_out in (out[..., :10].transpose(1, 2), out.transpose(1, 2)[..., :10].contiguous()):
            turned = align_with_sink(laid_out, v_sink, ever_sink, 3.0, 0.1)
            assert turned[0].equal(laid_out[0]) and turned.dtype == dtype
            assert turned[1, :, 2].equal(laid_out[1, :, 2]) and (turned[1, :, 4] == 0).all()
            assert not turned[1, :, :2].equal(laid_out[1, :, :2])


# ---- constants ----


def test_defaults_are_these_numbers():
    """The numbers as they stand in the release, in model/outro.py and modeling_qwen2_5_omni.py."""
    assert OutRo() == OutRo(abs_threshold=100.0, median_multiple=1000.0, relax=True, align=True, gamma=3.0,
                            temperature=0.1, relax_every=None, skip_last=2)


@pytest.mark.parametrize("wrong", [
    dict(temperature=0.0), dict(temperature=math.inf), dict(relax_every=0), dict(relax_every=0.5),
    dict(gamma=-1.0), dict(gamma=math.nan), dict(median_multiple=math.nan), dict(median_multiple=math.inf),
    dict(abs_threshold=-1), dict(skip_last=-1), dict(skip_last=2.0), dict(skip_last=None)])
def test_impossible_constants(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OutRo(**wrong)


# ---- equal to the published code ----


@pytest.mark.parametrize("case", CASES)
def test_prompts_equal_the_published_code(golden, case):
    g, trace = golden(case), {}
    L = g.meta["L"]
    assert_close(g.model(g.input_ids, g.pixels, outro=g.outro(), trace=trace), g.tensors["logits_on"])
    found = {name: torch.cat([trace[f"layers.{l}.{name}"] for l in range(L)])
             for name in ("is_sink", "relaxed")}
    assert found["is_sink"].equal(g.tensors["is_sink"].bool()) and found["is_sink"].any()
    assert found["relaxed"].equal(g.tensors["is_relaxed"].bool()) and found["relaxed"].any()
    assert_close(g.model(g.input_ids, g.pixels), g.tensors["logits_off"])
    for switch, name in (("relax", "logits.align_only"), ("align", "logits.relax_only")):
        outro, trace = g.outro(**{switch: False}), {}
        assert_close(g.model(g.input_ids, g.pixels, outro=outro, trace=trace), g.tensors[name])
    for l in range(L):                                              # of the last run, with relaxation only
        assert_close(trace[f"layers.{l}.hidden"], g.tensors[f"hidden.{l}"])


@pytest.mark.parametrize("case", CASES)
def test_answers_equal_the_published_code(golden, decoded, case):
    """The release aligns no generated token in a layer where position 0 is a sink. In dev_late these are all
    layers with a sink, so OutRo ends after the prompt. In dev_natural it is none of them."""
    g, trace, cache, forgetting = golden(case), {}, Cache(), []
    logits = g.model(g.input_ids, g.pixels, outro=g.outro(), cache=cache, trace=trace)
    is_sink = torch.cat([trace[f"layers.{l}.is_sink"] for l in range(g.meta["L"])])         # (L,S)
    assert is_sink[is_sink.any(1), 0].unique().tolist() == [case == "dev_late"]
    cache.sinks = None
    while len(forgetting) < 24:
        forgetting.append(logits[0, -1].argmax().item())
        logits = g.model(torch.tensor([forgetting[-1:]]), cache=cache)
    assert forgetting == decoded[case]["no_decode_alignment"]
    ours = g.model.generate(g.input_ids, g.pixels, outro=g.outro(), max_new_tokens=24)
    assert ours == decoded[case]["ids"] != forgetting
    assert g.model.generate(g.input_ids, g.pixels, max_new_tokens=24) == decoded[case]["off"]


# ---- equal to a second implementation, without cache and without vectorising ----


def slow_outro(model, input_ids, n_prompt, outro, features):
    """Logits of one prompt and of the tokens generated after it, in one pass. Rows of sinks reach to the end of
    the prompt, and only the prompt is searched. Written with loops, directly from the description."""
    text, c = model.model.text_model, model.config.text_config
    L, H, G, D = c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    S = input_ids.shape[1]
    hidden = model.merge(text.embed_tokens(input_ids), input_ids, features)
    cos, sin = rope_tables(torch.arange(S), D, c.rope_theta, hidden)
    ever, opened = set(), set()
    for l, layer in enumerate(text.layers):
        x = layer.input_layernorm(hidden)[0]
        q, k, v = (getattr(layer.self_attn, f"{n}_proj")(x).view(S, -1, D).transpose(0, 1)[None] for n in "qkv")
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        sinks, mask = [], causal_mask(S, S)
        if l < L - outro.skip_last:
            magnitude = hidden[0, :n_prompt].abs()
            floor = max(outro.abs_threshold,
                        outro.median_multiple * magnitude.flatten().sort().values[(n_prompt * c.hidden_size - 1) // 2])
            sinks = [i for i in range(n_prompt) if magnitude[i].max() >= floor]
        ever.update(sinks)
        if outro.relax and l % max(1, L // 7) == 0:
            for i in set(sinks) - opened:
                mask[i, :n_prompt] = True
            opened.update(sinks)
        out, _ = attention(q, k, v, mask)
        if outro.align and sinks:
            for h in range(H):
                v_sink = sum(v[0, h // (H // G), i] for i in sinks) / len(sinks)
                for t in set(range(S)) - ever:
                    o = out[0, h, t].clone()
                    c_ = torch.dot(o, v_sink) / (o.norm() * v_sink.norm())
                    gate = math.tanh(max(0.0, c_.item()) / outro.temperature)
                    new = o + gate * outro.gamma * torch.dot(o, v_sink) / v_sink.norm()**2 * v_sink
                    out[0, h, t] = new * o.norm() / new.norm()
        hidden = hidden + layer.self_attn.o_proj(out[0].transpose(0, 1).reshape(1, S, H * D))
        x = layer.post_attention_layernorm(hidden)
        gate = torch.nn.functional.silu(layer.mlp.gate_proj(x))
        hidden = hidden + layer.mlp.down_proj(gate * layer.mlp.up_proj(x))
    return model.head(text.norm(hidden))


@pytest.mark.parametrize("switches", [{}, {"relax": False}, {"align": False}])
@pytest.mark.parametrize("case", CASES)
def test_decoding_equals_one_slow_pass(golden, case, switches):
    g, cache, outro = golden(case), Cache(), golden(case).outro(**switches)
    features, S = g.model.encode(g.pixels), g.input_ids.shape[1]
    ids, steps = g.input_ids, [g.model(g.input_ids, features=features, outro=outro, cache=cache)]
    for _ in range(4):
        ids = torch.cat([ids, steps[-1][:, -1:].argmax(-1)], dim=1)
        steps.append(g.model(ids[:, -1:], cache=cache))
    assert_close(torch.cat(steps, dim=1), slow_outro(g.model, ids, S, outro, features), 5e-5)


# ---- properties ----


@pytest.mark.parametrize("case", CASES)
def test_off_is_the_baseline(golden, case):
    g = golden(case)
    baseline = g.model(g.input_ids, g.pixels)
    nothing_on, no_sink = g.outro(relax=False, align=False), OutRo(median_multiple=1e9)
    assert g.model(g.input_ids, g.pixels, outro=nothing_on).equal(baseline)
    assert g.model(g.input_ids, g.pixels, outro=no_sink).equal(baseline)
    assert not g.model(g.input_ids, g.pixels, outro=g.outro()).equal(baseline)
    for outro in (nothing_on, no_sink):
        assert g.model.generate(g.input_ids, g.pixels, outro=outro, max_new_tokens=8) == \
            g.model.generate(g.input_ids, g.pixels, max_new_tokens=8)


def test_batch_with_sinks_equals_singles(golden):
    """The second item has other frames, and its last five tokens are reversed. So it has other sinks."""
    g = golden("dev_natural")
    features = torch.cat([g.model.encode(g.pixels), 3 * g.model.encode(g.pixels.flip(1))])
    ids, outro = g.input_ids.repeat(2, 1), g.outro()
    ids[1, -5:] = ids[1, -5:].flip(0)
    both, alone, cache = {}, [{}, {}], Cache()
    logits = g.model(ids, features=features, outro=outro, trace=both, cache=cache)
    step = g.model(ids[:, :1], cache=cache)
    for b in range(2):
        single = Cache()
        logits_b = g.model(ids[b:b + 1], features=features[b:b + 1], outro=outro, trace=alone[b],
                           cache=single)
        assert_close(logits[b:b + 1], logits_b, 1e-5)
        assert_close(step[b:b + 1], g.model(ids[b:b + 1, :1], cache=single), 1e-5)
    L = g.meta["L"]
    sinks = [torch.cat([trace[f"layers.{l}.is_sink"] for l in range(L)]) for trace in alone]
    assert not sinks[0].equal(sinks[1])
    for l in range(L):
        assert both[f"layers.{l}.is_sink"].equal(torch.stack([sinks[0][l], sinks[1][l]]))


def test_sink_rows_open_once(golden):
    for case in CASES:
        g, trace = golden(case), Trace(weights_of=range(golden(case).meta["L"]))
        g.model(g.input_ids, g.pixels, outro=g.outro(), trace=trace)
        L, S = g.meta["L"], g.input_ids.shape[1]
        relaxed = torch.cat([trace[f"layers.{l}.relaxed"] for l in range(L)])
        assert relaxed.sum(0).max() == 1
        assert not relaxed[torch.arange(L) % max(1, L // 7) != 0].any()
        for l in range(L):
            expected = open_sink_rows(causal_mask(S, S), relaxed[None, l])
            assert trace[f"layers.{l}.may_attend"].expand(1, S, S).equal(expected)
        for l in (L - 2, L - 1):
            assert not trace[f"layers.{l}.is_sink"].any() and not trace[f"layers.{l}.v_sink"].any()
            assert trace[f"layers.{l}.aligned"].equal(trace[f"layers.{l}.out"])


def test_trace_of_outro(golden):
    g, trace = golden("dev_natural"), {}
    g.model(g.input_ids, g.pixels, outro=g.outro(), trace=trace)
    ever_sink = torch.zeros_like(g.input_ids, dtype=torch.bool)
    for l in range(g.meta["L"] - 2):
        entry = lambda name: trace[f"layers.{l}.{name}"]
        is_sink = entry("is_sink")
        ever_sink |= is_sink
        largest = entry("ratio") * entry("hidden").abs().flatten().median()
        assert is_sink.equal(entry("ratio") >= g.meta["median_multiple"])
        assert torch.allclose(largest, entry("hidden").abs().amax(-1))
        repeated = align_with_sink(entry("out"), entry("v_sink"), ever_sink, 3.0, 0.1)
        assert entry("aligned").equal(repeated)
        turned = (entry("cosine") > 0.01) & ~ever_sink[:, None]
        assert (entry("cosine_aligned")[turned] > entry("cosine")[turned]).all()
        assert turned.any() == is_sink.any()


def test_future_reaches_the_past_through_sinks(golden):
    """Change the last token. In the baseline, no earlier logits move. With OutRo they do. Later layers read the
    opened sink (relax). Or, with all rows closed, outputs are turned towards the value of a later sink, which
    here is the last token itself (align)."""
    g = golden("dev_natural")
    features, ids = g.model.encode(g.pixels), g.input_ids.clone()
    ids[0, -1] = 5
    assert g.input_ids[0, -1] != 5

    moved = lambda outro: (g.model(g.input_ids, features=features, outro=outro)[:, :-1]
                           - g.model(ids, features=features, outro=outro)[:, :-1]).abs().max().item()
    assert moved(None) == 0
    assert moved(g.outro(align=False)) > 0.01
    align, trace = replace(g.outro(relax=False), median_multiple=2.0), {}
    g.model(ids, features=features, outro=align, trace=trace)
    assert trace["layers.0.is_sink"][0, -1] and moved(align) > 1e-3


def test_first_token_knows_nothing_until_opened(golden):
    g = golden("dev_late")
    last = g.meta["L"] - 3
    features = g.model.encode(g.pixels)
    states = {}
    for relax in (False, True):
        for name, video in (("one", features), ("other", -features)):
            trace = {}
            g.model(g.input_ids, features=video, outro=g.outro(relax=relax, align=False), trace=trace)
            assert trace[f"layers.{last}.is_sink"][0, 0]
            states[relax, name] = trace[f"layers.{last}.hidden"][0, 0]
    assert states[False, "one"].equal(states[False, "other"])
    assert not states[True, "one"].equal(states[True, "other"])


def test_no_second_pass_and_no_weights(golden, monkeypatch):
    g, calls = golden("dev_late"), []

    def forbidden(*_):
        raise AssertionError("the explicit path was taken")
    forward = module.DecoderLayer.forward
    monkeypatch.setattr(module, "attention", forbidden)
    monkeypatch.setattr(module.DecoderLayer, "forward",
                        lambda layer, *args: calls.append(layer.index) or forward(layer, *args))
    token_ids = g.model.generate(g.input_ids, g.pixels, outro=g.outro(), max_new_tokens=3, trace={})
    assert len(token_ids) == 3 and calls == list(range(g.meta["L"])) * 3
    with pytest.raises(AssertionError, match="explicit path"):
        g.model(g.input_ids, g.pixels, trace=Trace(weights_of=[0]))


def test_cache_keeps_outro(golden):
    """A later call may give no outro or an equal one, but not another. At a new prompt, None means no OutRo."""
    g, steps = golden("dev_late"), []
    for later in (None, g.outro()):
        cache = Cache()
        g.model(g.input_ids, g.pixels, outro=g.outro(), cache=cache)
        steps.append(g.model(g.input_ids[:, :2], outro=later, cache=cache))
        for other in (g.outro(skip_last=1), replace(g.outro(), gamma=1.0)):
            with pytest.raises(ValueError, match=r"gamma=\d.*read with OutRo\(.*leave it out after"):
                g.model(g.input_ids[:, :1], outro=other, cache=cache)
    assert steps[0].equal(steps[1])

    cache = Cache()
    baseline = g.model(g.input_ids, g.pixels, cache=cache)
    with pytest.raises(ValueError, match="read with None"):
        g.model(g.input_ids[:, :1], outro=g.outro(), cache=cache)
    nobody = torch.zeros_like(g.input_ids, dtype=torch.bool)
    unused = Cache(sinks=module.Sinks(g.outro(), g.meta["L"], nobody))
    assert g.model(g.input_ids, g.pixels, cache=unused).equal(baseline) and unused.sinks is None


# ---- another detector, and a prompt that was interrupted ----


def like_the_first(hidden):
    """The rule of secondary attention sinks (arXiv 2512.22213)."""
    return torch.cosine_similarity(hidden, hidden[:, :1], dim=-1).abs() > 0.9


def test_another_rule_finds_other_sinks(golden):
    """The sinks are those of the rule, in every layer that is searched, and their rows are opened."""
    g, trace = golden("dev_natural"), {}
    g.model(g.input_ids, g.pixels, outro=OutRo(rule=like_the_first), trace=trace)
    for l in range(g.meta["L"] - 2):
        assert trace[f"layers.{l}.is_sink"].equal(like_the_first(trace[f"layers.{l}.hidden"]))
    assert trace["layers.0.relaxed"].equal(trace["layers.0.is_sink"]) and trace["layers.0.is_sink"][0, 0]
    assert not trace[f"layers.{g.meta['L'] - 2}.is_sink"].any()


def test_rule_with_another_shape(golden):
    g = golden("dev_natural")
    with pytest.raises(AssertionError, match=r"bool\[B,S\] = \(1, \d+\), not torch.float32"):
        g.model(g.input_ids, g.pixels, outro=OutRo(rule=lambda hidden: hidden.amax(-1)))


@pytest.mark.parametrize("layer", [0, 3, 7])
def test_interrupted_prompt(golden, monkeypatch, layer):
    """After that, a batch of two other prompts gives the same as with a new cache."""
    g, cache = golden("dev_late"), Cache()
    mlp = g.model.model.text_model.layers[layer].mlp

    def interrupt(x):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mlp, "forward", interrupt)
        g.model(g.input_ids, g.pixels, outro=g.outro(), cache=cache)
    text = g.input_ids[:, -6:].repeat(2, 1)
    steps = []
    for used in (cache, Cache()):
        steps.append(g.model(text, outro=g.outro(), cache=used))
        steps.append(g.model(text[:, :2], cache=used))
    assert steps[0].equal(steps[2]) and steps[1].equal(steps[3])
