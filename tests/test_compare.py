"""Answers compared in pairs: the test, the interval, the one verdict, and what the table says."""

import random
import statistics

import pytest

from minioutro.lab.compare import (
    detectable,
    interval,
    sign_test,
    summarise,
    table_of_differences,
    verdict,
)


def line(id, variant, right, video="v", task="", **more):
    return {"id": f"{id}", "variant": variant, "right": right, "video": video, "task": task,
            "unparsed": False, "error": None, **more}


def pairs(baseline, outro, task="", first=0, **more):
    """Answers to questions, one for each video. "1" is a right answer. more: the answers of other variants.""" 
    of_variant = {"baseline": baseline, "outro": outro, **more}
    return [line(first + n, name, bits[n] == "1", f"v{first + n}", task)
            for n in range(len(baseline)) for name, bits in of_variant.items()]


# ---- the test and the interval ----


@pytest.mark.parametrize("gained, lost, p", [
    (5, 5, 1), (0, 0, 1), (0, 3, 2 / 8), (1, 5, 14 / 64),
    (45, 62, 0.12151242187624432), (4800, 5200, 6.593515598672343e-05)])
def test_sign_test(gained, lost, p):
    """By hand: 3 changes all in one way are 2 of 8 outcomes. 6 with at most one the other way are 2 * (1 + 6) of 64.

    The last two are from SciPy: binomtest(gained, gained + lost).pvalue.
    """
    assert sign_test(gained, lost) == pytest.approx(p, rel=1e-9)
    assert sign_test(lost, gained) == sign_test(gained, lost)


@pytest.mark.parametrize("changes", [6, 7, 20, 51, 10_000])
def test_detectable_is_the_smallest(changes):
    """5 gains and no loss have p = 2/32. So fewer than 6 changes can show nothing."""
    least = round(20_000 * detectable(20_000, changes))
    p = [sign_test((changes + d) // 2, (changes - d) // 2) for d in (least, least - 2)]
    assert p[0] < 0.05 <= p[1]
    assert [detectable(100, few) for few in range(6)] == [None] * 6


def test_interval_draws_videos():
    """It is wider than an interval over questions, because answers about one video are correlated."""
    rng = random.Random(1)
    lean = [rng.choice((-1, 0, 0, 1, 1)) for _ in range(40)]
    videos = [n for n in range(40) for _ in range(8)]
    changes = [lean[n] for n in videos]
    low, high = interval(changes, videos, seed=0)
    sigma = statistics.pstdev(lean) / 40**0.5                               # of a mean over 40 videos
    mean = statistics.mean(lean)
    assert (low, high) == pytest.approx((mean - 1.96 * sigma, mean + 1.96 * sigma), abs=0.02)
    assert interval(changes, videos, seed=0) == [low, high] != interval(changes, videos, seed=1)
    assert interval([1] * 6, list("aabbcc"), 0) == [1.0, 1.0]
    assert interval([1, 0], ["a", "a"], 0) == interval([], [], 0) == [-1.0, 1.0]


# ---- what is compared ----


def test_summary_counts():
    """OutRo mends 2 of ten and spoils 1. Then one question failed, one is half asked and one was asked again."""
    base, outro = "1110000000", "1101100000"
    lines = [line(n, name, bit == "1", f"v{n % 3}", "st"[n < 4])
             for n, pair in enumerate(zip(base, outro)) for name, bit in zip(("baseline", "outro"), pair)]
    lines += [line("x", "baseline", True, task="t"), line("x", "outro", False, task="t", error="broken")]
    lines += [line("half", "baseline", True)]
    lines += [line(9, "outro", False, "v0", "s", unparsed=True)]
    found = summarise(lines, seed=5)
    keys = ("questions", "videos", "errors", "unfinished", "seed", "asked")
    assert [found[key] for key in keys] == [11, 4, 1, 1, 5, "outro"]
    row = found["variants"]["outro"]
    assert [row[key] for key in ("n", "right", "gained", "lost", "unparsed")] == [10, 4, 2, 1, 1]
    assert row["difference"] == 0.1 and row["interval"][0] < 0.1 < row["interval"][1]
    assert found["variants"]["baseline"]["right"] == 3 and found["variants"]["baseline"]["difference"] == 0
    assert list(found["tasks"]) == ["s", "t"] and found["tasks"]["t"]["outro"]["gained"] == 1
    assert found["tasks"]["s"]["outro"]["n"] == 6 and found["tasks"]["t"]["outro"]["errors"] == 1
    assert summarise(lines[::-1][1:], seed=5) != found and summarise(lines[4:] + lines[:4], seed=5) == found
    assert "1 question without an answer of every variant" in table_of_differences(found)


def test_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no question has an answer of every variant"):
        summarise([line("x", "baseline", True), line("y", "outro", True)])
    with pytest.raises(ValueError, match="there is no answer of the baseline"):
        summarise([line("x", "outro", True)])


# ---- the one verdict ----


@pytest.mark.parametrize("baseline, outro, decided", [
    ("0" * 9 + "1", "1" * 9 + "1", "better"), ("1" * 9 + "0", "0" * 9 + "0", "worse"),
    ("0" * 4 + "1" * 6, "1" * 4 + "0" * 6, "not shown"), ("0" * 5, "1" * 5, "cannot be shown"),
    ("0" * 20, "1" * 5 + "0" * 15, "cannot be shown")])
def test_verdict(baseline, outro, decided):
    assert summarise(pairs(baseline, outro))["test"]["verdict"] == decided


def test_verdict_needs_several_videos():
    """The sign test calls nine gains significant. But if all are about one video, they say little."""
    found = summarise([line(n, name, name == "outro") for n in range(9) for name in ("baseline", "outro")])
    assert found["test"]["p"] < 0.05 and found["test"]["verdict"] == "not shown"
    assert "because the interval over videos contains 0" in verdict(found)


def test_only_one_row_is_tested():
    """relax mends nine of nine, but it gets no verdict, because it is not the variant that is tested."""
    found = summarise(pairs("0" * 9, "0" * 9, relax="1" * 9))
    assert (found["asked"], found["test"]["verdict"]) == ("outro", "cannot be shown")
    assert not {"p", "detectable", "verdict"} & found["variants"]["relax"].keys()
    text = table_of_differences(found)
    assert "better," not in text and "  outro *" in text and "  relax *" not in text
    found = summarise(pairs("0" * 9, "0" * 9, relax="1" * 9), asked="relax")
    assert (found["asked"], found["test"]["verdict"]) == ("relax", "better")
    found = summarise([{**answer, "variant": answer["variant"].replace("outro", "relax")}
                       for answer in pairs("0" * 9, "1" * 9)])
    assert (found["asked"], found["test"]) == (None, None) and "No row is tested" in table_of_differences(found)


# ---- the table ----


def test_table():
    """40 questions of two kinds, each on its own video. No answer of the second kind changes."""
    answers = pairs("0" * 20 + "1" * 10, "1" * 9 + "0" * 11 + "1" * 10, "colour",
                    relax="0" * 20 + "1" * 7 + "0" * 3)
    answers += pairs("1" * 10, "1" * 10, "moves", first=30, relax="1" * 10)
    lines = table_of_differences(summarise(answers)).splitlines()
    assert [text.split() for text in lines[3:7]] == [
        ["all:", "40", "questions"], ["baseline", "50.0%", "0"],
        ["outro", "*", "72.5%", "0", "9", "0", "+22.50", "(+10.00", "to", "+35.00)"],
        ["relax", "42.5%", "0", "0", "3", "-7.50", "(-17.50", "to", "+0.00)"]]
    assert lines[13].split() == ["outro", "100.0%", "0", "0", "0", "no", "answer", "changed"]
    assert lines[0] == "40 questions on 40 videos; seed 0" and lines[11] == "moves: 10 questions"
    assert lines[15:] == [
        "",
        "* asked: is outro better or worse than the baseline, over all questions?",
        "Sign test over 9 changed answers: p = 0.0039.",
        "It is better, by 22.50 points.",
        "The table has 5 other rows, not tested: among many rows, some differ by chance.",
        "A row with fewer than 6 changed answers can show nothing."]


def test_table_of_many_kinds():
    answers = [answer for n in range(60) for answer in pairs("1", "1", f"kind {n:02}", first=n)]
    text = table_of_differences(summarise(answers + pairs("11", "11", "last", first=60)))
    assert text.count(": 1 question\n") == 49 and "last: 2 questions" in text and "has 50 other rows" in text
    assert "\nand 11 smaller kinds of question, which --json prints\n" in text


def test_table_escapes_names():
    names = ["a\nb", "\x1b[31mred\x1b[2J", "\u202egnihton"]
    answers = [answer for n, name in enumerate(names) for answer in pairs("1", "1", name, first=n)]
    text = table_of_differences(summarise(answers))
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "\na\\nb: 1 question\n" in text and "\n\\x1b[31mred\\x1b[2J: 1 question\n" in text
