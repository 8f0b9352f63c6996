"""Print the tutorial without what its blocks print and draw, so that a class can predict before it sees.

    python tests/course/lecture.py > lecture.md

A block that draws ends in the line `picture`, because a notebook shows what the last line of a cell is.
"""

import re
import sys
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parent.parent.parent / "tutorial.md"
# the code, what it prints, and what it draws
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n?```\n.*?^```\n)?(?:\n?!\[[^\]]*\]\([^)]+\)\n)?", re.S | re.M)


def cell(block: re.Match) -> str:
    """A block of the tutorial as a class gets it."""
    code = block["code"]
    if re.search(r"^picture = ", code, re.M):
        code += "picture         # in a terminal: picture.show()\n"
    return f"```python\n{code}```\n"


def lecture(tutorial: str) -> str:
    return BLOCK.sub(cell, tutorial)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    print(lecture(TUTORIAL.read_text(encoding="utf-8")), end="")
