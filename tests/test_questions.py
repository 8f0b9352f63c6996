"""Files of questions, as their authors publish them, and what is wrong with a file, in one line."""

import json
import random

import pytest

from minioutro.lab.questions import (
    FORMATS,
    LETTERS,
    OF_A_CLIP,
    Record,
    chosen,
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
MVB = {"video": "x.webm", "question": "Then?", "candidates": ["a", "b", "it"], "answer": "it"}
NEXT = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
EGO = {"question": "Why?", **{f"option {n}": letter for n, letter in enumerate("abcde")}}


def written(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name, content, records", [
    ("ours.jsonl", lines(OURS, {"id": 2, "video": "b/c.mkv", "question": "What?", "answer": "a ring",
                                "task": "shape", "start": 0, "end": 2.5, "choices": None}),
     [Record("1", "a.mp4", "Which colour?", ("red", "blue"), "blue", "", None, None),
      Record("2", "b/c.mkv", "What?", (), "a ring", "shape", 0.0, 2.5)]),
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
    ("sense.json", {"v1": {"duration": 60, "domain": "d", "task0": SENSE, "task1": {**SENSE, "answer": "C"}}},
     [Record("v1_task0", "v1.mp4", "Who?", ("I", "you", "he"), "I", "t"),
      Record("v1_task1", "v1.mp4", "Who?", ("I", "you", "he"), "he", "t")]),
    ("moving.json", [MVB, {**MVB, "candidates": ["B", "A"], "answer": "B", "start": 1.5, "end": 9}],
     [Record("moving_1", "x.webm", "Then?", ("a", "b", "it"), "it", "moving"),
      Record("moving_2", "x.webm", "Then?", ("B", "A"), "B", "moving", 1.5, 9.0)]),
    ("next.csv", NEXT + '7,9,4,3,"why, ""so""",2,6,CW,a,b,"c, d",e,f\n8,9,4,3,how,0,6,CH,1,0,2,,\n',
     [Record("7_6", "7.mp4", 'why, "so"', ("a", "b", "c, d", "e", "f"), "c, d", "CW"),
      Record("8_6", "8.mp4", "how", ("1", "0", "2"), "1", "CH")]),
], ids=lambda value: value if isinstance(value, str) and "." in value[:20] else "")
def test_every_format_becomes_the_same_records(tmp_path, name, content, records):
    assert read_questions(written(tmp_path, name, content)) == records


def test_egoschemas_answers_and_nextqas_folders_lie_beside_the_questions(tmp_path):
    path = written(tmp_path, "questions.json", [{"q_uid": q, **EGO} for q in ("u1", "u2", "u3")])
    with pytest.raises(FileNotFoundError, match="subset_answers.json: no such file"):
        read_questions(path)
    written(tmp_path, "subset_answers.json", {"u1": 3, "u3": 0})
    notes = []
    assert [(r.id, r.video, r.answer) for r in read_questions(path, notes=notes)] == [
        ("u1", "u1.mp4", "d"), ("u3", "u3.mp4", "a")]
    assert notes == ["left out: 1 captions, or without an answer"]
    other = written(tmp_path, "answers.json", {"u2": 4})
    assert [(r.id, r.answer) for r in read_questions(path, answers=other)] == [("u2", "e")]
    path = written(tmp_path, "val.csv", NEXT + "7,9,4,3,why,2,6,CW,a,b,c,d,e\n8,9,4,3,why,2,6,CW,a,b,c,d,e\n")
    written(tmp_path, "map_vid_vidorID.json", {"7": "1164/7"})
    assert [r.video for r in read_questions(path)] == ["1164/7.mp4", "8.mp4"]


def test_what_is_left_out_is_counted_and_deafness_said(tmp_path):
    notes = []
    read_questions(written(tmp_path, "a.json", [AV, {**AV, "task": "AV Captioning"}, {**AV, "label": ""}]),
                   notes=notes)
    assert notes == ["left out: 2 captions, or without an answer",
                     "avhbench asks about sound, and these models are deaf"]
    read_questions(written(tmp_path, "b.jsonl", lines(OURS)), notes=notes)
    assert len(notes) == 2


def without(row, key):
    return {k: value for k, value in row.items() if k != key}


@pytest.mark.parametrize("name, content, said", [
    ("none.json", None, "none.json: no such file"),
    ("a.jsonl", "", "a.jsonl has no questions"),
    ("a.json", [], "a.json has no questions"),
    ("a.json", [{**AV, "task": "AV Captioning"}], "a.json has no questions with answers"),
    ("a.json", [{"foo": 1, "bar": 2}], "its format is unknown, with the keys bar, foo; known formats are"),
    ("a.json", "[1, 2]", "not objects"), ("a.json", '"text"', "not objects"),
    ("a.jsonl", lines(OURS, OURS)[:-9], "line 2 is not JSON"),
    ("a.jsonl", '{"id": 1,\n' + lines(OURS), "line 1 is not JSON"),
    ("a.json", '[\n{"id": 1},\n{"id"\n]', "line 4 is not JSON"),
    ("a.json", "[" * 100_000, "line 1 is not JSON"),
    ("a.parquet", "PAR1", "read_parquet(...).to_json("),
    ("a.jsonl", lines(OURS, {"id": "seven", "video": "a", "question": "?"}), "'seven': it has no 'answer'"),
    ("a.jsonl", lines(without(OURS, "id"), OURS), "record 1: it has no 'id'"),
    ("a.jsonl", lines({**OURS, "video": None}), "record '1': it has no 'video'"),
    ("a.jsonl", lines({**OURS, "answer": "green"}), "record '1': its answer 'green' is none of the choices"),
    ("a.json", [{**MME, "answer": "E"}], "record '001-1': its answer 'E' is none of"),
    ("a.csv", NEXT + "7,9,4,3,why,5,6,CW,a,b,c,d,e\n", "record '7_6': its answer '5' is none of"),
    ("a.jsonl", lines({**OURS, "choices": ["blue"]}), "'1': its choices are ['blue'], not a list of 2"),
    ("a.jsonl", lines({**OURS, "choices": "blue"}), "record '1': its choices are 'blue', not a list"),
    ("a.jsonl", lines(OURS, OURS), "record '1': this id is there twice"),
    ("a.jsonl", lines({**OURS, "start": "soon"}), "record '1': could not convert string to float: 'soon'"),
])
def test_what_is_wrong_with_a_file_is_named_in_one_line(tmp_path, name, content, said):
    path = tmp_path / name if content is None else written(tmp_path, name, content)
    with pytest.raises((ValueError, OSError)) as error:
        read_questions(path)
    assert said in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("row, keys", [
    (OURS, "video question answer"), (AV, "task label"), (DAILY, "video_id Question Answer Type"),
    (MME, "question_id question options answer task_type"), (MVB, "video question answer")], ids=range(5))
def test_a_missing_field_is_named_with_what_is_there(tmp_path, row, keys):
    for key in keys.split():
        rest = without(row, key)
        with pytest.raises(ValueError, match=f"record .*: it has no '{key}'; .*{sorted(rest)[0]}"):
            read_questions(written(tmp_path, "a.json", [rest]))


def test_a_format_can_be_forced(tmp_path):
    path = written(tmp_path, "a.json", [{**MVB, "id": "1"}])
    assert read_questions(path)[0].id == "a_1" and read_questions(path, "mvbench")[0].id == "a_1"
    assert read_questions(path, "ours")[0] == Record("1", "x.webm", "Then?", (), "it", "")
    with pytest.raises(ValueError, match="its format is vqa, with the keys answer, candidates"):
        read_questions(path, "vqa")
    assert len(FORMATS) == 8


def test_the_requests_are_the_releases():
    assert with_choices("Who?", ()) == "Who?"
    assert with_choices("Is it?", ("Yes", "No")) == "Is it? Answer yes or no."
    assert with_choices("Who?", ("I", "you", "he", "we")) == (
        "Who?\nA. I\nB. you\nC. he\nD. we\n"
        "Respond with only the letter (A, B, C, or D) of the correct option.")
    assert with_choices("Who?", ("I", "you")).endswith("the letter (A or B) of the correct option.")


@pytest.mark.parametrize("text, choice", [
    ("B", "a boat"), ("B.", "a boat"), ("B) whatever", "a boat"), ("(B)", "a boat"), ("B: a boat", "a boat"),
    ("A boat.", "a boat"), ("the  BOAT", "a boat"), (" C\n", "Bob"), ("D", None), ("b", None), ("", None),
    ("B or C", None), ("The answer is B", None), ("a", None), ("a boat and a car", None)])
def test_a_generated_choice_is_read_strictly(text, choice):
    assert chosen(text, ("a car", "a boat", "Bob")) == choice


@pytest.mark.parametrize("text, choice", [
    ("Yes", "Yes"), ("no.", "No"), ("I think NO, yes", "No"), ("Nobody knows", None), ("yesterday", None)])
def test_yes_or_no_is_the_first_whole_word(text, choice):
    assert chosen(text, ("Yes", "No")) == choice


def test_plain_texts():
    assert plain(" The red  Ring. ") == plain("a red ring") == "red ring"
    assert plain("A") == "a" and plain("red, blue!") == "red, blue" and plain("an") != plain("the")


def test_the_toys_questions_are_about_unseen_clips_and_answered_by_what_is_drawn():
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


def test_letters_of_options_are_taken_off_only_if_all_have_them_in_order(tmp_path):
    rng = random.Random(0)
    for options, bare in ((["A. x", "B. y"], ["x", "y"]), (["A. x", "C. y"], None), (["A. x", "y"], None),
                          (["A: A. x", "B) y"], ["A. x", "y"]), (["A x", "B y"], None), (["Ab", "Ba"], None)):
        n = rng.randrange(2)
        path = written(tmp_path, "a.json", [{**MME, "options": options, "answer": LETTERS[n]}])
        record, = read_questions(path)
        assert record.choices == tuple(bare or options) and record.answer == record.choices[n]
