"""What all commands share: options, streams, one-line errors, progress, files, CSV and JSON lines.

A command's module ends with

    if __name__ == "__main__":
        run_command(main, "evaluate.py")

and its main() begins with a Parser, to which the options below are added.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shown  # a value in an error message: cut if it is long or deep

# ---- 1. The command line ------------------------------------------------------------------------


def escaped(text) -> str:
    """A text as one line. Characters that a terminal obeys are escaped: a newline becomes "\\n"."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line. The usual three lines of usage would hide the error."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {escaped(message)} (try --help)\n")


def number(least: float, most: float, kind: type = float) -> Callable[[str], float]:
    """A type for argparse: a number from `least` to `most`. kind: int or float."""
    what = "a whole number" if kind is int else "a number"
    limits = f"{least:,} and {most:,}" if kind is int else f"{least:g} and {most:g}"

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:20]!r} is not {what}") from None
        if not least <= value <= most:             # NaN is refused here too
            raise argparse.ArgumentTypeError(f"{text[:20]!r} is not between {limits}")
        return value
    return convert


COUNT = number(1, 10**9 - 1, int)
STRENGTH = number(0, 1e12)


def not_empty(text: str) -> str:
    """A type for argparse: the name of a file, a folder or a repository."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; give one, or leave it out")
    return text


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --revision, --device and --dtype. Without --model, args.model is None."""
    add = parser.add_argument
    add("--model", type=not_empty, metavar="DIR_OR_REPO",
        help="folder of a checkpoint, or repository on the Hugging Face hub (default: "
             "SmolVLM2-256M-Video-Instruct, or the bundled toy model for the toy's own clips)")
    add("--revision", help="branch, tag or commit of the repository (default: the newest)")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu",
        help="where the model runs (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="data type of weights and activations (default: %(default)s)")


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """--frames and --fps. Both are None unless given, which means the checkpoint's settings."""
    add = parser.add_argument
    add("--frames", type=COUNT, metavar="N",
        help="show the model at most N frames (default: the checkpoint's setting, usually 64)")
    add("--fps", type=number(1e-9, 1e9), metavar="F",
        help="show it F frames for each second of video (default: the checkpoint's setting, "
             "usually 1)")


def add_outro_options(parser: argparse.ArgumentParser) -> None:
    """All options of the method: its constants, --gamma and the switches."""
    add = parser.add_argument
    add("--gamma", type=STRENGTH, default=3.0, metavar="G",
        help="strength of the alignment (default: %(default)s)")
    add_outro_constants(parser)
    add("--no-relax", action="store_true",
        help="do not open the rows of the sinks: no sink attends to the whole prompt")
    add("--no-align", action="store_true",
        help="do not turn the attention outputs of the other tokens towards the sink's value")


def add_outro_constants(parser: argparse.ArgumentParser) -> None:
    """--temperature, --median-multiple and --abs-threshold."""
    add = parser.add_argument
    add("--temperature", type=number(1e-12, 1e12), default=0.1, metavar="T",
        help="temperature of the alignment's gate (default: %(default)s)")
    add("--median-multiple", type=STRENGTH, default=1000.0, metavar="M",
        help="a sink has an activation of at least M times the median (default: %(default)s)")
    add("--abs-threshold", type=STRENGTH, default=100.0, metavar="A",
        help="a sink also has an activation of at least A (default: %(default)s)")


# ---- 2. Streams, errors and progress ------------------------------------------------------------


def run_command(main_function: Callable[[], None], name: str, when_interrupted: str = "") -> None:
    """Run a command, and end the process in the way that all commands end.

    A ValueError or OSError is a mistake of the user: one line on stderr, exit code 2.
    Ctrl-C: `when_interrupted` on stderr, exit code 130.
    The program that reads stdout has closed it: exit code 141.
    """
    set_up_streams()
    try:
        try:
            main_function()
        finally:
            sys.stdout.flush()          # raises BrokenPipeError here if the reader has left
    except KeyboardInterrupt:
        if when_interrupted:
            print(f"\n{name}: {when_interrupted}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:             # the reader has left, as `head` does after a few lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        print(f"{name}: {escaped(line)}", file=sys.stderr)
        sys.exit(2)


def set_up_streams() -> None:
    """Make both streams safe to print to, even if one is closed or its encoding has no "■"."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:              # the caller has closed it
            setattr(sys, name, open(os.devnull, "w"))
    reconfigure_stdout(errors="replace")            # print "?" for what cannot be encoded


def reconfigure_stdout(**settings) -> None:
    if hasattr(sys.stdout, "reconfigure"):          # a notebook's stream has no such method
        sys.stdout.reconfigure(**settings)


def print_json(value) -> None:
    """Print a value as JSON, in UTF-8 on any system. NaN and infinity become null."""
    reconfigure_stdout(encoding="utf-8", errors="backslashreplace")
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    print(json.dumps(value, ensure_ascii=False))


def progress(items: Iterable, what: str, total: int | None = None, initial: int = 0):
    """Go through the items with a progress bar on stderr, if stderr is a terminal.

    Returns: a tqdm, whose set_postfix shows further values beside the bar.
    """
    from huggingface_hub.utils import tqdm  # imported here because it is slow to import
    return tqdm(items, desc=what, total=total, initial=initial, leave=False,
                disable=not sys.stderr.isatty())


# ---- 3. Files -----------------------------------------------------------------------------------


def writable_folder(flag: str, folder) -> Path:
    """A folder, which need not exist yet. Raises: ValueError if it cannot be written to."""
    path = Path(os.path.expanduser(folder))
    candidates = [path, *path.absolute().parents]
    nearest = next(parent for parent in candidates if os.path.lexists(parent))
    try:
        # permissions do not tell it reliably, so try to write
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError:
        raise ValueError(f"{flag} {folder}: {nearest} is not a writable folder; "
                         f"give another one") from None
    return path


@contextmanager
def written_whole(path: Path):
    """Yield another path to write to. If that succeeds, the file is moved to `path`.

    So nobody ever finds half a file. The other path lies in a new folder, where nobody can have put
    a symbolic link that leads elsewhere.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.half-") as folder:
        half = Path(folder) / path.name
        yield half
        half.replace(path)


def read_rows(path: Path) -> list[dict]:
    """The objects of a csv file, of a JSON list, or of JSON lines. One object is a list of one.

    Raises: ValueError or OSError that names the file and what is wrong with it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if path.suffix.lower() == ".parquet":
        raise ValueError(f"{path} is not a text file; convert it, for example with pandas: "
                         f"read_parquet(...).to_json(..., orient='records', lines=True)")
    try:
        if path.suffix.lower() == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file, restkey="further"))
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}); give another file") from None
    rows = read_json_lines(path, text)
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds {shown(rows)}, not objects; give another file")
    return rows


def read_json_lines(path: Path, text: str) -> list:
    """The values of JSON lines, or the value of one JSON text, in a list.

    Raises: ValueError that names the line which is not JSON.
    """
    begins_a_list = text.lstrip().startswith("[")
    begins_an_object = text.split("\n")[0].strip() == "{"
    if begins_a_list or begins_an_object:
        return [parse_json(path, text, 1)]
    lines = enumerate(text.split("\n"), start=1)
    return [parse_json(path, line, number) for number, line in lines if line.strip()]


def parse_json(path: Path, text: str, first_line: int):
    """first_line: the number of the text's first line in the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, problem = first_line + error.lineno - 1, error.msg
    except (ValueError, RecursionError) as error:       # too many digits, or too deep
        line, problem = first_line, str(error)
    raise ValueError(f"{path}: line {line} is not JSON ({problem}); correct it")
