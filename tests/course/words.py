"""Print the answers in words of all modules, exercise by exercise, for the person who grades them.

    python tests/course/words.py submissions/*.py > words.txt
"""

import re
import sys
from pathlib import Path

from grade import EXERCISES, shown


def answer(module: str, number: int) -> str:
    """What stands below the heading of an exercise in the text of a module, up to the next one or the end."""
    found = re.search(rf"^Exercise {number}: .*\n((?:(?!Exercise \d+: |''').*\n?)*)", module, re.M)
    return found[1].strip() if found else "(the heading of this exercise is missing; look into the module)"


def main(paths: list[Path]) -> None:
    modules = {path: path.read_text(encoding="utf-8", errors="replace") for path in paths}
    for e in EXERCISES:
        if e.in_words:
            print(f"======== Exercise {e.number}: {e.title} ({e.in_words} points)\n")
            for path, module in modules.items():
                print(f"---- {path}\n\n{shown(answer(module, e.number))}\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    main([Path(name) for name in sys.argv[1:]])
