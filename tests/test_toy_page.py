"""The toy's page: its figures, and the sentences that are made from them."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import FIXTURES, TOY

from minioutro import read_video
from minioutro.lab import toy_page
from minioutro.lab.questions import OF_A_CLIP, toy_questions
from minioutro.lab.toy_page import BUNDLED_SEED, FirstSink

STORED = FIXTURES / "toy_page.json"


@pytest.fixture
def stored():
    """The figures of the page, by seed."""
    return toy_page.read_figures(STORED)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with the first three clips of the page, and the questions about them."""
    folder = tmp_path_factory.mktemp("clips")
    records, written = toy_questions(3 * OF_A_CLIP)
    for name, write in written.items():
        write(folder / name)
    return folder, records


def asked(model, processor, folder, record):
    inputs = processor(read_video(folder / record.video), record.question)
    return inputs.input_ids, model.encode(inputs.pixel_values)


def flat(text):
    return " ".join(text.split())


def sink_of(attention, full, marked, changed=((1.0,) + (0.0,) * 8), prompts=2):
    zero = [0.0] * len(marked)
    zeros = [[0.0, 0.0]] * len(marked)
    return FirstSink(prompts=prompts, marked=marked, others=zero, ratio=zero, attention=attention,
                     attention_of_answer=attention, full=full, changed=list(changed), cosine=zeros, leaning=zeros,
                     turned=zeros, value=zeros)


# ---- The bundled page ----


def test_page_is_made_from_stored_figures(stored):
    """The page is what the command writes, and the figures are of this checkpoint."""
    assert stored[BUNDLED_SEED]["checkpoint"] == toy_page.checkpoint(TOY)
    assert toy_page.page(stored) == (TOY / "README.md").read_text(encoding="utf-8")


def test_page_holds_for_three_clips(toy, clips, stored):
    """Measured again on 3 of the 200 clips, the layers are the same and the attention is about the same."""
    sink = toy_page.find_first_sink(*toy, clips[1][::OF_A_CLIP], clips[0])
    of_page = FirstSink(**stored[BUNDLED_SEED]["sink"])
    assert sink.layers == of_page.layers == [2, 3, 4, 5]
    for name, tolerance in (("attention", 0.1), ("full", 0.1), ("cosine", 0.15), ("turned", 8.0), ("value", 0.3)):
        measured, printed = torch.tensor(getattr(sink, name)), torch.tensor(getattr(of_page, name))
        assert (measured - printed).abs().max() < tolerance, name
    assert len(sink.changed) == 1 + toy_page.OTHERS
    right = stored[BUNDLED_SEED]["ordinary"]["variants"]["baseline"]
    assert right["n"] == toy_page.ASKED and right["right"] > 0.98 * right["n"]


# ---- Measuring ----


def test_measure_asks_both_sets_of_clips(monkeypatch):
    monkeypatch.setattr(toy_page, "ASKED", 5)
    figures = toy_page.measure(TOY, explore=True)
    assert json.loads(json.dumps(figures)) == figures
    for clips in toy_page.CLIPS:
        found = figures[clips]
        assert (found["questions"], found["videos"], found["asked"]) == (5, 1, "outro")
        assert {"baseline", "outro", "relax", "align", "outro gamma 2"} <= found["variants"].keys()
        assert all(rows.keys() == {"baseline", "outro"} for rows in found["tasks"].values())
    right = [figures[clips]["variants"]["baseline"]["right"] for clips in toy_page.CLIPS]
    assert right[0] > right[1]                                          # noise makes the questions harder
    assert figures["sink"]["prompts"] == 1
    text = toy_page.figures_as_text(figures)
    assert "5 questions on 1 video" in text and "Of 1 answers" in text


# ---- Sentences ----


def test_sink_in_words():
    """Layers 1 to 3 are always marked. Of these, only layer 1 has a head above 0.7 and one below 0.3."""
    sink = sink_of(attention=[[0.9, 0.1], [0.9, 0.1], [0.9, 0.4], [0.6, 0.1]],
                   full=[[1.0, 1.0], [0.8, 0.0], [0.4, 0.0], [0.0, 0.0]], marked=[0.5, 1.0, 1.0, 1.0],
                   changed=[1.0] + [0.5] * 4 + [0.0] * 4)
    assert sink.layers == [1, 2, 3]
    said = flat(toy_page.sink_in_words(sink))
    assert "in 3 layers: 1, 2 and 3. Of these, 1 have both" in said
    assert "20% of the pairs of a head and a token" in said             # (0.8 + 0.4) / 6
    assert "Of 2 answers, 2 change" in said and "0.5 change on average" in said
    nowhere = sink_of(attention=[[0.9, 0.1]], full=[[0.0, 0.0]], marked=[0.5])
    assert "no layer where token 0 is a sink" in toy_page.sink_in_words(nowhere)


def with_effect(figures, gained, lost, verdict="not shown"):
    """The figures of a toy in which OutRo mends and spoils these numbers of answers, with and without noise."""
    figures = copy.deepcopy(figures)
    for clips in toy_page.CLIPS:
        figures[clips]["variants"]["outro"] |= {"gained": gained, "lost": lost}
        figures[clips]["test"] |= {"p": toy_page.sign_test(gained, lost), "verdict": verdict}
    return figures


def test_effect_in_words(stored):
    figures = stored[BUNDLED_SEED]
    none = with_effect(figures, 6, 9)["noise"]
    worse = with_effect(figures, 1, 26, "worse")["noise"]
    assert toy_page.effect_in_words(none) == (
        "OutRo mends 6 of 2,000 answers and spoils 9 (p = 0.61): no difference is shown.")
    assert toy_page.effect_in_words(worse) == (
        "OutRo mends 1 of 2,000 answers and spoils 26 (p = 4.2e-07): with OutRo this toy is worse.")


@pytest.mark.parametrize("changes, follows", [((-1, -2, -3), True), ((-3, -2, -1), True), ((-1, -3, -2), False)])
def test_explanations(stored, changes, follows):
    toys = {}
    for n, change in enumerate(changes):
        toys[str(n)] = with_effect(stored[BUNDLED_SEED], 10 + change, 10)
        toys[str(n)]["sink"]["turned"] = [[10.0 + n] * 4] * 8
    assert (toy_page.explanations(toys, "noise") == ["angle turned"]) is follows
    said = toy_page.explanations_in_words(toys)
    assert ("angle turned" in said) is follows and ("does not explain" in said) is not follows
    assert "Fewer than three" in toy_page.explanations_in_words({"0": toys["0"], "1": toys["1"]})


# ---- The command ----


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["toy_page.py", *map(str, arguments)])
    toy_page.main()


def test_write_measures_only_what_is_new(tmp_path, monkeypatch, stored):
    """The bundled toy is in the file already. Another toy is measured once, and again after its weights change."""
    bundled, other, out = tmp_path / "toy", tmp_path / "other", tmp_path / "figures.json"
    for folder in (bundled, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes((TOY / "model.safetensors").read_bytes())
    (other / "model.safetensors").write_bytes(b"weights")
    out.write_text(json.dumps({"format": toy_page.FORMAT, "toys": {"0": stored["0"]}}))
    measured = []

    def measure(folder, explore):
        measured.append((Path(folder).name, explore))
        return {**stored["0"], "checkpoint": toy_page.checkpoint(folder)}
    monkeypatch.setattr(toy_page, "measure", measure)
    monkeypatch.setattr(toy_page, "TOY", bundled)
    for weights in (b"weights", b"weights", b"other weights"):
        (other / "model.safetensors").write_bytes(weights)
        run_main(monkeypatch, "--write", "--out", out, "--seed", 12, other)
    assert measured == [("other", False)] * 2
    assert (bundled / "README.md").read_text().count("\n| 12 | ") == 2        # in both tables over seeds
    out.write_text("{}")
    with pytest.raises(ValueError, match="figures.json is not a file of this command's figures; remove it"):
        run_main(monkeypatch, "--write", "--out", out)
