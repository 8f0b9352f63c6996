"""Shapes are named as in minioutro/model.py; sizes in tests are distinct, so that no transpose passes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minioutro import OutRo, VideoLM, load

torch.set_num_threads(1)             # the tensors are tiny, and a second thread only gets in the way
FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parent.parent
TOY = ROOT / "minioutro" / "toy"


def pytest_addoption(pluginmanager):
    pluginmanager.import_plugin("grader")       # of the exercises; it is there if pytest began above tests/


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


def pytest_ignore_collect(collection_path, config):
    """tests/with_transformers is left out unless it is named: it alone needs transformers."""
    if collection_path.name == "with_transformers" and "with_transformers" not in " ".join(config.args):
        return True
