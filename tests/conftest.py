"""Shapes are named as in minioutro/model.py; sizes in tests are distinct, so that no transpose passes."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from exercises import EXERCISES, Implementation, points_table
from safetensors.torch import load_file

from minioutro import OutRo, VideoLM, load
from minioutro import model as minioutro_model

torch.set_num_threads(1)             # the tensors are tiny, and a second thread only gets in the way
FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parent.parent
TOY = ROOT / "minioutro" / "toy"


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Golden:
    """A checkpoint of fixtures/ and the tensors that were computed with it elsewhere."""

    def __init__(self, name: str):
        self.folder = FIXTURES / name
        self.model = VideoLM.from_pretrained(self.folder)
        self.tensors = load_file(self.folder / "golden.safetensors")
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.input_ids, self.pixels = self.tensors["input_ids"], self.tensors["pixel_values"]

    def outro(self, **switches) -> OutRo:
        names = ("abs_threshold", "median_multiple", "gamma", "temperature")
        return OutRo(**{name: self.meta[name] for name in names}, **switches)


@pytest.fixture(scope="session")
def golden():
    cache = {}
    return lambda name: cache.setdefault(name, None) or cache.update({name: Golden(name)}) or cache[name]


@pytest.fixture(scope="session")
def toy():
    return load(TOY)


def assert_close(ours, golden, tolerance=1e-4):
    """Equal to within a share of the golden values' standard deviation."""
    assert ours.numel() == golden.numel(), (ours.shape, golden.shape)
    difference = (ours.reshape(golden.shape) - golden).abs() / golden.std()
    assert difference.max() <= tolerance, f"max {difference.max():.1e}, mean {difference.mean():.1e}"


@pytest.fixture(scope="session")
def decoded():
    return json.loads((FIXTURES / "decode.json").read_text())


# ---- the exercises: python -m pytest --impl my_module -m exercise_4 ----


def pytest_addoption(parser):
    parser.addoption("--impl", metavar="MODULE", default="minioutro.model",
                     help="run the tests of the exercises, and no others, on this module")


def pytest_configure(config):
    for e in EXERCISES:
        config.addinivalue_line("markers", f"{e.mark}: {e.title}, {e.points} points")
    name = config.getoption("--impl")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise pytest.UsageError(f"--impl {name}: {error}; python tests/starter.py my_module.py "
                                f"writes one to start from, for --impl my_module") from None
    except Exception as error:
        raise pytest.UsageError(f"--impl {name}: {type(error).__name__}: {error}") from None


def exercise_of(keywords) -> int | None:
    return next((e.number for e in EXERCISES if e.mark in keywords), None)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--impl") != "minioutro.model":
        others = [item for item in items if exercise_of(item.keywords) is None]
        items[:] = [item for item in items if exercise_of(item.keywords) is not None]
        config.hook.pytest_deselected(items=others)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """An exercise that is not written yet fails with that sentence, not with a traceback."""
    try:
        return (yield)
    except NotImplementedError as missing:
        sentence = str(missing)
    pytest.fail(sentence, pytrace=False)


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--impl") != "minioutro.model":
        results = {}
        for outcome in ("passed", "failed", "error"):
            for report in terminalreporter.stats.get(outcome, []):
                if isinstance(report, pytest.TestReport):       # not that a file cannot be read
                    number = exercise_of(report.keywords)
                    results.setdefault(number, []).append(outcome == "passed")
        terminalreporter.section("points")
        terminalreporter.write_line(points_table(results))


@pytest.fixture(scope="session")
def impl(pytestconfig):
    """The functions that the exercises ask for: the model's own, or those of --impl."""
    module = importlib.import_module(pytestconfig.getoption("--impl"))
    return Implementation(module, minioutro_model)
