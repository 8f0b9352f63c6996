"""The exercises of the tutorial: what is to be written, for how many points, and in which module."""

import importlib.util
import keyword
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "minioutro" / "model.py"


@dataclass(frozen=True)
class Exercise:
    number: int
    title: str
    points: int
    minutes: int                        # as two fresh readers reckoned, to five
    difficulty: int                     # 1 to 3
    can: str                            # what one can do afterwards
    names: tuple[str, ...] = ()         # what is to be written, as named in model.py; () for words
    in_words: int = 0                   # of the points, those that a person gives
    sections: tuple[str, ...] = ()      # of the tutorial, by title, to be read before
    needs: tuple[int, ...] = ()         # exercises before it
    given: tuple[str, ...] = ()         # of model.py, what the starter module imports for it
    stub: str = ""                      # what is to be written, where model.py has nothing of that name
    rivals: tuple[str, ...] = ()        # of model.py and analysis.py, what must not be called instead
    asked: tuple[str, ...] = ()         # for the words, line by line

    @property
    def by_tests(self) -> int:
        return self.points - self.in_words

    @property
    def mark(self) -> str:
        return f"exercise_{self.number}"

    @property
    def not_written(self) -> str:
        return f"not written yet: exercise {self.number}"


LOOKS = '''def looks_like_a_sink(weights: Tensor, v: Tensor) -> Tensor:
    """Which tokens does one layer treat as a sink? Judged by its attention, not by `hidden`.

    weights: float[B,H,S,S], causal; v: float[B,G,S,D], the values, which you may ignore.
    Returns: bool[B,S]. Clear are these, on average over the queries that may see a token: one to
    which every head gives more than 0.6 of its attention is a sink, one to which no head gives
    as much as 0.1 is none. In between it is yours to say. Tokens that fewer than 16 queries may see
    are not tested.
    """
'''

EXERCISES = (
    Exercise(1, "Pixel shuffle", 5, 15, 1, "fold an image's patches into fewer tokens, without a loop",
             ("pixel_shuffle",), sections=("Patches and image tokens",)),
    Exercise(2, "Norm and positions", 5, 20, 1,
             "write the two small pieces of a Llama layer, and say why a massive activation survives them",
             ("RMSNorm.forward", "rotate"), sections=("The decoder",)),
    Exercise(3, "The masks", 5, 10, 1, "say in one matrix who may attend to whom, with a cache and with sinks",
             ("causal_mask", "open_sink_rows"), sections=("The mask", "OutRo, step by step")),
    Exercise(4, "Grouped-query attention", 10, 25, 2,
             "compute attention from its definition, with fewer key-value heads than query heads",
             ("repeat_heads", "attention"), sections=("The mask",)),
    Exercise(5, "The cache", 10, 35, 2, "decode token by token and get the logits of one pass",
             ("Cache.extend", "Cache.keys", "Cache.values"), sections=("The trap in the decode steps",)),
    Exercise(6, "Find the sinks", 5, 10, 1, "find massive activations, item by item",
             ("activation_ratio", "find_sinks"), sections=("The sink, in three definitions",)),
    Exercise(7, "Does it look like a sink to you?", 10, 60, 2,
             "tell what a definition says from what it is a definition of", ("looks_like_a_sink",), 5,
             ("The sink, in three definitions", "Why a sink exists, and what it holds"), (6,),
             stub=LOOKS, rivals=("find_sinks", "activation_ratio", "attention_mass", "sink_share"),
             asked=("Table, by trace and layer: tokens that the rule finds, tokens that mine finds:",
                    "Where the two differ, or from which threshold on they would:",
                    "The loss without these tokens, by themselves and together, with its errors:",
                    'The rule answers "...?", mine answers "...?", and the loss shows it by ...:')),
    Exercise(8, "Alignment", 10, 40, 2, "turn vectors in a plane, and know where rounding bites",
             ("sink_value", "align_with_sink"), 0, ("OutRo, step by step",), (4,), given=("cosine",)),
    Exercise(9, "A row opened in the last layer", 5, 20, 2, "predict from a layer's data flow what a change can reach",
             (), 5, ("OutRo, step by step",), (3,),
             asked=("Prediction, before the measurement:", "Measured:", "What in the layer explains it:")),
    Exercise(10, "The layer", 20, 80, 3, "assemble a method in a decoder, for prompts, batches and decode steps",
             ("DecoderLayer.forward",), 5, ("OutRo, step by step", "The trap in the decode steps"),
             (2, 3, 4, 5, 6, 8),
             asked=("With the published line, for each of the three tokens: in which layers (L = 16, "
                    "skip_last = 2) is it turned:",
                    "Why, and which should be:")),
    Exercise(11, "A few answers more", 5, 30, 2, "compare two runs on the same questions", (), 5,
             ("What it does to answers, and what it costs",), asked=("(a)", "(b)", "(c)")),
    Exercise(12, "Predict, then measure", 10, 100, 3, "design a measurement, and say what its numbers allow",
             (), 10, ("Why a sink exists, and what it holds", "The paper's questions"), (7, 11),
             asked=("Before. I expect that ..., because ...; the opposite would be ...:",
                    "What is measured, and against what:",
                    "The control, in which ... is absent and all else is the same:",
                    "On the first 40 clips, mean difference ± standard error of question and control:",
                    "Then, unchanged, on the other 40, and whether the two agree:",
                    "These numbers allow me to say that ...:",
                    "They do not allow me to say that ..., since ...:")),
)


IN_WORDS = "in words, to be read by a person: exercises " + ", ".join(
    f"{e.number} ({e.in_words})" for e in EXERCISES if e.in_words)


def table() -> str:
    """All exercises in Markdown, for the tutorial."""
    lines = ["| | exercise | points | minutes | difficulty | needs | afterwards you can |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    text = (ROOT / "tutorial.md").read_text(encoding="utf-8")
    number = {title: n for n, title in re.findall(r"^## (\d+)\. (.+)$", text, re.M)}
    for e in EXERCISES:
        needs = "section" + "s" * (len(e.sections) > 1) + " " + ", ".join(number[title] for title in e.sections)
        needs += f"; exercise{'s' * (len(e.needs) > 1)} {', '.join(map(str, e.needs))}" if e.needs else ""
        lines.append(f"| {e.number} | {e.title} | {e.points} | {e.minutes} | {e.difficulty} | {needs} | {e.can} |")
    points, minutes = sum(e.points for e in EXERCISES), sum(e.minutes for e in EXERCISES)
    return "\n".join([*lines, f"| | all of these | {points} | {minutes} | | | |"])


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
        raise ValueError(f"{given or 'nothing'} {what}; python tests/course/starter.py my_module.py writes a "
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
        points = e.by_tests if all(outcomes) else 0
        reached, possible = reached + points, possible + e.by_tests
        not_run = f", {outcomes.count(None)} not run" if None in outcomes else ""
        lines.append(f"{e.number:>4}  {e.title:<33}{points:>3} of {e.by_tests:>3}   "
                     f"{outcomes.count(True)} passed, {outcomes.count(False)} failed{not_run}")
    lines.append(f"      {'all of these':<33}{reached:>3} of {possible:>3}")
    return "\n".join([*lines, f"      {IN_WORDS}"])
