"""The toy's page: what makes its first token a sink, and what the figures of the page are of."""

import pytest
import torch
from helpers import TOY

from minioutro import read_video
from minioutro.lab import toy_page as train
from minioutro.lab.questions import OF_A_CLIP, toy_questions


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with the first three of the page's clips, and the questions about them."""
    folder = tmp_path_factory.mktemp("clips")
    records, written = toy_questions(3 * OF_A_CLIP)
    for name, write in written.items():
        write(folder / name)
    return folder, records


def asked(model, processor, folder, record):
    inputs = processor(read_video(folder / record.video), record.question)
    return inputs.input_ids, model.encode(inputs.pixel_values)


def test_masking_a_token_that_the_answer_does_not_need_changes_nothing(toy, clips):
    """The last token is seen by nobody else; of the words of five questions, one at least is needed."""
    model, processor = toy
    prompt, features = asked(model, processor, clips[0], clips[1][0])
    S, answer = prompt.shape[1], model.generate(prompt, features=features)
    assert train.unchanged_without(model, prompt, features, [S + len(answer) - 2]) == [True]
    stays = []
    for record in clips[1][:5]:
        prompt, features = asked(model, processor, clips[0], record)
        S = prompt.shape[1]
        stays += train.unchanged_without(model, prompt, features, range(S - 10, S))
    assert not all(stays)


def test_the_toys_sink_is_found(toy, clips):
    sinks = train.find_first_sink(*toy, clips[1][::10], clips[0])
    assert sinks.marked == [2, 3, 4, 5]
    rows = train.sink_table(sinks).splitlines()
    assert [row.split()[1] for row in rows[1:9]] == ["0%", "0%", "100%", "100%", "100%", "100%", "0%", "0%"]
    assert (sinks.full <= 1).all() and (sinks.far > 0.95 * sinks.full).all()
    assert sinks.changed.shape == (3, 1 + train.OTHERS)


def test_contrast_needs_a_head_that_rests_and_one_that_works():
    """Layers 1 to 3 are marked, 0 is not always; only layer 1 has a head above 0.7 and one below 0.3."""
    far = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.4], [0.6, 0.1]])
    full = torch.tensor([[1.0, 1.0], [0.8, 0.0], [0.4, 0.0], [0.0, 0.0]])
    changed = torch.tensor([[True] + [False] * 8, [True] + [True] * 4 + [False] * 4])
    zero = torch.zeros(4)
    sinks = train.Sinks(torch.tensor([0.5, 1, 1, 1]), zero, zero, far, far, full, changed)
    assert sinks.marked == [1, 2, 3] and sinks.contrast == [True, False, False]
    said = " ".join(train.sink_table(sinks).split())
    assert "of the 3 layers where token 0 is always a sink, 1 have a head" in said
    assert "20% of their (head, token) pairs" in said                          # (0.8 + 0.4) / 6
    assert "of 2 answers, 2 change when token 0 is masked; 0.5 do, on average" in said


def test_the_page_is_made_of_the_same_questions_with_noise_and_without(toy, monkeypatch):
    monkeypatch.setattr(train, "ASKED", 12)
    monkeypatch.setattr(train, "GAMMAS", [1, 3])
    clean, hard, line = train.report(*toy, variants="align")
    for page in (clean, hard):
        assert page.startswith("12 questions on 2 videos; seed 0\n")
        assert [page.count(f"\n  align {gamma} ") == 1 for gamma in (1, 2)] == [True, False]
        assert page.count("\n  align 3 ") == page.count("\n  baseline ") > 2            # by kind as well
    assert "token 0 a sink" in clean and "of 2 answers, " in clean and "token 0 a sink" not in hard
    right = [block.split("baseline")[1].split()[0] for block in (clean, hard)]
    assert line.split()[:3:2] == right and line.split()[3:6] == ["2", "to", "5"]


def test_a_run_in_a_line_by_hand():
    """Layers 1 and 2 are marked: the head that rests least of the best, and the one that works least."""
    far = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.8, 0.2]])
    changed = torch.tensor([[True] + [False] * 8, [True] + [True] * 4 + [False] * 4])
    sinks = train.Sinks(torch.tensor([0.0, 1, 1]), torch.tensor([0, 0, 0.05]), far[0], far, far, far, changed)
    found = {"variants": {"baseline": {"right": 18, "n": 20}},
             "tasks": {name: {"baseline": {"right": n, "n": 10}} for n, name in ((10, "a"), (8, "b"))}}
    line = train.in_a_line(found, {"variants": {"baseline": {"right": 3, "n": 4}}}, sinks)
    assert line.split() == "90.0% 80.0% 75.0% 1 to 2 0.05 0.80 0.20 50% 2 0.5".split()
    nobody = train.Sinks(far[0], *[far[0]] * 2, far, far, far, changed)
    assert train.in_a_line(found, found, nobody) == "token 0 is always a sink in no layer"


def test_the_toys_page_is_written_with_what_was_measured(tmp_path, monkeypatch):
    """Text stays, blocks are replaced in their order: the toy, its hard clips, its two controls; but for
    the table of runs, whose lines are other folders'."""
    monkeypatch.setattr(train, "load", lambda folder: (None, folder.name))
    monkeypatch.setattr(train, "report", lambda _, name, variants="all": iter(
        [f"{name} {variants} {what}" for what in ("ordinary", "hard", "line")]))
    train.write_readme(tmp_path)
    written, bundled = (path.read_text(encoding="utf-8").split("```")
                        for path in (tmp_path / "README.md", TOY / "README.md"))
    assert written[0::2] == bundled[0::2] and "price" in bundled[0] and "noise" in bundled[2]
    for run, before, block in zip(train.CONTROLS, bundled[6:-1:2], written[7::2], strict=True):
        heading = before.split("### ")[1].splitlines()[0]
        assert ("price" not in heading or not run.price) and ("seed" not in heading or not run.seed)
        assert block == f"\n{run.folder} baseline ordinary\n"
    assert written[1:4:2] == [f"\n{tmp_path.name} all ordinary\n", f"\n{tmp_path.name} all hard\n"]
    assert written[5] == bundled[5] and "seed" in written[5]
