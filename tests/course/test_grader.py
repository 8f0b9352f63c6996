"""Grading: every test counts, nobody is given points for the project's code, and nothing ends or changes it."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import grader
import mutants
import pytest
import starter
import torch
from exercises import EXERCISES, find_module, points_table
from grader import Process
from helpers import ROOT
from solution import Solution, import_solution
from test_starter import CODED, RIGHT, SOURCE, checks_of, filled, impl_of, module_from, run
from variants import Variant

from minioutro import model
from minioutro.lab import analysis

pytest_plugins = ["pytester"]
TESTS = str(ROOT / "tests" / "test_exercises.py")
X = torch.ones(1, 4, 2)                                         # a small `hidden` or `x`


def test_the_table_of_points():
    assert points_table({3: [True, True], 4: [True, False, True], 7: [True, None]}) == """\
   3  The masks                          5 of   5   2 passed, 0 failed
   4  Grouped-query attention            0 of  10   2 passed, 1 failed
   7  Does it look like a sink to you?   0 of   5   1 passed, 0 failed, 1 not run
      all of these                       5 of  20
      in words, to be read by a person: exercises 7 (5), 9 (5), 10 (5), 11 (5), 12 (10)"""


# ---- a call of a function ----


def replaced(exercise, wrap, module) -> dict:
    """The functions of an exercise, each made anew of the one that a module has."""
    functions = {}
    for dotted in exercise.names:
        name, _, method = dotted.partition(".")
        one = functions.get(name, getattr(module, name))
        functions[name] = type(name, (one,), {method: wrap(getattr(one, method))}) if method else wrap(one)
    return functions


@pytest.mark.parametrize("exercise", CODED, ids=lambda e: e.title)
def test_a_function_that_calls_ours_for_what_it_should_compute_earns_nothing(request, exercise):
    rule = lambda weights, v: (analysis.attention_mass(weights) > 0.3).all(1)
    wrappers = replaced(exercise, lambda ours: lambda *args: ours(*args),
                        SimpleNamespace(**vars(model), looks_like_a_sink=rule))
    for test in checks_of(exercise):
        with pytest.raises(AssertionError, match="^this calls the project's own function"):
            run(test, impl_of(module_from(SOURCE, **wrappers)), request)
    run(checks_of(exercise)[0], impl_of(module_from(RIGHT)), request)           # they are as they were


@pytest.mark.parametrize("text", [
    "from minioutro.model import find_sinks as f\ndef find_sinks(h, a, m): return f(h, a, m)",
    "import minioutro.model as m\ndef find_sinks(*a): return m.find_sinks(*a)",
    "import minioutro.model as m\ndef find_sinks(*a): return vars(m)['find_sinks'](*a)",
    "import minioutro.model as m, functools\nfind_sinks = functools.partial(m.find_sinks)",
    "from minioutro.model import activation_ratio as f\ndef find_sinks(h, a, m): return f(h)[0] >= a"])
def test_by_whatever_way_ours_is_reached(text):
    with pytest.raises(AssertionError, match="^this calls the project's own function"):
        impl_of(module_from(text)).find_sinks(X, 0.0, 1.0)


def test_a_function_of_another_exercise_may_be_ours(request):
    layer = mutants.layer_with(mutants.WHO, mutants.WHO)
    impl = impl_of(SimpleNamespace(**{**vars(model), "DecoderLayer": layer}))
    run(checks_of(EXERCISES[9])[0], impl, request)


@pytest.mark.parametrize("exercise", CODED, ids=lambda e: e.title)
def test_arguments_must_be_the_same_afterwards(request, exercise):
    """Right, but for one bit of the first tensor."""
    def spoils(own):
        def function(*args):
            result = own(*args)
            for first in [value for value in args if torch.is_tensor(value)][:1]:
                spoilt = first.view(-1) if first.is_contiguous() else first[(0,) * first.dim()][None]
                spoilt[0] = not spoilt[0] if first.dtype == torch.bool else spoilt[0] + 1
            return result
        return function
    module = module_from(RIGHT)
    vars(module).update(replaced(exercise, spoils, module))
    with pytest.raises(AssertionError, match=r"^[\w.]+ changes its argument \d; work on a copy$"):
        for test in checks_of(exercise):
            run(test, impl_of(module), request)


def test_the_weight_of_a_layer_must_be_the_same_afterwards():
    module = module_from("""
from minioutro import model
class RMSNorm(model.RMSNorm):
    def forward(self, x):
        self.weight.mul_(2)
        return x
""")
    with pytest.raises(AssertionError, match="^RMSNorm.forward changes its weight; work on a copy$"):
        impl_of(module).RMSNorm(2, 0.0)(X)


@pytest.mark.parametrize("body, sentence", [
    ("pass", "find_sinks returns NoneType; asked for: Tensor"),
    ("return h, h", "find_sinks returns Tensor, Tensor; asked for: Tensor"),
    ("import sys; sys.exit()", "sys.exit() ends find_sinks; a function returns: my_module.py, line 1")])
def test_what_is_returned_is_as_many_tensors_as_are_asked_for(body, sentence):
    module = module_from(f"def find_sinks(h, a, m): {body}")
    module.__file__ = "my_module.py"
    with pytest.raises(AssertionError, match=f"^{re.escape(sentence)}$"):
        impl_of(module).find_sinks(X, 0.0, 1.0)


# ---- a process ----


HOSTILE = """import ctypes, faulthandler, os, re, time
print("x" * 10_000_000)
def pixel_shuffle(x, scale):
    while True:
        try: re.match("(a+)+$", 40 * "a" + "b")
        except: pass
def rotate(x, cos, sin):
    faulthandler.cancel_dump_traceback_later(); time.sleep(1000)
def causal_mask(n_query, n_key, device=None):
    print("y" * 10_000_000)
    return x
def repeat_heads(x, H):
    ctypes.string_at(0)
def find_sinks(hidden, a, m):
    return unwritten(hidden)
def unwritten(hidden):
    raise NotImplementedError
def sink_value(v, is_sink):
    return v[:, :, 0]
def align_with_sink(*args):
    return [x for x in args]
def looks_like_a_sink(weights, v):
    for file in range(3, 30):
        try: os.write(file, (12).to_bytes(8, "big") + b"cos\\nabort\\n.")
        except OSError: pass
"""


def test_nothing_that_a_function_does_ends_the_tests_or_holds_them_up(tmp_path, monkeypatch):
    """A loop that no exception leaves, a sleep without the clock, a crash, an answer of its own: each is one
    sentence, for all calls of the exercise. Others work, and an error has the lines that led to it."""
    monkeypatch.setattr(grader, "TO_END_ITSELF", 1.0)
    path = tmp_path / "hostile.py"
    path.write_text(HOSTILE)
    process = Process(path, stderr=subprocess.DEVNULL)
    process.seconds_left.update({1: 0.3, 2: 0.3})
    impl = grader.Implementation(process)
    lines = {n: rf'  File "[^"]+hostile.py", line {n}, in \w+\n    .+\n' for n in (11, 15, 17)}
    try:
        assert impl.sink_value(X[None], X > 0).equal(X[:, :1])
        for call, sentence in (
                (lambda: impl.align_with_sink(X), "align_with_sink returns list; asked for: Tensor"),
                (lambda: impl.causal_mask(1, 1), f"{lines[11]}[^\"]*NameError: name 'x' is not defined\n"),
                (lambda: impl.find_sinks(X, 0, 1), f"{lines[15]}[^\"]*{lines[17]}NotImplementedError\n"),
                (lambda: impl.pixel_shuffle(X, 2),
                 "exercise 1 may take a minute and did not end in it: hostile.py, line 5"),
                (lambda: impl.pixel_shuffle(X, 2), "exercise 1 may take a minute and did not end .*"),
                (lambda: impl.rotate(X, X, X), "exercise 2 may take a minute and did not end in it: hostile.py"),
                (lambda: impl.repeat_heads(X, 2), "exercise 4 crashes: hostile.py, line 13"),
                (lambda: impl.looks_like_a_sink(X, X), "exercise 7 .*")):
            with pytest.raises(AssertionError, match=f"^{sentence}$"):
                call()
    finally:
        process.stop()


@pytest.mark.parametrize("text, sentence", [
    ("import os; os._exit(0)", r"the import ends the process, as os._exit\(\) does: mine.py"),
    ("1 / 0", "mine.py, line 1: ZeroDivisionError: division by zero")])
def test_a_module_that_cannot_be_imported_is_one_sentence(tmp_path, text, sentence):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        Process(tmp_path / "mine.py")


@pytest.mark.parametrize("text, sentence", [
    ("x = (", r"mine.py: SyntaxError: .* \(mine.py, line 1\)"),
    ("import torch\nx", "mine.py, line 2: NameError: name 'x' is not defined"),
    ("raise ValueError('two\\nlines')", "mine.py, line 1: ValueError: two lines"),
    ("import sys\nsys.exit()", r"mine.py, line 2: sys.exit\(\) would end the tests as well; leave it out")])
def test_an_error_of_the_import_is_one_sentence(tmp_path, monkeypatch, text, sentence):
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        import_solution(tmp_path / "mine.py")
    assert "mine" not in sys.modules


@pytest.mark.parametrize("given, found", [
    ("my_package", "my_package"), ("my_package/", "my_package"), ("my_package/__init__.py", "my_package"),
    ("students/anna.py", "students/anna.py"), ("students.anna", "students/anna.py")])
def test_a_module_is_given_by_its_name_or_path_or_as_a_package(tmp_path, monkeypatch, given, found):
    for path in ("my_package/__init__.py", "students/anna.py"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text("")
    monkeypatch.chdir(tmp_path)
    assert find_module(given).samefile(tmp_path / found)


# ---- pytest --impl ----


class Here:
    """In place of a Process, one that is started at once."""

    def __init__(self, path, stderr, variant):
        self.solve = Solution(import_solution(path))

    def __call__(self, *args):
        return self.solve(*args)

    def stop(self):
        pass


@pytest.fixture
def pytest_impl(pytester, monkeypatch):
    """Run pytest in a folder with modules of these texts, beside links to the project."""
    monkeypatch.setattr(grader, "Process", Here)
    for name in ("conftest.py", "tests", "minioutro"):
        (pytester.path / name).symlink_to(ROOT / name)

    def pytest_impl(*arguments, run=partial(pytester.runpytest_inprocess, no_reraise_ctrlc=True), **texts):
        for name, text in texts.items():
            path = pytester.path / name.replace("__in__", "/").replace("_py", ".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return run("-p", "no:cacheprovider", "--impl", *arguments)
    return pytest_impl


MASKS = RIGHT.partition("# ---- Exercise 4")[0]         # exercises 1 to 3 are right


def points(done, number: int) -> str:
    """The line of an exercise in the table, without its title."""
    title = re.escape(EXERCISES[number - 1].title)
    line, = re.findall(rf"^ *{number}  {title} +(.*)$", done.stdout.str(), re.M)
    return re.sub(" +", " ", line)


def parts(text: str) -> list[str]:
    """What stands above the exercises, and each exercise with code."""
    return re.split("(?=# ---- Exercise)", text)


def test_a_half_finished_module_gets_its_points(pytest_impl, monkeypatch):
    """In a process. Of variant 2, exercises 1, 2 and 5 are right, 3 is wrong, 10 takes what it needs from the
    model, all others are untouched; no other test is run. The module is given by the name of its file, which
    pytest takes for one of tests until it knows the option."""
    monkeypatch.setattr(grader, "Process", Process)
    head, one, two, three, _, five, *_, ten = parts(filled(Variant(2)))
    _, _, _, _, four, _, *others, _ = parts(starter.starter(SOURCE, variant=Variant(2)))
    taken = "from minioutro.model import activation_ratio, align_with_sink, attention, find_sinks, sink_value\n"
    wrong = three.replace(".tril(n_key - n_query)", ".tril()")
    done = pytest_impl("my_module.py", "--variant", "2", "--points", "points.json",
                       my_module_py="".join([head, one, two, wrong, four, five, *others, taken, ten]))
    assert done.ret == 0
    done.stdout.fnmatch_lines(["*causal_mask(2, 4), with a cache of two, is"])
    done.stdout.fnmatch_lines(["not written yet: exercise 8"])
    done.stdout.fnmatch_lines(["*= points of variant 2 =*"])
    done.stdout.no_fnmatch_line("*NotImplementedError*")
    results = {e.number: [e.number in (1, 2, 5, 10)] * len(checks_of(e)) for e in CODED}
    results[3] = [False, False, True, True, True]
    assert points_table(results) in done.stdout.str()
    report = json.loads(Path("points.json").read_text())
    assert report["score"] == sum(test["score"] for test in report["tests"]) == 5 + 5 + 10 + 15
    assert sum(test["max_score"] for test in report["tests"]) == sum(e.by_tests for e in EXERCISES)
    by_name = {test["name"]: test for test in report["tests"]}
    assert by_name["2. Norm and positions"] == {"name": "2. Norm and positions", "score": 5, "max_score": 5,
                                                "output": "passed"}
    assert "causal_mask(2, 4), with a cache of two, is" in by_name["3. The masks"]["output"]
    assert "not written yet: exercise 8" in by_name["8. Alignment"]["output"]


def test_a_stub_that_hides_an_import_is_told_and_what_fails_without_its_source(pytest_impl):
    stub = "\ndef attention(*args): raise NotImplementedError('not written yet: exercise 4')\n"
    done = pytest_impl("mine", "-k", "constants_of_outro or attention_by_hand", mine_py=RIGHT + stub)
    done.stdout.fnmatch_lines(["not written yet: exercise 4",
                               "not written yet: exercise 4, and this one calls it; * delete its stub, *"])
    slip = RIGHT.replace(mutants.WHO, mutants.SLIP)
    done = pytest_impl("its", "-k", "tokens_after_the_prompt", its_py=slip)
    done.stdout.fnmatch_lines(["E * dev_late, layer 3 has sinks; of 1 tokens after the prompt not all were turned*"])
    done.stdout.no_fnmatch_line("*prompt, cache = *")


@pytest.mark.parametrize("arguments, expected", [
    (("-m", "exercise_3"), "5 of 5 5 passed, 0 failed"),
    (("-k", "causal_mask_by_hand"), "0 of 5 1 passed, 0 failed, 4 not run"),
    ((f"{TESTS}::test_causal_mask_by_hand",) * 2 + ("--keep-duplicates",),
     "0 of 5 1 passed, 0 failed, 4 not run")])
def test_an_exercise_counts_only_if_all_of_its_tests_ran(pytest_impl, arguments, expected):
    done = pytest_impl("mine", *arguments, mine_py=MASKS)
    assert done.ret == 0 and points(done, 3) == expected


def test_a_test_that_did_not_end_has_failed(pytest_impl):
    """Ctrl-C in the second test. The points so far are written, and nobody calls this graded."""
    done = pytest_impl("mine", "-m", "exercise_3", "--points", "points.json", mine_py=MASKS.replace(
        "    assert 0 < n_query", "    if n_query == 7: raise KeyboardInterrupt\n    assert 0 < n_query"))
    assert done.ret == 2 and points(done, 3) == "0 of 5 1 passed, 4 failed"
    assert json.loads(Path("points.json").read_text())["score"] == 0


REFUSED = [
    ("no_such_module", "no_such_module is not here; python tests/course/starter.py *"),
    ("nothing.py", "nothing.py is not here; *"),
    ("", "nothing is neither a file .py nor a folder with an __init__.py; *"),
    ("a_folder", "a_folder is neither a file .py nor a folder with an __init__.py; *"),
    ("minioutro", "minioutro is the project's own; *"),
    ("unfinished", "unfinished.py, line 1: NameError: name 'x' is not defined"),
    ("unfinished.py", "unfinished.py, line 1: NameError: name 'x' is not defined"),
    *[(name, f"{name.removesuffix('.py')} is the name of another module (*); call yours my_module.py, or such")
      for name in ("exercises", "mutants.py", "starter", "solution", "torch", "torch.py", "numpy", "json", "this")],
    ("class.py", "class.py cannot be imported by its name; call it my_module.py, or such"),
    ("class", "class.py cannot be imported by its name; call it my_module.py, or such")]


def given_module(given):
    """A module that cannot be imported, if one of this name is there at all."""
    Path("a_folder").mkdir()
    missing = given in ("no_such_module", "nothing.py", "", "a_folder", "minioutro")
    return {} if missing else {given.removesuffix(".py") + "_py": "x"}


@pytest.mark.parametrize("given, sentence", REFUSED)
def test_a_module_that_cannot_be_graded_is_refused_in_one_line(pytest_impl, given, sentence):
    done = pytest_impl(given, **given_module(given))
    assert done.ret == 4
    lines = [line for line in done.stderr.lines if line]
    assert len(lines) == 1, lines
    done.stderr.fnmatch_lines([f"ERROR: --impl {given}: {sentence}"])


@pytest.mark.parametrize("given, sentence", [REFUSED[0], REFUSED[5], REFUSED[7]])
def test_for_a_course_it_has_no_points_and_the_reason(pytest_impl, given, sentence):
    done = pytest_impl(given, "--points", "points.json", **given_module(given))
    report = json.loads(Path("points.json").read_text())
    assert done.ret == 0 and report["score"] == 0
    assert {test["score"] for test in report["tests"]} == {0} and len(report["tests"]) == len(CODED)
    pytest.LineMatcher([report["output"]]).fnmatch_lines([sentence])


@pytest.mark.parametrize("arguments, sentence", [
    (("mine", "--points", "no/folder.json"), "--points no/folder.json: *; give another file"),
    (("minioutro.model", "--points", "points.json"), "--points is for a module; give --impl my_module*"),
    (("minioutro.model", "--variant", "2"), "--variant is for a module; give --impl my_module*")])
def test_options_that_cannot_be_obeyed_are_an_error_of_the_teacher(pytest_impl, arguments, sentence):
    done = pytest_impl(*arguments, mine_py=MASKS)
    assert done.ret == 4 and not Path("points.json").exists()
    done.stderr.fnmatch_lines([f"ERROR: {sentence}"])


EDITS = """
import sys, torch
from pathlib import Path
root = Path(sys.modules["minioutro"].__file__).parent.parent
for path in (*root.rglob("tests/*.py"), *root.rglob("*.safetensors"), root / "points.json"):
    path.write_text("")
for name in ("grader", "exercises", "test_exercises"):
    vars(__import__(name)).clear()
torch.allclose = torch.Tensor.equal = lambda *args, **kwargs: True
print(10_000_000 * "z")
"""


def test_a_module_that_edits_the_tests_has_the_points_of_those_that_were_there(tmp_path):
    """In a copy: exercise 4 is wrong, 5 is right and needs the files that are edited; no other is run. What
    lies in the folder hides no package, neither from pytest nor from the process of the solution."""
    root = tmp_path / "project"
    for name in ("tests", "minioutro"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "pictures"))
    shutil.copy(ROOT / "conftest.py", root)
    wrong = "\ndef attention(q, k, v, may_attend): return v, v\ndef repeat_heads(x, H): return x\n"
    (root / "mine.py").write_text(RIGHT + wrong + EDITS)
    for name in ("torch.py", "numpy.py"):
        (root / name).write_text("raise ValueError('not this one')")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--impl", "mine",
                           "--points", "points.json", "-m", "exercise_4 or exercise_5"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout) < 1_000_000, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((root / "points.json").read_text())
    assert [test["score"] for test in report["tests"]] == [0, 0, 0, 0, 10, 0, 0, 0, 0]
