"""OutRo in models of transformers: equal to ours where ours is the model, and itself everywhere else."""

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import assert_close
from tiny import PLANTED, TEXT, TINY, text
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GenerationConfig, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minioutro import OutRo
from minioutro.attach import attach
from minioutro.model import align_with_sink

LONG = [PLANTED, 3, 4, 5, 9, PLANTED, 11, 12, 13, 14]
SHORT = [PLANTED, 21, 22, 11, 23]
GREEDY = dict(do_sample=False, max_new_tokens=4, min_new_tokens=4)


@pytest.fixture(scope="module")
def tiny():
    made = {}
    return lambda name: made.setdefault(name, None) or made.update({name: TINY[name]()}) or made[name]


@pytest.fixture
def llama(tiny):
    return tiny("Llama")


# ---- SmolVLM: ours and theirs on the same weights ----

GIVEN = dict(abs_threshold=0.0, median_multiple=4.0)         # dev_a and dev_c are no OutRo cases: any sinks do


@pytest.mark.parametrize("switches", [{}, {"relax": False}, {"align": False}])
@pytest.mark.parametrize("case", ["dev_late", "dev_natural", "dev_a", "dev_c"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_smolvlm_equals_our_model(golden, case, switches, attention):
    g, trace = golden(case), {}
    outro = g.outro(**switches) if "gamma" in g.meta else OutRo(**GIVEN, **switches)
    theirs = transformers.SmolVLMForConditionalGeneration.from_pretrained(
        g.folder, dtype=torch.float32, attn_implementation=attention).eval()
    inputs = dict(input_ids=g.input_ids, pixel_values=g.pixels)
    logits = g.model(g.input_ids, g.pixels, outro=outro, trace=trace)
    with attach(theirs, outro) as seen:
        assert_close(theirs(**inputs).logits, logits)
        for name, found in (("is_sink", seen.is_sink), ("relaxed", seen.opened)):
            ours = {l: trace[f"layers.{l}.{name}"] for l in range(g.model.config.text_config.num_hidden_layers)}
            assert found.keys() == {l for l, tokens in ours.items() if tokens.any()}
            assert all(tokens.equal(ours[l]) for l, tokens in found.items())
        assert seen.is_sink and bool(seen.opened) == outro.relax
        token_ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)[0, g.input_ids.shape[1]:]
    assert token_ids.tolist() == g.model.generate(g.input_ids, g.pixels, outro=outro, max_new_tokens=12)


# ---- every class ----


@pytest.mark.parametrize("name", TINY)
def test_sinks_are_where_they_were_planted_and_their_rows_are_opened_once(tiny, name):
    """Massive from the input of layer 3 on; the first layer from there that opens rows is 4 of 15."""
    case, inputs = tiny(name), tiny(name).prompt(LONG, SHORT)
    with attach(case.model, OutRo()) as seen:
        case.model(**inputs)
    planted = inputs["input_ids"] == PLANTED
    assert planted.sum(1).tolist() == [2, 1]
    assert list(seen.is_sink) == list(seen.v_sink) == list(range(3, 13)) and list(seen.opened) == [4]
    assert all(tokens.equal(planted) for tokens in [*seen.is_sink.values(), *seen.opened.values()])


def heads_of(model, layer, kind, **call):
    """What goes into o_proj, or out of v_proj, of a layer, in each call of the model: list of (B,H,S,D)."""
    module, kept = model.get_submodule(next(n for n, _ in model.named_modules() if "vi" not in n and n.endswith(
        f"layers.{layer}.self_attn.{kind}"))), []
    hook = module.register_forward_hook(lambda m, args, out: kept.append(args[0] if kind == "o_proj" else out))
    model.generate(**call)
    hook.remove()
    return [x.unflatten(-1, (-1, TEXT["head_dim"])).transpose(1, 2) for x in kept]


@pytest.mark.parametrize("name", TINY)
def test_the_outputs_of_prompt_and_answer_are_turned_towards_the_sinks_value(tiny, name):
    """In layer 3, the first with sinks, what comes in is the same with and without alignment."""
    case, inputs = tiny(name), tiny(name).prompt(LONG)
    call = dict(**inputs, **GREEDY, prefix_allowed_tokens_fn=lambda b, ids: [20 + len(ids)])
    planted = inputs["input_ids"] == PLANTED
    out = {}
    for align in (False, True):
        with attach(case.model, OutRo(align=align)):
            out[align] = heads_of(case.model, 3, "o_proj", **call)
    with attach(case.model, OutRo(align=False)) as seen:
        values = heads_of(case.model, 3, "v_proj", **call)[0]
    v_sink = values[:, :, planted[0]].mean(2)
    assert torch.allclose(seen.v_sink[3], v_sink, atol=1e-6) and len(out[True]) == 4
    moved = [not torch.allclose(*pair, atol=1e-3) for pair in zip(out[False], out[True], strict=True)]
    assert moved[0] and any(moved[1:])
    for step, (plain, turned) in enumerate(zip(out[False], out[True], strict=True)):
        ever_sink = planted if step == 0 else torch.zeros(1, 1, dtype=torch.bool)
        expected = align_with_sink(plain, v_sink, ever_sink, 3.0, 0.1)
        assert torch.allclose(turned, expected, atol=1e-5)
        assert torch.allclose(turned.norm(dim=-1), plain.norm(dim=-1), rtol=1e-4)
        assert turned.transpose(1, 2)[ever_sink].equal(plain.transpose(1, 2)[ever_sink])


@pytest.mark.parametrize("name", TINY)
def test_a_batch_padded_on_the_left_equals_its_prompts_alone(tiny, name):
    case, outro = tiny(name), OutRo()
    call = dict(**GREEDY, output_logits=True, return_dict_in_generate=True)
    both = case.prompt(LONG, SHORT)
    with attach(case.model, outro) as seen:
        together = torch.stack(case.model.generate(**both, **call).logits)                  # (4,B,V)
        sinks = {l: tokens[1, both["attention_mask"][1].bool()] for l, tokens in seen.is_sink.items()}
        for b, prompt in enumerate((LONG, SHORT)):
            inputs = case.prompt(prompt)
            for key, value in case.given.items():
                inputs[key] = both[key][b * len(value):(b + 1) * len(value)]
            alone = torch.stack(case.model.generate(**inputs, **call).logits)
            assert_close(together[:, b:b + 1], alone)
    assert sinks and all(tokens.equal(seen.is_sink[l][0]) for l, tokens in sinks.items())
    plain = torch.stack(case.model.generate(**both, **call).logits)
    assert not torch.allclose(together[0], plain[0], atol=1e-3)


def state(model):
    """All that attach touches."""
    return ([(type(m).__name__, m.config._attn_implementation) for m in model.modules() if hasattr(m, "config")],
            [len(m._forward_pre_hooks) for m in model.modules()], model.generation_config.to_dict(),
            "generate" in vars(model), list(ALL_ATTENTION_FUNCTIONS), list(ALL_MASK_ATTENTION_FUNCTIONS))


@pytest.mark.parametrize("name", TINY)
def test_everything_is_put_back_also_after_an_error(tiny, name):
    case, inputs = tiny(name), tiny(name).prompt(LONG, SHORT)
    before, logits = state(case.model), case.model(**inputs).logits
    with attach(case.model, OutRo()):
        changed = [now for was, now in zip(before[0], state(case.model)[0], strict=True) if was != now]
        assert changed and not any("Vision" in module for module, _ in changed)
        assert not case.model(**inputs).logits.equal(logits)
    assert state(case.model) == before and case.model(**inputs).logits.equal(logits)
    with pytest.raises(KeyError, match="of the user"), attach(case.model, OutRo()):
        raise KeyError("of the user")
    assert state(case.model) == before


@pytest.mark.parametrize("name", TINY)
def test_with_nothing_on_or_nothing_found_it_is_eager_attention(tiny, name):
    case, inputs = tiny(name), tiny(name).prompt(LONG, SHORT)
    before = case.model.config.get_text_config()._attn_implementation
    case.model.set_attn_implementation("eager")
    try:
        logits, answer = case.model(**inputs).logits, case.model.generate(**inputs, **GREEDY)
        for outro in (OutRo(relax=False, align=False), OutRo(median_multiple=1e9)):
            with attach(case.model, outro) as seen:
                assert case.model(**inputs).logits.equal(logits)
                assert case.model.generate(**inputs, **GREEDY).equal(answer)
                assert bool(seen.is_sink) == (outro.median_multiple < 1e9) and not seen.opened
    finally:
        case.model.set_attn_implementation(before)
