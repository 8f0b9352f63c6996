"""What tests share. Shapes are named as in minioutro/model.py. Sizes differ, so that a wrong transpose cannot pass."""

import copy
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file

from minioutro import OutRo, VideoLM

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parent.parent
TOY = ROOT / "minioutro" / "toy"


class Golden:
    """A checkpoint of fixtures/ and the tensors that were computed with it elsewhere."""

    def __init__(self, name: str):
        self.folder = FIXTURES / name
        # Copied, because a loaded tensor is a mapping of its file, and would change if the file is written.
        self.model = copy.deepcopy(VideoLM.from_pretrained(self.folder))
        stored = load_file(self.folder / "golden.safetensors")
        self.tensors = {name: tensor.clone() for name, tensor in stored.items()}
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.input_ids, self.pixels = self.tensors["input_ids"], self.tensors["pixel_values"]

    def outro(self, **switches) -> OutRo:
        names = ("abs_threshold", "median_multiple", "gamma", "temperature")
        return OutRo(**{name: self.meta[name] for name in names}, **switches)


def assert_close(ours, golden, tolerance=1e-4):
    """Assert that the largest difference is at most this share of the golden values' standard deviation."""
    assert ours.numel() == golden.numel(), (ours.shape, golden.shape)
    difference = (ours.reshape(golden.shape) - golden).abs() / golden.std()
    assert difference.max() <= tolerance, f"max {difference.max():.1e}, mean {difference.mean():.1e}"


def check(condition, sentence: str) -> None:
    """An assert for the exercises. `python -O` does not remove it, and a failure shows only the sentence."""
    __tracebackhide__ = True
    if not condition:
        raise AssertionError(sentence)


def writable_copy(source: Path, to: Path, ignore=None) -> Path:
    """A copy that a test may change, even if the project itself is read-only."""
    shutil.copytree(source, to, ignore=ignore, copy_function=shutil.copyfile)
    for folder in (to, *to.rglob("*/")):
        folder.chmod(0o755)
    return to
