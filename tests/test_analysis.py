"""The paper's questions: each function on numbers that can be checked by hand, or in a second way."""

import math

import pytest
import torch

from minioutro import Cache, OutRo
from minioutro.lab import analysis
from minioutro.lab.analysis import Examples, logits_of, loss_of
from minioutro.lab.sink_report import sources

WEIGHTS = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.7, 0.1]])         # one head, (Q,K)
SELFISH = torch.eye(3)


@pytest.fixture(scope="module")
def asked(toy):
    return analysis.examples(*toy, n=3)


# ---- Q1 ----


def test_attention_mass_and_sink_share_by_hand():
    """Key 0 draws 1 + 0.5 + 0.2 of three queries, key 1 draws 1.2 of two, key 2 draws 0.1 of one."""
    weights = torch.stack([WEIGHTS, SELFISH])[None]
    assert torch.allclose(analysis.attention_mass(weights)[0, 0], torch.tensor([1.7 / 3, 0.6, 0.1]))
    assert torch.allclose(analysis.attention_mass(weights)[0, 1], torch.tensor([1 / 3, 1 / 2, 1.0]))
    assert analysis.sink_share(analysis.attention_mass(weights)).tolist() == [[1.0, 1.0, 0.5]]
    assert analysis.sink_share(analysis.attention_mass(weights), threshold=0.5).tolist() == [[0.5, 0.5, 0.5]]


def test_phi_and_sink_dimensions_by_hand():
    """The mean square of (3, 0, -4, 0) is 25 / 4. One huge coordinate gives sqrt(C), which is 20 at C = 400."""
    hidden = torch.tensor([[[3.0, 0.0, -4.0, 0.0]]])
    assert analysis.phi(hidden, torch.tensor([0, 2])).item() == pytest.approx(4 / 2.5)
    assert analysis.phi(hidden, torch.tensor([0])).item() == pytest.approx(3 / 2.5)
    massive = torch.zeros(1, 1, 64)
    massive[0, 0, 5] = -1e4
    assert analysis.phi(massive, torch.tensor([5])).item() == pytest.approx(8)
    hidden = torch.tensor([[[1.0, 7.0, 8.0], [0.0, 0.0, 0.0]], [[-9.0, 1.0, 2.0], [5.0, 6.0, 7.0]]])
    assert analysis.sink_dimensions(hidden, 2).tolist() == [0, 2]
    assert analysis.sink_dimensions(hidden, 1).tolist() == [0]


def test_detectors_and_their_overlap():
    """Token 0 is massive in coordinate 1. Token 1 draws attention. Token 2 is small, but all of it is in 1."""
    hidden = torch.tensor([[[1.0, 5000.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 0.0]]])
    drawing = torch.tensor([[1.0, 0.0, 0.0], [0.1, 0.9, 0.0], [0.0, 0.8, 0.2]])
    weights = torch.stack([drawing, torch.zeros(3, 3)])[None]           # one head of two: that is half
    found = analysis.detectors(hidden, analysis.attention_mass(weights), torch.tensor([1]))
    assert {name: is_sink[0].tolist() for name, is_sink in found.items()} == {
        "activation": [True, False, False], "attention": [True, True, False],
        "dimensions": [True, True, True], "phi > 20": [False, False, False]}
    assert analysis.overlap(found["activation"], found["dimensions"]) == pytest.approx(1 / 3)
    assert analysis.overlap(found["attention"], found["activation"]) == 0.5
    assert analysis.overlap(*found.values()) == 0
    assert analysis.overlap(*list(found.values())[:3]) == pytest.approx(1 / 3)
    assert analysis.overlap(found["phi > 20"], found["phi > 20"]) == 0


# ---- Q2 ----


def test_a_head_is_removed_from_a_copy_alone(toy, asked):
    """The head's columns of o_proj are zero. Without all heads, a layer adds only its MLP."""
    model = toy[0]
    name = "model.text_model.layers.3.self_attn.o_proj.weight"
    D, H = model.config.text_config.head_dim, model.config.text_config.num_attention_heads
    before = model.get_parameter(name).clone()
    changed = analysis.without_head(model, 3, 1)
    difference = (changed.get_parameter(name) - before).abs().sum(0).view(H, D)
    assert difference.any(1).tolist() == [h == 1 for h in range(H)]
    assert not changed.get_parameter(name)[:, D:2 * D].any()
    assert model.get_parameter(name).equal(before)
    assert all(theirs is ours for (other, theirs), (_, ours) in
               zip(changed.named_parameters(), model.named_parameters()) if other != name)
    assert not loss_of(changed, asked).equal(loss_of(model, asked))
    for h in range(H):
        changed = analysis.without_head(changed, 3, h)
    assert loss_of(changed, asked).equal(loss_of(analysis.with_zeros(model, name, ...), asked))


def test_without_row_silences_one_layer(toy, asked):
    """The MLP then adds nothing to that coordinate of any token. What it adds to other coordinates stays."""
    for changed, silent in ((toy[0], False), (analysis.without_row(toy[0], 1, 5), True)):
        trace = {}
        changed.hidden_states(asked.input_ids, features=asked.features, trace=trace)
        added = sources(changed, trace, [0, 7, 100])[2]                 # of the MLP of layer 1
        assert (added[:, 5].abs() < 1e-5).all() == silent and (added[:, 6].abs() > 1e-3).all()


# ---- Q3 ----


def test_zero_k_equals_one_pass(toy, asked):
    """Token 0 sees only itself. So editing its key in one pass gives the same as in two passes."""
    class ZeroKey(Cache):
        def extend(self, layer, k, v):
            k, v = super().extend(layer, k.clone(), v)
            if layer >= 2:
                for g in range(k.shape[1]):
                    for b in range(len(k)):
                        for d in k[b, g, 0].abs().sort(descending=True).indices[:3].tolist():
                            k[b, g, 0, d] = 0
            return k, v
    model = toy[0]
    L = model.config.text_config.num_hidden_layers
    logits = model(asked.both_ids, features=asked.features, cache=ZeroKey())
    edited = logits_of(model, asked, zero_keys=(range(2, L), 0, 3))
    assert torch.allclose(edited, logits[:, -asked.is_scored.shape[1] - 1:-1], atol=1e-3)
    assert not torch.allclose(edited, logits_of(model, asked), atol=1e-2)


def test_value_split_by_hand():
    """The sinks have values 10 and 20, the other token 1. The last query gets 0.2 * 10 + 0.7 * 20 and 0.1 * 1.
    The second key-value head, for heads 2 and 3, holds ten times these values."""
    v = torch.tensor([[10.0, 20.0, 1.0], [100.0, 200.0, 10.0]]).view(1, 2, 3, 1)
    of_sink, of_others = analysis.value_split(WEIGHTS.expand(1, 4, 3, 3), v, torch.tensor([[True, True, False]]))
    for h, times in enumerate((1, 1, 10, 10)):
        assert torch.allclose(of_sink[0, h, :, 0], times * torch.tensor([10.0, 15.0, 16.0]))
        assert torch.allclose(of_others[0, h, :, 0], times * torch.tensor([0.0, 0.0, 0.1]))


def test_nop_or_broadcast_by_hand():
    """Head 0 varies by 3 along the sink's value and by 4 across it: 9 of 25. Head 1 only along it."""
    v = torch.tensor([[[[2.0, 0.0], [0.0, 4.0], [0.0, 8.0]]]])
    out = torch.tensor([[[[3.0, 4.0], [-3.0, -4.0]], [[6.0, 1.0], [0.0, 1.0]]]])
    ratio, share = analysis.nop_or_broadcast(out, v, v[:, :, 0])
    assert ratio.tolist() == [[0.5]] and share.tolist() == [[pytest.approx(9 / 25), pytest.approx(1.0)]]
    assert analysis.nop_or_broadcast(torch.ones(1, 2, 3, 2), v, v[:, :, 0])[1].tolist() == [[0.0, 0.0]]


def test_probe_reads_or_guesses():
    generator = torch.Generator().manual_seed(0)
    labels = ["red", "blue", "blue"] * 20
    noise = torch.randn(60, 5, generator=generator)
    read = noise.clone()
    read[:, 3] += torch.tensor([10.0 * (label == "red") for label in labels])
    assert analysis.probe(read, labels, 30) == 1.0
    assert analysis.probe(torch.full((60, 5), 7.0), labels, 30) == pytest.approx(2 / 3)          # always blue
    assert analysis.probe(read, ["blue"] * 30 + labels[:30], 30) == pytest.approx(2 / 3)         # red not learnt


# ---- losses and masks ----


def test_token_losses_by_hand(asked):
    """Uniform logits cost log V for each token. The padding of an answer costs nothing."""
    B, A = asked.answer_ids.shape
    alike = Examples(asked.input_ids, asked.features, asked.answer_ids % 11, asked.is_scored)
    losses = analysis.token_losses(torch.zeros(B, A, 11), alike)
    assert torch.allclose(losses, math.log(11) * asked.is_scored)
    right = torch.zeros(B, A, 11).scatter_(-1, alike.answer_ids[:, :, None], 50.0)
    assert analysis.token_losses(right, alike).max() < 1e-6
    assert asked.is_scored.sum(1).unique().numel() > 1


# ---- Many directions or one, and rows opened in one layer ----


def test_singular_entropy_by_hand():
    """One line has entropy 0, four equal directions have 1, and two of four have log 2 / log 4 = 0.5."""
    line = torch.outer(torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([2.0, 0.0, 1.0, 1.0]))
    two = torch.diag(torch.tensor([3.0, 3.0, 0.0, 0.0]))
    found = analysis.singular_entropy(torch.stack([line, 7 * torch.eye(4), two]))
    assert torch.allclose(found, torch.tensor([0.0, 1.0, 0.5]), atol=1e-5)


def test_a_massive_token_lowers_the_entropy():
    hidden = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0))
    before = analysis.singular_entropy(hidden)
    hidden[0, 0, 3] = 1e4
    assert before > 0.9 and analysis.singular_entropy(hidden) < 0.01


def test_only_the_first_output_is_its_own_value(toy, asked):
    """Token 1 gives half of its attention to token 0, whose value points the other way: nothing is left."""
    v = torch.tensor([[[[3.0, 4.0], [-3.0, -4.0], [0.0, 2.0]]]])
    out = WEIGHTS @ v
    assert analysis.output_by_own_value(out, v)[0, 0, :2].tolist() == [1, 0]
    trace, cache = {}, Cache()
    toy[0](asked.input_ids, features=asked.features, trace=trace, cache=cache)
    ratio = analysis.output_by_own_value(trace["layers.0.out"], cache.values(0))           # (B,H,S)
    assert torch.allclose(ratio[:, :, 0], torch.ones(3, 4), atol=1e-5)
    assert ((ratio - 1).abs().amax(1)[:, 1:] > 1e-3).all()


def test_a_row_opened_in_one_layer(toy, asked):
    """In the layer where OutRo opens it, the logits move as OutRo moves them. In the last, not at all."""
    model, ids, features = toy[0], asked.input_ids[:1], asked.features[:1]
    moves = analysis.moved_by_opening(model, ids, features, 0)
    treated = model(ids, features=features, outro=OutRo(align=False)) - model(ids, features=features)
    assert moves[2] == pytest.approx(treated[0, -1].abs().max().item(), abs=1e-4) and moves[2] > 1e-4
    assert len(moves) == 8 and moves[-1] == 0
