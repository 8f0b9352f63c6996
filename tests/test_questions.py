"""Files of questions: the formats of their authors, what is refused, and how answers are read."""

import json

import pytest

from minioutro.lab.questions import (
    OF_A_CLIP,
    Record,
    chosen,
    first_tokens,
    plain,
    read_questions,
    toy_questions,
    with_choices,
)
from minioutro.lab.shapes import UNSEEN, Clip

OURS = {"id": "1", "video": "a.mp4", "question": "Which colour?", "choices": ["red", "blue"],
        "answer": "blue"}
AV = {"video_id": "00012", "task": "AV Matching", "text": "Is a dog heard?", "label": "No"}
DAILY = {"Question": "What?", "Choice": ["A. x", "B. y", "C. z", "D. A. w"], "Answer": "B", "video_id": "ab",
         "Type": "Inference", "video_category": "Pets", "video_duration": "30s"}
MME = {"videoID": "x1", "video_id": "001", "duration": "short", "domain": "d", "sub_category": "s",
       "question_id": "001-1", "task_type": "Counting Problem", "question": "How many?",
       "options": ["A. 1", "B. 2", "C. 3", "D. 4"], "answer": "C"}
SENSE = {"task_domain": "d", "task_type": "t", "question": "Who?", "candidates": ["A. I", "B. you", "C. he"],
         "answer": "A"}


def written(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def without(row, key):
    return {k: value for k, value in row.items() if k != key}


def refusal(folder, name, content):
    """The error message about a file: one line that names the file."""
    path = written(folder, name, content)
    with pytest.raises((ValueError, OSError)) as error:
        read_questions(path)
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text
    return text


# ---- formats ----


@pytest.mark.parametrize("name, content, records", [
    ("ours.jsonl", lines(OURS, {"id": 2, "video": "b/c.mkv", "question": "What?", "answer": "a ring",
                                "task": "shape", "start": 0, "end": 2.5, "choices": None}),
     [Record("1", "a.mp4", "Which colour?", ("red", "blue"), "blue", "", None, None),
      Record("2", "b/c.mkv", "What?", (), "a ring", "shape", 0.0, 2.5)]),
    ("ours.csv", "\ufeffid,video,question,answer,task,start\n007,1.mp4,\"Why, so?\",3,,\n8,1.mp4,How?,x,t,1.5\n",
     [Record("007", "1.mp4", "Why, so?", (), "3", ""), Record("8", "1.mp4", "How?", (), "x", "t", 1.5)]),
    ("lettered.jsonl", lines({**OURS, "choices": ["(A) red", "(B) blue", "(C) 3"], "answer": "C"}),
     [Record("1", "a.mp4", "Which colour?", ("red", "blue", "3"), "3", "")]),
    ("avhbench.json", [AV, {**AV, "task": "AV Captioning", "label": "A dog barks."}, {**AV, "label": "yes"}],
     [Record("00012_1", "00012.mp4", "Is a dog heard?", ("Yes", "No"), "No", "AV Matching"),
      Record("00012_3", "00012.mp4", "Is a dog heard?", ("Yes", "No"), "Yes", "AV Matching")]),
    ("daily.json", [DAILY, {**DAILY, "Choice": ["A", "a boat", "A. x", "no"], "Answer": "B. a boat"}],
     [Record("ab_1", "ab/ab_video.mp4", "What?", ("x", "y", "z", "A. w"), "y", "Inference"),
      Record("ab_2", "ab/ab_video.mp4", "What?", ("A", "a boat", "A. x", "no"), "a boat", "Inference")]),
    ("mme.jsonl", lines(MME, {**MME, "question_id": "001-2", "answer": "(A)"}),
     [Record("001-1", "x1.mp4", "How many?", ("1", "2", "3", "4"), "3", "Counting Problem"),
      Record("001-2", "x1.mp4", "How many?", ("1", "2", "3", "4"), "1", "Counting Problem")]),
    ("sense.json", {"v1": {"duration": 60, "audio_class": ["Speech"], "task0": SENSE,
                           "task1": {**SENSE, "answer": "C"}}},
     [Record("v1_task0", "v1.mp4", "Who?", ("I", "you", "he"), "I", "t"),
      Record("v1_task1", "v1.mp4", "Who?", ("I", "you", "he"), "he", "t")]),
], ids=lambda value: value if isinstance(value, str) and "." in value[:20] else "")
def test_formats(tmp_path, name, content, records):
    assert read_questions(written(tmp_path, name, content)) == records


@pytest.mark.parametrize("content", [
    lines({"v1": {"task0": SENSE, "task1": SENSE}}, {"v2": {"task3": SENSE}}),
    json.dumps([{"v1": {"task0": SENSE, "task1": SENSE}}, {"v2": {"task3": SENSE}}]),
    json.dumps({"v1": {"task0": SENSE, "task1": SENSE}, "v2": {"task3": SENSE}})], ids=["lines", "list", "object"])
def test_worldsense_of_several_objects(tmp_path, content):
    records = read_questions(written(tmp_path, "a.json", content))
    assert [record.id for record in records] == ["v1_task0", "v1_task1", "v2_task3"]


def test_format_is_given(tmp_path):
    path = written(tmp_path, "a.json", [{**AV, "videoID": "x"}])
    assert read_questions(path)[0] == read_questions(path, "avhbench")[0]
    with pytest.raises(ValueError, match="record 1: it has no 'options'"):
        read_questions(path, "video-mme")
    with pytest.raises(ValueError, match="is an object of videos"):
        read_questions(path, "worldsense")
    notes = []
    read_questions(path, notes=notes)
    assert notes == ["two of avhbench's three tasks ask about sound, which the model cannot hear"]


# ---- what is refused ----


@pytest.mark.parametrize("name, content, said", [
    ("a.jsonl", "", "has no questions"),
    ("a.json", [{**AV, "task": "AV Captioning"}], "has no questions with answers"),
    ("a.json", [{"foo": 1, "bar": 2}], "its format is unknown, with the keys bar, foo; give a file in one of"),
    ("a.jsonl", lines(OURS, OURS)[:-9], "line 2 is not JSON"),
    ("a.parquet", "PAR1", "read_parquet(...).to_json("),
    ("a.jsonl", lines(without(OURS, "id"), OURS), "record 1: it has no 'id'"),
    ("a.jsonl", lines({**OURS, "video": 7.0}), "record 1: its 'video' is 7.0, with a decimal point"),
    ("a.jsonl", lines({**OURS, "video": " "}), "record 1: its 'video' is empty"),
    ("a.jsonl", lines({**OURS, "answer": float("nan")}), "record 1: its 'answer' is empty"),
    ("a.jsonl", lines({**OURS, "answer": True}), "record 1: its 'answer' is True, not a text or a number"),
    ("a.jsonl", lines({**OURS, "options": ["red", "blue"]}), "record 1: its key 'options' is unknown"),
    ("a.jsonl", lines(OURS, {**OURS, "id": 1}), "record 2: an earlier record has the same id, '1'"),
    ("a.jsonl", lines({**OURS, "start": "soon"}), "record 1: its 'start' is 'soon', not a number of seconds"),
    ("a.jsonl", lines({**OURS, "start": 2, "end": 2}), "record 1: its end, 2 s, is not after its start"),
    ("a.csv", "id,video,question,answer\n1,a,b\n", "record 1: it has fewer cells"),
    ("a.json", [{**AV, "label": "maybe"}], "record 1: its answer 'maybe' is not one of the choices ('Yes', 'No')"),
    ("a.json", {"v1": {"task0": SENSE}, "v2": {"question0": SENSE}}, "video 'v2' has {'question0'"),
    ("a.json", {"v1": {"task0": SENSE, "task1": None}}, "video 'v1' has 'task1', which is None"),
    ("a.json", {"id": {"0": 1}, "video": {"0": "a"}, "question": {"0": "?"}, "answer": {"0": "x"}},
     "is the object {'0': 'x'}, not a text or a number (with orient='records', pandas writes one row"),
    ("a.json", {key: {"0": value} for key, value in MME.items()}, "(with orient='records', pandas"),
])
def test_wrong_files(tmp_path, name, content, said):
    assert said in refusal(tmp_path, name, content)


@pytest.mark.parametrize("row, keys", [
    (OURS, "video question answer"), (AV, "task label"), (DAILY, "video_id Question Answer Type"),
    (MME, "question_id question options answer task_type")], ids=range(4))
def test_missing_fields_are_named(tmp_path, row, keys):
    for key in keys.split():
        rest = without(row, key)
        text = refusal(tmp_path, "a.json", [row, {**rest, "id": "2"} if row is OURS else rest])
        assert f"record 2: it has no '{key}'" in text


@pytest.mark.parametrize("options, said", [
    (["red", None, "blue"], "option 2 of its 'choices' is empty"),
    (["red", " ", "blue"], "option 2 of its 'choices' is empty"),
    (["A. red", "B.", "C. blue"], "option 2 of its 'choices' is empty"),
    (["blue", "blue ", "red"], "and two of them are equal"),
    (["blue"], "are ['blue'], not a list of 2 to 26"),
    ({"A": "red", "B": "blue"}, "'choices' is the object"),
    ([["red"], "blue"], "option 1 of its 'choices' is ['red'], not a text"),
    ([f"{n}" for n in range(27)], "not a list of 2 to 26")])
def test_wrong_options(tmp_path, options, said):
    text = refusal(tmp_path, "a.jsonl", lines(OURS, {**OURS, "id": "2", "choices": options}))
    assert "record 2: " in text and said in text


@pytest.mark.parametrize("row, answer, said", [
    (OURS, 1, "its answer '1' is not one of the choices ('red', 'blue')"),
    ({**OURS, "choices": ["b", "a"]}, "A", "is the letter of one choice and the text of another"),
    (MME, "E", "its answer 'E' is not one of the choices"),
    (MME, "B. 3", "its answer 'B. 3' is not one of the choices")])
def test_wrong_answers(tmp_path, row, answer, said):
    assert said in refusal(tmp_path, "a.json", [{**row, "answer": answer}])


# ---- options and answers ----


@pytest.mark.parametrize("options, choices", [
    (["A. x", "B. y"], ("x", "y")), (["(A) x", "(B) y"], ("x", "y")), (["A: A. x", "B) y"], ("A. x", "y")),
    (["A. x", "C. y"], ("A. x", "C. y")), (["A. x", "y"], ("A. x", "y")), (["A x", "B y"], ("A x", "B y")),
    (["Ab", "Ba"], ("Ab", "Ba")), (["A.D.", "B.C."], ("A.D.", "B.C.")), (["A.x", "B.y"], ("A.x", "B.y")),
    (["A.", "B."], ("A.", "B.")), (["(A)", "(B)"], ("(A)", "(B)")), (["A", "B"], ("A", "B"))])
def test_letters_in_front_of_options(tmp_path, options, choices):
    """They are removed if every option has its own, in order, with a space after it and a text after that."""
    for position, letter in enumerate("AB"):
        for answer in (letter, options[position]):
            path = written(tmp_path, "a.json", [{**MME, "options": options, "answer": answer}])
            record, = read_questions(path)
            assert (record.choices, record.answer) == (choices, choices[position])


@pytest.mark.parametrize("row, key, answer", [(OURS, "choices", "B"), (MME, "options", "A")])
def test_answer_text_or_letter(tmp_path, row, key, answer):
    record, = read_questions(written(tmp_path, "a.json", [{**row, key: ["B", "A"], "answer": "B"}]))
    assert record.answer == answer


def test_requests():
    assert with_choices("Who?", ()) == "Who?"
    assert with_choices("Is it?", ("Yes", "No")) == "Is it? Answer yes or no."
    assert with_choices("Who?", ("I", "you", "he", "we")) == (
        "Who?\nA. I\nB. you\nC. he\nD. we\n"
        "Respond with only the letter (A, B, C, or D) of the correct option.")
    assert with_choices("Who?", ("I", "you")).endswith("the letter (A or B) of the correct option.")


@pytest.mark.parametrize("text, position", [
    ("B", 1), ("B.", 1), ("B) whatever", 1), ("(B)", 1), ("B: a boat", 1), ("B. A boat", 1), ("B. B", 1),
    ("C. Vitamin A", 2), ("A boat.", 1), ("the  BOAT", 1), (" C\n", 2), ("vitamin a", 2),
    ("D", None), ("b", None), ("", None), ("The answer is B", None), ("a", None),
    ("a boat and a car", None), ("B or C", None), ("A, B", None), ("(A) or (B)", None), ("A) B) C)", None),
    ("A. a car B. a boat C. Vitamin A", None), ("A. a car\nB. a boat", None), ("A. and B", None), ("B. C", None)])
def test_chosen_letter(text, position):
    assert chosen(text, ("a car", "a boat", "Vitamin A")) == position


def test_chosen_text():
    assert plain(" The red  Ring. ") == plain("a red ring") == "red ring" and plain("an") != plain("the")
    assert chosen("A. Huxley", ("B. Braun", "A. Huxley")) == 1
    assert chosen("A", ("B", "A")) == 0                     # we asked for a letter
    assert chosen("B.C.", ("B.C.", "A.D.")) == 0
    assert chosen("ph", ("pH", "PH")) is None               # equal to both once capitals are ignored


@pytest.mark.parametrize("text, position", [
    ("Yes", 0), ("no.", 1), ("I think NO, yes", 1), ("Yes, no dog is heard", 0), ("Nobody knows", None),
    ("yesterday", None), ("Yes or no", None), ("yes/no", None)])
def test_chosen_yes_or_no(text, position):
    assert chosen(text, ("Yes", "No")) == position


def test_first_tokens(toy):
    """The toy has no token ' B' and no token 'Yes', so it has one form. A tokenizer with all of them has two."""
    processor = toy[1]
    colours = ("red", "green", "blue")
    token = processor.tokenizer.token_to_id
    assert first_tokens(processor, colours).tolist() == [[token("A"), token("B"), token("C")]]
    assert first_tokens(processor, ("No", "Yes")).tolist() == [[token("ĠNo"), token("ĠYes")]]

    class Whole:
        def tokenize(self, pieces):
            return [len(pieces[0]) * 100 + ord(pieces[0][-1])]

    class Bytes:
        def tokenize(self, pieces):
            return list(pieces[0].encode())
    assert first_tokens(Whole(), colours).tolist() == [[265, 266, 267], [165, 166, 167]]
    with pytest.raises(ValueError, match="no single token for Yes or No"):
        first_tokens(Bytes(), ("Yes", "No"))


# ---- the toy's world ----


def test_toy_questions():
    """They are about unseen clips, their answers are what is drawn, and every kind of question occurs."""
    records, clips = toy_questions(25, seed=3, noise=7)
    assert len(records) == 25 and len(clips) == 3 and len({record.id for record in records}) == 25
    for n, (video, write) in enumerate(clips.items()):
        clip = write.__self__
        assert clip.seed == UNSEEN + 3 * 10**6 + n and clip.noise == 7
        asked = [record for record in records if record.video == video]
        known = {q.text: (q.answer, q.kind) for q in Clip(clip.seed, len(clip.shapes)).questions()}
        assert all(known[r.question] == (r.answer, r.task) and r.choices == () for r in asked)
        assert len(asked) == min(OF_A_CLIP, 25 - 10 * n) == len({r.question for r in asked})
        kinds = [kind for _, kind in known.values()]
        assert len({r.task for r in asked}) == min(len(set(kinds)), len(asked))
        assert all(kinds.count(r.task) > 1 for r in asked[len(set(kinds)):])
    assert toy_questions(20, seed=3)[0] == records[:20] != toy_questions(20, seed=4)[0]
