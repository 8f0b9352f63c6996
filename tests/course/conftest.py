"""The option --impl and the fixture impl: whose functions the tests of the exercises call."""

import importlib
import importlib.util
import re
import sys
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from grade import WITH_TESTS
from helpers import TOY, check

from minioutro import Cache, Trace, model, read_video
from minioutro.lab.analysis import without_row

OURS = "minioutro.model"


def pytest_addoption(parser):
    parser.addoption("--impl", default=OURS, metavar="MODULE_OR_FILE", help="whose functions the exercises test")


def pytest_configure(config):
    for e in WITH_TESTS:
        config.addinivalue_line("markers", f"exercise_{e.number}: {e.title}")
    given = config.getoption("--impl", OURS)
    if given.endswith(".py") and not Path(given).is_file():
        raise pytest.UsageError(f"--impl {given}: there is no such file; cp tests/course/starter.py my_module.py "
                                f"gives one to start from")


def load(given: str):
    """The module in this file, or of this name. The student's folder comes last on sys.path."""
    if not given.endswith(".py"):
        return importlib.import_module(given)
    path = Path(given).resolve()
    there = sys.modules.get(path.stem)
    if there is not None:
        check(getattr(there, "__file__", None) == str(path),
              f"{path.name} has the name of another module that is in use; call yours my_module.py, or such")
        return there
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


def written_in(module, dotted: str):
    """A function or method of a module by its dotted name, None if it is not there."""
    try:
        return attrgetter(dotted)(module)
    except AttributeError:
        return None


# As they were at first: tests of exercise 10 put a student's class into the model.
PROJECT_OWN = {dotted: written_in(model, dotted) for e in WITH_TESTS for dotted in e.names}


class Implementation:
    """The functions and classes of a module, by the names of model.py.

    Something counts as not written if the module lacks it, or if it is the project's own.
    """

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name: str):
        exercise, = (e for e in WITH_TESTS if name in [dotted.split(".")[0] for dotted in e.names])
        for dotted in exercise.names:
            if dotted.split(".")[0] == name:
                self._check_written(dotted, exercise.number)
        found = getattr(self._module, name)
        return found if isinstance(found, type) else watched(name, found)

    def _check_written(self, dotted: str, number: int) -> None:
        theirs = written_in(self._module, dotted)
        if theirs is None:
            raise NotImplementedError(f"not written yet: exercise {number}")
        check(theirs is not PROJECT_OWN[dotted],
              f"{dotted} is the project's own: exercise {number} is for writing it")


def watched(name: str, function):
    """The function, which must return what it should in kind, and leave the tensors it is given as they are."""
    ours = getattr(model, name, None)
    n_results = len(get_args(ours.__annotations__["return"])) or 1 if ours else 1

    def call(*args):
        __tracebackhide__ = True
        before = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
        result = function(*args)
        for n, (old, new) in enumerate(zip(before, args), 1):
            check(not torch.is_tensor(old) or new.equal(old), f"{name} changes its argument {n}; work on a copy")
        results = result if isinstance(result, tuple) else (result,)
        kinds = ", ".join(type(one).__name__ for one in results)
        check(len(results) == n_results and all(map(torch.is_tensor, results)),
              f"{name} returns {kinds}; it should return {', '.join(n_results * ['Tensor'])}")
        return result
    return call


@pytest.fixture(scope="session")
def implementation_of():
    """For tests of the tests: what --impl makes of a module."""
    return Implementation


@pytest.fixture(scope="session")
def impl(request):
    given = request.config.getoption("--impl", OURS)
    if given == OURS:
        # Imported here, because a class may have been given this folder without mutants.py.
        from mutants import looks_like_a_sink
        return SimpleNamespace(**vars(model), looks_like_a_sink=looks_like_a_sink)
    return Implementation(load(given))


@pytest.fixture(scope="session")
def three_traces(toy):
    """Of exercise 7, by name: weights and values of every layer."""
    model, processor = toy
    inputs = processor(read_video(TOY / "clip.mp4"), "What happens in this video?")
    ids, features = inputs.input_ids, model.encode(inputs.pixel_values)
    layers = range(model.config.text_config.num_hidden_layers)

    def traced(model, ids):
        trace, cache = Trace(weights_of=layers), Cache()
        model(ids, features=features, trace=trace, cache=cache)
        return trace, [(trace[f"layers.{l}.weights"], cache.values(l)) for l in layers]

    trace, of_toy = traced(model, ids)
    first = next(l for l in layers if trace[f"layers.{l}.ratio"].max() > 1000)
    massive = trace[f"layers.{first}.hidden"][0, 0].abs().argmax()
    twice = torch.cat([ids[:, :200], ids[:, :1], ids[:, 200:]], dim=1)
    return {"toy": of_toy, "without": traced(without_row(model, first - 1, massive), ids)[1],
            "twice": traced(model, twice)[1]}
