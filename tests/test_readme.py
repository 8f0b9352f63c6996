"""What the README shows is what happens."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = r"\d[\d,]*\.?\d*"


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [text for of_block, text in found if of_block == language]


def test_the_output_is_that_of_the_command_up_to_times():
    shown, = blocks("")
    done = subprocess.run([sys.executable, ROOT / "run.py"], capture_output=True, text=True)
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


def test_the_module_stays_short_enough_for_an_evening():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines())
             for path in (ROOT / "minioutro").glob("*.py")}
    assert lines["model.py"] < 700 and sum(lines.values()) < 2600
