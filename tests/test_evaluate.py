"""Video question answering: how a question is scored, what a run writes, and that no answer is lost."""

import json
import os
import shutil
from collections import Counter

import pytest
import torch
from helpers import TOY, writable_copy
from safetensors.torch import load_file, save_file

from minioutro import read_video
from minioutro.lab import evaluate
from minioutro.lab.evaluate import How, Share, ask, variants_of
from minioutro.lab.questions import Record, with_choices
from minioutro.support.cli import run_command
from minioutro.weights import HUB_MODEL

COLOURS = ("red", "green", "blue")
RECORDS = [
    Record("q0", "a.mp4", "What colour is the ring?", COLOURS, "red", "colour"),
    Record("q1", "a.mp4", "What happens in this video?", (), "nothing", "free"),
    Record("q2", "b.mp4", "Does the cross move?", ("Yes", "No"), "No", "moves"),
    Record("q3", "a.mp4", "What shape is red?", (), "Ring.", "free", 0.0, 4.0),
    Record("q4", "c.mp4", "What colour is the square?", COLOURS, "green", "colour"),
    Record("q5", "b.mp4", "How many shapes are there?", (), "the three", "free")]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path):
    """Three copies of the bundled clip, and the questions about them."""
    for name in "abc":
        shutil.copyfile(TOY / "clip.mp4", tmp_path / f"{name}.mp4")
    written(tmp_path / "q.jsonl", [record._asdict() for record in RECORDS])
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command: exit code, stdout, stderr."""
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
        code = 0
        try:
            with torch.enable_grad():
                run_command(evaluate.main, "evaluate.py")
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()
    return call


def answers(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


# ---- asking ----


def test_score_of_a_choice(toy, folder):
    """The same score from a whole forward pass with a softmax by hand, at the last token and not before it."""
    model, processor = toy
    record, variants = RECORDS[0], variants_of(gammas=[2.0])
    for line in ask(model, processor, [record], variants, folder):
        inputs = processor(read_video(folder / "a.mp4"), with_choices(record.question, record.choices))
        logits = model(inputs.input_ids, inputs.pixel_values, outro=variants[line["variant"]])[0].double()
        tokens = [processor.tokenizer.token_to_id(letter) for letter in "ABC"]
        log_p = [[(row[token].exp() / row.exp().sum()).log().item() for token in tokens] for row in logits[-2:]]
        assert line["scores"] == pytest.approx(log_p[1], abs=1e-3)
        assert line["scores"] != pytest.approx(log_p[0], abs=0.1)
        assert line["answer"] == COLOURS[log_p[1].index(max(log_p[1]))]
        assert line["right"] == (line["answer"] == "red")


def test_each_video_is_encoded_once(toy, folder, monkeypatch):
    """q3 asks about four seconds of a.mp4, which counts as a video of its own."""
    model, processor = toy
    encoded = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda pixels: encoded.append(pixels.shape[1]) or encode(pixels))
    variants = variants_of(["relax"])
    found = list(ask(model, processor, RECORDS, variants, folder))
    assert encoded == [8, 8, 4, 8]
    assert Counter((line["id"], line["variant"]) for line in found) == Counter(
        (record.id, name) for record in RECORDS for name in variants)
    plain = {line["id"]: line for line in found if line["variant"] == "baseline"}
    assert [plain[f"q{n}"]["right"] for n in (1, 3, 5)] == [False, True, True]


def test_generated_choices(toy, folder, monkeypatch):
    """An answer that names no choice is wrong, and is counted as unparsed."""
    model, processor = toy
    texts = {"q0": "A", "q2": "It does, yes", "q4": "A. red B. green"}
    monkeypatch.setattr(model, "generate", lambda *_, max_new_tokens, **__: [max_new_tokens])
    order = iter([texts.get(f"q{n}", "the Three.") for n in (0, 1, 2, 5, 3, 4)])
    monkeypatch.setattr(processor, "decode", lambda ids: next(order) if ids == [9] else 1 / 0)
    how = How(generate=True, max_new_tokens=9)
    found = {line["id"]: line for line in ask(model, processor, RECORDS, {"baseline": None}, folder, how=how)}
    assert {id: line["right"] for id, line in found.items()} == {
        "q0": True, "q1": False, "q2": False, "q3": False, "q4": False, "q5": True}
    assert [id for id, line in found.items() if line["unparsed"]] == ["q4"]


def test_question_that_fails(toy, folder, monkeypatch):
    """A video may not fit into memory, or scores may not be finite. The other questions are answered."""
    model, processor = toy
    encode = model.encode

    def encode_short(pixels):
        if pixels.shape[1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return encode(pixels)
    monkeypatch.setattr(model, "encode", encode_short)
    errors = {line["id"]: line["error"] for line in ask(model, processor, RECORDS, {"baseline": None}, folder)}
    assert errors.pop("q3") is None and {*errors.values()} == {"CUDA out of memory. Tried to allocate"}

    monkeypatch.setattr(model, "encode", lambda pixels: encode(pixels) * float("nan"))
    line, = ask(model, processor, RECORDS[:1], {"baseline": None}, folder)
    assert "no finite numbers" in line["error"] and not line["right"]


# ---- one run ----


def test_interrupted_run(folder, call, monkeypatch):
    """After a kill at any byte, or Ctrl-C, the answers that are there are not asked again and count once."""
    ask_for = [folder / "q.jsonl", "--model", TOY]
    code, whole, err = call(*ask_for, "--out", folder / "whole")
    assert code == 0 and whole.startswith("6 questions on 3 videos; seed 0\n") and err == "6 questions\n"
    data = (folder / "whole").read_bytes()
    assert {"id", "variant", "answer", "right", "settings"} <= answers(folder / "whole")[0].keys()
    asked = []
    monkeypatch.setattr(evaluate, "ask", lambda *args: (asked.append(line) or line for line in ask(*args)))
    for cut in (3, len(data) // 2, len(data)):
        (folder / "part").write_bytes(data[:cut])
        asked.clear()
        assert call(*ask_for, "--out", folder / "part") == (0, whole, err)
        assert (folder / "part").read_bytes() == data
        assert len(asked) == 12 - data[:cut].count(b"\n")

    def interrupted(*args):
        for n, line in enumerate(ask(*args)):
            if n == 5:
                raise KeyboardInterrupt
            yield line
    monkeypatch.setattr(evaluate, "ask", interrupted)
    code, out, err = call(*ask_for, "--out", folder / "stopped")
    assert (code, out, (folder / "stopped").read_bytes().count(b"\n")) == (130, "", 5)
    assert call("--report", folder / "whole")[:2] == (0, whole)


def test_processes_share_the_videos(folder, call, monkeypatch):
    """Each process says how many questions it asks, and --report joins their files."""
    ask_for = [folder / "q.jsonl", "--model", TOY, "--seed", 4]
    whole = call(*ask_for, "--json")[1]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert call(*ask_for)[0] == 2
    for rank, asked in (("1", 2), ("0", 4)):
        monkeypatch.setenv("RANK", rank)
        code, out, err = call(*ask_for, "--out", folder / "out")
        assert (code, out) == (0, "") and err.startswith(f"process {rank} of 2: {asked} of 6 questions; --report")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    videos = [{line["video"] for line in answers(folder / f"out.{rank}")} for rank in "01"]
    assert videos == [{"a.mp4", "c.mp4"}, {"b.mp4"}]
    assert call("--report", folder / "out.1", folder / "out.0", "--json")[:2] == (0, whole)
    found = json.loads(whole)
    assert sorted(found["tasks"]) == ["colour", "free", "moves"] and (found["seed"], found["asked"]) == (4, "outro")


@pytest.mark.parametrize("under_torchrun, rank, local_rank, share", [
    (False, "1", "", Share()), (True, "1", "", Share(1, 4, 1)),
    (True, "1", "0", Share(1, 4, 0)), (True, "", "0", Share())])
def test_ranks_under_torchrun(monkeypatch, under_torchrun, rank, local_rank, share):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for name, value in {"RANK": rank, "WORLD_SIZE": "4", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    assert Share.of_environment() == share


def test_share_of_many_videos():
    """20,000 videos take no time. If each was looked up in a list, they would take minutes."""
    records = [RECORDS[0]._replace(id=f"{n}", video=f"{n // 2}") for n in range(40_000)]
    shares = [Share(rank, 3).records(records) for rank in range(3)]
    assert sorted(record.id for share in shares for record in share) == sorted(record.id for record in records)
    assert len({record.video for record in shares[0]} & {record.video for record in shares[1]}) == 0


def test_bad_videos(folder, call):
    """Its questions are errors, and are asked again later. One name is longer than a file system allows."""
    (folder / "b.mp4").write_bytes(b"no video at all")
    (folder / "c.mp4").rename(folder / "elsewhere")
    records = [RECORDS[0]._replace(id="long", video="x" * 300), *RECORDS]
    written(folder / "q.jsonl", [record._asdict() for record in records])
    ask_for = [folder / "q.jsonl", "--model", TOY, "--out", folder / "out", "--json"]
    code, out, err = call(*ask_for)
    found = json.loads(out)
    assert (code, found["questions"], found["errors"], found["variants"]["outro"]["n"]) == (0, 7, 4, 3)
    assert err.count("\n") == 4 and "b.mp4 is not a video" in err and "c.mp4: no such file" in err
    assert "File name too long" in err
    errors = {line["video"]: line["error"] or "" for line in answers(folder / "out")}
    assert errors["c.mp4"].endswith("c.mp4: no such file; check the path") and not errors["a.mp4"]
    (folder / "elsewhere").rename(folder / "c.mp4")
    found = json.loads(call(*ask_for)[1])
    assert (found["errors"], found["variants"]["outro"]["n"]) == (3, 4)


def test_names_of_files_are_escaped(folder, call):
    record = RECORDS[0]._replace(id="x", video="\x1b[2J\u202e.mp4", task="\x1b]0;title\x07")
    written(folder / "q.jsonl", [record._asdict(), RECORDS[1]._asdict()])
    _, out, err = call(folder / "q.jsonl", "--model", TOY)
    assert "\\x1b[2J\\u202e.mp4: no such file" in err and "\\x1b]0;title\\x07: 0 questions, 1 error" in out
    assert all(character.isprintable() or character == "\n" for character in out + err)


@pytest.mark.parametrize("arguments, name", [
    (["q.jsonl"], HUB_MODEL), (["--toy", "1"], TOY), (["--toy", "1", "--model", "mine"], "mine")])
def test_default_model(folder, call, monkeypatch, arguments, name):
    loaded = []

    def refuse(path_or_repo, *rest):
        loaded.append(path_or_repo)
        raise ValueError("not now")
    monkeypatch.setattr(evaluate, "load", refuse)
    monkeypatch.chdir(folder)
    assert call(*arguments)[0] == 2 and loaded == [name]


def test_model_is_recognised(folder, call):
    """A run goes on with a copy of the model, but not with other weights at the same path."""
    model = folder / "model"
    writable_copy(TOY, model)
    ask_for = [folder / "q.jsonl", "--limit", 1, "--out", folder / "out"]
    assert call(*ask_for, "--model", TOY)[0] == 0
    data = (folder / "out").read_bytes()
    assert call(*ask_for, "--model", model)[0] == 0 and (folder / "out").read_bytes() == data
    tensors = load_file(model / "model.safetensors")
    name = "model.text_model.layers.2.self_attn.o_proj.weight"
    save_file({**tensors, name: tensors[name] * 1.01}, model / "model.safetensors", {"format": "pt"})
    code, out, err = call(*ask_for, "--model", model)
    assert (code, out) == (2, "") and "is from another run, with weights" in err
    assert (folder / "out").read_bytes() == data


# ---- reports ----


def line(n, variant, right, **more):
    return {"id": f"{n}", "variant": variant, "right": right, "settings": "seed 3; gamma 3", **more}


def test_answers_of_two_runs(folder, call):
    """They are refused in two files and in one file. Two files of the same run are joined."""
    mine = [line(n, name, True) for n in range(2) for name in ("baseline", "outro")]
    other = [{**row, "settings": "seed 3; gamma 1"} for row in mine]
    first, second, third = (written(folder / name, rows) for name, rows in (
        ("first", mine[:2]), ("second", mine[2:]), ("third", other[2:])))
    both = written(folder / "both", mine[:2] + other[2:])
    assert json.loads(call("--report", first, second, "--json")[1])["questions"] == 2
    for files in ([first, third], [both]):
        code, out, err = call("--report", *files)
        assert (code, out) == (2, "") and "is from another run, with gamma 1 instead of gamma 3" in err


# ---- errors of the user ----


@pytest.mark.parametrize("arguments, said", [
    ([], "give one of these: a file of questions, --toy N, or --report FILE"),
    (["none.jsonl"], "none.jsonl: no such file"),
    (["q.jsonl", "--videos", "empty"], "empty has neither a.mp4"),
    (["q.jsonl", "--variants", "relax,open"], "--variants 'open' is not one of baseline, outro, relax, align"),
    (["q.jsonl", "--gamma", "3,x"], "argument --gamma: 'x' is not a number"),
    (["q.jsonl", "--model", "no/toy/here"], "no/toy/here is neither a folder here"),
    (["q.jsonl", "--out", "notes.txt"], "notes.txt: line 1 is not JSON"),
    (["q.jsonl", "--out", "q.jsonl"], "q.jsonl is not a file of answers"),
    (["q.jsonl", "--out", "empty"], "empty is a folder"),
    (["q.jsonl", "--out", "pipe"], "pipe is a pipe or a device"),
    (["q.jsonl", "--out", "/dev/full"], "/dev/full is a pipe or a device"),
    (["q.jsonl", "--out", "nowhere/out"], "there is no folder nowhere"),
    (["q.jsonl", "--out", "old", "--gamma", "2"], "old is from another run, with variants baseline,outro instead of"),
    (["--report", "none"], "none: no such file"),
    (["--report", "pipe"], "pipe is a pipe or a device"),
    (["--report", "words"], "words: right of the question '1' is 'yes'; correct it"),
    (["--report", "void"], "no question has an answer"),
    (["--toy", "5", "--noise", "256"], "argument --noise: '256' is not between 0 and 255"),
])
def test_errors_change_no_file(folder, call, monkeypatch, arguments, said):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "notes.txt").write_text("a list\n")
    (folder / "void").touch()
    written(folder / "words", [line(1, "baseline", "yes")])
    if "old" in arguments:
        same = ("q.jsonl", "--model", TOY, "--limit", 1)
        call(*same, "--out", "old")
        arguments = [*same, *arguments[1:]] if "q.jsonl" in arguments else arguments
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    code, out, err = call(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
