"""The exercises of the tutorial: what is to be written, and for how many points."""

from dataclasses import dataclass


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


class Implementation:
    """What tests call: the model's functions, or those of a student's module of the same names.

    One that the module lacks, or only imports from the model, is not written yet.
    """

    def __init__(self, module, model):
        self.module, self.model = module, model

    def __getattr__(self, name: str):
        value, ours = getattr(self.module, name, None), getattr(self.model, name)
        if value is None or (value is ours and self.module is not self.model):
            exercise, = (e for e in EXERCISES if name in [n.split(".")[0] for n in e.names])
            raise NotImplementedError(exercise.not_written)
        return value


def points_table(results: dict[int, list[bool]]) -> str:
    """The points for these results: of each exercise that ran, which of its tests passed.

    An exercise counts if all of its tests pass; words are for a person to read.
    """
    lines, reached, possible = [], 0, 0
    for e in EXERCISES:
        if e.number not in results:
            continue
        passed = results[e.number]
        points = e.points if all(passed) else 0
        reached, possible = reached + points, possible + e.points
        lines.append(f"{e.number:>4}  {e.title:<32}{points:>3} of {e.points:>3}   "
                     f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    lines.append(f"      {'all of these':<32}{reached:>3} of {possible:>3}")
    words = ", ".join(f"{e.number} ({e.points})" for e in EXERCISES if not e.names)
    lines.append(f"      in words, to be read by a person: exercises {words}")
    return "\n".join(lines)
