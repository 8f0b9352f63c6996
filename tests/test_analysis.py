"""The paper's questions: each function on numbers that can be checked by hand, or against a second way."""

import json
import math
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import TOY

from minioutro import Cache, OutRo, Trace, model, read_video
from minioutro.lab import analysis, sink_report
from minioutro.lab.analysis import (
    QUESTION,
    Examples,
    attention_mass,
    detectors,
    examples,
    heads_by_sink_attention,
    image_token_masks,
    logits_of,
    loss_of,
    nop_or_broadcast,
    overlap,
    phi,
    probe,
    sink_dimensions,
    sink_share,
    token_losses,
    value_split,
    with_zeros,
    without_head,
    without_row,
)
from minioutro.lab.sink_report import analyse, report, sources, table, weights_by_head, without_token
from minioutro.model import causal_mask

WEIGHTS = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.7, 0.1]])         # one head, (Q,K)
SELFISH = torch.eye(3)


@pytest.fixture(scope="module")
def asked(toy):
    return examples(*toy, n=3)


# ---- Q1 ----


def test_attention_mass_and_sink_share_by_hand():
    """Key 0 draws 1 + 0.5 + 0.2 of three queries, key 1 draws 1.2 of two, key 2 draws 0.1 of one."""
    weights = torch.stack([WEIGHTS, SELFISH])[None]
    assert torch.allclose(attention_mass(weights)[0, 0], torch.tensor([1.7 / 3, 0.6, 0.1]))
    assert torch.allclose(attention_mass(weights)[0, 1], torch.tensor([1 / 3, 1 / 2, 1.0]))
    assert sink_share(attention_mass(weights)).tolist() == [[1.0, 1.0, 0.5]]
    assert sink_share(attention_mass(weights), threshold=0.5).tolist() == [[0.5, 0.5, 0.5]]


def test_phi_by_hand_and_the_width_that_a_threshold_of_20_needs():
    """Of (3, 0, -4, 0) the mean square is 25 / 4. One huge coordinate gives sqrt(C): 20 at C = 400."""
    hidden = torch.tensor([[[3.0, 0.0, -4.0, 0.0]]])
    assert phi(hidden, torch.tensor([0, 2])).item() == pytest.approx(4 / 2.5)
    assert phi(hidden, torch.tensor([0])).item() == pytest.approx(3 / 2.5)
    for C in (64, 399, 401):
        massive = torch.zeros(1, 1, C)
        massive[0, 0, 5] = -1e4
        assert phi(massive, torch.tensor([5])).item() == pytest.approx(math.sqrt(C))
        assert (phi(massive, torch.tensor([5])) > 20).item() == (C > 400)


def test_sink_dimensions_are_those_of_the_most_massive_token():
    hidden = torch.tensor([[[1.0, 7.0, 8.0], [0.0, 0.0, 0.0]], [[-9.0, 1.0, 2.0], [5.0, 6.0, 7.0]]])
    assert sink_dimensions(hidden, 2).tolist() == [0, 2] and sink_dimensions(hidden, 1).tolist() == [0]


def test_each_detector_looks_at_its_own_definition():
    """Token 0 is massive in coordinate 1; token 1 draws attention; token 2 is small, yet all in 1."""
    hidden = torch.tensor([[[1.0, 5000.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 0.0]]])
    drawing = torch.tensor([[1.0, 0.0, 0.0], [0.1, 0.9, 0.0], [0.0, 0.8, 0.2]])
    weights = torch.stack([drawing, torch.zeros(3, 3)])[None]           # one head of two: that is half
    found = detectors(hidden, attention_mass(weights), torch.tensor([1]))
    assert {name: is_sink[0].tolist() for name, is_sink in found.items()} == {
        "activation": [True, False, False], "attention": [True, True, False],
        "dimensions": [True, True, True], "phi > 20": [False, False, False]}
    assert overlap(found["activation"], found["dimensions"]) == pytest.approx(1 / 3)
    assert overlap(found["attention"], found["activation"]) == 0.5
    assert overlap(*found.values()) == 0 and overlap(*list(found.values())[:3]) == pytest.approx(1 / 3)
    assert overlap(found["phi > 20"], found["phi > 20"]) == 0


# ---- Q2 ----


def test_heads_are_ranked_by_what_the_sink_draws_of_them():
    trace = {"layers.2.weights": torch.stack([SELFISH, WEIGHTS])[None],
             "layers.4.weights": torch.stack([WEIGHTS / 2, WEIGHTS * 2])[None]}
    assert [(l, h) for _, l, h in heads_by_sink_attention(trace, (2, 4), 0)] == \
        [(4, 1), (2, 1), (2, 0), (4, 0)]
    assert heads_by_sink_attention(trace, (2,), 1)[0] == (pytest.approx(0.6), 2, 1)


def test_a_head_is_removed_from_a_copy_alone(toy, asked):
    """Its columns of o_proj are zero; without all heads a layer adds nothing but its MLP."""
    model = toy[0]
    name = "model.text_model.layers.3.self_attn.o_proj.weight"
    D, H = model.config.text_config.head_dim, model.config.text_config.num_attention_heads
    before = model.get_parameter(name).clone()
    changed = without_head(model, 3, 1)
    difference = (changed.get_parameter(name) - before).abs().sum(0).view(H, D)
    assert difference.any(1).tolist() == [h == 1 for h in range(H)]
    assert not changed.get_parameter(name)[:, D:2 * D].any()
    assert model.get_parameter(name).equal(before)
    assert all(theirs is ours for (other, theirs), (_, ours) in
               zip(changed.named_parameters(), model.named_parameters()) if other != name)
    assert not loss_of(changed, asked).equal(loss_of(model, asked))
    for h in range(H):
        changed = without_head(changed, 3, h)
    assert loss_of(changed, asked).equal(loss_of(with_zeros(model, name, ...), asked))


def test_a_row_is_silenced_in_one_layer_alone(toy, asked):
    """Its MLP then adds nothing to that coordinate, of any token; what it adds to others stays."""
    for changed, silent in ((toy[0], False), (without_row(toy[0], 1, 5), True)):
        trace = {}
        changed.hidden_states(asked.input_ids, features=asked.features, trace=trace)
        added = sources(changed, trace, [0, 7, 100])[2]                 # of the MLP of layer 1
        assert (added[:, 5].abs() < 1e-5).all() == silent and (added[:, 6].abs() > 1e-3).all()


# ---- Q3 ----


def test_zero_k_by_a_second_way(toy, asked):
    """For token 0, which sees only itself, editing its key in one pass is the same as in two."""
    class ZeroKey(Cache):
        def extend(self, layer, k, v):
            k, v = super().extend(layer, k.clone(), v)
            if layer >= 2:
                for g in range(k.shape[1]):
                    for b in range(len(k)):
                        for d in k[b, g, 0].abs().sort(descending=True).indices[:3].tolist():
                            k[b, g, 0, d] = 0
            return k, v
    model = toy[0]
    L = model.config.text_config.num_hidden_layers
    logits = model(asked.both_ids, features=asked.features, cache=ZeroKey())
    edited = logits_of(model, asked, zero_keys=(range(2, L), 0, 3))
    assert torch.allclose(edited, logits[:, -asked.is_scored.shape[1] - 1:-1], atol=1e-3)
    edited = loss_of(model, asked, zero_keys=(range(2, L), 0, 3))
    baseline = loss_of(model, asked)
    assert not torch.allclose(edited, baseline, atol=1e-4)
    middle = asked.input_ids.shape[1] // 2                          # an image token; none are edited
    for position in (0, middle):
        assert torch.allclose(loss_of(model, asked, zero_keys=((), position, 3)), baseline, atol=1e-4)


def test_outputs_are_the_sinks_term_and_the_others(toy, asked):
    model, trace, cache = toy[0], Trace(weights_of=[3]), Cache()
    model(asked.input_ids, features=asked.features, trace=trace, cache=cache)
    v, is_sink = cache.values(3), torch.zeros_like(asked.input_ids, dtype=torch.bool)
    is_sink[:, 0] = True
    of_sink, of_others = value_split(trace["layers.3.weights"], v, is_sink)
    assert torch.allclose(of_sink + of_others, trace["layers.3.out"], atol=1e-4)
    v_of_head_3 = v[:, 3 * v.shape[1] // of_sink.shape[1], :1]                      # (B,1,D)
    assert torch.allclose(of_sink[:, 3], trace["layers.3.weights"][:, 3, :, :1] * v_of_head_3, atol=1e-5)


def test_value_split_by_hand():
    """Sink values 10 and 20, the other 1: the last query has 0.2 * 10 + 0.7 * 20 of sinks, 0.1 of it."""
    v = torch.tensor([10.0, 20.0, 1.0]).view(1, 1, 3, 1)
    of_sink, of_others = value_split(WEIGHTS[None, None], v, torch.tensor([[True, True, False]]))
    assert torch.allclose(of_sink.flatten(), torch.tensor([10.0, 15.0, 16.0]))
    assert torch.allclose(of_others.flatten(), torch.tensor([0.0, 0.0, 0.1]))


def test_nop_or_broadcast_by_hand():
    """Head 0 varies by 3 along the sink's value and by 4 across it: 9 of 25. Head 1 only along it."""
    v = torch.tensor([[[[2.0, 0.0], [0.0, 4.0], [0.0, 8.0]]]])
    out = torch.tensor([[[[3.0, 4.0], [-3.0, -4.0]], [[6.0, 1.0], [0.0, 1.0]]]])
    ratio, share = nop_or_broadcast(out, v, v[:, :, 0])
    assert ratio.tolist() == [[0.5]] and share.tolist() == [[pytest.approx(9 / 25), pytest.approx(1.0)]]
    assert nop_or_broadcast(torch.ones(1, 2, 3, 2), v, v[:, :, 0])[1].tolist() == [[0.0, 0.0]]


def test_a_probe_reads_what_is_there_and_guesses_where_nothing_is():
    generator = torch.Generator().manual_seed(0)
    labels = ["red", "blue", "blue"] * 20
    noise = torch.randn(60, 5, generator=generator)
    read = noise.clone()
    read[:, 3] += torch.tensor([10.0 * (label == "red") for label in labels])
    assert probe(read, labels, 30) == 1.0
    assert probe(torch.full((60, 5), 7.0), labels, 30) == pytest.approx(2 / 3)          # always blue
    tiny = 1e4 + 1e-5 * read.double()                          # a difference below the rounding of float32
    assert probe(tiny, labels, 30) == pytest.approx(2 / 3)
    assert probe(read, ["blue"] * 30 + labels[:30], 30) == pytest.approx(2 / 3)         # red not learnt


# ---- losses and masks ----


def test_the_loss_of_answers_by_hand(asked):
    """Uniform logits cost log V a token; an answer's padding costs nothing."""
    B, A = asked.answer_ids.shape
    alike = Examples(asked.input_ids, asked.features, asked.answer_ids % 11, asked.is_scored)
    losses = token_losses(torch.zeros(B, A, 11), alike)
    assert torch.allclose(losses, math.log(11) * asked.is_scored)
    right = torch.zeros(B, A, 11).scatter_(-1, alike.answer_ids[:, :, None], 50.0)
    assert token_losses(right, alike).max() < 1e-6
    assert asked.is_scored.sum(1).unique().numel() > 1


def test_the_losses_agree_where_nothing_is_changed(toy, asked):
    """Of the tokens before each of the answer's, in one call and in two; and the mean is of what counts."""
    model, A = toy[0], asked.answer_ids.shape[1]
    S, L = asked.both_ids.shape[1], model.config.text_config.num_hidden_layers
    log_p = model(asked.both_ids, features=asked.features).log_softmax(-1)
    for b, n in enumerate(asked.is_scored.sum(1).tolist()):
        one_pass = -sum(log_p[b, S - A - 1 + i, asked.answer_ids[b, i]] for i in range(n)) / n
        assert loss_of(model, asked)[b] == pytest.approx(one_pass.item(), abs=1e-4)
    for how in ({"masks": [causal_mask(S, S)] * L}, {"outro": OutRo(relax=False, align=False)}):
        assert torch.allclose(loss_of(model, asked, **how), loss_of(model, asked), atol=1e-4)
    assert not torch.allclose(loss_of(model, asked, OutRo(gamma=30.0)), loss_of(model, asked), atol=1e-2)


def test_image_token_masks_keep_the_best_and_all_text(toy, asked):
    model = toy[0]
    S, is_image = asked.both_ids.shape[1], asked.both_ids == model.config.image_token_id
    scores = torch.rand(asked.input_ids.shape, generator=torch.Generator().manual_seed(1))
    masks = image_token_masks(model, asked, scores, l=2, share=0.25)
    causal = causal_mask(S, S)
    assert all(mask is masks[0] for mask in masks[:3]) and masks[0].equal(causal) and len(masks) == 8
    for b in range(3):
        last = masks[3][b, -1]
        for frame in is_image[b].nonzero().flatten().view(8, 16):               # its positions
            best = sorted(frame.tolist(), key=lambda i: -scores[b, i])[:4]
            assert frame[last[frame]].tolist() == sorted(best)
        assert last[~is_image[b]].all() and masks[7][b].diagonal().all()
        assert not masks[7][b][~causal].any()


# ---- all of it at once ----


@pytest.fixture(scope="module")
def clip(toy):
    """The inputs of the bundled clip, and what is found on it."""
    model, processor = toy
    inputs = processor(read_video(TOY / "clip.mp4", longest_edge=processor.longest_edge), QUESTION)
    features = model.encode(inputs.pixel_values)
    return inputs.input_ids, features, analyse(model, inputs.input_ids, features)


def column(found, table, name):
    return [row[name] for row in found[table]]


def spread(x):
    return pytest.approx([x.min().item(), x.median().item(), x.max().item()], rel=1e-3)


def test_weights_by_head_are_those_that_the_layers_used(toy, clip):
    (ids, features, _), trace, cache = clip, Trace(weights_of=range(8)), Cache()
    toy[0].hidden_states(ids, features=features, trace=trace, cache=cache)
    for l in range(8):
        heads = list(weights_by_head(toy[0], trace, cache, l))
        assert torch.allclose(torch.cat(heads, dim=1), trace[f"layers.{l}.weights"], atol=1e-5)


def test_sources_are_the_embedding_and_what_each_mlp_adds(toy, clip):
    (ids, features, _), trace, positions = clip, {}, [0, 5, 100]
    toy[0].hidden_states(ids, features=features, trace=trace)
    given = sources(toy[0], trace, positions)
    assert given[0].equal(trace["layers.0.hidden"][0, positions])
    for l, layer in enumerate(list(toy[0].model.text_model.layers)[:-1]):
        hidden = trace[f"layers.{l}.hidden"] + layer.self_attn.o_proj(trace[f"layers.{l}.out"].transpose(1, 2).flatten(2))
        x, mlp = layer.post_attention_layernorm(hidden), layer.mlp
        added = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))[0, positions]
        assert torch.allclose(given[l + 1], added, atol=0.01)               # of numbers up to 26,000


def test_a_token_is_left_out_with_its_feature():
    """Positions 1, 3 and 4 are image tokens (99)."""
    asked = Examples(torch.tensor([[7, 99, 8, 99, 99, 9]]), torch.arange(3.0).view(1, 3, 1),
                     torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.bool))
    assert without_token(asked, 3, 99).both_ids.tolist() == [[7, 99, 8, 99, 9, 5]]
    assert without_token(asked, 3, 99).features.flatten().tolist() == [0, 2]
    assert without_token(asked, 2, 99).both_ids.tolist() == [[7, 99, 99, 99, 9, 5]]
    assert without_token(asked, 2, 99).features.equal(asked.features)


def test_the_first_two_tables_equal_the_functions(toy, clip):
    """By the functions on a trace that holds all weights, in the layer where token 0 is first marked."""
    (ids, features, found), cache = clip, Cache()
    l = found["layer"]
    trace = Trace(weights_of=[l])
    toy[0].hidden_states(ids, features=features, trace=trace, cache=cache)
    assert (found["marked"], found["position"]) == (True, 0)
    who, holds = found["who"][l], found["holds"][l]
    mass = attention_mass(trace[f"layers.{l}.weights"])
    by = detectors(trace[f"layers.{l}.hidden"], mass, sink_dimensions(trace[f"layers.{l}.hidden"]))
    for name, definition in {"activation": "activation", "attention": "attention", "dimension": "dimensions"}.items():
        assert who[name] == by[definition][0].nonzero().flatten().tolist()
    assert who["ratio"] == found["ratio"] == trace[f"layers.{l}.ratio"].max() and who["of"] == 0
    assert holds["attention"] == spread(mass[0, :, 0])
    v, is_sink = cache.values(l), torch.zeros_like(ids, dtype=torch.bool)
    is_sink[0, 0] = True
    of_sink, _ = value_split(trace[f"layers.{l}.weights"], v, is_sink)
    term = (of_sink.norm(dim=-1) / trace[f"layers.{l}.out"].norm(dim=-1)).median(-1).values
    assert holds["term"] == spread(term)
    size = cache.keys(l).norm(dim=-1)
    assert holds["|k|"] == spread(size[0, :, 0] / size[0].median(-1).values)


def test_the_writer_is_the_mlp_without_which_the_rule_finds_nothing(toy, clip):
    ids, features, found = clip
    silent = without_row(toy[0], found["written by"], found["coordinate"])
    again = analyse(silent, ids, features)
    assert not again["marked"] and not any(column(again, "who", "activation"))
    assert again["ratio"] < 1000 and again["layer"] < 6                     # the nearest, not in the last two
    assert max(column(again, "outro", "largest move")) > 0.01               # with thresholds that it reaches
    text = report(again, ["x"] * ids.shape[1], "")
    assert text.startswith("The rule marks no token. The nearest") and "thresholds lowered" in text
    assert abs(found["who"][found["written by"]]["MLP adds"]) == pytest.approx(found["activation"], rel=0.05)


def test_the_last_two_tables_by_a_second_way(toy, clip):
    """The answer's loss, in one call over prompt and answer, for a token in the middle."""
    ids, features, found = clip
    answer = torch.tensor([toy[0].generate(ids, features=features)])
    assert found["answer_ids"] == answer[0].tolist() and found["tokens"] == answer.shape[1]
    both, S, A = torch.cat([ids, answer], 1), ids.shape[1], answer.shape[1]

    def losses(both=both, features=features, **how):
        hidden = toy[0].hidden_states(both, features=features, **how)[:, -A - 1:-1]
        return F.cross_entropy(toy[0].head(hidden)[0], answer[0], reduction="none")
    assert found["loss"] == pytest.approx(losses().mean().item(), abs=1e-4)
    position, marked = found["others"][1], {i for row in found["who"] for i in row["activation"]}
    ordinary = [i for i in range(S) if i not in marked]
    assert found["others"] == [ordinary[len(ordinary) * i // 4] for i in (1, 2, 3)]
    assert ids[0, position] == toy[0].config.image_token_id
    masks = causal_mask(S + A, S + A)
    masks[position + 1:, position] = False
    image = (ids[0, :position] == toy[0].config.image_token_id).sum()
    shorter = torch.cat([both[:, :position], both[:, position + 1:]], 1), torch.cat(
        [features[:, :image], features[:, image + 1:]], 1)
    cuts = dict(zip(column(found, "without", ""), column(found, "without", f"token {position}")))
    for name, change in {"column masked": losses(masks=[masks] * 8) - losses(),
                         "left out": losses(*shorter) - losses()}.items():
        assert cuts[name] == pytest.approx((change.mean().item(), change.std().item() / A**0.5), abs=1e-4), name
    assert set(cuts["marked then"]) == marked
    first = dict(zip(column(found, "without", ""), column(found, "without", "token 0")))
    assert first["left out"] == pytest.approx(first["column masked"], abs=1e-4)     # only distances count
    asked = Examples(ids, features, answer, torch.ones_like(answer).bool())
    for row in found["outro"]:
        outro = OutRo(relax=row[""] != "align", align=row[""] != "relax", gamma=row["gamma"] or 0)
        change = loss_of(toy[0], asked, outro) - loss_of(toy[0], asked)
        assert row["change"][0] == pytest.approx(change.item(), abs=1e-5)


def test_a_text_without_a_video_is_scored_itself(golden):
    """dev_late: token 0 is massive; 29 tokens, of which 16 are not scored."""
    model, ids = golden("dev_late").model, golden("dev_late").input_ids[:1]
    found = analyse(model, ids)
    log_p = model(ids)[0].log_softmax(-1)
    losses = torch.stack([-log_p[i - 1, ids[0, i]] for i in range(16, ids.shape[1])])
    assert found["loss"] == pytest.approx(losses.mean().item(), abs=1e-4) and found["tokens"] == len(losses)
    assert (found["marked"], found["position"], found["others"], found["answer_ids"]) == (True, 0, [4, 8, 12], [])
    with pytest.raises(ValueError, match="17 tokens is too short"):
        analyse(model, ids[:, :17])


def test_what_is_marked_after_a_cut_has_its_position_of_before(golden):
    """dev_late's first token a second time, at position 6: both are massive, also when token 4 is left out."""
    ids = golden("dev_late").input_ids[:1]
    found = analyse(golden("dev_late").model, torch.cat([ids[:, :6], ids], dim=1))
    assert found["who"][4]["activation"] == [0, 6] and 4 in found["others"]
    assert dict(zip(column(found, "without", ""), column(found, "without", "token 4")))["marked then"] == [0, 6]


def test_where_the_embedding_is_massive_no_mlp_wrote_it(golden):
    """dev_c has no sink; its nearest token is one of the video, from the encoder."""
    case = golden("dev_c")
    found = analyse(case.model, case.input_ids[:1], case.model.encode(case.pixels[:1]))
    assert (found["marked"], found["layer"], found["written by"]) == (False, 0, -1)
    sink = f"token {found['position']}"
    assert dict(zip(column(found, "without", ""), column(found, "without", sink)))["writing row silenced"] is None
    assert "written by the embedding" in report(found, ["x"] * case.input_ids.shape[1], "")


def test_no_more_than_two_heads_weights_are_there_at_a_time(toy, clip, monkeypatch):
    """The last one's while the next one's are computed. Neither a trace nor a view keeps those of a layer,
    which would be gigabytes of a long prompt."""
    (ids, features, found), shapes, storages = clip, [], weakref.WeakSet()

    def one_head(q, k, v, may_attend):
        out, weights = model.attention(q, k, v, may_attend)
        shapes.append(tuple(weights.shape))
        storages.add(weights.untyped_storage())
        assert len(storages) <= 2
        return out, weights
    monkeypatch.setattr(sink_report, "attention", one_head)
    traced = []
    monkeypatch.setattr(model.DecoderLayer, "forward", lambda self, *args, forward=model.DecoderLayer.forward:
                        traced.append(args[-1]) or forward(self, *args))
    assert analyse(toy[0], ids, features) == found
    S = ids.shape[1]
    assert set(shapes) == {(1, 1, S, S)} and len(shapes) == 8 * 4
    assert any(traced) and not any(getattr(trace, "weights_of", ()) for trace in traced)


def test_tables_are_aligned_by_hand():
    assert table([{"": "masked", "at": 3, "x": (0.5, 0.25), "all": [0, 7, 8, 9], "y": 0.5},
                  {"": "no", "at": None, "x": None, "all": [], "y": 1234.5}]).splitlines() == [
        "        at                 x       all      y",
        "masked   3  +0.5000 ± 0.2500  0 7 8 +1   0.50",
        "no       -                 -         -  1,234"]


@pytest.fixture
def call(monkeypatch, capfd):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["analysis", *map(str, arguments)])
        code = 0
        try:
            sink_report.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()
    return call


def test_the_command_prints_the_tables_or_one_json_object(call, clip):
    code, out, err = call()
    ids, _, found = clip
    assert (code, err) == (0, "") and [line[0] for line in out.split("\n\n")] == ["T", "1", "2", "3", "4"]
    assert "phi > 2.5: 20 cannot be reached below a width of 400" in out
    for name in ("who", "holds", "without", "outro"):
        assert table(found[name]) in out
    code, out, err = call(TOY / "clip.mp4", "What shape is red?", "--model", TOY, "--frames", 3, "--json",
                          "--dtype", "bfloat16")
    said = json.loads(out, parse_constant=pytest.fail)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert said["answer"] and said["tokens"] == len(said["answer_ids"]) and len(said["who"]) == 8
    assert said["question"] == "What shape is red?" and said["position"] == 0


@pytest.mark.parametrize("arguments, says", [
    (["nofile.mp4"], "nofile.mp4: no such file"), (["a\nb\x1b.mp4"], r"a b\x1b.mp4: no such file"),
    ([""], "is empty"),
    (["--model", ""], "is empty"), (["--model", "no/where/here"], "no/where/here"),
    (["--frames", "0"], "'0' is not from 1"),
    (["--frames", "x"], "invalid number"), (["--dtype", "int8"], "int8"),
    ([str(TOY / "clip.mp4"), " ", "--model", str(TOY)], "question is empty")])
def test_a_mistake_is_one_line_and_exit_code_2(call, arguments, says):
    code, out, err = call(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err, err
