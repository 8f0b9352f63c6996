"""Write the module in which a student does the exercises: python tests/course/starter.py my_module.py

It is cut out of minioutro/model.py: signatures and docstrings are copied, the bodies of what is to
be written are left out, and what is given is imported from there. With --variant 7 some constants are
others (variants.py), and my_module.md beside it has the text of the exercises with them.
"""

import argparse
import ast
import os
import re
import sys
import textwrap
from pathlib import Path

from exercises import EXERCISES, MODEL, ROOT, make_importable
from variants import LAST, Variant

HEAD = '''"""The exercises of {text}: replace each `raise` by your own lines.

    python -m pytest --impl {name} -m exercise_4      checks one exercise
    python -m pytest --impl {name}                    checks all of them

The tutorial's text and this module say all that you need. What you do not write you may import from
minioutro.model, for later exercises to use: then delete its stub here, which would hide the import.
An import costs you the points of its own exercise, and of no other. Answers in words go to the end
of this file.

The method, in the order in which a decoder layer takes its steps:

{steps}

{legend}
"""
'''

WORDS = """


# ---- In words: read by a person, as a table or code of yours below them, without ''' in it ----

r'''
{answers}
'''
"""


def node_named(tree: ast.Module, dotted: str) -> ast.AST:
    """The definition of a function, a class, or `Class.method`."""
    node = tree
    for name in dotted.split("."):
        node, = (child for child in node.body if getattr(child, "name", None) == name)
    return node


def first_line(node: ast.AST) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def without_bodies(lines: list[str], outer: ast.AST, inner: list[ast.AST], sentence: str) -> str:
    """The source of `outer`, in which the body of each `inner`, behind its docstring, is a `raise`."""
    kept, start = [], first_line(outer)
    for node in inner:
        end_of_head = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
        indent = " " * node.body[0].col_offset
        kept += [*lines[start - 1:end_of_head], f'{indent}raise NotImplementedError("{sentence}")']
        start = node.end_lineno + 1
    return "\n".join([*kept, *lines[start - 1:outer.end_lineno]])


STEPS = """\
        # From q, k, v of all tokens so far, steps 1 to 6. What stands below them needs
        #   is_sink, opened   bool[B,S]       found in this layer; of these, opened in this layer
        #   out, aligned      float[B,H,S,D]  the heads' outputs, before and after step 6
        # and cache.sinks keeps what later layers and calls need.
        is_prompt, none = cache.length == 0, hidden.new_zeros(B, S, dtype=torch.bool)
        touched = outro is not None and l < L - outro.skip_last         # else steps 1, 3, 5, 6 do nothing
        raise NotImplementedError("{sentence}")

"""


def without_steps(source: str, sentence: str) -> str:
    """The source of DecoderLayer without steps 1 to 6: given are what they need and what needs them."""
    node = node_named(ast.parse(source), "DecoderLayer")
    text = "\n".join(source.splitlines()[node.lineno - 1:node.end_lineno])
    text, n = re.subn(r"(?ms)^ +# Step 1\..*?(?=^        if trace is not None:\n +largest)",
                      lambda steps: STEPS.format(sentence=sentence), text)
    assert n == 1, ("tests/course/starter.py looks in model.py's DecoderLayer for a comment `# Step 1.` and, behind "
                    f"the steps, for what goes into the trace, and found {n}: change both together")
    return text


def starter(source: str, name: str = "my_module", variant: Variant = Variant()) -> str:
    """The text of the starter module, from that of model.py."""
    source = variant(source)
    tree, lines = ast.parse(source), source.splitlines()
    parts, written, given = [], set(), set()
    for e in EXERCISES:
        given.update(e.given)
        if e.names:
            parts.append(f"\n\n# ---- Exercise {e.number}: {e.title} ({e.points} points) ----")
        if e.stub:
            parts.append(f'\n\n{variant(e.stub)}    raise NotImplementedError("{e.not_written}")')
            continue
        for outer in dict.fromkeys(dotted.split(".")[0] for dotted in e.names):
            written.add(outer)
            inner = [node_named(tree, dotted) for dotted in e.names if dotted.split(".")[0] == outer]
            text = (without_steps(source, e.not_written) if outer == "DecoderLayer" else
                    without_bodies(lines, node_named(tree, outer), inner, e.not_written))
            parts.append(f"\n\n{text}")
    body = "\n".join(parts)
    answers = "\n\n".join("\n".join([f"Exercise {e.number}: {e.title} ({e.in_words} points)", *e.asked])
                          for e in EXERCISES if e.in_words)

    defined = {node.name for node in tree.body if hasattr(node, "name")}
    given |= {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)} & defined
    imports = [lines[node.lineno - 1] for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    imports = [line.replace(", replace", "") for line in imports if "minioutro" not in line]
    names = textwrap.fill(", ".join(sorted(given - written)), 92, initial_indent="    ",
                          subsequent_indent="    ")
    legend = re.search(r"^Shapes, .*?\n\n", source, re.M | re.S).group().rstrip()
    steps = re.search(r"^  1\. .*?^  6\. .*?$", source, re.M | re.S).group()
    name, text = f"{name}{option(variant)}", f"{name}.md" if variant.number else "minioutro's tutorial"
    return (HEAD.format(name=name, text=text, steps=steps, legend=legend) + "\n" + "\n".join(imports)
            + f"\n\nfrom minioutro.model import (\n{names},\n)\n" + body + variant(WORDS.format(answers=answers)))


def option(variant: Variant) -> str:
    return f" --variant {variant.number}" if variant.number else ""


def exercises(tutorial: str, name: str, variant: Variant) -> str:
    """The tutorial's text of the exercises, for a variant."""
    _, heading, text = tutorial.partition("## Exercises\n")
    for command in ("python tests/course/starter.py my_module.py", "python -m pytest --impl my_module"):
        text = text.replace(command, command.replace("my_module", name) + option(variant))
    return (f"{heading}\nThis is variant {variant.number}. Its constants are not those of `tutorial.md` and "
            f"`model.py`; so give `--variant {variant.number}` whenever you check.\n{variant(text)}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write the module in which a student does the exercises.")
    parser.add_argument("module", type=Path, help="the file to write, such as my_module.py")
    parser.add_argument("--variant", type=int, choices=range(LAST + 1), default=0, metavar="NUMBER",
                        help=f"with other constants, by number up to {LAST}, and with the text of the "
                             f"exercises for them in a file .md beside it")
    options = parser.parse_args(arguments)
    path, variant, halves = options.module, Variant(options.variant), {}
    try:
        if path.suffix != ".py":
            raise ValueError(f"{path} is no Python module; call it my_module.py, or such")
        name = make_importable(path)
        texts = {path: starter(MODEL.read_text(encoding="utf-8"), name, variant)}
        if variant.number:
            tutorial = (ROOT / "tutorial.md").read_text(encoding="utf-8")
            texts[path.with_suffix(".md")] = exercises(tutorial, name, variant)
        for file, text in texts.items():                        # then moved: whole, or not there
            if os.path.lexists(file):                           # never over a student's work
                raise ValueError(f"{file} is there already; give another name")
            halves[file] = file.with_name(f".{file.name}.half")
            halves[file].write_text(text, encoding="utf-8")
        for file, half in halves.items():
            half.rename(file)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}); give another name", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        for half in halves.values():
            half.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
