"""Shapes are named as in minioutro/model.py; sizes in tests are distinct, so that no transpose passes."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minioutro import Cache, OutRo, Trace, VideoLM, load, read_video
from minioutro.analysis import without_row

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
        # Copies in memory: whoever writes to a file takes from under us what was only mapped to it.
        self.model = copy.deepcopy(VideoLM.from_pretrained(self.folder))
        stored = load_file(self.folder / "golden.safetensors")
        self.tensors = {name: tensor.clone() for name, tensor in stored.items()}
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.input_ids, self.pixels = self.tensors["input_ids"], self.tensors["pixel_values"]

    def outro(self, **switches) -> OutRo:
        names = ("abs_threshold", "median_multiple", "gamma", "temperature")
        return OutRo(**{name: self.meta[name] for name in names}, **switches)

    def as_computed(self):
        """The same with what model.py computes in place of what was computed elsewhere, for a variant of the
        exercises."""
        g, trace = copy.copy(self), {}
        call = partial(self.model, self.input_ids, self.pixels)
        g.tensors = self.tensors | {"logits_on": call(outro=self.outro(), trace=trace), "logits_off": call(),
                                    "logits.relax_only": call(outro=self.outro(align=False)),
                                    "logits.align_only": call(outro=self.outro(relax=False))}
        for name, stored in (("is_sink", "is_sink"), ("relaxed", "is_relaxed")):
            g.tensors[stored] = torch.cat([trace[f"layers.{l}.{name}"] for l in range(self.meta["L"])])
        g.decoded = {"no_decode_alignment": [], "ids": self.model.generate(
            self.input_ids, self.pixels, max_new_tokens=12, outro=self.outro())}
        return g


PUBLISHED = ("dev_late", "dev_natural")         # with what the published code computes


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


def assert_close(ours, golden, tolerance=1e-4):
    """Equal to within a share of the golden values' standard deviation."""
    assert ours.numel() == golden.numel(), (ours.shape, golden.shape)
    difference = (ours.reshape(golden.shape) - golden).abs() / golden.std()
    assert difference.max() <= tolerance, f"max {difference.max():.1e}, mean {difference.mean():.1e}"


@pytest.fixture(scope="session")
def decoded(golden, variant):
    found = json.loads((FIXTURES / "decode.json").read_text())
    return {name: golden(name).decoded for name in PUBLISHED} if variant.number else found


def pytest_ignore_collect(collection_path, config):
    """tests/with_transformers is left out unless it is named: it alone needs transformers."""
    if collection_path.name == "with_transformers" and "with_transformers" not in " ".join(config.args):
        return True
