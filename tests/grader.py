"""The tests of the exercises as a grader: python -m pytest --impl my_module -m exercise_4

A plugin of pytest. It imports the solution, watches what its functions do, and counts points.
"""

import contextlib
import importlib
import io
import random
import signal
import sys
import time
import traceback
from functools import partial
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from exercises import EXERCISES, find_module, make_importable, points_table
from torch import nn

from minioutro import model as minioutro_model

OURS = "minioutro.model"
A_MINUTE = 60.0                         # seconds, for all calls of an exercise's functions together
SOLUTION = pytest.StashKey()


# ---- running somebody's code ----


class TimeIsUp(BaseException):
    """No Exception, which a solution might catch."""


def within(seconds: float, function, *args, **kwargs):
    """function(*args, **kwargs), or TimeIsUp if that does not end in so many seconds.

    An alarm raises TimeIsUp in the midst of the function. A bare `except:` catches it, so it is
    raised again and again, until it hits one of the few instructions outside of every `try`.
    What no alarm interrupts: one single call that stays in C, such as a product of two huge
    matrices, which is waited for; a debugger; os._exit(); and anything on Windows, which has none.
    """
    __tracebackhide__ = True
    if seconds <= 0:
        raise TimeIsUp
    if not hasattr(signal, "setitimer"):
        return function(*args, **kwargs)
    has_rung = False

    def ring(signum, frame):
        nonlocal has_rung
        codes = [frame.f_code for frame, _ in traceback.walk_stack(frame)]
        inside = codes[:codes.index(within.__code__)]
        if inside and ring.__code__ not in inside and sys.gettrace() is None:
            has_rung = True
            soon = 10 ** random.uniform(-6, -4)         # seconds: now and then within an `except:`
            signal.setitimer(signal.ITIMER_REAL, soon, 1e-3)
            raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 1e-3)
        result = function(*args, **kwargs)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if has_rung:
        raise TimeIsUp
    return result


def last_line(error: BaseException, path: Path) -> str:
    """The last line of a module, or of a package's folder, that led to an error."""
    lines = [f"{Path(entry.filename).name}, line {entry.lineno}"
             for entry in traceback.extract_tb(error.__traceback__)
             if path in (Path(entry.filename), *Path(entry.filename).parents)]
    return lines[-1] if lines else path.name


def import_solution(given: str):
    """The module that --impl names. What it prints meanwhile is dropped.

    Raises: ValueError, in one sentence, if it cannot be imported.
    """
    path = find_module(given)
    name = make_importable(path)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return within(A_MINUTE, importlib.import_module, name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reasons = {TimeIsUp: "the import does not end in a minute",
                   SystemExit: "sys.exit() would end the tests as well; leave it out"}
        said = " ".join(f"{type(error).__name__}: {error}".split())         # in one line
        sentence = f"{last_line(error, path)}: {reasons.get(type(error), said)}"
    raise ValueError(sentence)


def called_ours(*args, **kwargs):
    __tracebackhide__ = True
    raise AssertionError("this calls the project's own function for what the exercise is about")


@contextlib.contextmanager
def out_of_reach(functions: list):
    """Meanwhile these functions raise, under whatever name and by whatever way they are called."""
    codes = [function.__code__ for function in functions]
    try:
        for function in functions:
            function.__code__ = called_ours.__code__
        yield
    finally:
        for function, code in zip(functions, codes, strict=True):
            function.__code__ = code


class Implementation:
    """What tests call: the model's functions, or those of a student's module of the same names.

    One that the module lacks, or only imports from the model, is not written yet. While one runs,
    the model's own functions of that exercise raise; it has what is left of the exercise's minute;
    and the tensors that it is given must be the same afterwards.
    """

    def __init__(self, module, model, seconds: float = A_MINUTE):
        self.module, self.model = module, model
        self.seconds_left = {e.number: seconds for e in EXERCISES}

    def __getattr__(self, name: str):
        value, ours = getattr(self.module, name, None), getattr(self.model, name)
        exercise, = (e for e in EXERCISES if name in [n.split(".")[0] for n in e.names])
        if value is None or (value is ours and self.module is not self.model):
            raise NotImplementedError(exercise.not_written)
        watch = partial(self.call, exercise, name)
        if not isinstance(value, type):
            return partial(watch, value)

        class Watched(value):
            def forward(self, *args, **kwargs):
                return watch(super().forward, *args, **kwargs)
        return Watched

    def call(self, exercise, name, function, *args, **kwargs):
        __tracebackhide__ = True
        layer = getattr(function, "__self__", None)
        given = {f"argument {n}": value for n, value in enumerate((*args, *kwargs.values()), 1)}
        given.update(layer.named_parameters() if isinstance(layer, nn.Module) else {})
        copies = {what: value.clone() for what, value in given.items() if torch.is_tensor(value)}
        ours = [attrgetter(dotted)(self.model) for dotted in exercise.names]
        ours = [getattr(one, "forward", one) for one in ours if self.module is not self.model]
        with out_of_reach(ours):
            result = self.in_time(exercise, name, function, *args, **kwargs)
        for what, copy in copies.items():
            if not given[what].equal(copy):
                raise AssertionError(f"{name} changes its {what}; work on a copy")
        return result

    def in_time(self, exercise, name, function, *args, **kwargs):
        __tracebackhide__ = True
        path, start = Path(getattr(self.module, "__file__", name)), time.monotonic()
        path = path.parent if path.name == "__init__.py" else path
        try:
            return within(self.seconds_left[exercise.number], function, *args, **kwargs)
        except TimeIsUp as error:
            sentence = (f"exercise {exercise.number} may take a minute and did not end in it: "
                        f"{last_line(error, path)}")
        except SystemExit as error:
            sentence = f"sys.exit() ends {name}; a function returns: {last_line(error, path)}"
        finally:
            self.seconds_left[exercise.number] -= time.monotonic() - start
        raise AssertionError(sentence)


@pytest.fixture(scope="session")
def impl(pytestconfig):
    """The functions that the exercises ask for: the model's own, or those of --impl."""
    return Implementation(pytestconfig.stash[SOLUTION], minioutro_model)


# ---- choosing tests and counting points ----


def pytest_addoption(parser):
    parser.addoption("--impl", metavar="MODULE", default=OURS,
                     help="run the tests of the exercises, and no others, on this module: its name, "
                          "its file, or the folder of a package")


def pytest_configure(config):
    for e in EXERCISES:
        config.addinivalue_line("markers", f"{e.mark}: {e.title}, {e.points} points")
    name = config.getoption("--impl")
    if name == OURS:
        config.stash[SOLUTION] = minioutro_model
        return
    try:
        config.stash[SOLUTION] = import_solution(name)
    except ValueError as error:
        raise pytest.UsageError(f"--impl {name}: {error}") from None
    config.pluginmanager.register(Grader(), "points")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """An exercise that is not written yet fails with that sentence, not with a traceback."""
    try:
        return (yield)
    except NotImplementedError as missing:
        sentence = str(missing)
        if sentence not in [e.not_written for e in EXERCISES]:
            raise
    pytest.fail(sentence, pytrace=False)


def checks_of(module, exercise) -> list[str]:
    """The names of all tests of an exercise in a module of tests."""
    return [name for name, test in vars(module).items()
            if any(mark.name == exercise.mark for mark in getattr(test, "pytestmark", []))]


class Grader:
    """Runs test_exercises.py alone and prints the points. All tests of an exercise count, also one
    that was not chosen, or that did not end since everything was stopped before."""

    def __init__(self):
        self.chosen, self.passed, self.failed = [], set(), set()

    def pytest_ignore_collect(self, collection_path):
        other = collection_path.is_file() and collection_path.name != "test_exercises.py"
        return True if other else None

    def pytest_collection_finish(self, session):
        self.chosen = session.items

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.passed and report.when == "call":
            self.passed.add(report.nodeid)

    def results(self) -> dict[int, list[bool | None]]:
        of_test = {}
        for item in self.chosen:
            exercise, = (e for e in EXERCISES if item.get_closest_marker(e.mark))
            outcomes = of_test.setdefault(exercise.number,
                                          dict.fromkeys(checks_of(item.module, exercise)))
            outcomes[item.originalname] = item.nodeid in self.passed - self.failed
        return {number: list(outcomes.values()) for number, outcomes in of_test.items()}

    def pytest_terminal_summary(self, terminalreporter, config):
        if not config.option.collectonly:
            terminalreporter.section("points")
            terminalreporter.write_line(points_table(self.results()))
