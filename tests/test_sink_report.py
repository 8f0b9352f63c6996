"""The four tables: each number is compared with the functions of analysis.py, or computed in a second way."""

import copy
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import TOY

from minioutro import Cache, OutRo, Trace, read_video
from minioutro.lab import analysis, sink_report
from minioutro.lab.analysis import QUESTION, Examples, loss_of
from minioutro.lab.sink_report import analyse, report, table, without_token
from minioutro.model import causal_mask
from minioutro.support.cli import run_command


@pytest.fixture(scope="module")
def clip(toy):
    """The inputs of the bundled clip, and the result of `analyse` on it."""
    model, processor = toy
    inputs = processor(read_video(TOY / "clip.mp4", longest_edge=processor.longest_edge), QUESTION)
    features = model.encode(inputs.pixel_values)
    return inputs.input_ids, features, analyse(model, inputs.input_ids, features)


def column(found, table, name):
    return [row[name] for row in found[table]]


def cuts_of(found, position):
    """The column of table 3 about this token: way to take it away -> change."""
    return dict(zip(column(found, "without", ""), column(found, "without", f"token {position}")))


def spread(x):
    return pytest.approx([x.min().item(), x.median().item(), x.max().item()], rel=1e-3)


# ---- pieces ----


def test_without_token_drops_its_feature():
    """Positions 1, 3 and 4 are image tokens (99)."""
    asked = Examples(torch.tensor([[7, 99, 8, 99, 99, 9]]), torch.arange(3.0).view(1, 3, 1),
                     torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.bool))
    assert without_token(asked, 3, 99).both_ids.tolist() == [[7, 99, 8, 99, 9, 5]]
    assert without_token(asked, 3, 99).features.flatten().tolist() == [0, 2]
    assert without_token(asked, 2, 99).both_ids.tolist() == [[7, 99, 99, 99, 9, 5]]
    assert without_token(asked, 2, 99).features.equal(asked.features)


def test_tables_are_aligned_by_hand():
    assert table([{"": "masked", "at": 3, "x": (0.5, 0.25), "all": [0, 7, 8, 9], "y": 0.5},
                  {"": "no", "at": None, "x": None, "all": [], "y": 1234.5}]).splitlines() == [
        "        at                 x       all      y",
        "masked   3  +0.5000 ± 0.2500  0 7 8 +1   0.50",
        "no       -                 -         -  1,234"]


# ---- analyse ----


def test_tables_1_and_2(toy, clip):
    """The functions of analysis.py on a trace with all weights, in the layer where token 0 is largest."""
    (ids, features, found), cache = clip, Cache()
    l = found["layer"]
    trace = Trace(weights_of=[l])
    toy[0].hidden_states(ids, features=features, trace=trace, cache=cache)
    assert (found["marked"], found["position"]) == (True, 0)
    who, holds = found["who"][l], found["holds"][l]
    mass = analysis.attention_mass(trace[f"layers.{l}.weights"])
    hidden = trace[f"layers.{l}.hidden"]
    by = analysis.detectors(hidden, mass, analysis.sink_dimensions(hidden))
    for name, definition in {"activation": "activation", "attention": "attention", "dimension": "dimensions"}.items():
        assert who[name] == by[definition][0].nonzero().flatten().tolist()
    assert who["ratio"] == found["ratio"] == trace[f"layers.{l}.ratio"].max() and who["at"] == 0
    assert holds["attention"] == spread(mass[0, :, 0])
    v, is_sink = cache.values(l), torch.zeros_like(ids, dtype=torch.bool)
    is_sink[0, 0] = True
    of_sink, _ = analysis.value_split(trace[f"layers.{l}.weights"], v, is_sink)
    term = (of_sink.norm(dim=-1) / trace[f"layers.{l}.out"].norm(dim=-1)).median(-1).values
    assert holds["term"] == spread(term)
    size = cache.keys(l).norm(dim=-1)
    assert holds["|k|"] == spread(size[0, :, 0] / size[0].median(-1).values)


def test_no_sink_without_its_writer(toy, clip):
    ids, features, found = clip
    silent = analysis.without_row(toy[0], found["written by"], found["coordinate"])
    again = analyse(silent, ids, features)
    assert not again["marked"] and not any(column(again, "who", "activation"))
    assert again["ratio"] < 1000 and again["layer"] < 6         # the nearest token, outside the last two layers
    assert max(column(again, "outro", "largest move")) > 0.01               # the lowered thresholds mark it
    text = report(again, ["x"] * ids.shape[1], "")
    assert text.startswith("The rule marks no token. The nearest") and "thresholds that are lowered" in text
    assert abs(found["who"][found["written by"]]["MLP adds"]) == pytest.approx(found["activation"], rel=0.05)


def test_tables_3_and_4(toy, clip):
    """The loss of the answer from one call over prompt and answer, with a token in the middle taken away."""
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
    cuts = cuts_of(found, position)
    for name, change in {"column masked": losses(masks=[masks] * 8) - losses(),
                         "left out": losses(*shorter) - losses()}.items():
        assert cuts[name] == pytest.approx((change.mean().item(), change.std().item() / A**0.5), abs=1e-4), name
    assert set(cuts["marked then"]) == marked
    first = cuts_of(found, 0)
    assert first["left out"] == pytest.approx(first["column masked"], abs=1e-4)     # RoPE encodes only distances
    asked = Examples(ids, features, answer, torch.ones_like(answer).bool())
    for row in found["outro"]:
        outro = OutRo(relax=row[""] != "align", align=row[""] != "relax", gamma=row["gamma"] or 0)
        change = loss_of(toy[0], asked, outro) - loss_of(toy[0], asked)
        assert row["change"][0] == pytest.approx(change.item(), abs=1e-5)


def test_text_without_a_video(golden):
    """The tokens of the text itself are scored. In dev_late token 0 is massive, and 16 of 29 tokens are not scored."""
    model, ids = golden("dev_late").model, golden("dev_late").input_ids[:1]
    found = analyse(model, ids)
    log_p = model(ids)[0].log_softmax(-1)
    losses = torch.stack([-log_p[i - 1, ids[0, i]] for i in range(16, ids.shape[1])])
    assert found["loss"] == pytest.approx(losses.mean().item(), abs=1e-4) and found["tokens"] == len(losses)
    assert (found["marked"], found["position"], found["others"], found["answer_ids"]) == (True, 0, [4, 8, 12], [])
    with pytest.raises(ValueError, match="17 tokens is too short"):
        analyse(model, ids[:, :17])


def test_marked_then_keeps_old_positions(golden):
    """The first token of dev_late stands again at position 6. Both are massive, also if token 4 is left out."""
    ids = golden("dev_late").input_ids[:1]
    found = analyse(golden("dev_late").model, torch.cat([ids[:, :6], ids], dim=1))
    assert found["who"][4]["activation"] == [0, 6] and 4 in found["others"]
    assert cuts_of(found, 4)["marked then"] == [0, 6]


# ---- the command ----


@pytest.fixture
def call(monkeypatch, capfd):
    """Exit code, stdout, stderr."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sink_report", *map(str, arguments)])
        code = 0
        try:
            run_command(sink_report.main, "sink_report.py")
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()
    return call


def test_json_of_zero_weights_has_null(call, toy, monkeypatch):
    """With zero weights, all ratios are 0/0."""
    zero = copy.deepcopy(toy[0])
    for weight in zero.parameters():
        weight.zero_()
    zero.generate = lambda *_, **__: [20, 21, 22]
    monkeypatch.setattr(sink_report, "load", lambda *_: (zero, toy[1]))
    code, out, err = call(TOY / "clip.mp4", "?", "--frames", 1, "--json")
    said = json.loads(out, parse_constant=pytest.fail)
    assert (code, err) == (0, "") and said["who"][0]["ratio"] is None and said["loss"] > 0


def test_command_prints_tables_or_json(call, clip):
    code, out, err = call()
    assert (code, err) == (0, "") and [line[0] for line in out.split("\n\n")] == ["T", "1", "2", "3", "4"]
    assert "phi > 2.5: 20 cannot be reached below a width of 400" in out
    for name in ("who", "holds", "without", "outro"):
        assert table(clip[2][name]) in out
    code, out, err = call(TOY / "clip.mp4", "What shape is red?", "--model", TOY, "--frames", 3, "--json",
                          "--dtype", "bfloat16")
    said = json.loads(out, parse_constant=pytest.fail)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert said["answer"] and said["tokens"] == len(said["answer_ids"]) and len(said["who"]) == 8
    assert said["question"] == "What shape is red?" and said["position"] == 0
