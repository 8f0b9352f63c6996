"""The starter module of the exercises; wrong solutions, which must fail, and right ones."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from operator import attrgetter
from types import SimpleNamespace

import grader
import helpers as conftest
import mutants
import pytest
import starter
import test_exercises
import torch
from exercises import EXERCISES, MODEL
from grader import Implementation
from solution import Solution
from variants import Variant

from minioutro import model
from minioutro.model import cosine

CODED = [e for e in EXERCISES if e.names]
SOURCE = MODEL.read_text(encoding="utf-8")


def checks_of(exercise):
    return [getattr(test_exercises, name) for name in grader.checks_of(test_exercises, exercise)]


def run(test, impl, request, **fixtures):
    """Call a test of test_exercises.py with an implementation, and with these in place of its own fixtures."""
    names = list(inspect.signature(test).parameters)[1:]
    test(impl, **{name: fixtures[name] if name in fixtures else request.getfixturevalue(name) for name in names})


def impl_of(module):
    """What --impl makes of a module, in this process."""
    return Implementation(Solution(module))


def module_from(text, **others):
    """A student's module of this text, with other functions in place of some of its own."""
    namespace = {}
    exec(compile(text, "my_module.py", "exec"), namespace)
    return SimpleNamespace(**{**namespace, **others})


def test_there_are_a_hundred_points_in_the_order_of_the_data_flow():
    assert [e.number for e in EXERCISES] == list(range(1, len(EXERCISES) + 1))
    assert sum(e.points for e in EXERCISES) == 100
    assert all(e.in_words == e.points for e in EXERCISES if not e.names)
    assert all(need < e.number for e in EXERCISES for need in e.needs)
    assert all(checks_of(e) for e in CODED)
    marks = [[mark.name for mark in getattr(test, "pytestmark", [])]
             for name, test in vars(test_exercises).items() if name.startswith("test_")]
    assert all(len(names) == 1 for names in marks), "one mark each, and none is parametrised"
    assert list(dict.fromkeys(name for name, in marks)) == [e.mark for e in CODED]


# ---- the starter module ----


def test_the_starter_has_the_signatures_and_docstrings_of_the_model():
    module = module_from(starter.starter(SOURCE))
    for e in CODED:
        for name in e.names if not e.stub else ():
            ours, theirs = attrgetter(name)(model), attrgetter(name)(module)
            assert ours is not theirs and ours.__doc__ == theirs.__doc__
            assert str(inspect.signature(ours)).replace("minioutro.model.", "") == str(inspect.signature(theirs))


@pytest.mark.parametrize("exercise", CODED, ids=lambda e: e.title)
def test_an_untouched_starter_fails_every_test_with_the_sentence(request, exercise):
    """The layer needs those before it: it stops at the first function that it calls."""
    module = module_from(starter.starter(SOURCE))
    sentence = "exercise 2" if exercise.number == 10 else f"exercise {exercise.number}"
    for test in checks_of(exercise):
        with pytest.raises(NotImplementedError, match=rf"^not written yet: {sentence}$"):
            run(test, impl_of(module), request)


def test_what_is_missing_or_only_imported_is_not_written():
    module = SimpleNamespace(find_sinks=model.find_sinks, rotate=lambda x: x, Cache=model.Cache)
    impl, x = impl_of(module), torch.ones(1)
    for call, number in ((lambda: impl.find_sinks(x, 0.0, 1.0), 6), (lambda: impl.RMSNorm(1, 0.0)(x), 2),
                         (lambda: impl.repeat_heads(x, 1), 4), (lambda: impl.Cache().keys(0), 5)):
        with pytest.raises(NotImplementedError, match=f"^not written yet: exercise {number}$"):
            call()
    assert impl.rotate(x).equal(x)


def filled(variant: Variant = Variant()) -> str:
    """The starter, in which every `raise` is replaced by the model's own lines, or by those of mutants.py."""
    source, text = variant(SOURCE), starter.starter(SOURCE, variant=variant)
    tree, lines = ast.parse(source), source.splitlines()
    for e in CODED:
        for name in e.names:
            if e.stub:
                body = inspect.getsource(mutants.looks_like_a_sink).partition('"""\n')[2].rstrip()
                body = body.replace("given_to_each(weights)",
                                    "(weights.sum(-2) / torch.arange(weights.shape[-1], 0, -1))")
                body = body.replace("1 / 3", f"{(variant.none_below + variant.sink_from) / 2}")
            elif name == "DecoderLayer.forward":
                body = re.search(r"(?ms)^ +# Step 1\..*?(?=^        if trace is not None:\n +largest)", source)[0]
                body = body.replace("fused_attention(q, k, v, may_attend, is_causal)",
                                    "attention(q, k, v, may_attend)[0]")
            else:
                node = starter.node_named(tree, name)
                start = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
                body = "\n".join(lines[start:node.end_lineno])
            text, n = re.subn(rf'^ +raise NotImplementedError\("{e.not_written}"\)', lambda _: body, text,
                              count=1, flags=re.M)
            assert n == 1
    return text


RIGHT = filled()


def test_the_starter_with_the_models_own_lines_passes_every_test(request):
    assert "raise" not in RIGHT.split('"""', 2)[2]
    for e in CODED:
        for test in checks_of(e):
            run(test, impl_of(module_from(RIGHT)), request)


def test_a_layer_of_ones_own_watches_the_clip_as_the_text_says(monkeypatch, capsys):
    text = (conftest.ROOT / "tutorial.md").read_text(encoding="utf-8").split("Your layer fits into the toy.")[1]
    code = re.search(r"(?m)^\n((?:(?: {4}.*)?\n)+)", text)[1]
    monkeypatch.setitem(sys.modules, "my_module", module_from(RIGHT))
    monkeypatch.chdir(conftest.ROOT)
    exec(textwrap.dedent(code), {})
    baseline, treated = capsys.readouterr().out.splitlines()
    assert baseline != treated and baseline.startswith("A ") and treated.startswith("A ")


def test_the_slip_of_the_published_code_fails_after_the_prompt_alone(request):
    """As the text of exercise 10 says: for which of its tests, and for which prompts."""
    text = RIGHT.replace(mutants.WHO, mutants.SLIP)
    *at_prompt, turned, generated = checks_of(EXERCISES[9])
    impl = impl_of(module_from(text))
    for test in at_prompt:
        run(test, impl, request)
    for test in (turned, generated):
        with pytest.raises(AssertionError, match="^dev_late, layer .* not all were turned|^dev_late: .*prompt only"):
            run(test, impl, request)


def test_each_answer_in_words_has_its_place_at_the_end_of_the_starter():
    words = starter.starter(SOURCE, variant=Variant(2)).split("# ---- In words")[1]
    assert ast.parse(f"#{words}").body
    parts = re.findall(r"(?m)^Exercise (\d+): .* \((\d+) points\)\n((?:.+\n)+)", words)
    assert [(int(number), int(points)) for number, points, _ in parts] == [
        (e.number, e.in_words) for e in EXERCISES if e.in_words]
    assert all(len(lines.splitlines()) >= 2 for *_, lines in parts)
    assert all(len(e.asked) >= 2 for e in EXERCISES if e.in_words) and not any(
        e.asked for e in EXERCISES if not e.in_words)


def test_the_docstrings_of_the_starter_need_nothing_that_is_not_in_it():
    """A docstring goes to the student, the lines of the body below it do not."""
    for e in CODED:
        for name in e.names if not e.stub else ():
            text = attrgetter(name)(model).__doc__ or ""
            assert not re.search(r"\b(below|above)\b", text), f"{name}: {text}"


def write_starter(*arguments, cwd):
    command = [sys.executable, conftest.ROOT / "tests" / "course" / "starter.py", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_starter_is_never_written_over_a_module(tmp_path):
    assert write_starter("my_module.py", cwd=tmp_path).returncode == 0
    written = (tmp_path / "my_module.py").read_text(encoding="utf-8")
    assert written == starter.starter(SOURCE)
    (tmp_path / "my_module.py").write_text("my work")
    for name in ("my_module.py", "my-module.py", "my_module", "no/folder.py", "class.py", "json.py",
                 "torch.py", "numpy.py", "exercises.py", "conftest.py"):
        done = write_starter(name, cwd=tmp_path)
        assert done.returncode == 2 and name.removesuffix(".py") in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["my_module.py"]
    assert (tmp_path / "my_module.py").read_text() == "my work"


@pytest.mark.parametrize("trouble, code", [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 2)])
def test_half_a_starter_is_never_left(tmp_path, monkeypatch, trouble, code):
    def write_text(path, text, encoding):
        path.write_bytes(b"half of it")
        raise trouble
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starter.Path, "write_text", write_text)
    assert starter.main(["my_module.py"]) == code and not list(tmp_path.iterdir())


# ---- typical wrong solutions ----


def test_each_exercise_has_at_least_three_typical_wrong_solutions():
    for e in CODED:
        assert sum(number == e.number for number, *_ in mutants.WRONG) >= 3, e.title


@pytest.mark.parametrize("number, name, function, what", mutants.WRONG,
                         ids=[f"{number}-{what}" for number, _, _, what in mutants.WRONG])
def test_a_typical_wrong_solution_fails_a_test_of_its_exercise(request, number, name, function, what):
    impl = impl_of(module_from(SOURCE, **{name: function}))
    for test in checks_of(EXERCISES[number - 1]):
        try:
            run(test, impl, request)
        except AssertionError as failure:
            assert str(failure), f"{test.__name__} fails without a sentence for the student"
            assert str(failure).count("\n") < 30, "more than one can read"
            assert "the project's own" not in str(failure), "not for what it is named"
            return
    pytest.fail(f"every test of exercise {number} passes")


# ---- a right solution ----


def as_the_tutorial_says(out, v_sink, ever_sink, gamma, temperature):
    """The text of exercise 8, word for word."""
    o, v = out.float(), v_sink.float().repeat_interleave(out.shape[1] // v_sink.shape[1], 1)[:, :, None]
    c = cosine(out, v_sink)[..., None]
    g = torch.tanh(c.relu() / temperature)
    p = (o * v).sum(-1, keepdim=True) / ((v * v).sum(-1, keepdim=True) + 1e-8) * v
    turned = o + g * gamma * p
    turned = turned * o.norm(dim=-1, keepdim=True) / (turned.norm(dim=-1, keepdim=True) + 1e-8)
    return torch.where(ever_sink[:, None, :, None], out, turned.to(out.dtype))


def without_where(out, v_sink, ever_sink, gamma, temperature):
    """The same, but sinks have a gate of zero, and go through the scaling as well."""
    o, v = out.float(), v_sink.float().repeat_interleave(out.shape[1] // v_sink.shape[1], 1)[:, :, None]
    g = torch.tanh(cosine(out, v_sink).relu() / temperature) * ~ever_sink[:, None]
    dot, length = (o * v).sum(-1, keepdim=True), (v * v).sum(-1, keepdim=True)
    turned = o + g[..., None] * gamma * dot / (length + 1e-8) * v
    return (turned * o.norm(dim=-1, keepdim=True) / (turned.norm(dim=-1, keepdim=True) + 1e-8)).to(out.dtype)


@pytest.mark.parametrize("solution", [as_the_tutorial_says, without_where])
def test_a_solution_written_as_the_tutorial_says_has_all_points_of_exercise_8(request, solution):
    impl = impl_of(module_from(SOURCE, align_with_sink=solution))
    for test in checks_of(EXERCISES[7]):
        run(test, impl, request)


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_it_equals_the_model_in_float32_and_in_half_precision(dtype, tolerance):
    """Also where 1e-8 counts: |v|^2 is about that, or |o| is."""
    for scale_o, scale_v in ((1, 1), (1, 1e-4), (1e-4, 1), (100, 100)):
        out, v_sink = test_exercises.heads()
        out, v_sink = (out * scale_o).to(dtype), (v_sink * scale_v).to(dtype)
        ever_sink = torch.tensor([[True, False, False, True, False], [False] * 5])
        expected = model.align_with_sink(out, v_sink, ever_sink, 3.0, 0.1)
        found = as_the_tutorial_says(out, v_sink, ever_sink, 3.0, 0.1)
        assert found.dtype == expected.dtype == dtype
        difference = (found.float() - expected.float()).abs().max() / out.float().abs().max()
        assert difference < tolerance, (scale_o, scale_v, difference)
