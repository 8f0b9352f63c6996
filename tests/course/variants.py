"""What changes from one year to the next, so that last year's solution does not serve this year.

A variant is a number. It gives each of these constants another value, in the starter, in the text of the
exercises and in what the tests expect alike. Variant 0 is the model and the tutorial as they are.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    name: str
    exercise: int
    values: tuple                       # of variants 0, 1, 2, ...; no two are the same
    places: dict[str, str]              # what stands in model.py, the starter or the text, and the same with {}


CONSTANTS = (
    Constant("sink_from", 7, (0.6, 0.13, 0.22, 0.31, 0.44, 0.53, 0.62, 0.71, 0.8, 0.89), {
        "more than 0.6": "more than {}"}),
    Constant("none_below", 7, (0.1, 0.06, 0.15, 0.24, 0.37, 0.46, 0.55, 0.64, 0.73, 0.82), {
        "as much as 0.1": "as much as {}"}),
    Constant("cosine_from", 8, (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18), {
        "tanh(relu(c) / temperature)": "tanh(relu(c - {}) / temperature)",
        "tanh(c.relu() / temperature)": "tanh((c - {}).relu() / temperature)",
        "With gamma 3, an angle of 80 degrees to v becomes 56, one of 45 becomes 14; from 90 on it stays.":
            "Where the cosine c is {} or less, o stays."}),
    Constant("aligned_from", 10, (0, 4, 5, 6, 7, 8, 9, 10, 11, 12), {
        "if touched and outro.align:": "if touched and l >= {} and outro.align:",
        "Where the layer is `touched` and `outro.align` is on,":
            "Where the layer is `touched`, l is {} or more and `outro.align` is on,"}),
    Constant("gain", 11, (7, 6, 8, 9, 10, 11, 12, 13, 14, 15), {
        "OutRo, 7 more": "OutRo, {} more", "a gain of 7": "a gain of {}"}),
)
LAST = min(len(constant.values) for constant in CONSTANTS) - 1


class Variant:
    """The value of each constant, by its name."""

    def __init__(self, number: int = 0):
        self.number = number
        vars(self).update((constant.name, constant.values[number]) for constant in CONSTANTS)

    def __call__(self, text: str) -> str:
        """The text of variant 0 with this one's constants."""
        for constant in CONSTANTS if self.number else ():
            for old, new in constant.places.items():
                text = text.replace(old, new.format(getattr(self, constant.name)))
        return text
