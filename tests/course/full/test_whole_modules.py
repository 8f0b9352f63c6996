"""Whole modules, graded as those of students are. `.ci/run` runs this: it takes minutes."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from operator import attrgetter

import mutants
from grade import HERE, ROOT, WITH_TESTS
from helpers import writable_copy

from minioutro import model

STARTER = (HERE / "starter.py").read_text(encoding="utf-8")


def body_of(function) -> str:
    """The lines of a function after its signature and docstring, with their indent."""
    source = inspect.getsource(function)
    _, end, body = source.rpartition('"""\n')
    return body if end else source.split("\n", 1)[1]


def filled_starter() -> str:
    """The starter, in which each `raise` is replaced with the project's own lines."""
    text = STARTER
    for e in WITH_TESTS:
        for name in e.names:
            ours = mutants.looks_like_a_sink if name == "looks_like_a_sink" else attrgetter(name)(model)
            stub = f'raise NotImplementedError("not written yet: exercise {e.number}")\n'
            assert stub in text, name
            text = text.replace(stub, body_of(ours).lstrip(), 1)
    return text


def graded(folder, text, **environment):
    """The report about a module, and what was printed."""
    (folder / "mine.py").write_text(text, encoding="utf-8")
    command = [sys.executable, HERE / "grade.py", "mine.py", "--points", "points.json", "--seconds", "120"]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads((folder / "points.json").read_text()), done.stdout


def test_filled_starter_has_all_points(tmp_path):
    report, table = graded(tmp_path, filled_starter())
    assert report["score"] == 70, table


def test_surroundings_give_no_points(tmp_path):
    """A module with two wrong functions, one that is imported, and one that ends Python, under `python -O`."""
    wrong = filled_starter() + """
from minioutro.model import pixel_shuffle
find_sinks = lambda hidden, *thresholds: ~model_sinks(hidden, *thresholds)
from minioutro.model import find_sinks as model_sinks
def rotate(x, cos, sin): raise SystemExit
def attention(q, k, v, may_attend): return v, v
"""
    report, table = graded(tmp_path, wrong, PYTHONOPTIMIZE="1", PYTEST_ADDOPTS="-n 2 --collect-only")
    assert [test["score"] for test in report["tests"]] == [0, 0, 5, 0, 10, 0, 5, 10, 15], table
    assert "pixel_shuffle is the project's own: exercise 1 is for writing it" in report["tests"][0]["output"], table


def test_a_hand_out_needs_four_files(tmp_path):
    """As the teacher's page says: the others can be left out. Somebody's pytest.ini around them changes nothing."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --collect-only\n")
    project = tmp_path / "project"
    ignored = shutil.ignore_patterns("__pycache__", "pictures")
    for name in ("minioutro", "tests"):
        writable_copy(ROOT / name, project / name, ignored)
    course = project / "tests" / "course"
    shutil.rmtree(course / "full")
    for path in course.glob("*.*"):
        if path.name not in ("starter.py", "grade.py", "conftest.py", "test_exercises.py"):
            path.unlink()
    shutil.copy(course / "starter.py", project / "my_module.py")
    code = "import grade; print(grade.run_tests(grade.WITH_TESTS[2], grade.ROOT / 'my_module.py', 120))"
    done = subprocess.run([sys.executable, "-c", code], cwd=course, capture_output=True, text=True)
    assert done.stdout.startswith("2 of 2 tests failed. NotImplementedError: not written yet"), done.stdout + done.stderr
