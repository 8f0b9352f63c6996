"""The teacher's file: what it gives points for adds up, and its figures are right."""

import re

import pytest
from conftest import ROOT
from exercises import EXERCISES

from minioutro.evaluate import sign_test

TEXT = (ROOT / "tests" / "teaching.md").read_text(encoding="utf-8")
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


def test_the_p_values_of_exercise_11():
    assert sign_test(gained=8, lost=1) == pytest.approx(0.039, abs=5e-4)
    assert sign_test(gained=9, lost=2) == pytest.approx(0.065, abs=5e-4)
    one_sided = [2 * k + 7 for k in range(9) if sign_test(gained=k + 7, lost=k) / 2 < 0.05]
    assert max(one_sided) == 13
