"""The answers to the exercises in words, 7, 9 and 10: try yourself before you read on."""

import re

import mutants
import torch
from helpers import ROOT

from minioutro import OutRo
from minioutro.lab.analysis import attention_mass
from minioutro.model import Sinks


def test_rule_and_attention_come_apart(monkeypatch):
    """Exercise 7, by a mean over the heads above 0.3; what the rule finds is printed by its text. In `without` it
    finds nobody, and attention token 0. In `twice` it finds both copies, and attention the first alone."""
    section = (ROOT / "tutorial.md").read_text(encoding="utf-8").split("### Exercise 7. ")[1]
    make_model, make_traces, *_ = re.findall(r"(?s)```python\n(.*?)```", section)
    tutorial = {}
    monkeypatch.chdir(ROOT)
    exec(make_model + make_traces, tutorial)
    found = {}
    for name, (trace, _) in tutorial["traces"].items():
        weights = [trace[f"layers.{l}.weights"] for l in tutorial["layers"]]
        is_one = [attention_mass(w)[0, :, :-15].mean(0) > 0.3 for w in weights]       # 16 queries or more may see it
        found[name] = [tokens.nonzero().flatten().tolist() for tokens in is_one]
    assert found["toy"] == found["twice"] == [[], []] + 6 * [[0]]
    assert found["without"] == [[], []] + 4 * [[0]] + [[], [0]]


def test_which_layers_turn_the_tokens_after_the_prompt():
    """Exercise 10: position 7 is a sink in layers 2 to 13, position 0 in layers 6 to 9. The published code turns one
    new token in layers 2 to 5 and 10 to 13, because there index 0 is not among the layer's own sinks. Ours turns it,
    and each of two tokens at once, in layers 2 to 13."""
    found = dict.fromkeys(range(2, 14), [7]) | dict.fromkeys(range(6, 10), [0, 7])
    published, = (solution for *_, solution, what in mutants.WRONG if what == "the_published_slip")
    for kind, n_new, turned in ((published, 1, [2, 3, 4, 5, 10, 11, 12, 13]), (Sinks, 1, list(range(2, 14))),
                                (Sinks, 2, list(range(2, 14)))):
        sinks = kind(OutRo(), 16, torch.zeros(1, 9, dtype=torch.bool))
        v, out, new = torch.rand(1, 1, 9, 8), torch.rand(1, 5, 9, 8), torch.rand(1, 5, n_new, 8)    # below 90 degrees
        for l in range(16):
            hidden = torch.ones(1, 9, 3)
            hidden[:, found.get(l, [])] = 5000.0
            sinks.find(l, hidden)
            sinks.align(l, out, v)
        moved = torch.stack([(sinks.align(l, new, v) != new).any(-1).any(1)[0] for l in range(16)])       # (L,n_new)
        for token in range(n_new):
            assert moved[:, token].nonzero().flatten().tolist() == turned


def test_last_layer_row_does_not_reach_the_answer(golden):
    """Exercise 9: no effect. Opening a row changes the output of that position alone; the layer's
    keys and values are computed before it, and there is no later layer in which others could read
    it. The logits at the sink itself move, but the answer is read from the last position."""
    g = golden("dev_late")
    last, trace = len(g.model.model.text_model.layers) - 1, {}
    late = OutRo(relax_every=last, skip_last=0, align=False)
    opened = g.model(g.input_ids, g.pixels, outro=late, trace=trace)
    is_open = trace[f"layers.{last}.relaxed"][0]
    assert is_open.any() and not is_open[-1] and not trace["layers.0.relaxed"].any()
    moved = (opened - g.model(g.input_ids, g.pixels)).abs().amax(-1)[0]
    assert (moved[~is_open] == 0).all() and (moved[is_open] > 0).all()
