"""The numbers in the full answer of exercise 7 are those of the toy. Those of exercise 12 are one measurement."""

import re
from dataclasses import replace

import pytest
import torch
from grade import HERE
from helpers import TOY

from minioutro import read_video
from minioutro.lab.analysis import examples, loss_of, without_row
from minioutro.model import causal_mask

TEXT = (HERE / "README.md").read_text(encoding="utf-8")


def loss_without(model, asked, *tokens) -> tuple[float, float]:
    """The loss if nobody may attend to these tokens, less that of the plain run, in thousandths, and its error."""
    length = asked.both_ids.shape[1]
    mask = causal_mask(length, length)
    for token in tokens:
        mask[token + 1:, token] = False
    masks = [mask] * model.config.text_config.num_hidden_layers
    change = 1000 * (loss_of(model, asked, masks=masks) - loss_of(model, asked))
    return change.mean().item(), change.std().item() / len(change)**0.5


def test_losses_of_exercise_7(toy):
    model, processor = toy
    inputs = processor(read_video(TOY / "clip.mp4"), "What happens in this video?")
    trace = {}
    model(inputs.input_ids, inputs.pixel_values, trace=trace)
    first = next(l for l in range(8) if trace[f"layers.{l}.ratio"].max() > 1000)
    changed = without_row(model, first - 1, trace[f"layers.{first}.hidden"][0, 0].abs().argmax())
    asked = examples(model, processor, n=40)
    ids = asked.input_ids
    twice = replace(asked, input_ids=torch.cat([ids[:, :200], ids[:, :1], ids[:, 200:]], dim=1))
    measured = [loss_without(changed, asked, 0), loss_without(model, asked, 0), loss_without(model, twice, 0),
                loss_without(model, twice, 200), loss_without(model, twice, 0, 200)]
    answer = re.search(r"### 7\..*?\*\*Full answer\.\*\*(.*?)\*\*Commonest", TEXT, re.DOTALL)[1]
    written = [(float(mean), float(error)) for mean, error in re.findall(r"(-?\d+) ± (\d+)", answer)]
    assert written == [pytest.approx(pair, abs=0.6) for pair in measured]       # rounded, on any processor
