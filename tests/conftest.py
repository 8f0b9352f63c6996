"""Fixtures for all tests. What they import from each other is in helpers.py: two files of this name hide each other."""

import json
import sys
from pathlib import Path

import pytest
import torch

# What is installed comes before the current folder, in which somebody's torch.py may lie.
sys.path.sort(key=lambda entry: Path(entry).resolve() == Path.cwd())
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "course"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import FIXTURES, PUBLISHED, TOY, Golden  # noqa: E402

from minioutro import Cache, Trace, load, read_video  # noqa: E402
from minioutro.lab.analysis import without_row  # noqa: E402

torch.set_num_threads(1)             # the tensors are tiny, and a second thread only gets in the way


def pytest_addoption(pluginmanager):
    pluginmanager.import_plugin("grader")       # of the exercises; it is there if pytest began above tests/


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def golden(variant):
    """golden("dev_a") and others."""
    found = {path.name: Golden(path.name) for path in FIXTURES.iterdir() if path.is_dir()}
    with torch.no_grad():
        found.update((name, found[name].as_computed()) for name in PUBLISHED if variant.number)
    return found.__getitem__


@pytest.fixture(scope="session")
def toy():
    return load(TOY)


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


@pytest.fixture(scope="session")
def decoded(golden, variant):
    found = json.loads((FIXTURES / "decode.json").read_text())
    return {name: golden(name).decoded for name in PUBLISHED} if variant.number else found


def pytest_ignore_collect(collection_path, config):
    """What needs transformers or a browser is left out unless its folder is named."""
    name = collection_path.name
    if name in ("with_transformers", "with_browser") and name not in " ".join(config.args):
        return True
