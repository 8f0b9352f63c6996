"""The tutorial: every python block runs, in order, and prints and draws what is shown below it.

    python tests/test_tutorial.py --write        writes all outputs, pictures and links again
"""

import ast
import contextlib
import io
import os
import re
import sys
from pathlib import Path

import torch
from PIL import Image, ImageChops

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from minioutro.support.cli import written_whole  # noqa: E402

TUTORIAL = ROOT / "tutorial.md"
# the code, then its output if there is one, then its picture if there is one
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n"
                   r"(?:\n?```\n(?P<output>.*?)^```\n)?"
                   r"(?:\n?!\[(?P<alt>[^\]]*)\]\((?P<picture>[^)]+)\)\n)?", re.S | re.M)
LINK = re.compile(r"\[`(?P<name>\w+)`\]\((?P<file>[\w./]+)\)")
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*")


def lesson() -> str:
    return TUTORIAL.read_text(encoding="utf-8")


def run_blocks(text: str):
    """Run the blocks in one namespace: yields (match, what was printed, the picture that was made)."""
    namespace, before = {}, Path.cwd()
    os.chdir(ROOT)
    try:
        for block in BLOCK.finditer(text):
            namespace.pop("picture", None)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), torch.no_grad():
                line = text[:block.start("code")].count("\n")
                code = compile("\n" * line + block["code"], "tutorial.md", "exec")
                exec(code, namespace)
            yield block, printed.getvalue(), namespace.get("picture")
    finally:
        os.chdir(before)


def small(picture: Image.Image) -> Image.Image:
    """In 256 colours, as it is stored in the repository. Rare colours, such as the red of a sink, are kept."""
    return picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)


def home(name: str, file: str) -> str:
    """The file in which a function, class or test is defined: the given file, or another one in its folder."""
    folder = (ROOT / file).parent
    for path in (ROOT / file, *sorted(folder.glob("*.py"))):
        if path.exists() and any(node.name == name for node in ast.walk(ast.parse(path.read_text("utf-8")))
                                 if isinstance(node, (ast.FunctionDef, ast.ClassDef))):
            return path.relative_to(ROOT).as_posix()
    raise ValueError(f"tutorial.md links to {name}, which is not in {folder}")


def write() -> None:
    text, parts, end = lesson(), [], 0
    for block, printed, picture in run_blocks(text):
        parts += [text[end:block.start()], f"```python\n{block['code']}```\n"]
        parts += [f"\n```\n{printed}```\n"] if printed else []
        if block["picture"]:
            with written_whole(ROOT / block["picture"]) as half:
                small(picture).save(half, optimize=True)
            parts.append(f"\n![{block['alt']}]({block['picture']})\n")
        end = block.end()
    text = "".join([*parts, text[end:]])
    text = LINK.sub(lambda link: f"[`{link['name']}`]({home(link['name'], link['file'])})", text)
    with written_whole(TUTORIAL) as half:
        half.write_text(text, encoding="utf-8")


def agree(printed: str, shown: str) -> bool:
    """Whether texts and whole numbers are equal. A number with a decimal point or a comma may differ by two
    in its last digit, because processors round sums differently, and printing rounds once more."""
    if NUMBER.sub("#", printed) != NUMBER.sub("#", shown):
        return False
    for one, two in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        digits = len(two.rstrip(".").partition(".")[2])
        tolerance = 2.01 * 10**-digits if {".", ","} & set(two.rstrip(".,")) else 0
        if abs(float(one.replace(",", "")) - float(two.replace(",", ""))) > tolerance:
            return False
    return True


def test_every_block_shows_this():
    wrong = []
    for block, printed, picture in run_blocks(lesson()):
        shown = block["output"] or ""
        if not agree(printed, shown):
            wrong.append(f"{block['code']}printed\n{printed}and the tutorial shows\n{shown}")
        if block["picture"]:
            stored, new = Image.open(ROOT / block["picture"]).convert("RGB"), small(picture).convert("RGB")
            if stored.size != new.size or too_different(stored, new):
                wrong.append(f"{block['picture']} differs from the picture that is drawn")
    assert not wrong, "\n\n".join([*wrong, "python tests/test_tutorial.py --write shows the new ones"])


def too_different(stored: Image.Image, new: Image.Image) -> bool:
    """Whether more than 100 pixels differ by more than 40 of 255. A few changed letters do, rounding does not."""
    difference = ImageChops.difference(stored, new).convert("L").point(lambda grey: 255 * (grey > 40))
    return sum(pixel > 0 for pixel in difference.tobytes()) > 100


def test_links_lead_to_their_functions():
    links = [(link["name"], link["file"]) for link in LINK.finditer(lesson())]
    assert len(links) > 40
    assert [(name, home(name, file)) for name, file in links] == links
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", lesson()):
        assert (ROOT / path).exists(), path


def test_blocks_are_short():
    blocks = list(BLOCK.finditer(lesson()))
    assert len(blocks) > 30 and len(blocks) == lesson().count("```python")
    for block in blocks:
        lines = block["code"].splitlines()
        assert len(lines) < 15 and max(map(len, lines)) <= 79, block["code"]
        assert block["output"] or block["picture"] or "import" in block["code"], block["code"]


def test_readers_are_asked_to_predict():
    asked = re.findall(r"^Predict: .+\?\n\n(?=```python$)", lesson(), re.M)
    assert len(asked) == lesson().count("Predict: ") >= 10


def test_comparison_finds_changes():
    for changed, shown, same in (("0.93", "0.94", True), ("+0.00", "-0.00", True), ("26,668", "26,666", True),
                                 ("0.91", "0.94", False), ("22 of 40", "23 of 40", False), ("sinks [0]", "sinks [1]", False),
                                 ("1.4", "14", False), ("8,839", "8,809", False), ("a 1.0", "b 1.0", False)):
        assert agree(changed, shown) == same, (changed, shown)
    picture = Image.open(ROOT / "minioutro" / "pictures" / "cosine.png").convert("RGB")
    changed = picture.copy()
    changed.paste((205, 60, 45), (100, 100, 120, 120))
    assert too_different(picture, changed) and not too_different(picture, picture)


def test_pictures_are_small_and_shown():
    folder = ROOT / "minioutro" / "pictures"
    shown = {Path(block["picture"]).name for block in BLOCK.finditer(lesson()) if block["picture"]}
    shown |= {"page.png", "seeing.png"}             # written by tests/with_browser/screenshot.py
    stored = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert shown == set(stored) and sum(stored.values()) < 500_000


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_tutorial.py --write")
    torch.set_num_threads(1)
    write()
