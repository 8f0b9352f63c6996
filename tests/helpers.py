"""What tests share. Shapes are named as in minioutro/model.py; sizes in tests are distinct, so that no transpose passes."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from minioutro import OutRo, VideoLM

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parent.parent
TOY = ROOT / "minioutro" / "toy"


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


def assert_close(ours, golden, tolerance=1e-4):
    """Equal to within a share of the golden values' standard deviation."""
    assert ours.numel() == golden.numel(), (ours.shape, golden.shape)
    difference = (ours.reshape(golden.shape) - golden).abs() / golden.std()
    assert difference.max() <= tolerance, f"max {difference.max():.1e}, mean {difference.mean():.1e}"


def writable_copy(source: Path, to: Path) -> Path:
    """A copy that a test may change, also where the project itself is read-only."""
    shutil.copytree(source, to, copy_function=shutil.copyfile)
    to.chmod(0o755)
    return to
