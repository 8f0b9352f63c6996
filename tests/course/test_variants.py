"""A variant of the exercises: starter, text and tests agree, and the solution of another one fails."""

import re

import pytest
import starter
from exercises import EXERCISES, MODEL
from helpers import PUBLISHED, ROOT, Golden
from solution import model_of
from test_starter import checks_of, filled, impl_of, module_from, run
from variants import CONSTANTS, LAST, Variant

NUMBERS = range(1, 6)
SOURCE = MODEL.read_text(encoding="utf-8")
TUTORIAL = (ROOT / "tutorial.md").read_text(encoding="utf-8")
CODED = [e for e in EXERCISES if e.names and e.number in {constant.exercise for constant in CONSTANTS}]


def section(number: int, variant: Variant) -> str:
    text = starter.exercises(TUTORIAL, "my_module", variant)
    return text.split(f"### Exercise {number}. ")[1].split("\n#")[0]


@pytest.mark.parametrize("constant", CONSTANTS, ids=lambda c: c.name)
def test_a_constant_is_another_in_every_variant_and_in_all_places(constant):
    assert len(set(constant.values)) == len(constant.values) == LAST + 1
    today = {"model": SOURCE, "text": section(constant.exercise, Variant()),
             "stub": EXERCISES[constant.exercise - 1].stub}
    for old in constant.places:
        assert any(old in text for text in today.values()), f"nowhere: {old}"
    for number in NUMBERS:
        variant = Variant(number)
        module, text = starter.starter(SOURCE, variant=variant), section(constant.exercise, variant)
        for part in (module, text, variant(SOURCE)):
            assert not any(re.search(rf"{re.escape(old)}(?!\d)", part) for old in constant.places)
        value = re.escape(str(getattr(variant, constant.name)))
        assert re.search(rf"(?<![\d.]){value}(?![\d.]*\d)", text)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_right_solution_passes_and_one_with_the_constants_of_another_variant_fails(request, number):
    variant = Variant(number)
    with model_of(variant):
        golden = {name: Golden(name).as_computed() for name in PUBLISHED}
        fixtures = {"variant": variant, "golden": golden.__getitem__,
                    "decoded": {name: g.decoded for name, g in golden.items()}}
        right = impl_of(module_from(filled(variant)))
        for e in CODED:
            for test in checks_of(e):
                run(test, right, request, **fixtures)
        for e in CODED:
            other = Variant(number)
            for constant in CONSTANTS:
                if constant.exercise == e.number:
                    setattr(other, constant.name, constant.values[number - 1])
            wrong = impl_of(module_from(filled(other)))
            with pytest.raises(AssertionError):
                for test in checks_of(e):
                    run(test, wrong, request, **fixtures)


def test_variant_0_is_the_tutorial_and_the_model():
    assert Variant()(SOURCE) == SOURCE and Variant()(TUTORIAL) == TUTORIAL


def test_the_text_is_written_beside_the_module_and_over_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert starter.main(["mine.py", "--variant", "2"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"mine.py", "mine.md"}
    module, text = ((tmp_path / name).read_text(encoding="utf-8") for name in ("mine.py", "mine.md"))
    assert text == starter.exercises(TUTORIAL, "mine", Variant(2))
    for part in (module, text):
        commands = re.findall(r"-m pytest .*?--impl .*", part)
        assert commands and all("--impl mine --variant 2" in command for command in commands)
    assert "my_module" not in module
    (tmp_path / "mine.py").unlink()
    assert starter.main(["mine.py", "--variant", "2"]) == 2 and list(tmp_path.iterdir()) == [tmp_path / "mine.md"]
    assert capsys.readouterr().err == "mine.md is there already; give another name\n"
