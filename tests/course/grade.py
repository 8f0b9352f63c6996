"""Grade a module of the exercises: python tests/course/grade.py my_module.py

Every exercise is one run of pytest in a process of its own. A module that crashes, loops or exits loses the points of
the exercise that was running, and no others. This file also holds the table of exercises.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SECONDS = 20                # for the tests of one exercise, most of it to start; --seconds changes it
LONGEST = 2000              # characters of what is said about one exercise


@dataclass(frozen=True)
class Exercise:
    number: int
    title: str
    points: int                 # from the tests and for words together
    in_words: int               # of these, what a person gives
    names: tuple[str, ...]      # what is to be written, named as in minioutro/model.py
    minutes: int
    needs: str                  # sections of the tutorial, and earlier exercises

    @property
    def by_tests(self) -> int:
        return self.points - self.in_words


EXERCISES = (
    Exercise(1, "Pixel shuffle", 5, 0, ("pixel_shuffle",), 15, "section 2"),
    Exercise(2, "Norm and positions", 5, 0, ("RMSNorm.forward", "rotate"), 20, "section 4"),
    Exercise(3, "The masks", 5, 0, ("causal_mask", "open_sink_rows"), 10, "sections 5, 9"),
    Exercise(4, "Grouped-query attention", 10, 0, ("repeat_heads", "attention"), 25, "section 5"),
    Exercise(5, "The cache", 10, 0, ("Cache.extend", "Cache.keys", "Cache.values"), 35, "section 5"),
    Exercise(6, "Find the sinks", 5, 0, ("activation_ratio", "find_sinks"), 10, "section 6"),
    Exercise(7, "Does it look like a sink to you?", 10, 5, ("looks_like_a_sink",), 60, "sections 6, 7; exercise 6"),
    Exercise(8, "Alignment", 10, 0, ("sink_value", "align_with_sink"), 40, "section 9; exercise 4"),
    Exercise(9, "A row opened in the last layer", 5, 5, (), 20, "section 9; exercise 3"),
    Exercise(10, "The method", 20, 5, ("Sinks.find", "Sinks.open_rows", "Sinks.align"), 80,
             "sections 9, 11; exercises 3, 6, 8"),
    Exercise(11, "A few answers more", 5, 5, (), 30, "section 12"),
    Exercise(12, "Predict, then measure", 10, 10, (), 100, "sections 7, 12, 13; exercises 7, 11"),
)
WITH_TESTS = [e for e in EXERCISES if e.names]
IN_WORDS = ", ".join(f"{e.number} ({e.in_words})" for e in EXERCISES if e.in_words)


def run(command: list, seconds: float) -> int | None:
    """Run a command in the project's root. Returns: its code, None if it did not end within these seconds."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("PYTHONOPTIMIZE", "PYTEST_ADDOPTS")}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):       # the child, and what it has started
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def does_not_load(module: Path, seconds: float) -> bool:
    """Whether the module loops outside of its functions."""
    return run([sys.executable, "-c", "import runpy, sys; runpy.run_path(sys.argv[1])", module], seconds) is None


def did_not_end(seconds: float) -> str:
    return (f"did not end within {seconds:g} seconds; is there a loop that never ends? On a busy machine, give more time "
            "with --seconds 60")


def run_tests(exercise: Exercise, module: Path, seconds: float) -> str:
    """Run the tests of one exercise. Returns: what is wrong in words, "" if all of them pass."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", HERE / "test_exercises.py", f"--impl={module}",
                   "-m", f"exercise_{exercise.number}", f"--junitxml={results}", f"--rootdir={ROOT}",
                   "-p", "no:xdist", "-p", "no:cacheprovider",
                   "-c", os.devnull]        # without it, a pytest.ini in a folder around the project would count
        code = run(command, seconds)
        if code is None:
            return did_not_end(seconds)
        return what_failed(results, code, module)


def what_failed(results: Path, code: int, module: Path) -> str:
    """The first failure in the JUnit file of a run that ended with this code, "" if there is none."""
    try:
        tests = list(ElementTree.parse(results).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return f"the process ended with code {code} in the middle of the tests; does your code exit, or crash?"
    failures = [outcome for test in tests for outcome in test if outcome.tag in ("failure", "error", "skipped")]
    if not failures:
        return "" if tests and code == 0 else f"the tests did not run to their end; pytest ended with code {code}"
    said = (failures[0].get("message") or "").removeprefix("AssertionError: ")
    places = re.findall(rf"(?<!\w){re.escape(module.name)}:(\d+): ", failures[0].text or "")
    if places:
        said += f" ({module.name}, line {places[-1]})"
    return shown(f"{len(failures)} of {len(tests)} tests failed. {said}"[:LONGEST])


def shown(text: str) -> str:
    """A text without what would steer a terminal. Line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def report(wrong: dict[int, str]) -> dict:
    """The points in Gradescope's format. wrong: by number, what is wrong with the exercise, "" if nothing is."""
    tests = [{"name": f"{e.number}. {e.title}", "score": 0 if wrong[e.number] else e.by_tests,
              "max_score": e.by_tests, "output": wrong[e.number] or "all tests passed"} for e in WITH_TESTS]
    return {"score": sum(test["score"] for test in tests), "tests": tests}


def write(path: Path | None, content: dict) -> None:
    """Replace the file of points, whole or not at all. It is written in a new folder, where nobody has put a link."""
    if path is None:
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        half = Path(folder) / path.name
        half.write_text(json.dumps(content, indent=2), encoding="utf-8")
        half.replace(path)


def grade(module: Path, points: Path | None = None, seconds: float = SECONDS, exercises=WITH_TESTS) -> dict:
    """Run the tests of these exercises, print the table of points, and write the file if one is given."""
    wrong = {e.number: "not graded: the grading did not come to its end" for e in WITH_TESTS}
    write(points, report(wrong))
    not_loaded = ""
    for e in exercises:
        wrong[e.number] = not_loaded or run_tests(e, module, seconds)
        if wrong[e.number] == did_not_end(seconds) and does_not_load(module, seconds):
            not_loaded = f"the module did not load within {seconds:g} seconds; is there a loop outside of its functions?"
            wrong[e.number] = not_loaded
        score = 0 if wrong[e.number] else e.by_tests
        first, *_ = wrong[e.number].splitlines() or [""]
        print(f"{e.number:>4}  {e.title:<33}{score:>3} of {e.by_tests:>3}   {first[:150]}".rstrip(), flush=True)
    found = report(wrong)
    print(f"      {'all of these':<33}{found['score']:>3} of {sum(e.by_tests for e in exercises):>3}")
    print(f"      in words, read by a person: exercises {IN_WORDS}")
    write(points, found)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Grade a module of the exercises.")
    parser.add_argument("module", type=Path, help="the file, such as my_module.py")
    parser.add_argument("--points", type=Path, metavar="FILE", help="write the points there, as Gradescope reads them")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each exercise (default: %(default)s)")
    options = parser.parse_args(arguments)
    module = options.module.resolve()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # what a module says may have any letters
    if options.points and options.points.exists() and not options.points.is_file():
        print(f"{options.points} is not a file; give another one", file=sys.stderr)
        return 2
    try:
        if module.suffix != ".py" or not module.is_file():
            sentence = f"{options.module} is not a Python file; cp tests/course/starter.py my_module.py gives one"
            write(options.points, report({e.number: sentence for e in WITH_TESTS}))
            print(sentence, file=sys.stderr)
            return 2
        grade(module, options.points, options.seconds)
    except OSError as error:
        print(f"{options.points} cannot be written ({error.strerror}); give another file", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
