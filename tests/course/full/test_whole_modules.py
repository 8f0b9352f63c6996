"""Whole modules, graded as those of students are. `.ci/run` runs this: it takes minutes."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from zipfile import ZipFile

import mutants
from grade import HERE, ROOT, WITH_TESTS
from helpers import writable_copy

from minioutro import model

STARTER = (HERE / "starter.py").read_text(encoding="utf-8")
TEACHER = (HERE / "README.md").read_text(encoding="utf-8")


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


def project_in(folder: Path) -> Path:
    """A copy of the project, as a teacher has it."""
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache")
    return writable_copy(ROOT, folder / "project", ignored)


def commands_of(heading: str, *begin: str) -> list[str]:
    """The lines of the page's section that are meant for a shell and begin so."""
    section = TEACHER.split(heading)[1].split("\n**")[0].replace("\\\n", "")
    found = [line for line in re.findall(r"^    (\S.*)$", section, re.M) if line.startswith(begin)]
    assert found, heading
    return found


def in_shell(command: str, folder: Path, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command], cwd=folder, env={**os.environ, **environment}, capture_output=True,
                          text=True)


def commit(project: Path) -> None:
    """Make a repository of a folder, with one commit that has all of it."""
    done = in_shell("git init --quiet && git add . && git -c user.name=a -c user.email=a@b commit --quiet -m all", project,
                    GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM="1")
    assert done.returncode == 0, done.stderr


def script(path: Path, lines: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{lines}\n", encoding="utf-8")
    path.chmod(0o755)


def test_autograder(tmp_path):
    """All of it but the installation, in a clean folder: the zip, setup.sh with the shell of an image in which nothing
    is installed, and three submissions."""
    project, home, tools = project_in(tmp_path), tmp_path / "autograder", tmp_path / "tools"
    for folder in (project / ".venv", home / "results", home / "submission", tools):
        folder.mkdir(parents=True)
    (project / ".venv" / "gigabyte").touch()
    make_zip, = commands_of("**Gradescope.**", "git archive")
    commit(project)
    done = in_shell(make_zip, project)
    assert done.returncode == 0, done.stderr
    ZipFile(project / "autograder.zip").extractall(home / "source")         # from here on, what Gradescope does
    assert not (home / "source" / ".venv").exists()
    shutil.copy(home / "source" / "run_autograder", home)

    script(tools / "apt-get", "exit 0")
    script(tools / "python3", f"""
        mkdir -p "$3/bin"
        printf '#!/bin/sh\necho "$@" >> installed\n' > "$3/bin/pip"
        printf '#!/bin/sh\nexec {sys.executable} "$@"\n' > "$3/bin/python"
        chmod +x "$3/bin/pip" "$3/bin/python" """)
    done = in_shell("bash /autograder/source/setup.sh".replace("/autograder", str(home)), tmp_path,
                    PATH=f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    torch, = (line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    assert (home / "installed").read_text().splitlines() == [
        f"install {torch} --index-url https://download.pytorch.org/whl/cpu", "install -r source/requirements.txt"]

    def results():
        done = in_shell(f"bash {home}/run_autograder", tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads((home / "results" / "results.json").read_text())
    (home / "submission" / "answers.ipynb").touch()
    assert results() == {"score": 0, "output": "0 files that end in .py were handed in. Hand in exactly one, such as "
                                               "my_module.py."}
    (home / "submission" / "hw1-smith (2).py").write_text(filled_starter(), encoding="utf-8")
    report = results()
    assert report["score"] == 70, report
    (home / "submission" / "helpers.py").touch()
    assert results()["output"].startswith("2 files that end in .py were handed in.")


def test_surroundings_give_no_points(tmp_path):
    """A module with two wrong functions, one that is imported, and one that ends Python, under `python -O`. Whenever
    it is loaded, it prints 10 MB."""
    wrong = filled_starter() + """
print("ten bytes " * 10**6)
from minioutro.model import pixel_shuffle
find_sinks = lambda hidden, *thresholds: ~model_sinks(hidden, *thresholds)
from minioutro.model import find_sinks as model_sinks
def rotate(x, cos, sin): raise SystemExit
def attention(q, k, v, may_attend): return v, v
"""
    report, table = graded(tmp_path, wrong, PYTHONOPTIMIZE="1", PYTEST_ADDOPTS="-n 2 --collect-only")
    assert [test["score"] for test in report["tests"]] == [0, 0, 5, 0, 10, 0, 5, 10, 15], table
    assert "pixel_shuffle is the project's own: exercise 1 is for writing it" in report["tests"][0]["output"], table


def test_a_hand_out_passes_its_tests(tmp_path):
    """What the page leaves out can be left out, of a copy. Then somebody's pytest.ini around the project changes no
    points."""
    original, project = project_in(tmp_path), tmp_path / "handout"
    commit(original)
    before = sorted(original.rglob("*"))
    commands = commands_of("**What can be left out of a hand-out.**", "mkdir ", "python ", "rm ", "sed ")
    done = in_shell(" && ".join(commands), original, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(original.rglob("*")) == before
    assert not (project / ".git").exists() and (project / "lecture.md").exists()
    assert "eacher" not in (project / "README.md").read_text()
    left = {path.name for path in (project / "tests" / "course").iterdir()}
    assert left == {"starter.py", "grade.py", "conftest.py", "test_exercises.py"}
    tests = "tests/course tests/test_readme.py tests/test_tutorial.py --deselect tests/test_tutorial.py::test_every_block"
    done = in_shell(f"{sys.executable} -m pytest -q -p no:cacheprovider {tests}", project)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --collect-only\n")
    shutil.copy(project / "tests" / "course" / "starter.py", project / "my_module.py")
    code = "import grade; print(grade.run_tests(grade.WITH_TESTS[2], grade.ROOT / 'my_module.py', 120))"
    done = subprocess.run([sys.executable, "-c", code], cwd=project / "tests" / "course", capture_output=True, text=True)
    assert done.stdout.startswith("2 of 2 tests failed. NotImplementedError: not written yet"), done.stdout + done.stderr
