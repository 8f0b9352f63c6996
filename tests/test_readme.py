"""What the README shows is what happens."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT
from test_tutorial import lesson, run_blocks

from minioutro.lab import analysis
from minioutro.lab.analysis import examples

README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = r"\d[\d,]*\.?\d*"


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [text for of_block, text in found if of_block == language]


def test_the_output_is_that_of_the_command_up_to_times(tmp_path):
    """In a process of its own, from another folder, without a terminal and without network."""
    shown, = blocks("")
    done = subprocess.run([sys.executable, "-I", ROOT / "run.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])
    lines, expected = done.stdout.splitlines(), shown.splitlines()
    assert lines.pop().startswith("time ") and expected.pop().startswith("time ")
    assert [re.sub(NUMBER, "#", line) for line in lines] == [re.sub(NUMBER, "#", line) for line in expected]
    values = [[float(value.replace(",", "")) for line in text for value in re.findall(NUMBER, line)]
              for text in (lines, expected)]
    assert values[0] == pytest.approx(values[1], rel=0.01, abs=0.002)


def test_the_python_block_runs(capsys, monkeypatch):
    code, = blocks("python")
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    assert "torch.Size([1, 4, " in capsys.readouterr().out


def test_every_file_that_is_named_exists():
    names = re.findall(r"`((?:minioutro|tests)/[\w./]*|run\.py)`", README)
    names += re.findall(r"\]\(([\w./]+)\)", README)
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists(), name


def sections(numbers):
    """The tutorial's sections with these numbers, one after another."""
    parts = re.split(r"^## (?=\d+\.)", lesson(), flags=re.M)
    return "".join(part for n in numbers for part in parts if part.startswith(f"{n}. "))


def test_the_lectures_of_the_plan_run_in_one_session(monkeypatch):
    """Sections of the second lecture that the first has not run come behind it. With few clips: what is
    printed is compared elsewhere."""
    monkeypatch.setattr(analysis, "examples", lambda *args, n, **options: examples(
        *args, n=6 if n < 100 else 155, **options))
    spans = re.findall(r"sections (\d+) to (\d+) and (\d+)", README)
    first, second = ([*range(int(a), int(b) + 1), int(c)] for a, b, c in spans)
    shown = [block for block, *_ in run_blocks(sections([*first, *sorted({*second} - {*first})]))]
    assert len(shown) > 40
