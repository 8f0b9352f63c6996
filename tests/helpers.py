"""What tests share. Shapes are named as in minioutro/model.py; sizes in tests are distinct, so that no transpose passes."""

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
        # Copies in memory: whoever writes to a file takes from under us what was only mapped to it.
        self.model = copy.deepcopy(VideoLM.from_pretrained(self.folder))
        stored = load_file(self.folder / "golden.safetensors")
        self.tensors = {name: tensor.clone() for name, tensor in stored.items()}
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.input_ids, self.pixels = self.tensors["input_ids"], self.tensors["pixel_values"]

    def outro(self, **switches) -> OutRo:
        names = ("abs_threshold", "median_multiple", "gamma", "temperature")
        return OutRo(**{name: self.meta[name] for name in names}, **switches)


def assert_close(ours, golden, tolerance=1e-4):
    """Equal to within a share of the golden values' standard deviation."""
    assert ours.numel() == golden.numel(), (ours.shape, golden.shape)
    difference = (ours.reshape(golden.shape) - golden).abs() / golden.std()
    assert difference.max() <= tolerance, f"max {difference.max():.1e}, mean {difference.mean():.1e}"


def check(condition, sentence: str) -> None:
    """An assert for the exercises: `python -O` leaves it in, and a failure shows the sentence alone."""
    __tracebackhide__ = True
    if not condition:
        raise AssertionError(sentence)


def writable_copy(source: Path, to: Path, ignore=None) -> Path:
    """A copy that a test may change, also where the project itself is read-only."""
    shutil.copytree(source, to, ignore=ignore, copy_function=shutil.copyfile)
    for folder in (to, *to.rglob("*/")):
        folder.chmod(0o755)
    return to
