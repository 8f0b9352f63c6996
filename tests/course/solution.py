"""Somebody's module, whose functions the tests call; and, as a program, the process in which it runs.

    python tests/course/solution.py my_module.py LINES VARIANT     answers the calls that it reads from stdin

LINES is a file for what the grader tells of a process that ended: where it was.
"""

import contextlib
import copy
import faulthandler
import importlib
import io
import os
import sys
import traceback
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import torch
from exercises import EXERCISES, MODEL, ROOT, make_importable
from torch import nn
from variants import Variant

sys.path.insert(0, str(ROOT))
from minioutro import model  # noqa: E402
from minioutro.lab import analysis  # noqa: E402

FOR_IMPORT = 60.0                       # seconds


def last_line(error: BaseException, path: Path) -> str:
    """The last line of a module, or of a package's folder, that led to an error."""
    lines = [f"{Path(entry.filename).name}, line {entry.lineno}"
             for entry in traceback.extract_tb(error.__traceback__)
             if path in (Path(entry.filename), *Path(entry.filename).parents)]
    return lines[-1] if lines else path.name


def folder_of(path: Path) -> Path:
    """The folder of a package, for its __init__.py; else the file."""
    return path.parent if path.name == "__init__.py" else path


def import_solution(path: Path):
    """The module of this file, or the package of this folder.

    Raises: ValueError, in one sentence, if it cannot be imported.
    """
    try:
        return importlib.import_module(make_importable(path))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        leaves = "sys.exit() would end the tests as well; leave it out"
        said = " ".join(f"{type(error).__name__}: {error}".split())         # in one line
        sentence = f"{last_line(error, path)}: {leaves if isinstance(error, SystemExit) else said}"
    raise ValueError(sentence)


def called_ours(*args, **kwargs):
    __tracebackhide__ = True
    raise AssertionError("this calls the project's own function for what the exercise is about")


@contextlib.contextmanager
def doing(functions: list, others: list):
    """Meanwhile each function does what another does, by whatever name and in whatever way it is called."""
    codes = [function.__code__ for function in functions]
    try:
        for function, other in zip(functions, others, strict=True):
            function.__code__ = other.__code__
        yield
    finally:
        for function, code in zip(functions, codes, strict=True):
            function.__code__ = code


def model_of(variant: Variant):
    """Meanwhile minioutro.model computes with a variant's constants."""
    changed = {"__name__": model.__name__}
    exec(compile(variant(MODEL.read_text(encoding="utf-8")), MODEL, "exec"), changed)
    return doing(*[[attrgetter(name)(module) for e in EXERCISES if not e.stub for name in e.names]
                   for module in (model, SimpleNamespace(**changed))])


def ours(dotted: str):
    """The project's own function or method of this name; None for what only the exercises have."""
    for holder in (model, analysis):
        with contextlib.suppress(AttributeError):
            for name in dotted.split("."):
                holder = getattr(holder, name)
            return holder


class Solution:
    """A student's module. Its functions and methods are called by their names in `EXERCISES`.

    One that it lacks, or only imports from the model, is not written yet. While one runs, the project's
    own functions of that exercise raise; and the tensors that it is given must be the same afterwards.
    """

    def __init__(self, module):
        self.module, self.models = module, {}           # by id, a model and its copy

    def __call__(self, dotted: str, *args):
        """The result for copies of these arguments, and what each cache or trace among them is then.

        A method's first argument is an object of the model's class, which becomes one of the module's; of
        DecoderLayer.forward it is a VideoLM with such layers, whose `hidden_states` is called.
        """
        __tracebackhide__ = True
        exercise, = (e for e in EXERCISES if dotted in e.names)
        name, _, method = dotted.partition(".")
        function = getattr(self.module, name, None)
        if function is None or function is ours(name):
            raise NotImplementedError(exercise.not_written)
        given = [self.copied(arg) for arg in args]
        forbidden = [one for one in map(ours, (*exercise.names, *exercise.rivals)) if one]
        with doing(forbidden, [called_ours] * len(forbidden)):
            if given and isinstance(given[0], model.VideoLM):
                result = model.VideoLM.hidden_states(*given)
            else:
                result = self.watched(dotted, getattr(function, method) if method else function, given)
        return result, [vars(after) if isinstance(before, model.Cache) else
                        dict(after) if isinstance(before, dict) else None
                        for before, after in zip(args, given)]

    def watched(self, dotted: str, function, args):
        """function(*args), which returns as many tensors as ours does and changes none that it is given."""
        __tracebackhide__ = True
        given = {f"argument {n}": arg for n, arg in enumerate(args, 0 if "." in dotted else 1)}
        given |= dict(args[0].named_parameters()) if args and isinstance(args[0], nn.Module) else {}
        copies = {what: one.clone() for what, one in given.items() if torch.is_tensor(one)}
        try:
            result = function(*args)
        except SystemExit as error:
            path = Path(getattr(self.module, "__file__", "my_module.py"))
            raise AssertionError(f"sys.exit() ends {dotted}; a function returns: "
                                 f"{last_line(error, folder_of(path))}") from None
        for what, one in copies.items():
            if not given[what].equal(one):
                raise AssertionError(f"{dotted} changes its {what}; work on a copy")
        values = result if isinstance(result, tuple) else (result,)
        n = len(get_args(ours(dotted).__annotations__["return"])) or 1 if ours(dotted) else 1
        if len(values) != n or not all(torch.is_tensor(value) for value in values):
            returned = ", ".join(type(value).__name__ for value in values)
            raise AssertionError(f"{dotted} returns {returned}; asked for: " + ", ".join(n * ["Tensor"]))
        return result

    def copied(self, arg):
        """A copy with classes of the module. Of a model it is always the same one, since copying takes time."""
        if not isinstance(arg, model.VideoLM):
            return self.as_theirs(copy.deepcopy(arg))
        if id(arg) not in self.models:
            self.models[id(arg)] = arg, self.as_theirs(copy.deepcopy(arg))
        return self.models[id(arg)][1]

    def as_theirs(self, arg):
        """The same, but norms, layers and caches have the class of the module."""
        for part in arg.modules() if isinstance(arg, nn.Module) else [arg]:
            name = type(part).__name__
            theirs = getattr(self.module, name, type(part))
            if type(part) in (model.RMSNorm, model.Cache):
                part.__class__ = theirs
            elif type(part) is model.DecoderLayer:
                def forward(*args, theirs=theirs):
                    return self.watched("DecoderLayer.forward", theirs.forward, args)
                part.__class__ = type(name, (theirs,), {"forward": forward})
        return arg


# ---- in a process of its own ----


def send(stream, message) -> None:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    stream.write(len(buffer.getvalue()).to_bytes(8, "big") + buffer.getvalue())
    stream.flush()


def receive(stream, trusted: bool):
    """The next message. Raises: EOFError if there is none. One that is not trusted can hold tensors,
    numbers, texts and the model's Sinks, but no code that runs when it is read."""
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError
    with torch.serialization.safe_globals([model.Sinks, model.OutRo]):
        return torch.load(io.BytesIO(stream.read(int.from_bytes(size, "big"))), weights_only=not trusted)


def told(error: BaseException, path: Path) -> dict:
    """An error in words: a sentence of the code above, or the traceback from the module's first line on."""
    lines = traceback.extract_tb(error.__traceback__)
    if lines[-1].filename == __file__ or str(error) in [e.not_written for e in EXERCISES]:
        return {"error": str(error)}
    inside = [path in (Path(line.filename), *Path(line.filename).parents) for line in lines]
    shown = lines[inside.index(True):] if True in inside else []
    return {"error": "".join([*traceback.format_list(shown), *traceback.format_exception_only(error)])}


def serve(path: Path, lines) -> None:
    """Import a module, say so, and answer calls until there is none. What it prints goes to stderr. A model
    comes with a number, and alone with that the next time."""
    models, requests, answers = {}, sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdin = open(os.devnull)
    torch.set_num_threads(1)
    faulthandler.enable(lines)
    faulthandler.dump_traceback_later(FOR_IMPORT, exit=True, file=lines)
    try:
        solution, message = Solution(import_solution(path)), {}
    except ValueError as error:
        message = {"error": str(error)}
    while True:
        faulthandler.cancel_dump_traceback_later()
        send(answers, message)
        seconds, dotted, (first, *others), n = receive(requests, trusted=True)
        if n is not None:
            first = models.setdefault(n, first)
        faulthandler.dump_traceback_later(seconds, exit=True, file=lines)
        try:
            with torch.no_grad():
                result, changed = solution(dotted, first, *others)
            message = {"result": result, "changed": changed}
        except BaseException as error:
            message = told(error, path)


if __name__ == "__main__":
    _, path, lines, number = sys.argv
    with open(lines, "w") as lines, model_of(Variant(int(number))), contextlib.suppress(EOFError):
        serve(Path(path), lines)
