"""The exercises of the tutorial: what is to be written, for how many points, and in which module."""

import importlib.util
import keyword
import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Exercise:
    number: int
    title: str
    points: int
    names: tuple[str, ...] = ()         # what is to be written, as named in model.py; () for words
    given: tuple[str, ...] = ()         # of model.py, what the starter module imports for it

    @property
    def mark(self) -> str:
        return f"exercise_{self.number}"

    @property
    def not_written(self) -> str:
        return f"not written yet: exercise {self.number}"


EXERCISES = (
    Exercise(1, "Pixel shuffle", 5, ("pixel_shuffle",)),
    Exercise(2, "RMSNorm", 5, ("RMSNorm.forward",)),
    Exercise(3, "Rotary positions", 5, ("rotate",)),
    Exercise(4, "Causal mask with a cache", 5, ("causal_mask",)),
    Exercise(5, "Grouped-query attention", 10, ("repeat_heads", "attention")),
    Exercise(6, "Find the sinks", 10, ("activation_ratio", "find_sinks")),
    Exercise(7, "Open the sink rows", 5, ("open_sink_rows",)),
    Exercise(8, "A row opened in the last layer", 10),
    Exercise(9, "Sink value", 5, ("sink_value",)),
    Exercise(10, "Alignment", 15, ("align_with_sink",), given=("cosine",)),
    Exercise(11, "The decode step", 15, ("DecoderLayer",)),
    Exercise(12, "Seven answers more", 10),
)


def find_module(given: str) -> Path:
    """The file of a module, or the folder of a package, by its name or by its path.

    A name (my_module, students.anna) is looked for in the current folder, then in PYTHONPATH.
    Raises: ValueError, in one sentence, if there is nothing to import.
    """
    if given.endswith(".py") or Path(given).name != given:
        path = Path(os.path.abspath(given))
        found = [path.parent if path.name == "__init__.py" else path] if path.exists() else []
    else:
        folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
        stems = [Path(os.path.abspath(folder), *given.split(".")) for folder in (".", *folders)]
        found = [path for stem in stems for path in (stem, Path(f"{stem}.py")) if path.exists()]
    modules = [path for path in found
               if (path.suffix == ".py" and path.is_file()) or (path / "__init__.py").is_file()]
    if not modules:
        what = "is neither a file .py nor a folder with an __init__.py" if found else "is not here"
        raise ValueError(f"{given or 'nothing'} {what}; python tests/starter.py my_module.py writes a "
                         f"module to start from, for --impl my_module")
    ours = {ROOT / name for name in ("minioutro", "conftest.py", "run.py")}
    if ours & {modules[0].resolve(), *modules[0].resolve().parents}:
        raise ValueError(f"{given} is the project's own; give a module with your functions")
    return modules[0]


def make_importable(path: Path) -> str:
    """Put the folder of a module or package behind all else that can be imported; return its name.

    The module need not be there yet. Raises: ValueError, in one sentence, if `import` of that name
    does not give this module, but another one or nothing.
    """
    path, name = Path(os.path.abspath(path)), path.name.removesuffix(".py")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{path.name} cannot be imported by its name; call it my_module.py, or such")
    others = [entry for entry in sys.path if Path(entry).resolve() != Path.cwd()]
    sys.path[:] = [*others, str(path.parent), str(Path.cwd())]
    spec = importlib.util.find_spec(name)
    file = path if path.suffix == ".py" else path / "__init__.py"
    if spec is not None and spec.origin is not None:
        if not (file.exists() and os.path.exists(spec.origin) and file.samefile(spec.origin)):
            raise ValueError(f"{name} is the name of another module ({spec.origin}); call yours "
                             f"my_module.py, or such")
    return name


def points_table(results: dict[int, list[bool | None]]) -> str:
    """The points for these results: of each exercise, how each of its tests ended.

    True: passed. False: failed, or did not end. None: was not chosen, as by -k.
    An exercise counts if all of its tests pass; words are for a person to read.
    """
    lines, reached, possible = [], 0, 0
    for e in EXERCISES:
        if e.number not in results:
            continue
        outcomes = results[e.number]
        points = e.points if all(outcomes) else 0
        reached, possible = reached + points, possible + e.points
        not_run = f", {outcomes.count(None)} not run" if None in outcomes else ""
        lines.append(f"{e.number:>4}  {e.title:<32}{points:>3} of {e.points:>3}   "
                     f"{outcomes.count(True)} passed, {outcomes.count(False)} failed{not_run}")
    lines.append(f"      {'all of these':<32}{reached:>3} of {possible:>3}")
    words = ", ".join(f"{e.number} ({e.points})" for e in EXERCISES if not e.names)
    lines.append(f"      in words, to be read by a person: exercises {words}")
    return "\n".join(lines)
