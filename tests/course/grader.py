"""The tests of the exercises as a grader: python -m pytest --impl my_module -m exercise_4

A plugin of pytest. The solution runs in a process of its own (solution.py), so that nothing which it does
can end, delay or change the tests; here its functions are called, and points are counted.
"""

import contextlib
import copy
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import mutants
import pytest
from exercises import EXERCISES, IN_WORDS, find_module, make_importable, points_table
from solution import FOR_IMPORT, Solution, import_solution, model_of, receive, send
from variants import LAST, Variant

from minioutro import model as minioutro_model
from minioutro.support.cli import written_whole

OURS = "minioutro.model"
PATH = pytest.StashKey()                # of the solution; None for OURS
A_MINUTE = 60.0                         # in seconds, for all calls of an exercise's functions together
TO_END_ITSELF = 5.0                     # seconds, for a process whose time is over
NOT_WRITTEN = {e.not_written: e for e in EXERCISES}
LONGEST = 2000                          # letters of what one test says, in the file of points


# ---- calling somebody's code ----


class Process:
    """A `Solution` in a process of its own. An exercise that ends it has no further calls; the next one
    has a new process.

    Raises as Solution does, and AssertionError for what the module raises, and if its process ends.
    """

    def __init__(self, path: Path, stderr=None, variant: int = 0):
        """Raises: ValueError, in one sentence, if the module cannot be imported."""
        self.path, self.stderr, self.lines = path, stderr, tempfile.NamedTemporaryFile()
        self.variant = variant
        self.seconds_left, self.over = dict.fromkeys((e.number for e in EXERCISES), A_MINUTE), {}
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("solution.py"), self.path, self.lines.name,
             str(self.variant)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, start_new_session=True)
        self.sent = {}                      # models, by id: a process is sent each only once
        answer = self.ask(None, 2 * FOR_IMPORT)         # also that of torch, before its clock begins
        if answer is None:
            answer = {"error": self.how_it_ended("the import", "a minute")}
        if "error" in answer:
            self.stop()
            raise ValueError(answer["error"])

    def kill(self) -> None:
        """The process; where there are groups of processes, what it has started as well."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self.process.kill()

    def stop(self) -> None:
        if self.process is not None:
            self.kill()
            self.process.wait()
            self.process = None

    def ask(self, message, seconds: float) -> dict | None:
        """The answer to a message, or None: the process has ended. It ends itself when the time is over,
        and is ended a little later if something keeps it from that."""
        self.was_late = False

        def end():
            self.was_late = True
            self.kill()
        killer = threading.Timer(seconds + TO_END_ITSELF, end)
        killer.start()
        try:
            if message is not None:
                send(self.process.stdin, message)
            return receive(self.process.stdout, trusted=False)
        except Exception:           # its end; or, of what a solution has written there itself, whatever it is
            self.stop()
            return None
        finally:
            killer.cancel()
            killer.join()

    def how_it_ended(self, what: str, time: str) -> str:
        lines = Path(self.lines.name).read_text(errors="replace")
        places = [f"{Path(file).name}, line {n}" for file, n in re.findall(r'File "(.+?)", line (\d+)', lines)
                  if self.path in (Path(file), *Path(file).parents)]
        late = self.was_late or lines.startswith("Timeout")
        reason = (f"{what} may take {time} and did not end in it" if late else
                  f"{what} crashes" if lines else f"{what} ends the process, as os._exit() does")
        return f"{reason}: {places[0] if places else self.path.name}"

    def __call__(self, dotted: str, *args):
        __tracebackhide__ = True
        number, = (e.number for e in EXERCISES if dotted in e.names)
        if number in self.over:
            raise AssertionError(self.over[number])
        if self.process is None:
            self.start()
        seconds, start = max(0.01, self.seconds_left[number]), time.monotonic()
        first, *others = args
        n = id(first) if isinstance(first, minioutro_model.VideoLM) else None
        answer = self.ask((seconds, dotted, [None if n in self.sent else first, *others], n), seconds)
        self.sent.update({} if n is None else {n: first})
        self.seconds_left[number] -= time.monotonic() - start
        if answer is None:
            self.over[number] = self.how_it_ended(f"exercise {number}", "a minute")
            raise AssertionError(self.over[number])
        if "error" in answer:
            kind = NotImplementedError if answer["error"] in NOT_WRITTEN else AssertionError
            raise kind(answer["error"])
        return answer["result"], answer["changed"]


class Implementation:
    """What tests call: all names of the model's, but of what the exercises ask for, a solution's."""

    def __init__(self, solve):
        self.solve = solve                          # a Solution or a Process

    def call(self, dotted, *args):
        __tracebackhide__ = True
        result, changed = self.solve(dotted, *args)
        for arg, now in zip(args, changed, strict=True):
            if now is not None:                     # a trace, or what a cache holds
                (arg if isinstance(arg, dict) else vars(arg)).update(now)
        return result

    def __getattr__(self, name: str):
        ours = getattr(minioutro_model, name, None)
        if not isinstance(ours, type):
            return partial(self.call, name)

        def method(this, dotted, *args):
            __tracebackhide__ = True
            plain = copy.copy(this)
            plain.__class__ = ours
            result = self.call(dotted, plain, *args)
            vars(this).update(vars(plain))
            return result
        dotted = [d for e in EXERCISES for d in e.names if d.startswith(f"{name}.")]
        return type(name, (ours,), {d.split(".")[1]: partialmethod(method, d) for d in dotted})


    def in_model(self, model):
        """The model, but with the solution's decoder layers and norms."""
        def hidden_states(input_ids, pixel_values=None, features=None, outro=None, cache=None, trace=None):
            __tracebackhide__ = True
            return self.call("DecoderLayer.forward", model, input_ids, pixel_values, features, outro, cache, trace)
        changed = copy.copy(model)
        changed.hidden_states = hidden_states
        return changed


@pytest.fixture(scope="session")
def variant(pytestconfig) -> Variant:
    """What the exercises ask for, by --variant."""
    return Variant(pytestconfig.getoption("--variant"))


@pytest.fixture(scope="session")
def impl(request, pytestconfig):
    """The functions that the exercises ask for: the model's own, or those of --impl."""
    path, grader = pytestconfig.stash[PATH], pytestconfig.pluginmanager.get_plugin("points")
    if path is None:
        yield SimpleNamespace(**vars(minioutro_model), looks_like_a_sink=mutants.looks_like_a_sink)
        return
    # What tests read is read before a solution runs, which can write to files.
    used = {name for item in request.session.items for name in item.fixturenames}
    for name in used & {"golden", "decoded", "three_traces"}:
        request.getfixturevalue(name)
    try:
        if pytestconfig.getoption("usepdb"):        # in this process, where the debugger is
            solve = Solution(import_solution(path))
        else:
            solve = Process(path, stderr=subprocess.DEVNULL if grader.file else None,
                            variant=pytestconfig.getoption("--variant"))
    except ValueError as error:
        grader.broken = str(error)
        pytest.exit(grader.broken)
    yield Implementation(solve)
    if isinstance(solve, Process):
        solve.stop()


# ---- choosing tests and counting points ----


def pytest_addoption(parser):
    parser.addoption("--impl", metavar="MODULE", default=OURS,
                     help="run the tests of the exercises, and no others, on this module: its name, "
                          "its file, or the folder of a package")
    parser.addoption("--variant", metavar="NUMBER", type=int, choices=range(LAST + 1), default=0,
                     help=f"with --impl: of the exercises, 0 to {LAST}, as given to tests/course/starter.py")
    parser.addoption("--points", metavar="FILE", type=Path,
                     help="with --impl: write the points to this file, as Gradescope reads them, and end "
                          "with 0 whatever they are; a module that cannot be run has none, and the reason")


def pytest_configure(config):
    for e in EXERCISES:
        config.addinivalue_line("markers", f"{e.mark}: {e.title}, {e.by_tests} points")
    name, file, number = map(config.getoption, ("--impl", "--points", "--variant"))
    config.stash[PATH] = None
    if name != OURS and config.option.tbstyle == "auto":
        config.option.tbstyle = "short"             # the sentence, and not the whole test above it
    if name == OURS:
        if file or number:
            option = "--points" if file else "--variant"
            raise pytest.UsageError(f"{option} is for a module; give --impl my_module, too")
        return
    stack = contextlib.ExitStack()
    stack.enter_context(model_of(Variant(number)))
    config.add_cleanup(stack.close)
    grader, before = Grader(name, file), sys.path[:]
    config.pluginmanager.register(grader, "points")
    try:
        config.stash[PATH] = find_module(name)
        make_importable(config.stash[PATH])
    except ValueError as error:
        grader.broken = str(error)
        if not file:
            raise pytest.UsageError(f"--impl {name}: {error}") from None
    finally:
        sys.path[:] = before
    if file:
        try:
            grader.write("the tests did not end")       # replaced when they have
        except OSError as error:
            raise pytest.UsageError(f"--points {file}: {error.strerror}; give another file") from None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """An exercise that is not written yet fails with that sentence, not with a traceback."""
    try:
        return (yield)
    except NotImplementedError as missing:
        sentence = str(missing)
        if sentence not in NOT_WRITTEN:
            raise
    if not item.get_closest_marker(NOT_WRITTEN[sentence].mark):
        sentence += (", and this one calls it; write it, or import it from minioutro.model and delete its stub, "
                     "which hides the import")
    pytest.fail(sentence, pytrace=False)


def checks_of(module, exercise) -> list[str]:
    """The names of all tests of an exercise in a module of tests."""
    return [name for name, test in vars(module).items()
            if any(mark.name == exercise.mark for mark in getattr(test, "pytestmark", []))]


class Grader:
    """Runs test_exercises.py alone and prints the points. All tests of an exercise count, also one
    that was not chosen, or that did not end since everything was stopped before."""

    def __init__(self, name: str, file: Path | None):
        self.name, self.file, self.broken = name, file, ""      # broken: why nothing can be run
        self.chosen, self.passed, self.failed = [], set(), {}   # failed: by test, what it says

    def pytest_ignore_collect(self, collection_path):
        other = collection_path.is_file() and collection_path.name != "test_exercises.py"
        return True if other else None

    def pytest_collection_finish(self, session):
        self.chosen = session.items

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self):
        return True if self.broken else None

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash else str(report.longrepr)
            self.failed[report.nodeid] = said.removeprefix("AssertionError: ").partition("\nassert ")[0]
        elif report.passed and report.when == "call":
            self.passed.add(report.nodeid)

    def results(self) -> dict[int, list[bool | None]]:
        of_test = {}
        for item in self.chosen:
            exercise, = (e for e in EXERCISES if item.get_closest_marker(e.mark))
            outcomes = of_test.setdefault(exercise.number,
                                          dict.fromkeys(checks_of(item.module, exercise)))
            outcomes[item.originalname] = item.nodeid in self.passed - self.failed.keys()
        return {number: list(outcomes.values()) for number, outcomes in of_test.items()}

    def write(self, reason: str) -> None:
        """The points as Gradescope's autograder reads them: https://gradescope-autograders.readthedocs.io

        reason: why there are none, or "".
        """
        results, tests = {} if reason else self.results(), []
        for e in EXERCISES:
            if e.names:
                outcomes = results.get(e.number, [None])
                said = [f"{item.originalname}: {self.failed[item.nodeid][:LONGEST]}" for item in self.chosen
                        if item.nodeid in self.failed and item.get_closest_marker(e.mark)]
                tests.append({"name": f"{e.number}. {e.title}", "max_score": e.by_tests,
                              "score": e.by_tests if all(outcomes) else 0,
                              "output": reason or "\n\n".join(said) or
                              ("passed" if all(outcomes) else "not all of its tests were run")})
        report = {"score": sum(test["score"] for test in tests), "output": reason or IN_WORDS, "tests": tests}
        with written_whole(self.file) as half:
            half.write_text(json.dumps(report, indent=1), encoding="utf-8")

    def pytest_sessionfinish(self, session, exitstatus):
        if self.file and not session.config.option.collectonly:
            self.write(self.broken)
            if self.broken or exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
                session.exitstatus = pytest.ExitCode.OK
        elif self.broken:
            raise pytest.UsageError(f"--impl {self.name}: {self.broken}")

    def pytest_terminal_summary(self, terminalreporter, config):
        if not config.option.collectonly:
            number = config.getoption("--variant")
            terminalreporter.section(f"points of variant {number}" if number else "points")
            terminalreporter.write_line(self.broken or points_table(self.results()))
