"""The starter module of the exercises, its points, and typical wrong solutions, which must fail."""

import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import conftest
import mutants
import pytest
import starter
import test_exercises
from exercises import EXERCISES, Implementation, points_table

from minioutro import model

CODED = [e for e in EXERCISES if e.names]
SOURCE = starter.MODEL.read_text(encoding="utf-8")


def checks_of(exercise):
    return [test for test in vars(test_exercises).values()
            if any(mark.name == exercise.mark for mark in getattr(test, "pytestmark", []))]


@pytest.fixture
def run(golden, decoded):
    """Call a test of test_exercises.py with an implementation."""
    fixtures = {"golden": golden, "decoded": decoded}

    def run(test, impl):
        names = list(inspect.signature(test).parameters)[1:]
        test(impl, **{name: fixtures[name] for name in names})
    return run


def module_from(text):
    namespace = {}
    exec(compile(text, "my_module.py", "exec"), namespace)
    return SimpleNamespace(**namespace), namespace


def test_there_are_a_hundred_points_in_the_order_of_the_data_flow():
    assert [e.number for e in EXERCISES] == list(range(1, len(EXERCISES) + 1))
    assert sum(e.points for e in EXERCISES) == 100
    assert all(checks_of(e) for e in CODED)
    in_file = [test.pytestmark[0].name for test in vars(test_exercises).values()
               if hasattr(test, "pytestmark")]
    assert list(dict.fromkeys(in_file)) == [e.mark for e in CODED]


# ---- the starter module ----


def test_the_starter_has_the_signatures_and_docstrings_of_the_model():
    module, _ = module_from(starter.starter(SOURCE))
    for e in CODED:
        for name in e.names:
            ours, theirs = model, module
            for part in name.split("."):
                ours, theirs = getattr(ours, part), getattr(theirs, part)
            assert ours is not theirs and ours.__doc__ == theirs.__doc__
            assert str(inspect.signature(ours)) == str(inspect.signature(theirs))


@pytest.mark.parametrize("exercise", CODED, ids=lambda e: e.title)
def test_an_untouched_starter_fails_every_test_with_the_sentence(run, exercise):
    """Exercise 11 needs those before it: it stops at the first function that its layer calls."""
    module, _ = module_from(starter.starter(SOURCE))
    sentence = "exercise 2" if exercise.number == 11 else f"exercise {exercise.number}"
    for test in checks_of(exercise):
        with pytest.raises(NotImplementedError, match=rf"^not written yet: {sentence}$"):
            run(test, Implementation(module, model))


def test_what_is_missing_or_only_imported_is_not_written():
    module = SimpleNamespace(find_sinks=model.find_sinks, rotate=lambda: "mine")
    impl = Implementation(module, model)
    for name, number in (("find_sinks", 6), ("RMSNorm", 2), ("repeat_heads", 5)):
        with pytest.raises(NotImplementedError, match=f"^not written yet: exercise {number}$"):
            getattr(impl, name)
    assert impl.rotate() == "mine"
    assert Implementation(model, model).find_sinks is model.find_sinks


def test_in_a_finished_module_the_slip_fails_after_the_prompt_and_its_correction_passes(run):
    at_prompt, *later = checks_of(CODED[-1])
    text = starter.starter(SOURCE)
    correct = "cache.sinks.ever_sink if is_prompt else none"
    for who_was_a_sink, passes in ((starter.SLIP, False), (correct, True)):
        _, namespace = module_from(text.replace(starter.SLIP, who_was_a_sink))
        layer = namespace["DecoderLayer"]
        namespace.update(vars(model))                   # all other exercises are solved
        impl = SimpleNamespace(DecoderLayer=layer)
        run(at_prompt, impl)
        for test in later:
            if passes:
                run(test, impl)
            else:
                with pytest.raises(AssertionError, match="not turned|aligns the prompt only"):
                    run(test, impl)


def write_starter(*arguments, cwd):
    command = [sys.executable, conftest.ROOT / "tests" / "starter.py", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_starter_is_never_written_over_a_module(tmp_path):
    assert write_starter("my_module.py", cwd=tmp_path).returncode == 0
    written = (tmp_path / "my_module.py").read_text(encoding="utf-8")
    assert written == starter.starter(SOURCE)
    (tmp_path / "my_module.py").write_text("my work")
    for name in ("my_module.py", "my-module.py", "my_module", "no/folder.py"):
        done = write_starter(name, cwd=tmp_path)
        assert done.returncode == 2 and name in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["my_module.py"]
    assert (tmp_path / "my_module.py").read_text() == "my work"


# ---- pytest --impl ----


def run_impl(folder):
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "--impl", "my_module", "-p", "no:cacheprovider",
               "-k", "test_exercises.py"]                   # or this test could run itself
    return subprocess.run(command, cwd=conftest.ROOT, env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True)


def test_a_half_finished_module_gets_its_points(tmp_path):
    """Exercise 1 is right, 4 wrong, all others untouched; the suite's other tests are not run."""
    text = starter.starter(SOURCE)
    text = text.replace('raise NotImplementedError("not written yet: exercise 1")', """\
B, P, C = x.shape
    n = int(P**0.5)
    x = x.view(B, n // scale, scale, n // scale, scale, C).transpose(2, 3)
    return x.reshape(B, -1, C * scale**2)""")
    text = text.replace('raise NotImplementedError("not written yet: exercise 4")',
                        "return torch.ones(n_query, n_key, dtype=torch.bool).tril()")
    (tmp_path / "my_module.py").write_text(text, encoding="utf-8")
    done = run_impl(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    n_failed = sum(len(checks_of(e)) for e in CODED) - len(checks_of(CODED[0]))
    assert f"{n_failed} failed, {len(checks_of(CODED[0]))} passed" in done.stdout
    assert "causal_mask(2, 4), with a cache of two, is\n" in done.stdout
    assert "not written yet: exercise 3" in done.stdout and "NotImplementedError" not in done.stdout
    results = {e.number: [e.number == 1] * len(checks_of(e)) for e in CODED}
    results[4] = [False, False]
    assert points_table(results) in done.stdout


def test_the_table_of_points():
    assert points_table({4: [True, True], 6: [True, False, True]}) == """\
   4  Causal mask with a cache          5 of   5   2 passed, 0 failed
   6  Find the sinks                    0 of  10   2 passed, 1 failed
      all of these                      5 of  15
      in words, to be read by a person: exercises 8 (10), 12 (10)"""


def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "unfinished.py").write_text("x = (")
    monkeypatch.syspath_prepend(tmp_path)
    for name, reason in (("no_such_module", "No module named .*tests/starter.py"),
                         ("unfinished", r"SyntaxError: .* \(unfinished.py, line 1\)")):
        config = SimpleNamespace(getoption={"--impl": name}.get, addinivalue_line=lambda *_: None)
        with pytest.raises(pytest.UsageError, match=f"^--impl {name}: {reason}") as error:
            conftest.pytest_configure(config)
        assert "\n" not in str(error.value)


# ---- typical wrong solutions ----


def test_each_exercise_has_at_least_three_typical_wrong_solutions():
    for e in CODED:
        assert sum(number == e.number for number, *_ in mutants.WRONG) >= 3, e.title


@pytest.mark.parametrize("number, name, function, what", mutants.WRONG,
                         ids=[f"{number}-{what}" for number, _, _, what in mutants.WRONG])
def test_a_typical_wrong_solution_fails_a_test_of_its_exercise(run, number, name, function, what):
    impl = SimpleNamespace(**{**vars(model), name: function})
    for test in checks_of(EXERCISES[number - 1]):
        try:
            run(test, impl)
        except AssertionError as failure:
            assert str(failure), f"{test.__name__} fails without a sentence for the student"
            return
    pytest.fail(f"every test of exercise {number} passes")
