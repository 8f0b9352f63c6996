"""Print the answers in words of all modules, exercise by exercise, for the person who grades them.

    python tests/course/words.py submissions/*.py > words.txt
"""

import re
import sys
from pathlib import Path

from grade import EXERCISES, HERE, shown

STARTER = (HERE / "starter.py").read_text(encoding="utf-8")


def answer(module: str, number: int) -> str:
    """What stands below the heading of an exercise in the text of a module, up to the next one or the end."""
    found = re.search(rf"^Exercise {number}: .*\n((?:(?!Exercise \d+: |''').*\n?)*)", module, re.M)
    return found[1].strip() if found else "(the heading of this exercise is missing; look into the module)"


def told(module: str, number: int) -> str:
    """The answer, or that there is none: the lines of the starter alone say nothing."""
    written = answer(module, number)
    is_blank = not written or written.split() == answer(STARTER, number).split()
    return "(nothing written)" if is_blank else shown(written)


def main(paths: list[Path]) -> int:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        print(f"{missing[0] if missing else 'no module'} cannot be read; give the files of the students, such as "
              "submissions/*.py", file=sys.stderr)
        return 2
    modules = {path: path.read_text(encoding="utf-8", errors="replace") for path in paths}
    for e in EXERCISES:
        if e.in_words:
            print(f"======== Exercise {e.number}: {e.title} ({e.in_words} points)\n")
            for path, module in modules.items():
                print(f"---- {path}\n\n{told(module, e.number)}\n")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    sys.exit(main([Path(name) for name in sys.argv[1:]]))
