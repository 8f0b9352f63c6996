"""OutRo in models of transformers: for SmolVLM equal to our model, and for all others correct by hand."""

import threading

import pytest
import torch
import transformers
from helpers import assert_close
from tiny import PLANTED, TEXT, TINY, text
from transformers import AttentionInterface, DynamicCache, GenerationConfig, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minioutro import OutRo
from minioutro.lab.attach import attach
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

GIVEN = dict(abs_threshold=0.0, median_multiple=4.0)    # for dev_a and dev_c, which state no constants


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
            ours = {int(key.split(".")[1]): x for key, x in trace.items() if key.endswith(name) and x.any()}
            assert found.keys() == ours.keys() and all(found[l].equal(ours[l]) for l in ours)
        assert seen.is_sink and bool(seen.opened) == outro.relax
        token_ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)[0, g.input_ids.shape[1]:]
    assert token_ids.tolist() == g.model.generate(g.input_ids, g.pixels, outro=outro, max_new_tokens=12)


# ---- every class ----


@pytest.mark.parametrize("name", TINY)
def test_planted_sinks_open_once(tiny, name):
    """The planted tokens are massive from the input of layer 3 on. The next layer that opens rows is layer 4."""
    case, inputs = tiny(name), tiny(name).prompt(LONG, SHORT)
    with attach(case.model, OutRo()) as seen:
        case.model(**inputs)
    planted = inputs["input_ids"] == PLANTED
    assert planted.sum(1).tolist() == [2, 1]
    assert list(seen.is_sink) == list(seen.v_sink) == list(range(3, 13)) and list(seen.opened) == [4]
    assert all(tokens.equal(planted) for tokens in [*seen.is_sink.values(), *seen.opened.values()])


def heads_of(case, layer, kind, call):
    """The input of o_proj, or the output of v_proj, of a layer while it generates: one (B,H,S,D) for each call."""
    module, kept = getattr(case.layers[layer].self_attn, kind), []
    hook = module.register_forward_hook(lambda _, x, y: kept.append(x[0] if kind == "o_proj" else y))
    case.model.generate(**call)
    hook.remove()
    return [x.unflatten(-1, (-1, TEXT["head_dim"])).transpose(1, 2) for x in kept]


@pytest.mark.parametrize("name", TINY)
def test_only_opened_rows_change(tiny, name):
    """The input of o_proj in layer 4. The input of the layer itself is the same with open and with closed rows."""
    case, inputs = tiny(name), tiny(name).prompt(LONG, SHORT)
    heads = []
    for relax in (False, True):
        with attach(case.model, OutRo(relax=relax, align=False)):
            heads.append(heads_of(case, 4, "o_proj", dict(**inputs, max_new_tokens=1))[0])
    differs = (heads[1] - heads[0]).abs().amax((1, 3))                                          # (B,S)
    planted = inputs["input_ids"] == PLANTED
    assert (differs[planted] > 1e-2).all() and not differs[~planted & inputs["attention_mask"].bool()].any()


@pytest.mark.parametrize("name", TINY)
def test_outputs_turn_towards_v_sink(tiny, name):
    """Tried in layer 3, the first with sinks, because its input is the same with and without alignment."""
    case, inputs = tiny(name), tiny(name).prompt(LONG)
    call = dict(**inputs, **GREEDY, prefix_allowed_tokens_fn=lambda b, ids: [20 + len(ids)])
    planted = inputs["input_ids"] == PLANTED
    out = {}
    for align in (False, True):
        with attach(case.model, OutRo(align=align)):
            out[align] = heads_of(case, 3, "o_proj", call)
    with attach(case.model, OutRo(align=False)) as seen:
        values = heads_of(case, 3, "v_proj", call)[0]
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
def test_padded_batch_equals_singles(tiny, name):
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
    """Everything that attach changes."""
    parts = [m for m in model.modules() if hasattr(m, "config")]
    return ([(type(m).__name__, m.config._attn_implementation) for m in parts],
            [len(m._forward_pre_hooks) for m in model.modules()], model.generation_config.to_dict(),
            "generate" in vars(model), list(ALL_ATTENTION_FUNCTIONS), list(ALL_MASK_ATTENTION_FUNCTIONS))


@pytest.mark.parametrize("name", TINY)
def test_everything_is_put_back(tiny, name):
    case, inputs = tiny(name), tiny(name).prompt(LONG, SHORT)
    before, logits = state(case.model), case.model(**inputs).logits
    with attach(case.model, OutRo()) as seen:
        changed = [now for was, now in zip(before[0], state(case.model)[0], strict=True) if was != now]
        assert changed and not any("Vision" in module or "Audio" in module for module, _ in changed)
        assert not case.model(**inputs).logits.equal(logits)
        assert case.model.generation_config.disable_compile         # on a GPU, a static cache would compile
    assert not any(isinstance(value, torch.Tensor) for value in vars(seen).values())
    assert state(case.model) == before and case.model(**inputs).logits.equal(logits)
    with pytest.raises(KeyError, match="of the user"), attach(case.model, OutRo()):
        raise KeyError("of the user")
    assert state(case.model) == before


@pytest.mark.parametrize("name", TINY)
def test_off_is_eager_attention(tiny, name):
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


# ---- how a prompt is told from what follows, on one class ----


def answer(case, inputs, **options):
    """The generated ids of each row."""
    return case.model.generate(**inputs, **GREEDY, **options)[:, inputs["input_ids"].shape[1]:].tolist()


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2"])
def test_static_cache(tiny, name):
    case, inputs = tiny(name), tiny(name).prompt(LONG, SHORT)
    with attach(case.model, OutRo()):
        assert answer(case, inputs, cache_implementation="static") == answer(case, inputs)


def test_beams(llama):
    inputs = llama.prompt(LONG, SHORT)
    with attach(llama.model, OutRo()):
        found = llama.model.generate(**inputs, **GREEDY, num_beams=3, length_penalty=0.0, output_scores=True,
                                     return_dict_in_generate=True)
        for b, prompt in enumerate((LONG, SHORT)):
            cache, score = DynamicCache(), 0.0
            tokens = llama.prompt(prompt)["input_ids"]
            for token in found.sequences[b, inputs["input_ids"].shape[1]:]:
                logits = llama.model(input_ids=tokens, past_key_values=cache).logits[0, -1]
                score, tokens = score + logits.log_softmax(-1)[token].item(), token[None, None]
            assert score == pytest.approx(found.sequences_scores[b].item(), abs=1e-4)


def test_second_turns_of_two_caches(llama):
    """Two conversations that take turns give the same as each alone. A second turn opens no row."""
    def converse(*prompts):
        caches, logits = [DynamicCache() for _ in prompts], [[] for _ in prompts]
        with attach(llama.model, OutRo()) as seen:
            for cache, prompt in zip(caches, prompts, strict=True):
                llama.model(**llama.prompt(prompt), past_key_values=cache)
            before = dict(seen.is_sink)
            for turn in ([40, PLANTED, 41], [42]):
                for cache, own in zip(caches, logits, strict=True):
                    own.append(llama.model(torch.tensor([turn]), past_key_values=cache).logits)
            assert seen.is_sink == before
        return logits
    together = converse(LONG, SHORT)
    for prompt, own in zip((LONG, SHORT), together, strict=True):
        alone, = converse(prompt)
        assert all(a.equal(b) for a, b in zip(own, alone, strict=True))


def test_padding_on_the_right():
    """Masks of 0 and 1, boolean or added. In float64, because the kernels round differently."""
    llama = TINY["Llama"]()
    llama.model.double()
    ids = torch.tensor([LONG, SHORT + [0] * (len(LONG) - len(SHORT))])
    real, S = ids != 0, len(LONG)
    may_attend = torch.ones(S, S, dtype=torch.bool).tril() & real[:, None, None]
    added = [torch.zeros(2, 1, S, S, dtype=torch.float64).masked_fill(~may_attend, low)
             for low in (-1e9, -torch.inf, torch.finfo(torch.float64).min)]
    with attach(llama.model, OutRo()) as seen:
        alone = torch.cat([llama.model(**llama.prompt(text)).logits[0] for text in (LONG, SHORT)])
        for mask in (real, may_attend, *added):
            assert_close(llama.model(input_ids=ids, attention_mask=mask).logits[real], alone, 1e-9)
            assert list(seen.opened) == [4]


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_opened_mask_by_hand(tiny, monkeypatch, cache):
    """Two prompts, one of them padded, with a window of 6: keys that window or padding forbid stay closed."""
    case, masks, sdpa = tiny("Mistral"), {}, ALL_ATTENTION_FUNCTIONS["sdpa"]
    inputs = case.prompt([PLANTED, 3, 4, 5, 9, 8, 16, 17, PLANTED, 11, 12], SHORT)

    def record(module, query, key, value, mask, **kwargs):
        masks[module.layer_idx] = mask == 0
        return sdpa(module, query, key, value, mask, **kwargs)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", record)
    if cache == "static":
        inputs["past_key_values"] = StaticCache(config=case.model.config, max_cache_len=20)
    with attach(case.model, OutRo()):
        case.model(**inputs)
    for b, row in enumerate(inputs["input_ids"].tolist()):
        for i in (i for i, token in enumerate(row) if token != 0):
            sees = [j for j, token in enumerate(row) if token != 0 and i - 6 < j <= i]
            later = [j for j in range(i + 1, len(row))] if row[i] == PLANTED else []
            assert masks[3][b, 0, i].nonzero().flatten().tolist() == sees
            assert masks[4][b, 0, i].nonzero().flatten().tolist() == sees + later


def test_padding_is_not_searched(llama):
    """The thresholds are low, so that the median decides, which padding would change."""
    outro, both = OutRo(abs_threshold=0.0, median_multiple=3.3), llama.prompt(LONG + [31] * 9, SHORT)
    with attach(llama.model, outro) as seen:
        llama.model(**both)
        together = {l: tokens[1, -len(SHORT):] for l, tokens in seen.is_sink.items() if tokens[1].any()}
        assert not any(tokens[1, :-len(SHORT)].any() for tokens in seen.is_sink.values())
        llama.model(**llama.prompt(SHORT))
    assert together.keys() == seen.is_sink.keys() and len({tuple(t.tolist()) for t in together.values()}) > 2
    assert all(tokens.equal(seen.is_sink[l][0]) for l, tokens in together.items())


def test_hybrid_layers(recwarn):
    """Qwen3-Next has attention in layers 3, 7 and 11 of 15. By default rows would be opened in 0, 2, 4, ..."""
    case = text("Qwen3Next", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2,
                linear_key_head_dim=8, linear_value_head_dim=8)
    inputs, every = case.prompt(LONG), r"attention, \[3, 7, 11\], is a.*another relax_every"
    with attach(case.model, OutRo(), untested=True) as seen, pytest.warns(UserWarning, match=every):
        case.model(**inputs)
    assert list(seen.is_sink) == [3, 7, 11] and not seen.opened
    recwarn.clear()
    with attach(case.model, OutRo(relax_every=7), untested=True) as seen:
        case.model(**inputs)
    assert list(seen.opened) == [7] and not [w for w in recwarn if "no row" in str(w.message)]


# ---- what is refused ----

SMALL = dict(hidden_size=48, intermediate_size=64, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
             num_hidden_layers=5, vocab_size=128, pad_token_id=0)
T5 = dict(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=32)
BART = dict(d_model=16, vocab_size=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0)
GEMMA3N = {**SMALL, "intermediate_size": [64] * 5, "layer_types": ["full_attention"] * 5, "laurel_rank": 4,
           "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8,
           "activation_sparsity_pattern": [0.0] * 5}
GEMMA4 = {**SMALL, "layer_types": ["full_attention"] * 5, "vocab_size_per_layer_input": 128,
          "hidden_size_per_layer_input": 8, "global_head_dim": 8}
SPARSE = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, vocab_size=128, n_routed_experts=4, n_group=1,
              moe_intermediate_size=16, topk_group=1, kv_lora_rank=8, q_lora_rank=16, qk_rope_head_dim=8,
              qk_nope_head_dim=8, v_head_dim=6, index_n_heads=2, index_head_dim=16)
TWICE = dict(hidden_size=48, num_layers=4, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=6,
             ffn_hidden_size=64, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, head_dim=8,
             v_head_dim=8, n_routed_experts=4, zero_expert_num=2, moe_topk=2, expert_ffn_hidden_size=16, vocab_size=128,
             pad_token_id=0)


def small(name, config, **sizes):
    return getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()


@pytest.mark.parametrize("name, config, sizes, why", [
    ("T5ForConditionalGeneration", "T5Config", T5, "it attends to a second sequence"),
    ("BartForConditionalGeneration", "BartConfig", BART, "it attends to a second sequence"),
    ("MllamaForCausalLM", "MllamaTextConfig", dict(cross_attention_layers=[1], **SMALL, rope_parameters=dict(
        rope_type="default", rope_theta=1e4)), "it attends to a second sequence"),
    ("GPT2LMHeadModel", "GPT2Config", dict(n_embd=16, n_layer=2, n_head=2), "it has no decoder with a list"),
    ("Gemma3nForCausalLM", "Gemma3nTextConfig", dict(num_kv_shared_layers=2, **GEMMA3N), "some of its lay"),
    ("Gemma4ForCausalLM", "Gemma4TextConfig", dict(num_kv_shared_layers=2, **GEMMA4), "some of its layers"),
    ("DeepseekV32ForCausalLM", "DeepseekV32Config", SPARSE, "each of its queries attends only to a few"),
    ("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", SPARSE, "each of its queries attends only to a few"),
])
def test_refused_models(name, config, sizes, why):
    model = small(name, config, **sizes)
    before = state(model)
    with pytest.raises(ValueError, match=f"in {name}: {why}.*minioutro.lab.README.md says"), attach(model, OutRo()):
        pass
    assert state(model) == before


def test_layers_with_another_input():
    model = small("Gemma3nForCausalLM", "Gemma3nTextConfig", num_kv_shared_layers=0, **GEMMA3N)
    why = r"Gemma3nTextDecoderLayer: its input is \(4, 1, 3, 48\)"
    with attach(model, OutRo(), untested=True), pytest.raises(ValueError, match=why):
        model(torch.tensor([[3, 4, 5]]))


def test_layer_that_attends_twice():
    model = small("LongcatFlashForCausalLM", "LongcatFlashConfig", **TWICE)
    with attach(model, OutRo(), untested=True), pytest.raises(ValueError, match="its layer attends twice"):
        model(torch.tensor([[3, 4, 5]]))


def test_second_block(llama):
    with attach(llama.model, OutRo()) as seen:
        with pytest.raises(ValueError, match="LlamaForCausalLM has OutRo already"):
            attach(llama.model, OutRo()).__enter__()
        llama.model(**llama.prompt(LONG))
        assert seen.opened


@pytest.mark.parametrize("option, value", [("prefill_chunk_size", 4), ("prompt_lookup_num_tokens", 3),
                                           ("assistant_early_exit", 2), ("use_cache", False)])
def test_prompts_not_read_whole(llama, monkeypatch, option, value):
    """The option may come from an argument, from a config, or from the model's own config."""
    why = f"{option}.*generate without it"
    with attach(llama.model, OutRo()):
        for options in ({option: value}, {"generation_config": GenerationConfig(**{option: value})}):
            with pytest.raises(ValueError, match=why):
                llama.model.generate(**llama.prompt(LONG), **options)
        monkeypatch.setattr(llama.model.generation_config, option, value)
        with pytest.raises(ValueError, match=why):
            llama.model.generate(**llama.prompt(LONG))
        monkeypatch.undo()


def test_cache_filled_elsewhere(llama):
    """A cache that was filled before the block, in another block, or with a prompt that was not read to its end."""
    model, inputs, step = llama.model, llama.prompt(LONG), torch.tensor([[5]])
    caches = [DynamicCache() for _ in range(3)]
    model(**inputs, past_key_values=caches[0])
    with attach(model, OutRo()):
        model(**inputs, past_key_values=caches[1])
    stop = model.model.layers[6].register_forward_hook(lambda *_: 1 / 0)
    with attach(model, OutRo()):
        with pytest.raises(ZeroDivisionError):
            model(**inputs, past_key_values=caches[2])
        stop.remove()
        model(**inputs)
        for cache in caches:
            with pytest.raises(ValueError, match="begin with an empty cache"):
                model(step, past_key_values=cache)


# ---- what would otherwise be wrong without an error ----


def test_type_that_was_never_tried(llama):
    case = text("Olmo2")
    with pytest.raises(ValueError, match="its type olmo2 was never tried"), attach(case.model, OutRo()):
        pass
    with attach(case.model, OutRo(), untested=True) as seen:
        case.model(**case.prompt(LONG))
    assert list(seen.opened) == [4]


def test_inner_model_without_a_head(llama):
    with pytest.raises(ValueError, match="in LlamaModel: it has no head"), attach(llama.model.model, OutRo()):
        pass


def test_training_mode(llama):
    """In training mode a layer may be computed a second time for its gradient, so it is refused."""
    llama.model.train()
    try:
        with attach(llama.model, OutRo()), pytest.raises(ValueError, match="training mode.*eval"):
            llama.model(**llama.prompt(LONG))
    finally:
        llama.model.eval()


def test_second_thread(llama):
    inputs, refused = llama.prompt(LONG), []

    def call():
        try:
            llama.model(**inputs)
        except ValueError as error:
            refused.append(str(error))

    def call_from_another_thread(*_):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    with attach(llama.model, OutRo()):
        expected = llama.model(**inputs).logits
        hook = llama.layers[5].register_forward_pre_hook(call_from_another_thread)
        assert llama.model(**inputs).logits.equal(expected)
        hook.remove()
        call()
    assert len(refused) == 1 and "another thread" in refused[0]


def test_texts_packed_into_one_row(llama):
    ids, positions = torch.tensor([SHORT + SHORT]), torch.tensor([[*range(5), *range(5)]])
    with attach(llama.model, OutRo()):
        with pytest.raises(ValueError, match="positions of a row step back"):
            llama.model(input_ids=ids, position_ids=positions, use_cache=False)
        llama.model(**llama.prompt(LONG))


@pytest.mark.parametrize("choose", [lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
                                    lambda cache: cache.batch_select_indices(torch.tensor([1]))])
def test_reordered_cache(llama, choose):
    inputs, cache = llama.prompt(LONG, SHORT), DynamicCache()
    with attach(llama.model, OutRo()):
        llama.model(**inputs, past_key_values=cache)
        choose(cache)
        step = torch.full((cache.layers[0].keys.shape[0], 1), 5)
        with pytest.raises(ValueError, match="rows of the cache were reordered"):
            llama.model(step, past_key_values=cache)


def test_mask_with_a_bias(llama):
    S = len(LONG)
    mask = torch.zeros(1, 1, S, S).masked_fill(torch.ones(S, S).triu(1) > 0, -torch.inf)
    mask[0, 0, 5, 2] = -1.5
    with attach(llama.model, OutRo()), pytest.raises(ValueError, match="values between allowed"):
        llama.model(input_ids=torch.tensor([LONG]), attention_mask=mask)
