"""Answers compared in pairs: the test, the intervals, the verdict and the table of differences.

Only one thing is decided, and only once: is OutRo better or worse than the baseline, over all
questions? `summarise` tests that one row. Every other row, another variant or one kind of question,
has a difference and an interval, but no verdict: among many rows some look good by chance.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import islice

import torch

from minioutro.support.cli import escaped

ALPHA = 0.05                        # p has to be below this
RESAMPLES = 10_000                  # how often the videos are drawn again for an interval
AT_A_TIME = 100                     # resamples that are computed together, to save memory
MOST_KINDS = 50                     # kinds of question in the table, those with most questions
LEAST_CHANGES = 6                   # if five answers change, p is at least 2/32, above ALPHA


def ways_to_lose(changes: int) -> Iterator[int]:
    """Yield how many of the 2**changes outcomes have at most 0, 1, 2, ... losses."""
    ways_of_this_many = 1
    ways_so_far = 0
    for lost in range(changes + 1):
        ways_so_far += ways_of_this_many
        yield ways_so_far
        ways_of_this_many = ways_of_this_many * (changes - lost) // (lost + 1)


def sign_test(gained: int, lost: int) -> float:
    """Two-sided p value of an exact sign test (McNemar's).

    It is the probability that gains and losses differ at least as much as here, if each changed
    answer is as likely to be a gain as a loss.
    """
    changes = gained + lost
    if gained == lost:
        return 1.0
    fewer = min(gained, lost)
    ways = next(islice(ways_to_lose(changes), fewer, None))
    return min(1.0, 2 * ways / 2**changes)


def detectable(questions: int, changes: int) -> float | None:
    """The smallest |gained - lost| / questions with p < 0.05, given how many answers change.

    Returns: None for fewer than six changes, which can never reach p < 0.05. Source: ours.
    """
    if changes < LEAST_CHANGES:
        return None
    for lost, ways in enumerate(ways_to_lose(changes)):
        if 2 * ways / 2**changes >= ALPHA:          # so one loss fewer is the most for p < 0.05
            return (changes - 2 * (lost - 1)) / questions


def interval(changes: list[int], videos: list[str], seed: int) -> list[float]:
    """95 % interval of the mean change: percentiles of a bootstrap over videos.

    Videos are drawn, not questions, because questions about one video are correlated.
    changes: for each question +1 (right only now), -1 (wrong only now) or 0.
    videos: the video of each question.
    Returns: [low, high]. With fewer than two videos it is the whole range, [-1, 1].
    """
    number_of = {video: number for number, video in enumerate(sorted(set(videos)))}
    V = len(number_of)
    if V < 2:
        return [-1.0, 1.0]
    if not any(changes):
        return [0.0, 0.0]               # every resample gives 0, so save the time
    video_numbers = torch.tensor([number_of[video] for video in videos])
    change_and_count = torch.tensor([[change, 1] for change in changes]).double()
    of_video = torch.zeros(V, 2).double().index_add_(0, video_numbers, change_and_count)    # (V,2)

    random = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(RESAMPLES // AT_A_TIME):
        drawn = torch.randint(V, (AT_A_TIME, V), generator=random)
        total_change, count = of_video[drawn].sum(1).unbind(-1)
        means.append(total_change / count)
    return torch.cat(means).quantile(torch.tensor([0.025, 0.975]).double()).tolist()


def compare_answers(questions: list[dict[str, dict]], names: list[str],
                    seed: int) -> dict[str, dict]:
    """Compare every variant with the baseline, on the questions that all variants could answer.

    questions: for each question its answers by variant. names: all variants, including "baseline".
    Returns: by variant, the number of questions (n), and how many answers were right, could not be
    read (unparsed), became right (gained) and became wrong (lost). Also the difference from the
    baseline and its interval, as shares of the questions. If n is 0, the difference is None.
    """
    answered = []
    for question in questions:
        if not any(question[name]["error"] for name in names):
            answered.append(question)
    n = len(answered)
    videos = [question["baseline"]["video"] for question in answered]
    found = {}
    for name in names:
        changes = [question[name]["right"] - question["baseline"]["right"] for question in answered]
        gained = changes.count(1)
        lost = changes.count(-1)
        found[name] = {
            "n": n,
            "errors": len(questions) - n,
            "right": sum(question[name]["right"] for question in answered),
            "unparsed": sum(question[name]["unparsed"] for question in answered),
            "gained": gained,
            "lost": lost,
            "difference": (gained - lost) / n if n else None,
            "interval": interval(changes, videos, seed),
        }
    return found


def decide(variant: dict) -> dict:
    """The one decision, about one row of `compare_answers`.

    A difference is shown if p is below 0.05 and the interval does not contain 0. We require both,
    because p assumes that the questions about one video are independent. The interval does not.
    Source: ours.
    Returns: p, the result of `detectable`, and the verdict: "better", "worse", "not shown" or
    "cannot be shown".
    """
    p = sign_test(variant["gained"], variant["lost"])
    smallest = detectable(variant["n"], variant["gained"] + variant["lost"])
    low, high = variant["interval"]
    if smallest is None:
        decision = "cannot be shown"
    elif p >= ALPHA or low <= 0 <= high:
        decision = "not shown"
    elif low > 0:
        decision = "better"
    else:
        decision = "worse"
    return {"p": p, "detectable": smallest, "verdict": decision}


def summarise(answers: list[dict], seed: int = 0, asked: str = "outro") -> dict:
    """Compare the answers of a run: what `evaluate --json` prints.

    If a question has several answers of a variant, the last one counts. Questions without an answer
    of every variant are left out and counted (unfinished). asked: the variant that is tested.
    Returns: questions, videos, errors, unfinished and seed. asked, the variant that was tested, and
    test, the result of `decide`, both None if there is no answer of it. variants, the rows of
    `compare_answers`, and tasks, the same for each kind of question.
    Raises: ValueError if there is nothing to compare.
    """
    names = list(dict.fromkeys(line["variant"] for line in answers))
    by_id = defaultdict(dict)
    for line in answers:
        by_id[line["id"]][line["variant"]] = line
    questions = [by_id[id] for id in sorted(by_id) if len(by_id[id]) == len(names)]
    if not questions:
        raise ValueError("no question has an answer of every variant yet; let the run go on")
    if "baseline" not in names:
        raise ValueError("there is no answer of the baseline to compare with; give the files of a "
                         "whole run")
    of_task = defaultdict(list)
    for question in questions:
        task = question["baseline"]["task"]
        if task:
            of_task[task].append(question)
    variants = compare_answers(questions, names, seed)
    was_asked = asked in names
    return {
        "questions": len(questions),
        "videos": len({question["baseline"]["video"] for question in questions}),
        "errors": variants["baseline"]["errors"],
        "unfinished": len(by_id) - len(questions),
        "seed": seed,
        "asked": asked if was_asked else None,
        "test": decide(variants[asked]) if was_asked else None,
        "variants": variants,
        "tasks": {task: compare_answers(of_task[task], names, seed) for task in sorted(of_task)},
    }


# ---- The report ----


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def in_points(share: float) -> str:
    return f"{100 * share:.2f} points"


def verdict(found: dict) -> str:
    """The decision of `summarise` in words, a few lines."""
    if found["test"] is None:
        return "No row is tested, because there is no answer of the variant that would be tested."
    test = found["test"]
    row = found["variants"][found["asked"]]
    changes = row["gained"] + row["lost"]
    lines = [f"* asked: is {found['asked']} better or worse than the baseline, over all questions?"]
    if test["verdict"] == "cannot be shown":
        lines += [f"Nothing can be shown: of {counted(row['n'], 'answer')}, {changes} changed. "
                  f"A sign test needs at least",
                  f"{LEAST_CHANGES} changed answers to be below {ALPHA}, and then all must change "
                  f"in one way."]
        return "\n".join(lines)
    lines.append(f"Sign test over {changes} changed answers: p = {test['p']:.2g}.")
    if test["verdict"] != "not shown":
        lines.append(f"It is {test['verdict']}, by {in_points(abs(row['difference']))}.")
    elif test["p"] < ALPHA:
        lines.append("No difference is shown, because the interval over videos contains 0.")
    else:
        lines += [f"No difference is shown. With {changes} changed answers, only a difference of",
                  f"{in_points(test['detectable'])} or more could have been shown."]
    return "\n".join(lines)


def about_other_rows(found: dict) -> list[str]:
    """How many other rows have a difference, and how far they can be trusted."""
    sections = [found["variants"], *found["tasks"].values()]
    compared = []
    for rows in sections:
        compared += [row for name, row in rows.items() if name != "baseline"]
    others = len(compared) if found["asked"] is None else len(compared) - 1
    if not others:
        return []
    lines = [f"The table has {counted(others, 'other row')}, not tested: among many rows, some "
             f"differ by chance."]
    if any(row["gained"] + row["lost"] < LEAST_CHANGES for row in compared):
        lines.append(f"A row with fewer than {LEAST_CHANGES} changed answers can show nothing.")
    return lines


def difference_in_words(variant: dict) -> str:
    """The difference and its interval in points: hundredths of the questions."""
    if variant["n"] < LEAST_CHANGES:
        return f"fewer than {LEAST_CHANGES} questions"
    if variant["gained"] + variant["lost"] == 0:
        return "no answer changed"
    low, high = variant["interval"]
    return f"{100 * variant['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def row_of_table(label: str, width: int, variant: dict, is_baseline: bool) -> str:
    share_right = variant["right"] / max(variant["n"], 1)
    line = f"{label:{width}}{share_right:>7.1%}{variant['unparsed']:>10}"
    if is_baseline:
        return line
    return f"{line}{variant['gained']:>8}{variant['lost']:>6}{difference_in_words(variant):>27}"


def table_of_differences(found: dict) -> str:
    """The result of `summarise` as text, with the verdict in words.

    There is a row for each variant, over all questions and for each kind of question. An asterisk
    marks the row that is tested. If there are many kinds, only the largest are shown.
    """
    labels = {name: f"  {escaped(name)}" for name in found["variants"]}
    width = max(14, *(len(label) + 3 for label in labels.values()))
    lines = [f"{counted(found['questions'], 'question')} on {counted(found['videos'], 'video')}; "
             f"seed {found['seed']}"]
    if found["unfinished"]:
        lines.append(f"left out: {counted(found['unfinished'], 'question')} without an answer of "
                     f"every variant")
    lines += ["", f"{'':{width}}{'right':>7}{'unparsed':>10}{'gained':>8}{'lost':>6}"
                  f"{'difference, 95 % interval':>27}"]
    by_size = sorted(found["tasks"], key=lambda task: -found["tasks"][task]["baseline"]["n"])
    listed = set(by_size[:MOST_KINDS])
    tasks = {task: rows for task, rows in found["tasks"].items() if task in listed}
    for task, variants in [("all", found["variants"]), *tasks.items()]:
        n = variants["baseline"]["n"]
        errors = variants["baseline"]["errors"]
        title = f"{escaped(task)}: {counted(n, 'question')}"
        lines.append(f"{title}, {counted(errors, 'error')}" if errors else title)
        for name, variant in variants.items():
            is_asked = variants is found["variants"] and name == found["asked"]
            label = f"{labels[name]} *" if is_asked else labels[name]
            lines.append(row_of_table(label, width, variant, name == "baseline"))
    if len(by_size) > MOST_KINDS:
        rest = len(by_size) - MOST_KINDS
        lines.append(f"and {counted(rest, 'smaller kind')} of question, which --json prints")
    return "\n".join([*lines, "", verdict(found), *about_other_rows({**found, "tasks": tasks})])
