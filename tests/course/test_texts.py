"""The texts for students and teachers agree with the table of exercises, with the stubs, and with each other."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest
from grade import EXERCISES
from helpers import ROOT

from minioutro import OutRo, model
from minioutro.lab import analysis
from minioutro.lab.compare import sign_test

TUTORIAL = (ROOT / "tutorial.md").read_text(encoding="utf-8")
TEACHER = (ROOT / "tests" / "course" / "README.md").read_text(encoding="utf-8")


def section_of(exercise) -> str:
    return TUTORIAL.split(f"### Exercise {exercise.number}. ")[1].split("\n### ")[0]


def rows_after(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table after these words, without its head."""
    table = re.split(r"\n\| ---.*\n", text.split(heading)[1])[1].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


# ---- the tutorial ----


def test_tutorial_has_the_table_of_exercises():
    headings = re.findall(r"^### Exercise (\d+)\. (.+) \((\d+) points\)$", TUTORIAL, re.M)
    assert headings == [(str(e.number), e.title, str(e.points)) for e in EXERCISES]
    *rows, total = [row[:5] for row in rows_after(TUTORIAL, "## Exercises\n")]
    assert rows == [[str(e.number), e.title, str(e.points), str(e.minutes), e.needs] for e in EXERCISES]
    assert total[2:4] == [str(sum(e.points for e in EXERCISES)), str(sum(e.minutes for e in EXERCISES))]


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.title)
def test_exercise_has_all_its_parts(exercise):
    section = section_of(exercise)
    parts = re.findall(r"^- \*\*(\w+)\*\*: ", section, re.M)
    assert parts == ["Given", "Write", "Deliverable", "Check", "Size", "Discuss"]
    command = f"`python -m pytest tests/course --impl my_module.py -m exercise_{exercise.number}`"
    assert (command in section) == bool(exercise.names)
    for name in exercise.names:
        assert f"`{name}" in section, name


# ---- the teacher's page ----

WORDS = [e for e in EXERCISES if e.in_words]


@pytest.mark.parametrize("exercise", WORDS, ids=lambda e: e.title)
def test_each_answer_in_words_has_a_rubric(exercise):
    heading = rf"### {exercise.number}\. {re.escape(exercise.title)} \({exercise.in_words} points\)\n"
    section, = re.findall(rf"(?s)^{heading}(.+?)(?=^##|\Z)", TEACHER, re.M)
    points = [int(n) for n in re.findall(r"^\| (\d+) \| [^|]+ \| [^|]+ \|$", section, re.M)]     # with a half
    assert sum(points) == exercise.in_words and 3 <= len(points) <= 5
    assert section.count("**Full answer.**") == section.count("**Commonest wrong answers.**") == 1


def test_names_in_the_teachers_page_are_there():
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", TEACHER))
    course = {"my_module", "run_autograder", "is_sink"}
    there = {*vars(analysis), *vars(model), *course, *(field.name for field in fields(OutRo))}
    assert named <= there, named - there
    for path in re.findall(r"`((?:tests|minioutro)/[\w./]+)`", TEACHER):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("heading", ["**First lecture", "**Second lecture"])
def test_a_lecture_fills_its_ninety_minutes(heading):
    spans = [tuple(map(int, span.split("-"))) for span, *_ in rows_after(TEACHER, heading)]
    assert spans[0][0] == 0 and spans[-1][1] == 90
    assert all(end == begin for (_, end), (begin, _) in zip(spans, spans[1:]))
    titles = re.findall(r"^## \d+\. (.+)$", TUTORIAL, re.M)
    assert {title for _, title, _ in rows_after(TEACHER, heading)} - {""} <= set(titles)


def test_a_lecture_has_no_results_and_shows_pictures():
    command, = re.findall(r"^    python (tests/course/lecture.py) > lecture\.md$", TEACHER, re.M)
    done = subprocess.run([sys.executable, command], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    blocks = re.findall(r"^```python\n(.*?)^```\n", done.stdout, re.S | re.M)
    lines = [line for block in blocks for line in block.splitlines() if not line.startswith("picture    ")]
    original = re.findall(r"^```python\n(.*?)^```\n", TUTORIAL, re.S | re.M)
    assert lines == "".join(original).splitlines()
    drawing = [block for block in blocks if re.search(r"^picture = ", block, re.M)]
    assert drawing and all(block.splitlines()[-1].split()[0] == "picture" for block in drawing)
    assert not re.search(r"^```\n\n?(```\n|!\[)", done.stdout, re.M)
    assert re.findall(r"^[#>*-].*", done.stdout, re.M) == re.findall(r"^[#>*-].*", TUTORIAL, re.M)


def test_the_problem_set_has_each_exercise_once():
    numbers = []
    for _, which, minutes in rows_after(TEACHER, "**Problem set"):
        first, *last = map(int, which.split(" to "))
        span = range(first, [first, *last][-1] + 1)
        assert int(minutes) == sum(e.minutes for e in EXERCISES if e.number in span), which
        numbers += span
    assert numbers == [e.number for e in EXERCISES]


def test_constants_of_another_year_are_there():
    for _, constant, today, places in rows_after(TEACHER, "## Another year"):
        for path, words in re.findall(r"`([\w./]+)`: `([^`]+)`", places):
            assert words in (ROOT / path).read_text(encoding="utf-8"), (constant, today, words)


def test_the_p_values_of_exercise_11():
    """With one more answer that changed for the worse, the gain no longer has p < 0.05."""
    for gain, w, changed, p in [map(float, row) for row in rows_after(TEACHER, "the answers to 11 (b)")]:
        assert changed == gain + 2 * w and sign_test(int(gain + w), int(w)) == pytest.approx(p, abs=6e-4)
        assert sign_test(int(gain + w + 1), int(w + 1)) >= 0.05
