"""The option --impl and the fixture impl: whose functions the tests of the exercises call."""

import importlib
import importlib.util
import re
import sys
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from grade import WITH_TESTS
from helpers import check

from minioutro import model

OURS = "minioutro.model"
MUTANTS = Path(__file__).with_name("mutants.py")


def pytest_addoption(parser):
    parser.addoption("--impl", default=OURS, metavar="MODULE_OR_FILE", help="whose functions the exercises test")


def pytest_configure(config):
    for e in WITH_TESTS:
        config.addinivalue_line("markers", f"exercise_{e.number}: {e.title}")
    given = config.getoption("--impl", OURS)
    if given.endswith(".py") and not Path(given).is_file():
        raise pytest.UsageError(f"--impl {given}: there is no such file; cp tests/course/starter.py my_module.py gives "
                                "one to start from")


def load(given: str):
    """The module in this file, or of this name. The student's folder comes last on sys.path."""
    if not given.endswith(".py"):
        return importlib.import_module(given)
    path = Path(given).resolve()
    check(path.stem not in sys.modules,
          f"{path.name} has the name of another module that is in use; call yours my_module.py, or such")
    sys.path.append(str(path.parent))
    check_helpers(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_helpers(path: Path) -> None:
    """A file beside the module that it imports must not have the name of another module, such as helpers.py here."""
    imports = re.findall(r"^\s*(?:from|import) +(\w+)", path.read_text("utf-8", "replace"), re.MULTILINE)
    for name in imports:
        helper = path.with_name(f"{name}.py")
        if helper.is_file():
            found = Path(importlib.util.find_spec(name).origin or "").resolve()
            check(found == helper, f"{path.name} imports {helper.name} beside it, and that is the name of another "
                                   f"module that is in use; call it something else")


# As they were at first: tests of exercise 10 put a student's class into the model.
PROJECT_OWN = {dotted: attrgetter(dotted)(model) for e in WITH_TESTS for dotted in e.names if e.number != 7}
RETURNS_TWO = ("attention", "activation_ratio")


class Implementation:
    """The functions and classes of a module, by the names of model.py.

    Something counts as not written if the module lacks it, or if it is the project's own.
    """

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name: str):
        for e in WITH_TESTS:
            for dotted in e.names:
                if dotted.split(".")[0] == name:
                    self._check_written(dotted, e.number)
        found = getattr(self._module, name)
        return found if isinstance(found, type) else watched(name, found)

    def _check_written(self, dotted: str, number: int) -> None:
        try:
            theirs = attrgetter(dotted)(self._module)
        except AttributeError:
            raise NotImplementedError(f"not written yet: exercise {number}") from None
        check(theirs is not PROJECT_OWN.get(dotted),
              f"{dotted} is the project's own: exercise {number} is for writing it")


def watched(name: str, function):
    """The function. It must return one tensor or two, and leave those it is given as they are."""
    right = "Tensor, Tensor" if name in RETURNS_TWO else "Tensor"

    def call(*args):
        __tracebackhide__ = True
        before = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
        result = function(*args)
        for n, (old, new) in enumerate(zip(before, args), 1):
            check(not torch.is_tensor(old) or new.equal(old), f"{name} changes its argument {n}; work on a copy")
        results = result if isinstance(result, tuple) else (result,)
        kinds = ", ".join("Tensor" if torch.is_tensor(one) else type(one).__name__ for one in results)
        check(kinds == right, f"{name} returns {kinds}; it should return {right}")
        return result
    return call


@pytest.fixture(scope="session")
def course(pytestconfig):
    """This file, for tests of the tests. They cannot import it, because the folder above has a conftest.py as well."""
    return pytestconfig.pluginmanager.get_plugin(__file__)


@pytest.fixture(scope="session")
def impl(request):
    given = request.config.getoption("--impl", OURS)
    if given != OURS:
        return Implementation(load(given))
    solutions = SimpleNamespace(**vars(model))
    if MUTANTS.exists():
        solutions.looks_like_a_sink = importlib.import_module("mutants").looks_like_a_sink
    return solutions


def pytest_collection_modifyitems(config, items):
    """Our own solution of exercise 7 is in mutants.py. A class may have been given this folder without it."""
    if config.getoption("--impl", OURS) != OURS or MUTANTS.exists():
        return
    unsolved = [item for item in items if item.get_closest_marker("exercise_7")]
    config.hook.pytest_deselected(items=unsolved)
    items[:] = [item for item in items if item not in unsolved]
