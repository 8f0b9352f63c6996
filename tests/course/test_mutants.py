"""Typical wrong solutions fail, and right ones that are written in another way pass."""

import inspect
from types import SimpleNamespace

import mutants
import pytest
import test_exercises
import torch
from grade import WITH_TESTS
from helpers import ROOT

from minioutro import model
from minioutro.model import cosine


def those_of(number):
    """The tests that carry the mark of an exercise, in their order."""
    return [test for name, test in vars(test_exercises).items() if name.startswith("test_")
            and any(mark.name == f"exercise_{number}" for mark in test.pytestmark)]


def run(test, impl, request):
    """Call a test with an implementation. monkeypatch is undone at once, because many tests share one request."""
    fixtures = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in list(inspect.signature(test).parameters)[1:]:
            fixtures[name] = monkeypatch if name == "monkeypatch" else request.getfixturevalue(name)
        test(impl, **fixtures)


@pytest.fixture(scope="module")
def impl_with(course):
    """impl_with(rotate=f): copies of all functions of model.py, as a student may write them, and f in place of one."""
    source = (ROOT / "minioutro" / "model.py").read_text(encoding="utf-8")
    copies = {"__name__": "my_module", "looks_like_a_sink": mutants.looks_like_a_sink}
    exec(compile(source, "my_module.py", "exec"), copies)
    return lambda **others: course.Implementation(SimpleNamespace(**{**copies, **others}))


def test_every_test_belongs_to_one_exercise():
    marks = [[mark.name for mark in getattr(test, "pytestmark", [])]
             for name, test in vars(test_exercises).items() if name.startswith("test_")]
    assert all(len(names) == 1 for names in marks)
    assert list(dict.fromkeys(name for name, in marks)) == [f"exercise_{e.number}" for e in WITH_TESTS]


@pytest.mark.parametrize("number, name, solution, what", mutants.WRONG,
                         ids=[f"{number}-{what}" for number, _, _, what in mutants.WRONG])
def test_wrong_solution_fails_with_a_sentence(request, impl_with, number, name, solution, what):
    impl = impl_with(**{name: solution})
    for test in those_of(number):
        try:
            run(test, impl, request)
        except AssertionError as failure:
            assert len(str(failure).split()) > 4, f"{test.__name__} fails without a sentence for the student"
            assert len(str(failure)) < 1500 and str(failure).count("\n") < 30, "more than one can read"
            assert "the project's own" not in str(failure)
            return
    pytest.fail(f"every test of exercise {number} passes")


# ---- right solutions ----


def without_where(out, v_sink, ever_sink, gamma, temperature):
    """The text of exercise 8, where sinks have a gate of zero, and are scaled as well."""
    o, v = out.float(), v_sink.float().repeat_interleave(out.shape[1] // v_sink.shape[1], 1)[:, :, None]
    g = torch.tanh(cosine(out, v_sink).relu() / temperature) * ~ever_sink[:, None]
    dot, length = (o * v).sum(-1, keepdim=True), (v * v).sum(-1, keepdim=True)
    turned = o + g[..., None] * gamma * dot / (length + 1e-8) * v
    return (turned * o.norm(dim=-1, keepdim=True) / (turned.norm(dim=-1, keepdim=True) + 1e-8)).to(out.dtype)


@pytest.mark.parametrize("number, others", [(5, {"Cache": mutants.Cache}), (8, {"align_with_sink": without_where})])
def test_right_solution_passes(request, impl_with, number, others):
    for test in those_of(number):
        run(test, impl_with(**others), request)


def test_what_is_missing_or_only_imported_is_not_written(course):
    impl = course.Implementation(SimpleNamespace(find_sinks=model.find_sinks, Cache=model.Cache))
    for name, number in (("RMSNorm", 2), ("repeat_heads", 4), ("Sinks", 10)):
        with pytest.raises(NotImplementedError, match=f"^not written yet: exercise {number}$"):
            getattr(impl, name)
    for name, told in (("find_sinks", "find_sinks is"), ("Cache", "Cache.extend is")):
        with pytest.raises(AssertionError, match=f"^{told} the project's own: exercise . is for writing it$"):
            getattr(impl, name)


def test_arguments_and_results_are_checked(course):
    student = SimpleNamespace(attention=lambda *args: args[0], pixel_shuffle=lambda x, scale: x.zero_())
    impl = course.Implementation(student)
    with pytest.raises(AssertionError, match="^attention returns Tensor; it should return Tensor, Tensor$"):
        impl.attention(torch.ones(2))
    with pytest.raises(AssertionError, match="^pixel_shuffle changes its argument 1; work on a copy$"):
        impl.pixel_shuffle(torch.ones(2), 1)
