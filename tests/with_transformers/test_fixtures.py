"""The golden values can be computed again. A stand-in takes the place of the published code."""

import json

import pytest
import write_fixtures
from helpers import FIXTURES, assert_close
from safetensors.torch import load_file


def golden(name):
    return load_file(FIXTURES / name / "golden.safetensors")


def assert_same(made, golden):
    assert made.keys() == golden.keys()
    for name, tensor in golden.items():
        if tensor.is_floating_point():
            assert_close(made[name], tensor, 1e-5)
        else:
            assert made[name].equal(tensor), name


@pytest.mark.parametrize("case", write_fixtures.PLAIN)
def test_golden_values_of_checkpoints(case):
    tensors, ids = write_fixtures.plain(FIXTURES / case)
    assert_same(tensors, golden(case))
    assert ids == json.loads((FIXTURES / case / "meta.json").read_text())["generated_ids"]


def test_golden_values_of_the_toy():
    assert_same(write_fixtures.toy(), load_file(FIXTURES / "toy.safetensors"))


def test_prompts_and_pixels():
    assert write_fixtures.prompts() == json.loads((FIXTURES / "prompts.json").read_text())
    assert_same(write_fixtures.pixels(), load_file(FIXTURES / "pixels.safetensors"))


# The published code as far as write_fixtures calls it, built from our functions. So only the calls are tested.
STAND_IN = '''
from minioutro.model import *

class OutroController:
    def __init__(self, num_layers, end_layer, med_mul, abs_thr, num_heads, num_kv_heads, head_dim, gamma,
                 temp, enable_relu_tanh):
        self.every, self.end, self.heads = max(1, num_layers // 7), end_layer, num_heads
        self.rule, self.strength, self.aligns = (abs_thr, med_mul), (gamma, temp), enable_relu_tanh
        self.reset_runtime()

    def reset_runtime(self):
        self.sink_indices_cache, self.v_sink, self.opened = {}, {}, {}
        self.applied_sinks, self.ever = set(), set()

    def cache_sink_indices(self, l, hidden):
        if l < self.end and hidden.shape[1] > 1:
            self.sink_indices_cache[l] = find_sinks(hidden, *self.rule)[0].nonzero().flatten().tolist()

    def cache_v_proj_sink(self, l, value):
        if self.sink_indices_cache.get(l):
            self.v_sink[l] = value[:, :, self.sink_indices_cache[l]].mean(2)

    def compute_delta_v(self, l, query, key, value):
        S = query.shape[2]
        self.opened[l] = attention(query, key, value, torch.ones(S, S, dtype=torch.bool))[0]

    def apply_outro(self, l, out):
        heads = out.unflatten(-1, (self.heads, -1)).transpose(1, 2).clone()
        sinks = [i for i in self.sink_indices_cache.get(l, []) if i < out.shape[1]]
        self.ever.update(sinks)
        if l % self.every == 0:
            for i in set(sinks) - self.applied_sinks:
                heads[:, :, i] = self.opened[l][:, :, i]
            self.applied_sinks.update(sinks)
        if self.aligns and l in self.v_sink:
            stays = torch.tensor([[bool(sinks) and i in self.ever for i in range(out.shape[1])]])
            heads = align_with_sink(heads, self.v_sink[l], stays, *self.strength)
        return heads.transpose(1, 2).flatten(2)
'''


@pytest.mark.parametrize("case", write_fixtures.OUTRO)
def test_golden_values_of_the_release(case, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "outro.py").write_text(STAND_IN)
    tensors, decoded = write_fixtures.with_release(FIXTURES / case, tmp_path)
    expected = json.loads((FIXTURES / "decode.json").read_text())[case]
    expected["min_gap_over_std"] = pytest.approx(expected["min_gap_over_std"], rel=0.01)
    assert decoded == expected and decoded["min_gap_over_std"] > 0.001
    for name, tensor in golden(case).items():
        assert_close(tensors[name].float(), tensor.float())


def test_script_without_a_release(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["write_fixtures.py", "--into", str(tmp_path)])
    write_fixtures.main()
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"dev_a/golden.safetensors", "dev_a/meta.json", "dev_c/golden.safetensors",
                       "dev_c/meta.json", "toy.safetensors", "pixels.safetensors", "prompts.json"}
    assert (tmp_path / "prompts.json").read_text() == (FIXTURES / "prompts.json").read_text()
