"""Grading: every test counts, nobody is given points for the project's code, and nothing runs for ever."""

import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import starter
import torch
from conftest import ROOT
from exercises import EXERCISES, points_table
from grader import Implementation, TimeIsUp, within
from test_starter import CODED, SOURCE, checks_of, module_from, run

from minioutro import model

pytest_plugins = ["pytester"]
TESTS = str(ROOT / "tests" / "test_exercises.py")
X = torch.ones(1, 4, 2)                                         # a small `hidden` or `x`


def test_the_table_of_points():
    assert points_table({4: [True, True], 6: [True, False, True], 7: [True, None]}) == """\
   4  Causal mask with a cache          5 of   5   2 passed, 0 failed
   6  Find the sinks                    0 of  10   2 passed, 1 failed
   7  Open the sink rows                0 of   5   1 passed, 0 failed, 1 not run
      all of these                      5 of  20
      in words, to be read by a person: exercises 8 (10), 12 (10)"""


# ---- a call of a function ----


def replaced(exercise, wrap, module) -> dict:
    """The functions of an exercise, each made anew of the one that a module has."""
    functions = {}
    for dotted in exercise.names:
        name = dotted.split(".")[0]
        one = getattr(module, name)
        functions[name] = (type(name, (one,), {"forward": wrap(one.forward)})
                           if isinstance(one, type) else wrap(one))
    return functions


@pytest.mark.parametrize("exercise", CODED, ids=lambda e: e.title)
def test_a_function_that_calls_ours_for_what_it_should_compute_earns_nothing(request, exercise):
    wrappers = replaced(exercise, lambda ours: lambda *args: ours(*args), model)
    module = module_from(SOURCE, **wrappers)
    for test in checks_of(exercise):
        with pytest.raises(AssertionError, match="^this calls the project's own function"):
            run(test, Implementation(module, model), request)
        run(test, Implementation(model, model), request)            # afterwards they are as they were


@pytest.mark.parametrize("text", [
    "from minioutro.model import find_sinks as f\ndef find_sinks(h, a, m): return f(h, a, m)",
    "import minioutro.model as m\ndef find_sinks(*a): return m.find_sinks(*a)",
    "import minioutro.model as m\ndef find_sinks(*a): return vars(m)['find_sinks'](*a)",
    "import minioutro.model as m, functools\nfind_sinks = functools.partial(m.find_sinks)",
    "from minioutro.model import activation_ratio as f\ndef find_sinks(h, a, m): return f(h)[0] >= a"])
def test_by_whatever_way_ours_is_reached(text):
    impl = Implementation(module_from(text), model)
    with pytest.raises(AssertionError, match="^this calls the project's own function"):
        impl.find_sinks(X, 0.0, 1.0)


def test_a_function_of_another_exercise_may_be_ours():
    module = module_from("from minioutro.model import *\n" + starter.decoder_layer(SOURCE, "none"))
    config = model.TextConfig(8, 8, 4, 2, 1, 4)
    layer = Implementation(module, model).DecoderLayer(config, 0)
    cos = torch.ones(4, 4)
    layer(torch.ones(1, 4, 8), cos, cos, model.causal_mask(4, 4), True, model.Cache(), None)


@pytest.mark.parametrize("exercise", [e for e in CODED if e.number != 4], ids=lambda e: e.title)
def test_arguments_must_be_the_same_afterwards(request, exercise):
    """Right, but for one bit of the first tensor. (Those of exercise 4 are numbers.)"""
    def spoils(own):
        def function(*args):
            result = own(*args)
            first = next(value for value in args if torch.is_tensor(value)).view(-1)
            first[0] = not first[0] if first.dtype == torch.bool else first[0] + 1
            return result
        return function
    module = module_from(SOURCE, **replaced(exercise, spoils, module_from(SOURCE)))
    names = "|".join(name.split(".")[0] for name in exercise.names)
    with pytest.raises(AssertionError, match=rf"^({names}) changes its argument 1; work on a copy$"):
        run(checks_of(exercise)[0], Implementation(module, model), request)


def test_the_weight_of_a_layer_must_be_the_same_afterwards():
    module = module_from("""
from minioutro import model
class RMSNorm(model.RMSNorm):
    def forward(self, x):
        self.weight.mul_(2)
        return x
""")
    with pytest.raises(AssertionError, match="^RMSNorm changes its weight; work on a copy$"):
        Implementation(module, model).RMSNorm(2, 0.0)(X)


@pytest.mark.parametrize("body", [
    "while True: pass",
    "while True:\n  try: h.sum()\n  except: pass",
    "while True:\n  try: h.sum()\n  except BaseException: continue",
    "while True:\n  try: time.sleep(1)\n  except: pass",
    "while True:\n  try:\n   while True:\n    try: h.sum()\n    except: h.sum()\n  except: pass",
    "try:\n  while True: h.sum()\n except: return h[..., 0] > 0"])
def test_a_function_that_does_not_end_fails_with_that_sentence(body):
    module = module_from(f"import time\ndef find_sinks(h, a, m):\n {body}\ndef activation_ratio(h): return h")
    module.__file__ = "my_module.py"
    impl = Implementation(module, model, seconds=0.05)
    for _ in range(2):                                          # all tests of an exercise share the time
        with pytest.raises(AssertionError, match="^exercise 6 may take a minute and .*: my_module"):
            impl.find_sinks(X, 0.0, 1.0)
    with pytest.raises(AssertionError, match="^exercise 6 may take a minute"):
        impl.activation_ratio(X)


def test_the_alarm_is_off_when_a_function_has_ended():
    before = signal.getsignal(signal.SIGALRM)
    impl = Implementation(module_from("def find_sinks(h, a, m): return h[..., 0] > 0"), model)
    impl.find_sinks(X, 0.0, 1.0)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) is before


def test_who_steps_through_a_function_in_a_debugger_has_all_the_time():
    def slow():
        end = time.monotonic() + 0.05
        while time.monotonic() < end:
            pass
        return "done"
    before = sys.gettrace()
    sys.settrace(lambda *event: None)
    try:
        assert within(0.001, slow) == "done"
    finally:
        sys.settrace(before)
    with pytest.raises(TimeIsUp):
        within(0.001, slow)


def test_sys_exit_in_a_function_is_one_sentence():
    module = module_from("import sys\ndef leave():\n    sys.exit()\ndef find_sinks(h, a, m):\n    leave()")
    module.__file__ = "my_module.py"
    with pytest.raises(AssertionError, match=r"^sys.exit\(\) ends find_sinks; a function returns: "
                                             r"my_module.py, line 3$"):
        Implementation(module, model).find_sinks(X, 0.0, 1.0)


# ---- pytest --impl ----


@pytest.fixture
def pytest_impl(pytester, monkeypatch):
    """Run pytest in a folder with modules of these texts, beside links to the project."""
    for name in ("conftest.py", "tests", "minioutro"):
        (pytester.path / name).symlink_to(ROOT / name)

    def pytest_impl(*arguments, run=partial(pytester.runpytest_inprocess, no_reraise_ctrlc=True), **texts):
        for name, text in texts.items():
            path = pytester.path / name.replace("__in__", "/").replace("_py", ".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return run("-p", "no:cacheprovider", "--impl", *arguments)
    return pytest_impl


CAUSAL_MASK = """from minioutro.model import *
import torch
def causal_mask(n_query, n_key, device=None):
    {}
    return torch.ones(n_query, n_key, dtype=torch.bool).tril(n_key - n_query)
"""


def points(done, number: int) -> str:
    """The line of an exercise in the table, without its title."""
    title = re.escape(EXERCISES[number - 1].title)
    line, = re.findall(rf"^ *{number}  {title} +(.*)$", done.stdout.str(), re.M)
    return re.sub(" +", " ", line)


def test_a_half_finished_module_gets_its_points(pytest_impl):
    """Exercise 1 is right, 4 wrong, all others untouched; no other test is run. The module is given
    by the name of its file, which pytest takes for one of tests until it knows the option."""
    text = starter.starter(SOURCE)
    text = text.replace('raise NotImplementedError("not written yet: exercise 1")', """\
B, P, C = x.shape
    n = int(P**0.5)
    x = x.view(B, n // scale, scale, n // scale, scale, C).transpose(2, 3)
    return x.reshape(B, -1, C * scale**2)""")
    text = text.replace('raise NotImplementedError("not written yet: exercise 4")',
                        "return torch.ones(n_query, n_key, dtype=torch.bool).tril()")
    done = pytest_impl("my_module.py", my_module_py=text)
    assert done.ret == 1
    n_failed = sum(len(checks_of(e)) for e in CODED) - len(checks_of(CODED[0]))
    assert f"{n_failed} failed, {len(checks_of(CODED[0]))} passed in" in done.stdout.str()
    done.stdout.fnmatch_lines(["*causal_mask(2, 4), with a cache of two, is"])
    done.stdout.fnmatch_lines(["not written yet: exercise 3"])
    done.stdout.no_fnmatch_line("*NotImplementedError*")
    results = {e.number: [e.number == 1] * len(checks_of(e)) for e in CODED}
    assert points_table(results) in done.stdout.str()


@pytest.mark.parametrize("arguments, expected", [
    (("-m", "exercise_4"), "5 of 5 2 passed, 0 failed"),
    (("-k", "causal_mask_by_hand"), "0 of 5 1 passed, 0 failed, 1 not run"),
    ((f"{TESTS}::test_causal_mask_by_hand",), "0 of 5 1 passed, 0 failed, 1 not run"),
    ((f"{TESTS}::test_causal_mask_by_hand",) * 2 + ("--keep-duplicates",),
     "0 of 5 1 passed, 0 failed, 1 not run")])
def test_an_exercise_counts_only_if_all_of_its_tests_ran(pytest_impl, arguments, expected):
    done = pytest_impl("mine", *arguments, mine_py=CAUSAL_MASK.format("pass"))
    assert points(done, 4) == expected


@pytest.mark.parametrize("what", ["raise KeyboardInterrupt", "import pytest; pytest.exit('enough')",
                                  "import pytest; pytest.skip('not now')", "import pytest; pytest.xfail()"])
def test_a_test_that_did_not_end_has_failed(pytest_impl, what):
    """Ctrl-C, for one, in an endless loop of the second test."""
    done = pytest_impl("mine", "-m", "exercise_4", mine_py=CAUSAL_MASK.format(f"if n_query == 7: {what}"))
    assert points(done, 4) == "0 of 5 1 passed, 1 failed"


def test_a_not_implemented_error_of_somebody_else_has_its_file_and_line(pytest_impl):
    done = pytest_impl("mine", "-m", "exercise_9", mine_py="""from minioutro.model import *
def sink_value(v, is_sink):
    return is_sink[:, None, None, :] @ is_sink[:, None, :, None]
""")
    done.stdout.fnmatch_lines(["mine.py:3: NotImplementedError"])
    assert points(done, 9).startswith("0 of 5")


@pytest.mark.parametrize("given", ["my_package", "my_package/", "students/anna.py", "students.anna",
                                   "my_package/__init__.py"])
def test_a_module_is_given_by_its_name_or_path_or_as_a_package(pytest_impl, given):
    done = pytest_impl(given, "-m", "exercise_4", **{
        "my_package__in____init___py": "from .masks import causal_mask",
        "my_package__in__masks_py": CAUSAL_MASK.format("pass"),
        "students__in__anna_py": CAUSAL_MASK.format("pass")})
    assert points(done, 4) == "5 of 5 2 passed, 0 failed"


LEAVES = "print('here')\nimport sys\nsys.exit()\n"


@pytest.mark.parametrize("given, text, sentence", [
    ("no_such_module", "", "no_such_module is not here; python tests/starter.py *"),
    ("nothing.py", "", "nothing.py is not here; *"),
    ("", "", "nothing is neither a file .py nor a folder with an __init__.py; *"),
    ("a_folder", "", "a_folder is neither a file .py nor a folder with an __init__.py; *"),
    ("minioutro", "", "minioutro is the project's own; *"),
    ("unfinished", "x = (", "unfinished.py: SyntaxError: * (unfinished.py, line 1)"),
    ("unfinished", "import torch\nx", "unfinished.py, line 2: NameError: name 'x' is not defined"),
    ("unfinished", "raise ValueError('two\\nlines')", "unfinished.py, line 1: ValueError: two lines"),
    ("leaves", LEAVES, "leaves.py, line 3: sys.exit() would end the tests as well; leave it out"),
    ("leaves.py", LEAVES, "leaves.py, line 3: sys.exit() would end the tests as well; leave it out"),
    *[(name + end, "", f"{name} is the name of another module (*); call yours my_module.py, or such")
      for name in ("exercises", "mutants", "starter", "bench", "torch", "numpy", "json", "this")
      for end in ("", ".py")],
    ("class.py", "", "class.py cannot be imported by its name; call it my_module.py, or such"),
    ("class", "", "class.py cannot be imported by its name; call it my_module.py, or such")])
def test_a_module_that_cannot_be_graded_is_refused_in_one_line(pytest_impl, given, text, sentence):
    (Path.cwd() / "a_folder").mkdir()
    missing = given in ("no_such_module", "nothing.py", "", "a_folder", "minioutro")
    done = pytest_impl(given, **({} if missing else {given.removesuffix(".py") + "_py": text}))
    assert done.ret == 4 and "here" not in done.stdout.str().replace("is not here", "")
    lines = [line for line in done.stderr.lines if line]
    assert len(lines) == 1, lines
    done.stderr.fnmatch_lines([f"ERROR: --impl {given}: {sentence.replace('[', '[[]')}"])


def test_a_solution_called_torch_does_not_hide_torch(pytest_impl, pytester):
    """In a process of its own, in which nothing is imported yet."""
    (pytester.path / "numpy.py").write_text("import torch\nraise ValueError('not this one')")
    text = starter.starter(SOURCE)
    done = pytest_impl("torch.py", torch_py=text, run=pytester.runpytest_subprocess)
    assert done.ret == 4
    line, = [line for line in done.stderr.lines if line]
    assert line.startswith("ERROR: --impl torch.py: torch is the name of another module (")
