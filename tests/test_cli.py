"""What all commands share: one-line errors, closed pipes, other encodings, narrow terminals, files written whole."""

import io
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from minioutro.support import cli

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")       # of runpy
COMMANDS = {"run.py": ["none.mp4"], "sink_report": ["none.mp4"], "evaluate": ["none.jsonl"],
            "train_toy": ["--device", "none"], "toy_page": ["--folder", "none"]}      # each with a mistake


def start(name, *arguments):
    """Run a command as a program, in this process. Returns: its exit code."""
    sys.argv = [name, *arguments]
    try:
        if name == "run.py":
            runpy.run_path(str(ROOT / name), run_name="__main__")
        else:
            runpy.run_module(f"minioutro.lab.{name}", run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_errors_are_one_line(name, capfd):
    for arguments in (COMMANDS[name], ["--nonsense\x1b"]):
        assert start(name, *arguments) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1 and err[:-1].isprintable() and arguments[0][:10].strip("-") in err


@pytest.mark.parametrize("name", COMMANDS)
def test_reader_who_leaves(name, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert start(name, "--help") == 141
        monkeypatch.undo()
    assert capfd.readouterr().err == ""


def run_main(main):
    """Exit code of a command with this main function."""
    try:
        cli.run_command(main, "test.py", "go on with the same command")
    except SystemExit as stop:
        return stop.code
    return 0


def raise_error(error):
    raise error


@pytest.mark.parametrize("error, code, said", [
    (ValueError("two\nlines \x1b[31m"), 2, "test.py: two lines \\x1b[31m\n"),
    (OSError("disk full"), 2, "test.py: disk full\n"),
    (KeyboardInterrupt(), 130, "\ntest.py: go on with the same command\n")])
def test_ends_of_a_command(capsys, error, code, said):
    assert run_main(lambda: raise_error(error)) == code
    assert capsys.readouterr() == ("", said)


def test_our_own_errors_are_not_hidden():
    with pytest.raises(AssertionError, match="a shape"):
        run_main(lambda: raise_error(AssertionError("a shape")))


def test_other_encodings(monkeypatch):
    """Text has ? for a character that the stream lacks. JSON is UTF-8, and NaN becomes null."""
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run_main(lambda: print("■ naïve")) == 0
    assert run_main(lambda: cli.print_json({"text": "■", "broken": "\ud800", "numbers": [1.5, float("nan")]})) == 0
    text, found = stdout.buffer.getvalue().decode("utf-8").splitlines()
    assert text == "? na?ve" and json.loads(found)["numbers"] == [1.5, None] and '"■"' in found


def test_streams_of_notebooks_and_services(monkeypatch):
    """A notebook's stream has no reconfigure. A service has no streams at all."""
    class Notebook:
        text = ""
        flush = staticmethod(lambda: None)

        def write(self, text):
            self.text += text
    notebook = Notebook()
    monkeypatch.setattr(sys, "stdout", notebook)
    assert run_main(lambda: print("■")) == 0 and notebook.text == "■\n"
    assert run_main(lambda: cli.print_json("■")) == 0
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_main(lambda: print(list(cli.progress([1], "items")))) == 0
    assert run_main(lambda: raise_error(ValueError("nobody reads this"))) == 2


def test_progress_is_for_a_person(monkeypatch, capfd):
    assert list(cli.progress([1, 2], "frames")) == [1, 2] and capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(cli.progress([1, 2], "frames")) == [1, 2]
    out, err = capfd.readouterr()
    assert out == "" and "frames:" in err


def test_files_are_written_whole(tmp_path):
    """A failed attempt leaves nothing behind, and a symbolic link at the same name is not followed."""
    path, other = tmp_path / "a.txt", tmp_path / "other.txt"
    other.write_text("other")
    for name in (".a.half.txt", "a.txt"):
        (tmp_path / name).symlink_to(other)
    with cli.written_whole(path) as half:
        half.write_text("new")
    assert path.read_text() == "new" and not path.is_symlink() and other.read_text() == "other"
    with pytest.raises(ValueError), cli.written_whole(path) as half:
        half.write_text("half of")
        raise ValueError
    assert path.read_text() == "new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".a.half.txt", "a.txt", "other.txt"]


def test_writable_folder(tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    for folder in ("taken", "taken/sub"):
        with pytest.raises(ValueError, match=f"^--out {folder}: .*taken is not a writable folder; give another one$"):
            cli.writable_folder("--out", folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.writable_folder("--out", "~/a/b") == Path(tmp_path / "a" / "b")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]
