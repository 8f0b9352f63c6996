"""The teacher's file: what it gives points for adds up, and its figures are right."""

import re
from dataclasses import fields

import pytest
from exercises import EXERCISES
from helpers import ROOT
from variants import CONSTANTS

from minioutro import model
from minioutro.lab import analysis
from minioutro.lab.compare import sign_test

TEXT = (ROOT / "tests" / "course" / "README.md").read_text(encoding="utf-8")
WORDS = [e for e in EXERCISES if e.in_words]


@pytest.mark.parametrize("exercise", WORDS, ids=lambda e: e.title)
def test_each_answer_in_words_has_a_rubric(exercise):
    heading = rf"### {exercise.number}\. {re.escape(exercise.title)}(?:: .+)? \({exercise.in_words} points\)\n"
    section, = re.findall(rf"(?s)^{heading}(.+?)(?=^##|\Z)", TEXT, re.M)
    points = [int(n) for n in re.findall(r"^\| (\d+) \|", section, re.M)]
    assert sum(points) == exercise.in_words and 3 <= len(points) <= 5
    _, wrong = section.split("**Commonest wrong answers.**")
    assert section.count("**Full answer.**") == 1 and len(re.findall("^- ", wrong, re.M)) == 2


def test_there_is_no_other_rubric_and_students_are_not_led_to_it():
    assert re.findall(r"^### (\d+)\.", TEXT, re.M) == [str(e.number) for e in WORDS]
    assert f"{sum(e.by_tests for e in EXERCISES)} are given by the tests" in TEXT
    assert "teaching" not in (ROOT / "tutorial.md").read_text(encoding="utf-8")


def test_functions_that_it_names_are_there():
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", TEXT))
    there = {*vars(analysis), *vars(model), *(field.name for field in fields(model.Sinks)), "my_module"}
    assert "loss_of" in named and named <= there, named - there


def rows(heading: str) -> list[list[str]]:
    """The rows of the first table behind these words, without its head."""
    table = re.split(r"\n\| ---.*\n", TEXT.split(heading)[1])[1].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


@pytest.mark.parametrize("heading", ["**First lecture", "**Second lecture"])
def test_a_lecture_fills_its_ninety_minutes_with_sections_of_the_tutorial(heading):
    spans = [tuple(map(int, span.split("-"))) for span, *_ in rows(heading)]
    assert spans[0][0] == 0 and spans[-1][1] == 90
    assert all(end == begin for (_, end), (begin, _) in zip(spans, spans[1:]))
    titles = re.findall(r"^## \d+\. (.+)$", (ROOT / "tutorial.md").read_text(encoding="utf-8"), re.M)
    assert {title for _, title, _ in rows(heading)} - {""} <= set(titles)


def test_the_problem_set_has_each_exercise_once_and_takes_their_minutes():
    numbers = []
    for _, which, minutes in rows("**Problem set"):
        first, *last = map(int, which.split(" to "))
        span = range(first, [first, *last][-1] + 1)
        assert int(minutes) == sum(e.minutes for e in EXERCISES if e.number in span), which
        numbers += span
    assert numbers == [e.number for e in EXERCISES]


def test_each_exercise_has_an_answer_to_its_question():
    questions = TEXT.split("## Twelve questions to discuss")[1].split("\n## ")[0]
    assert re.findall(r"^(\d+)\. ", questions, re.M) == [str(e.number) for e in EXERCISES]


def test_what_changes_in_a_variant_is_told_and_its_answers_are_right():
    told = [(int(number), float(value)) for number, _, value in rows("## Another year")]
    assert told == [(constant.exercise, float(constant.values[0])) for constant in CONSTANTS]
    table = TEXT[TEXT.index("| gain |"):].split("\n\n")[0]
    table = [line.strip("|").split("|") for line in table.splitlines()]
    gains, _, ws, changed, p, p_more = ([float(cell) if cell.strip("- ") else None for cell in line[1:]]
                                        for line in table)
    assert gains == [float(value) for value in CONSTANTS[-1].values]
    for n, gain in enumerate(map(int, gains)):
        at_most = max(w for w in range(99) if sign_test(gained=gain + w, lost=w) < 0.05)
        assert (ws[n], changed[n]) == (at_most, gain + 2 * at_most)
        assert sign_test(gained=gain + at_most, lost=at_most) == pytest.approx(p[n], abs=6e-4)
        assert sign_test(gained=gain + at_most + 1, lost=at_most + 1) == pytest.approx(p_more[n], abs=6e-4)


def test_the_p_values_of_exercise_11():
    assert sign_test(gained=8, lost=1) == pytest.approx(0.039, abs=5e-4)
    assert sign_test(gained=9, lost=2) == pytest.approx(0.065, abs=5e-4)
    one_sided = [2 * k + 7 for k in range(9) if sign_test(gained=k + 7, lost=k) / 2 < 0.05]
    assert max(one_sided) == 13
