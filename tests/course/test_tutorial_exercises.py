"""The text of the exercises in the tutorial agrees with what is checked."""

import ast
import re

import pytest
import starter
from exercises import EXERCISES, MODEL, table
from helpers import ROOT

TEXT = (ROOT / "tutorial.md").read_text(encoding="utf-8")
HEADING = r"^### Exercise (\d+)\. (.+) \((\d+) points\)$"


def test_titles_and_points_are_those_of_the_table():
    headings = re.findall(HEADING, TEXT, re.M)
    assert headings == [(str(e.number), e.title, str(e.points)) for e in EXERCISES]
    assert sum(e.points for e in EXERCISES) == 100 and "100 points" in TEXT
    assert TEXT.split("## Exercises\n")[1].count(table()) == 1, f"the table of all exercises is\n{table()}"


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.title)
def test_each_exercise_says_what_is_given_what_to_write_and_how_it_is_checked(exercise):
    section = TEXT.split(f"### Exercise {exercise.number}. ")[1].split("\n#")[0]
    parts = re.findall(r"^- \*\*(\w+)\*\*: ", section, re.M)
    assert parts == ["Given", "Write", "Deliverable", "Check", "Size", "Discuss"]
    command = f"`python -m pytest --impl my_module -m {exercise.mark}`"
    assert (command in section) == bool(exercise.names)
    for name in exercise.names:
        assert f"`{name}" in section, name
    words = re.findall(r"\((\d+) points\)", section)[1:]         # behind those of the title
    both = {str(exercise.by_tests), str(exercise.in_words)}
    assert set(words) == (both if exercise.names and exercise.in_words else set())


FUNCTIONS = [e for e in EXERCISES if e.names and not e.stub and e.number != 10]     # 10: a part of one


@pytest.mark.parametrize("exercise", FUNCTIONS, ids=lambda e: e.title)
def test_sizes_are_about_those_of_the_model(exercise):
    source = MODEL.read_text(encoding="utf-8")
    n_lines = 0
    for name in exercise.names:
        function = starter.node_named(ast.parse(source), name)
        body = function.body[1:] if ast.get_docstring(function) else function.body
        lines = source.splitlines()[body[0].lineno - 1:function.end_lineno]
        n_lines += sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)
    hint, = re.findall(rf"### Exercise {exercise.number}\. .*?about (\d+) line", TEXT, re.S)
    assert abs(int(hint) - n_lines) <= max(2, n_lines // 4), f"{n_lines} lines in model.py"
