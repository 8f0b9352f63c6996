"""What all commands share: options, one-line errors, files written whole, CSV and JSON lines."""

import argparse
import csv
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shown  # a value in an error message: cut if it is long or deep

from minioutro.weights import HUB_MODEL


def read_json_lines(path: Path, text: str) -> list:
    """The values of a JSON text, or of its lines. Raises: ValueError with the line that is none."""
    is_one = text.lstrip()[:1] == "[" or text.split("\n")[0].strip() == "{"
    values = []
    for n, line in enumerate([text] if is_one else text.split("\n"), start=1):
        try:
            values += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            n = getattr(error, "lineno", n) if is_one else n
            raise ValueError(f"{path}: line {n} is no JSON ({error}); correct it") from None
    return values


def read_rows(path: Path) -> list[dict]:
    """The objects of a csv file, of a JSON list or of JSON lines; one object is a list of one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if path.suffix.lower() == ".parquet":
        raise ValueError(f"{path} is no text; convert it, for one with pandas: read_parquet(...)."
                         f"to_json(..., orient='records', lines=True)")
    try:
        if path.suffix.lower() == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file, restkey="further"))
        rows = read_json_lines(path, path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}); give another file") from None
    rows = rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds {shown(rows)}, not objects; give another file")
    return rows


def writable_folder(name: str, folder) -> Path:
    """A folder that need not exist yet. Raises: ValueError if it cannot be written to."""
    folder = Path(os.path.expanduser(folder))
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryDirectory(dir=nearest).cleanup()          # the only sure way to know
    except OSError:
        raise ValueError(f"{name}: {nearest} is no folder that can be written to; give "
                         f"another") from None
    return folder


@contextmanager
def written_whole(path: Path):
    """A path to write to instead; what is there in the end is moved to `path`, or is removed."""
    half = path.with_name(f".{path.stem}.half{path.suffix}")
    try:
        yield half
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def numbers(least: float, most: float, kind: type = float):
    """For argparse: what reads a number from `least` to `most`."""
    def number(text: str):
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text[:20]!r} is not from {least} to {most}")
        return value
    return number


def add_options(parser: argparse.ArgumentParser, of_outro: bool = True) -> None:
    """The options of run.py that other commands share; those of the method only if wanted."""
    add, count, strength = parser.add_argument, numbers(1, 10**9 - 1, int), numbers(0, 1e12)
    add("--model", metavar="DIR_OR_REPO", help="folder of a checkpoint, or repository of the hub "
        f"(default: {HUB_MODEL}; for the toy's own clips the bundled toy)")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="default: %(default)s")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of weights and activations (default: %(default)s)")
    add("--frames", type=count, metavar="N", help="at most (default: the checkpoint's, mostly 64)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    if not of_outro:
        return
    add("--revision", help="branch, tag or commit of the repository (default: the newest)")
    add("--fps", type=numbers(1e-9, 1e9), metavar="F",
        help="frames a second (default: the checkpoint's, mostly 1)")
    add("--max-new-tokens", type=count, default=64, metavar="N", help="default: %(default)s")
    add("--temperature", type=strength, default=0.1, metavar="T",
        help="of the alignment's gate (default: %(default)s)")
    add("--median-multiple", type=strength, default=1000.0, metavar="M",
        help="a sink has an activation of at least M times the median (default: %(default)s)")
    add("--abs-threshold", type=strength, default=100.0, metavar="A",
        help="and of at least A (default: %(default)s)")
    add("--figures", metavar="DIR", help="write pictures into this folder")


@contextmanager
def one_line_errors(name: str):
    """End the program as run.py does: by one line and code 2 for an error of the user's."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())             # what would steer a terminal is escaped
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        print(f"{name}: {line}", file=sys.stderr)
        sys.exit(2)
