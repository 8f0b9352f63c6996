"""The commands and outputs of the README are true."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

from minioutro.lab import toy_page

README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = r"\d[\d,]*\.?\d*"


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [text for of_block, text in found if of_block == language]


def numbers_of(line):
    return [float(value.replace(",", "")) for value in re.findall(NUMBER, line)]


def test_run_prints_these_lines(tmp_path):
    """run.py runs in a process of its own, in another folder, without a terminal and without network."""
    shown, = blocks("")
    done = subprocess.run([sys.executable, "-I", ROOT / "run.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])
    printed = iter(done.stdout.splitlines())
    for line in shown.splitlines():
        found = next((other for other in printed if re.sub(NUMBER, "#", other) == re.sub(NUMBER, "#", line)), None)
        assert found is not None, f"run.py does not print, after the lines before it: {line}"
        assert numbers_of(found) == pytest.approx(numbers_of(line), rel=0.01, abs=0.002), line


def test_readme_is_short():
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 1700


def test_effect_on_the_toy():
    """README, tutorial and the toy's page give the same numbers for the one test."""
    toys = json.loads((ROOT / "tests" / "fixtures" / "toy_page.json").read_text())["toys"]
    tutorial = (ROOT / "tutorial.md").read_text(encoding="utf-8")
    for clips in ("ordinary", "noise"):
        found = toys["0"][clips]
        outro = found["variants"]["outro"]
        said = f"mends {outro['gained']} of 2,000 answers and spoils {outro['lost']} (p = {found['test']['p']:.2g})"
        assert said in " ".join(README.split()) and said in " ".join(tutorial.split()), said
        assert len(toys) == 4 and all(toy_page.net_change(figures, clips) < 0 for figures in toys.values())
    assert toys["0"]["ordinary"]["test"]["verdict"] == "not shown" and toys["0"]["noise"]["test"]["verdict"] == "worse"
    assert toy_page.seed_table(toys) in tutorial


def test_the_python_block_runs(capsys, monkeypatch):
    code, = blocks("python")
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    assert "torch.Size([1, 4, " in capsys.readouterr().out


def test_every_file_that_is_named_exists():
    for page in ("README.md", "tests/README.md", "minioutro/lab/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        names = [ROOT / name for name in re.findall(r"`((?:minioutro|tests)/[\w./]*|run\.py)`", text)]
        names += [(ROOT / page).parent / name for name in re.findall(r"\]\(([\w./]+)(?:#[\w-]*)?\)", text)]
        assert names or page != "README.md"
        for name in names:
            assert name.exists(), (page, name)
