"""Video question answering: how a question is scored, what is compared, and that nothing is lost."""

import json
import random
import shutil
from collections import Counter

import pytest
import torch
from helpers import TOY

from minioutro import OutRo, read_video
from minioutro.lab import evaluate
from minioutro.lab.compare import compare, detectable, holm, interval, sign_test, summarise
from minioutro.lab.evaluate import ask, variants_of
from minioutro.lab.questions import Record, with_choices

COLOURS = ("red", "green", "blue")
RECORDS = [
    Record("q0", "a.mp4", "What colour is the ring?", COLOURS, "red", "colour"),
    Record("q1", "a.mp4", "What happens in this video?", (), "nothing", "free"),
    Record("q2", "b.mp4", "Does the cross move?", ("Yes", "No"), "No", "moves"),
    Record("q3", "a.mp4", "What shape is red?", (), "Ring.", "free", 0.0, 4.0),
    Record("q4", "c.mp4", "What colour is the square?", COLOURS, "green", "colour"),
    Record("q5", "b.mp4", "How many shapes are there?", (), "the three", "free")]


@pytest.fixture
def folder(tmp_path):
    """Three copies of the bundled clip, and the questions about them."""
    for name in "abc":
        shutil.copy(TOY / "clip.mp4", tmp_path / f"{name}.mp4")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record._asdict()) + "\n" for record in RECORDS))
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
        try:
            with torch.enable_grad():
                code = evaluate.main() or 0
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()
    return call


def answers(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


# ---- asking ----


def test_a_letter_is_scored_by_its_likelihood_as_the_answers_first_token(toy, folder):
    """The same from a whole forward pass of the prompt, pixels and all; each variant gets its own."""
    model, processor = toy
    record, variants = RECORDS[0], variants_of("both", [2.0])
    for line in ask(model, processor, [record], variants, folder):
        inputs = processor(read_video(folder / "a.mp4"), with_choices(record.question, record.choices))
        logits = model(inputs.input_ids, inputs.pixel_values, outro=variants[line["variant"]])[0, -1]
        tokens = [processor.tokenizer.token_to_id(letter) for letter in "ABC"]
        assert line["scores"] == pytest.approx(logits.log_softmax(-1)[tokens].tolist(), abs=1e-3)
        assert line["answer"] == COLOURS[logits[tokens].argmax()]
        assert line["right"] == (line["answer"] == "red")
    assert variants == {"baseline": None, "both": OutRo(gamma=2.0)}


def test_letters_with_a_space_before_and_without_are_summed_where_both_are_tokens(toy):
    """The toy has ' A' but not ' B', ' Yes' and ' No' but not 'Yes'; a tokenizer with all has two forms."""
    processor, first_tokens = toy[1], evaluate.first_tokens
    token = processor.tokenizer.token_to_id
    assert first_tokens(processor, COLOURS).tolist() == [[token("A"), token("B"), token("C")]]
    assert first_tokens(processor, ("No", "Yes")).tolist() == [[token("ĠNo"), token("ĠYes")]]

    class Whole:
        def tokenize(self, pieces):
            return [len(pieces[0]) * 100 + ord(pieces[0][-1])]

    class Bytes:
        def tokenize(self, pieces):
            return list(pieces[0].encode())
    assert first_tokens(Whole(), COLOURS).tolist() == [[265, 266, 267], [165, 166, 167]]
    with pytest.raises(ValueError, match="no token for Yes or No"):
        first_tokens(Bytes(), ("Yes", "No"))


def test_a_video_is_decoded_and_encoded_once_for_its_questions_and_variants(toy, folder, monkeypatch):
    model, processor = toy
    encoded, opened = [], []
    monkeypatch.setattr(model, "encode", lambda pixels: encoded.append(pixels.shape[1]) or type(model).encode(
        model, pixels))
    monkeypatch.setattr(evaluate, "read_video", lambda path, *rest: opened.append(path.name) or read_video(
        path, *rest))
    variants = variants_of("baseline,relax,align,both", [1.0, 3.0])
    found = list(ask(model, processor, RECORDS, variants, folder))
    assert opened == ["a.mp4", "b.mp4", "a.mp4", "c.mp4"] and encoded == [8, 8, 4, 8]
    assert list(variants) == ["baseline", "relax", "align 1", "align 3", "both 1", "both 3"]
    assert Counter((line["id"], line["variant"]) for line in found) == Counter(
        (record.id, name) for record in RECORDS for name in variants)
    plain = {line["id"]: line for line in found if line["variant"] == "baseline"}
    assert [plain[f"q{n}"]["right"] for n in (1, 3, 5)] == [False, True, True]
    assert plain["q3"]["answer"] == "ring" and not any(line["error"] or line["unparsed"] for line in found)


def test_generated_choices_that_cannot_be_read_are_wrong_and_counted(toy, folder, monkeypatch):
    model, processor = toy
    texts = {"q0": "A", "q2": "It does, yes", "q4": "purple"}
    monkeypatch.setattr(model, "generate", lambda *_, max_new_tokens, **__: [max_new_tokens])
    order = iter([texts.get(f"q{n}", "the Three.") for n in (0, 1, 2, 5, 3, 4)])
    monkeypatch.setattr(processor, "decode", lambda ids: next(order) if ids == [9] else 1 / 0)
    asked = ask(model, processor, RECORDS, {"baseline": None}, folder, generate=True, max_new_tokens=9)
    found = {line["id"]: line for line in asked}
    assert {id: line["right"] for id, line in found.items()} == {
        "q0": True, "q1": False, "q2": False, "q3": False, "q4": False, "q5": True}
    assert [id for id, line in found.items() if line["unparsed"]] == ["q4"]


def test_numbers_that_are_not_finite_are_an_error(toy, folder):
    model, processor = toy
    table = model.lm_head.weight
    try:
        model.lm_head.weight = torch.nn.Parameter(table * float("nan"), requires_grad=False)
        lines = list(ask(model, processor, RECORDS[:2], {"baseline": None}, folder))
    finally:
        model.lm_head.weight = table
    assert ["no finite numbers" in line["error"] for line in lines] == [True, True] and not lines[0]["right"]


# ---- statistics ----


def test_the_sign_test_by_hand_and_as_scipy_has_it():
    """SciPy: binomtest(gained, gained + lost).pvalue."""
    assert sign_test(5, 5) == sign_test(0, 0) == 1
    assert sign_test(0, 3) == sign_test(3, 0) == 2 / 8
    assert sign_test(1, 5) == 2 * (1 + 6) / 64
    for gained, lost, p in ((3, 21, 0.0002771615982055664), (45, 62, 0.1215124218762441), (8, 1, 0.0390625)):
        assert sign_test(gained, lost) == pytest.approx(p, rel=1e-9)


def test_holms_correction_by_hand_and_as_statsmodels_has_it():
    """0.01 three times, then 0.03 twice, then 0.04, which may not be below the one before."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2, 0.0002, 0.03, 0.03, 0.9]) == pytest.approx([0.4, 0.001, 0.12, 0.12, 0.9])
    assert holm([0.7, 0.6]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]


def test_the_smallest_difference_that_could_be_shown_by_hand():
    """Of 9 changes, 8 against 1 has p = 20/512 and 7 against 2 has 92/512; of 6, 6 against 0 has 2/64."""
    assert detectable(100, 9) == 7 / 100
    assert detectable(50, 6) == 6 / 50 == detectable(50, 0) == detectable(50, 5)
    for changes in (7, 20, 51):
        least = round(1000 * detectable(1000, changes))
        p = [sign_test((changes + d) // 2, (changes - d) // 2) for d in (least, least - 2)]
        assert p[0] < 0.05 <= p[1]


def test_the_interval_equals_a_second_writing_of_it():
    """With numbers drawn by another generator, so within what 10,000 draws leave open."""
    rng = random.Random(1)
    videos = [f"v{rng.randrange(40)}" for _ in range(300)]
    lean = {f"v{n}": rng.choice((-1, 0, 0, 1, 1)) for n in range(40)}
    changes = [lean[video] if rng.random() < 0.4 else 0 for video in videos]
    of_video = [[c for c, video in zip(changes, videos) if video == v] for v in sorted(set(videos))]
    means = []
    for _ in range(4000):
        drawn = sum(rng.choices(of_video, k=len(of_video)), [])
        means.append(sum(drawn) / len(drawn))
    means.sort()
    low, high = interval(changes, videos, seed=0)
    assert (low, high) == pytest.approx((means[100], means[3900]), abs=0.005)
    assert interval(changes, videos, seed=0) == [low, high] != interval(changes, videos, seed=1)
    one_each = interval(changes, [f"{n}" for n in range(300)], seed=0)       # as if videos did not matter
    assert one_each[1] - one_each[0] < 0.9 * (high - low)


def test_the_interval_of_what_leaves_no_doubt_and_of_one_video():
    assert interval([1] * 6, list("aabbcc"), 0) == [1.0, 1.0]
    assert interval([1, 0], ["a", "a"], 0) == interval([], [], 0) == [-1.0, 1.0]


def line(id, variant, right, video="v", task="t", **more):
    return {"id": id, "variant": variant, "right": right, "video": video, "task": task, "unparsed": False,
            "error": None, **more}


def test_the_summary_counts_pairs_overall_and_by_task():
    """Ten questions; OutRo mends 2 and spoils 1. Then one that failed, one half asked, one asked again."""
    base, outro = "1110000000", "1101100000"
    lines = [line(f"{n}", name, bit == "1", f"v{n % 3}", "st"[n < 4])
             for n, pair in enumerate(zip(base, outro)) for name, bit in zip(("baseline", "both"), pair)]
    lines += [line("x", "baseline", True), line("x", "both", False, error="broken")]
    lines += [line("half", "baseline", True)]
    lines += [line("9", "both", False, "v0", "s", unparsed=True)]
    found = summarise(lines, seed=5)
    assert (found["questions"], found["videos"], found["errors"], found["seed"]) == (11, 4, 1, 5)
    both = found["variants"]["both"]
    keys = ("n", "right", "gained", "lost", "unparsed", "p", "p_holm")
    assert [both[key] for key in keys] == [10, 4, 2, 1, 1, 1, 1]
    assert both["difference"] == 0.1 and both["interval"][0] < 0.1 < both["interval"][1]
    assert found["variants"]["baseline"]["right"] == 3 and found["variants"]["baseline"]["difference"] == 0
    assert list(found["tasks"]) == ["s", "t"] and found["tasks"]["t"]["both"]["gained"] == 1
    assert found["tasks"]["s"]["both"]["n"] == 6 and found["tasks"]["t"]["both"]["errors"] == 1
    assert summarise(lines[::-1][1:], seed=5) != found and summarise(lines[4:] + lines[:4], seed=5) == found
    with pytest.raises(ValueError, match="no question has an answer of every variant"):
        summarise(lines[-2:-1] + [line("y", "both", True)])


def test_holm_counts_the_variants_but_not_the_baseline():
    questions = [{name: line("", name, n < k, f"v{n}") for name, k in
                  (("baseline", 0), ("relax", 0), ("align", 6), ("both", 9))} for n in range(20)]
    found = compare(questions, ["baseline", "relax", "align", "both"], 0)
    assert [found[name]["p_holm"] for name in found] == pytest.approx([1, 1, 2 * 2 / 64, 3 * 2 / 512])


# ---- the command ----


def test_an_interrupted_run_goes_on_to_the_report_of_a_whole_one(folder, call, monkeypatch):
    """Killed at any byte, or by Ctrl-C; what is there is not asked again, and counts once."""
    ask_for = [folder / "q.jsonl", "--model", TOY, "--variants", "both"]
    code, whole, err = call(*ask_for, "--out", folder / "whole")
    assert code == 0 and whole.startswith("6 questions on 3 videos; seed 0\n") and err == "6 questions\n"
    data = (folder / "whole").read_bytes()
    assert {"id", "variant", "answer", "right", "settings"} <= answers(folder / "whole")[0].keys()
    asked = []
    monkeypatch.setattr(evaluate, "ask", lambda *args, **how: (
        asked.append(answer) or answer for answer in ask(*args, **how)))
    for cut in (3, data.index(b"\n") + 1, len(data) // 2, len(data)):
        (folder / "part").write_bytes(data[:cut])
        asked.clear()
        assert call(*ask_for, "--out", folder / "part") == (0, whole, err)
        assert (folder / "part").read_bytes() == data
        assert len(asked) == 12 - data[:cut].count(b"\n")

    def interrupted(*args, **how):
        for n, answer in enumerate(ask(*args, **how)):
            if n == 5:
                raise KeyboardInterrupt
            yield answer
    monkeypatch.setattr(evaluate, "ask", interrupted)
    code, out, err = call(*ask_for, "--out", folder / "stopped")
    assert (code, out, (folder / "stopped").read_bytes().count(b"\n")) == (130, "", 5)
    assert call("--report", folder / "whole")[:2] == (0, whole)


def test_processes_share_the_videos_and_their_files_report_together(folder, call, monkeypatch):
    ask_for = [folder / "q.jsonl", "--model", TOY, "--variants", "relax,align", "--seed", 4]
    whole = call(*ask_for, "--json")[1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call(*ask_for)[0] == 2
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert call(*ask_for, "--out", folder / "out")[:2] == (0, "")
    monkeypatch.delenv("WORLD_SIZE")
    videos = [{answer["video"] for answer in answers(folder / f"out.{rank}")} for rank in "01"]
    assert videos == [{"a.mp4", "c.mp4"}, {"b.mp4"}]
    assert call("--report", folder / "out.1", folder / "out.0", "--json")[:2] == (0, whole)
    found = json.loads(whole)
    assert list(found) == ["questions", "videos", "errors", "seed", "variants", "tasks"]
    assert {*"n right unparsed gained lost p p_holm difference interval detectable".split()} <= {
        *found["variants"]["relax"]}
    assert sorted(found["tasks"]) == ["colour", "free", "moves"] and found["seed"] == 4


def test_a_broken_or_missing_video_is_an_error_that_is_counted_and_tried_again(folder, call):
    (folder / "b.mp4").write_bytes(b"no video at all")
    (folder / "c.mp4").rename(folder / "elsewhere")
    ask_for = [folder / "q.jsonl", "--model", TOY, "--variants", "relax", "--out", folder / "out"]
    code, out, err = call(*ask_for, "--json")
    found = json.loads(out)
    assert (code, found["questions"], found["errors"], found["variants"]["relax"]["n"]) == (0, 6, 3, 3)
    assert err.count("\n") == 3 and "b.mp4 is not a video" in err and "c.mp4: no such file" in err
    errors = {answer["video"]: answer["error"] or "" for answer in answers(folder / "out")}
    assert errors["c.mp4"].endswith("c.mp4: no such file; check the path") and not errors["a.mp4"]
    assert call(*ask_for, "--json")[1] == out and len(answers(folder / "out")) == 12
    (folder / "elsewhere").rename(folder / "c.mp4")
    found = json.loads(call(*ask_for, "--json")[1])
    assert (found["errors"], found["variants"]["relax"]["n"]) == (2, 4)


def test_the_report_says_in_words_what_is_shown(folder, call):
    """40 questions of which OutRo mends 9 and alignment spoils 1: the first is shown, the second is not."""
    right = {"baseline": lambda n: n < 20, "both": lambda n: n < 29, "align": lambda n: n < 19}
    rows = [json.dumps({**line(f"{n}", name, is_right(n), f"v{n}"), "settings": "seed 0; gamma 3"})
            for n in range(40) for name, is_right in right.items()]
    (folder / "out").write_text("\n".join(rows) + "\n")
    code, out, _ = call("--report", folder / "out", "--figures", folder / "pictures")
    table = [text.split() for text in out.splitlines()]
    assert table[3] == ["all:", "40", "questions"] and table[4] == ["baseline", "50.0%", "0"]
    assert table[5][:5] == ["both", "72.5%", "0", "9", "0"] and table[5][5] == "+22.50"
    assert table[5][-4:] == ["0.0039", "0.0078", "17.50", "better"] and table[6][-1] == "no"
    assert "both: better than the baseline, by 22.50 points" in out
    assert "align: no difference from the baseline is shown; with so many changed answers, 15.00" in out
    assert out.splitlines()[-1].startswith("The best of several variants") and "is no result" in out
    assert [path.name for path in (folder / "pictures").iterdir()] == ["differences.png"]


def test_a_report_needs_no_more_of_a_line_than_what_was_answered(folder, call):
    """Ten videos with a question each, of which OutRo mends eight and spoils one; --seed counts then."""
    rows = [{"id": f"{n}", "variant": name, "answer": "", "right": is_right, "settings": "mine"}
            for n in range(10) for name, is_right in (("baseline", n == 9), ("both", n < 8))]
    (folder / "out").write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = json.loads(call("--report", folder / "out", "--seed", 6, "--json")[1])
    both = found["variants"]["both"]
    assert (found["videos"], found["seed"], found["tasks"]) == (10, 6, {})
    assert (both["gained"], both["lost"], both["p"], both["difference"]) == (8, 1, 20 / 512, 0.7)


@pytest.mark.parametrize("arguments, said", [
    ([], "give one of these: a file of questions, --toy N, or --report FILE"),
    (["q.jsonl", "--toy", "3"], "give one of these"),
    (["none.jsonl"], "none.jsonl: no such file"),
    (["q.jsonl", "--format", "vqa"], "its format is vqa"),
    (["q.jsonl", "--videos", "empty"], "empty has no a.mp4"),
    (["q.jsonl", "--variants", "relax,open"], "--variants 'open' is none of baseline, relax, align, both"),
    (["q.jsonl", "--gamma", "3,x"], "could not convert string to float: 'x'"),
    (["q.jsonl", "--gamma", "-1"], "gamma must be a number from 0 on"),
    (["q.jsonl", "--model", "no/toy/here"], "no/toy/here is neither a folder here"),
    (["q.jsonl", "--out", "notes.txt"], "notes.txt: line 1 is not JSON"),
    (["q.jsonl", "--out", "q.jsonl"], "q.jsonl is no file of answers"),
    (["q.jsonl", "--out", "word.txt"], "word.txt is no file of answers"),
    (["q.jsonl", "--out", "five.txt"], "five.txt is no file of answers"),
    (["q.jsonl", "--out", "old", "--gamma", "2"], "old is of another run, with gamma 3 instead of gamma 2"),
    (["--report", "none"], "No such file or directory: 'none'"),
    (["--report", "old", "none"], "No such file or directory: 'none'"),
    (["--report", "old", "older"], "older is of another run, with gamma 1"),
    (["--report", "void"], "no question has an answer"),
    (["q.jsonl", "--figures", "q.jsonl/a"], "is not a writable folder"),
    (["q.jsonl", "--frames", "0"], "argument --frames: '0' is not from 1 to"),
    (["--toy", "0"], "argument --toy: '0' is not from 1 to"),
    (["--toy", "5", "--noise", "256"], "argument --noise: '256' is not from 0 to 255"),
    (["q.jsonl", "--fps", "nan"], "argument --fps: 'nan' is not from"),
])
def test_errors_of_the_user_are_one_line_and_nothing_is_lost(folder, call, monkeypatch, arguments, said):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    for name, text in {"notes.txt": "a list\n", "word.txt": "a list", "five.txt": "5\n", "void": ""}.items():
        (folder / name).write_text(text)
    if "old" in arguments:
        align = ("q.jsonl", "--model", TOY, "--limit", 1, "--variants", "align")
        call(*align, "--out", "old")
        (folder / "older").write_text((folder / "old").read_text().replace("gamma 3", "gamma 1"))
        arguments = [*align, *arguments[1:]] if "q.jsonl" in arguments else arguments
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    code, out, err = call(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
