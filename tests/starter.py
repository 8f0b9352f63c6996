"""Write the module in which a student does the exercises: python tests/starter.py my_module.py

It is cut out of minioutro/model.py: signatures and docstrings are copied, the bodies of what is to
be written are left out, and what is given is imported from there.
"""

import ast
import os
import re
import sys
import textwrap
from pathlib import Path

from exercises import EXERCISES, make_importable

MODEL = Path(__file__).parent.parent / "minioutro" / "model.py"
SLIP = "cache.sinks.ever_sink[:, :S]"       # as in the published code: see exercise 11

HEAD = '''"""The exercises of minioutro's tutorial: replace each `raise` by your own lines.

    python -m pytest --impl {name} -m exercise_4      checks one exercise
    python -m pytest --impl {name}                    checks all of them

You may import a function from minioutro.model that you did not write, so that later ones can use
it: only its own exercise is then without points.

{legend}
"""
'''


def node_named(tree: ast.Module, dotted: str) -> ast.AST:
    """The definition of a function, a class, or `Class.method`."""
    node = tree
    for name in dotted.split("."):
        node, = (child for child in node.body if getattr(child, "name", None) == name)
    return node


def without_body(lines: list[str], outer: ast.AST, inner: ast.AST, sentence: str) -> str:
    """The source of `outer`, in which the body of `inner` behind its docstring is a `raise`."""
    if ast.get_docstring(inner) is None:
        end_of_head = inner.body[0].lineno - 1
    else:
        end_of_head = inner.body[0].end_lineno
    indent = " " * inner.body[0].col_offset
    kept = lines[outer.lineno - 1:end_of_head]
    return "\n".join([*kept, f'{indent}raise NotImplementedError("{sentence}")',
                      *lines[inner.end_lineno:outer.end_lineno]])


def decoder_layer(source: str, who_was_a_sink: str) -> str:
    """The source of DecoderLayer with another answer to: which of these tokens were ever a sink?"""
    node = node_named(ast.parse(source), "DecoderLayer")
    text = "\n".join(source.splitlines()[node.lineno - 1:node.end_lineno])
    text, n_lines = re.subn(r"(?m)^( +ever_sink =) .+$", rf"\1 {who_was_a_sink}", text)
    text, n_comments = re.subn(r"(?m)^( +# Step 6\.).*\n(?: +#.*\n)*",
                               r"\1 Sinks are left alone.\n", text)
    assert (n_lines, n_comments) == (1, 1), (
        "tests/starter.py looks in model.py's DecoderLayer for one line `ever_sink = ...` below a "
        f"comment `# Step 6.`, and found {n_lines} and {n_comments}: change both together")
    return text


def starter(source: str, name: str = "my_module") -> str:
    """The text of the starter module, from that of model.py."""
    tree, lines = ast.parse(source), source.splitlines()
    parts, written, given = [], set(), set()
    for e in EXERCISES:
        given.update(e.given)
        if e.names:
            parts.append(f"\n\n# ---- Exercise {e.number}: {e.title} ({e.points} points) ----")
        for dotted in e.names:
            outer = node_named(tree, dotted.split(".")[0])
            written.add(outer.name)
            if outer.name == "DecoderLayer":
                text = decoder_layer(source, SLIP)
            else:
                text = without_body(lines, outer, node_named(tree, dotted), e.not_written)
            parts.append(f"\n\n{text}")
    body = "\n".join(parts)

    defined = {node.name for node in tree.body if hasattr(node, "name")}
    given |= {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)} & defined
    imports = [ast.get_source_segment(source, node) for node in tree.body
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    imports = [line for line in imports if "minioutro" not in line and "dataclass" not in line]
    names = textwrap.fill(", ".join(sorted(given - written)), 92, initial_indent="    ",
                          subsequent_indent="    ")
    legend = re.search(r"^Shapes, .*?\n\n", source, re.M | re.S).group().rstrip()
    return (HEAD.format(name=name, legend=legend) + "\n" + "\n".join(imports)
            + f"\n\nfrom minioutro.model import (\n{names},\n)\n" + body + "\n")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python tests/starter.py my_module.py", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    half = path.with_name(f".{path.stem}.half.py")              # then moved: whole, or not there
    try:
        if path.suffix != ".py":
            raise ValueError(f"{path} is no Python module; call it my_module.py, or such")
        if os.path.lexists(path):                               # never over a student's work
            raise ValueError(f"{path} is there already; give another name")
        half.write_text(starter(MODEL.read_text(encoding="utf-8"), make_importable(path)), encoding="utf-8")
        half.rename(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}); give another name", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        half.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
