"""The fuzzer finds what is wrong, repeats itself, and finds nothing in its first inputs."""

import sys
import time

import pytest
from by_hand import fuzz
from helpers import TOY


def test_damaged_and_senseless_inputs_end_in_an_answer_or_in_one_line(tmp_path):
    report, wrong = fuzz.fuzz(0, 0, 40, sys.maxsize, tmp_path)
    assert wrong is None, wrong
    assert report.startswith("40 inputs\n") and "MB" in report and not list(tmp_path.iterdir())


@pytest.mark.parametrize("code, said", [
    ("print('x')", "no JSON"), ("sys.exit(1)", "exit code 1"), ("os._exit(3)", "died with 3"),
    ("raise RuntimeError('deep inside')", "deep inside"), ("os.write(2, b'from C')", "from C"),
    ("print('two\\nlines', file=sys.stderr); sys.exit(2)", "two"), ("time.sleep(60)", "no end within")])
def test_what_is_neither_is_saved_with_its_number(tmp_path, monkeypatch, code, said):
    monkeypatch.setattr(fuzz, "SECONDS", 60 if "sleep" not in code else 0.1)
    (tmp_path / "run.py").write_text(f"import os, sys, time\ndef main():\n    {code}\n")
    monkeypatch.setattr(fuzz, "ROOT", tmp_path)
    report, wrong = fuzz.fuzz(7, 3, 9, time.monotonic() + 60, tmp_path / "finds")
    assert "--seed 7 --first 3" in wrong and said in wrong and report.startswith("1 inputs")
    assert (tmp_path / "finds" / "seed_7_input_3" / "arguments.json").exists()


def test_the_same_seed_makes_the_same_inputs(tmp_path):
    for number in range(12):
        made = []
        for name in ("one", "two"):
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            kind, arguments = fuzz.make(5, number, folder)
            files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            made.append((kind, arguments, files))
        assert made[0] == made[1] and str(TOY) in made[0][1] + [str(TOY)]
