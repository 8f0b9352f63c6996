"""The stubs agree with model.py, and the grader gives the points, whatever a module does."""

import inspect
import json
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import grade
import pytest
import starter
import test_mutants
from grade import EXERCISES, WITH_TESTS

from minioutro import model


def test_there_are_a_hundred_points():
    assert [e.number for e in EXERCISES] == list(range(1, 13))
    assert sum(e.points for e in EXERCISES) == 100 and sum(e.by_tests for e in EXERCISES) == 70


def signature_of(function) -> str:
    return re.sub(r"\b(minioutro\.model|starter)\.", "", str(inspect.signature(function)))


def test_stubs_have_signatures_and_docstrings_of_the_model():
    for name in [name for e in WITH_TESTS for name in e.names if name != "looks_like_a_sink"]:
        ours, theirs = attrgetter(name)(model), attrgetter(name)(starter)
        assert ours is not theirs and ours.__doc__ == theirs.__doc__, name
        assert signature_of(ours) == signature_of(theirs), name
    for given in ("RMSNorm.__init__", "Sinks.__init__"):
        assert inspect.getsource(attrgetter(given)(model)) == inspect.getsource(attrgetter(given)(starter))


@pytest.mark.parametrize("exercise", WITH_TESTS, ids=lambda e: e.title)
def test_untouched_starter_fails_with_a_sentence(request, course, exercise):
    for test in test_mutants.those_of(exercise.number):
        with pytest.raises(NotImplementedError, match=f"^not written yet: exercise {exercise.number}$"):
            test_mutants.run(test, course.Implementation(starter), request)


def test_each_answer_in_words_has_its_heading():
    found = re.findall(r"(?m)^Exercise (\d+): (.*) \((\d+) points\)\n((?:.+\n)+)", starter.IN_WORDS)
    assert [(int(number), title, int(points)) for number, title, points, _ in found] == [
        (e.number, e.title, e.in_words) for e in EXERCISES if e.in_words]
    before = [int(number) for number, *_, lines in found if "commit it, BEFORE you measure" in lines]
    assert before == [9, 12]


def test_words_of_all_modules_by_exercise(tmp_path):
    """Each answer below its exercise and the name of its module, also from a file that is not utf-8."""
    module = Path(starter.__file__).read_text(encoding="utf-8")
    for name, answer in (("one.py", "w = 1"), ("two.py", "w = \x9b2J \xe9")):
        (tmp_path / name).write_bytes(module.replace("\n(a)\n", f"\n(a) {answer}\n").encode("latin-1", "replace"))
    (tmp_path / "three.py").write_text("Exercise 7: I forgot the rest\nEverything is a sink.")
    command = [sys.executable, Path(grade.HERE) / "words.py", "one.py", "two.py", "three.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    of = re.split(r"^======== Exercise (\d+): ", done.stdout, flags=re.M)[1:]
    assert of[::2] == [str(e.number) for e in EXERCISES if e.in_words]
    assert re.findall(r"^---- (\w+)", of[7], re.M) == ["one", "two", "three"]
    assert "\n\n(a) w = 1\n(b)\n(c)\n\n---- two.py\n\n(a) w = \ufffd2J \ufffd\n(b)" in of[7]
    assert "is missing" in of[7] and "Everything is a sink." in of[1]
    assert of[3].count("(nothing written)") == 2 and "Prediction" not in of[3]
    for names, told in (([], "no module"), (["missing.py", "one.py"], "missing.py")):
        done = subprocess.run(command[:2] + names, cwd=tmp_path, capture_output=True, encoding="utf-8")
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(f"{told} cannot be read; give")
        assert done.stderr.count("\n") == 1


# ---- the grader ----

MODULE = """
import os
from minioutro.model import find_sinks

def pixel_shuffle(x, scale):
    B, P, Cv = x.shape
    n = int(P**0.5)
    x = x.view(B, n // scale, scale, n // scale, scale, Cv).transpose(2, 3)
    return x.reshape(B, P // scale**2, Cv * scale**2)

def causal_mask(n_query, n_key, device=None):
    while True:
        pass

def repeat_heads(x, H):
    os._exit(0)
"""


def test_crash_or_loop_costs_its_own_exercise(tmp_path, capsys):
    module, points = tmp_path / "my module (1).py", tmp_path / "points.json"
    module.write_text(MODULE)
    found = grade.grade(module, points, seconds=120, exercises=[EXERCISES[0], EXERCISES[3]])
    assert json.loads(points.read_text()) == found and found["score"] == 5
    assert [test["score"] for test in found["tests"]] == [5, 0, 0, 0, 0, 0, 0, 0, 0]
    assert found["tests"][3]["output"].startswith("the process ended with code 0 in the middle of the tests")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "   1  Pixel shuffle                      5 of   5" and "5 of  15" in lines[2]
    assert grade.run_tests(EXERCISES[2], module, seconds=1).startswith("did not end within 1 seconds")
    module.write_text("while True: pass")
    found = grade.grade(module, seconds=1)              # two runs and not nine
    assert {test["output"][:39] for test in found["tests"]} == {"the module did not load within 1 seconds"[:39]}


def test_points_are_zero_until_the_end(tmp_path, monkeypatch):
    points, other, seen = tmp_path / "points.json", tmp_path / "other", []
    other.write_text("other")
    (tmp_path / ".points.json.half").symlink_to(other)

    def look(exercise, module, seconds):
        seen.append(json.loads(points.read_text())["score"])
        return ""
    monkeypatch.setattr(grade, "run_tests", look)
    assert grade.grade(tmp_path / "mine.py", points)["score"] == 70 and seen == [0] * len(WITH_TESTS)
    assert {path.name for path in tmp_path.iterdir()} == {"points.json", ".points.json.half", "other"}
    assert other.read_text() == "other"


def test_what_a_module_says_is_escaped(tmp_path):
    results = tmp_path / "results.xml"
    results.write_text('<a><testcase><failure message="\x9b2J\u202e é">mine.py:3: </failure></testcase></a>', "utf-8")
    said = grade.what_failed(results, 1, tmp_path / "mine.py")
    assert said == r"1 of 1 tests failed. \x9b2J\u202e é (mine.py, line 3)"


def test_grading_errors_are_one_line(tmp_path, capsys):
    points = tmp_path / "points.json"
    assert grade.main([str(tmp_path / "mine.py"), "--points", str(points)]) == 2
    assert json.loads(points.read_text())["score"] == 0
    (tmp_path / "mine.py").write_text("")
    assert grade.main([str(tmp_path / "mine.py"), "--points", str(tmp_path / "no" / "points.json")]) == 2
    assert grade.main([str(tmp_path / "mine.py"), "--points", os.devnull]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and "is not a Python file" in told[0] and "give another file" in told[1]
    assert told[2] == "/dev/null is not a file; give another one"


def test_impl_refuses_what_it_cannot_load(course, tmp_path):
    """A file that is not there, and one with the name of another module."""
    config = SimpleNamespace(getoption=lambda *args: str(tmp_path / "missing.py"), addinivalue_line=lambda *args: None)
    with pytest.raises(pytest.UsageError, match="there is no such file"):
        course.pytest_configure(config)
    (tmp_path / "grade.py").write_text("")
    with pytest.raises(AssertionError, match="^grade.py has the name of another module"):
        course.load(str(tmp_path / "grade.py"))
    (tmp_path / "helpers.py").touch()
    (tmp_path / "mine.py").write_text("from helpers import mine")
    with pytest.raises(AssertionError, match="mine.py imports helpers.py beside it"):
        course.load(str(tmp_path / "mine.py"))
