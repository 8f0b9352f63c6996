"""The fuzzer finds what is wrong, repeats itself, and finds nothing in its first inputs."""

import os
import subprocess
import sys

import pytest
from by_hand import fuzz


def test_first_inputs_end_well(tmp_path):
    command = [sys.executable, fuzz.__file__, "--end", "30", "--minutes", "9", "--keep", tmp_path / "finds"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("30 inputs\n") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("code, said", [
    ("print('{}')", None), ("raise ValueError('one line')", None), ("os._exit(3)", "exit code 3"),
    ("print('x')", "no JSON"), ("print('NaN')", "no JSON"), ("sys.exit(1)", "exit code 1"),
    ("raise RuntimeError('deep inside')", "deep inside"), ("print('{}'); os.write(2, b'from C')", "from C"),
    ("print('two\\nlines', file=sys.stderr); sys.exit(2)", "two")])
def test_wrong_ends_are_found(tmp_path, code, said):
    wrong = fuzz.ask(lambda: exec(code, {"os": os, "sys": sys}), [], tmp_path)[1]
    assert wrong is None if said is None else said in wrong


def test_wrong_input_is_saved_with_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.01)
    report, wrong = fuzz.fuzz(7, 3, 9, sys.maxsize, tmp_path / "finds")
    assert "--seed 7 --first 3" in wrong and "no end within" in wrong and report.startswith("1 inputs")
    assert (tmp_path / "finds" / "seed_7_input_3" / "arguments.json").exists()


def test_same_seed_makes_the_same_inputs(tmp_path):
    for number in range(12):
        made = []
        for name in ("one", "two"):
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            kind, arguments = fuzz.make(5, number, folder)
            files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            made.append((kind, arguments, files))
        assert made[0] == made[1]
