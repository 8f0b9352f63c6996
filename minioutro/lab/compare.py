"""Answers compared in pairs: tests, intervals, verdicts and the table of differences."""

import math
from collections import defaultdict
from itertools import accumulate

import torch
from PIL import Image

from minioutro.lab.figures import BLUE, MARK, PALE, WIDTH, canvas, chart, shorten

RESAMPLES = 10_000


def sign_test(gained: int, lost: int) -> float:
    """Two-sided p value of so many gained and lost answers, if either were as likely (McNemar)."""
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def holm(p: list[float]) -> list[float]:
    """Holm's correction for n tests: the k-th smallest p times n + 1 - k, never falling with k."""
    order = sorted(range(len(p)), key=p.__getitem__)
    larger = accumulate((min(1.0, (len(p) - k) * p[i]) for k, i in enumerate(order)), max)
    return [corrected for _, corrected in sorted(zip(order, larger))]


def detectable(n: int, changes: int) -> float:
    """The smallest |gained - lost| / n with p < 0.05, if so many of n answers change.

    Where fewer than six change no p is below, and it is six that all change one way. Source: ours.
    """
    changes = max(changes, 6)
    return next(d for d in range(changes % 2, changes + 1, 2)
                if sign_test((changes + d) // 2, (changes - d) // 2) < 0.05) / n


def interval(changes: list[int], videos: list[str], seed: int) -> list[float]:
    """95 % interval of the mean change, percentiles over resampled videos, whose questions hang
    together; the whole range if there is one video. changes: of each question +1 (right now),
    -1 (wrong now) or 0; videos: that of each question."""
    number = {video: n for n, video in enumerate(sorted(set(videos)))}
    V, random = len(number), torch.Generator().manual_seed(seed)
    if V < 2:
        return [-1.0, 1.0]
    sums = torch.zeros(V, 2).double()                       # of each video: changes, and questions
    sums.index_add_(0, torch.tensor([number[video] for video in videos]),
                    torch.tensor([[change, 1] for change in changes]).double())
    drawn = torch.cat([sums[torch.randint(V, (100, V), generator=random)].sum(1)
                       for _ in range(RESAMPLES // 100)])                           # (RESAMPLES,2)
    return (drawn[:, 0] / drawn[:, 1]).quantile(torch.tensor([0.025, 0.975]).double()).tolist()


def compare(questions: list[dict[str, dict]], names: list[str], seed: int) -> dict[str, dict]:
    """Each variant against the baseline, on the questions, of each the answers by variant, that all
    of them could be asked."""
    asked = [q for q in questions if not any(line["error"] for line in q.values())]
    found, videos = {}, [q["baseline"]["video"] for q in asked]
    for name in names:
        changes = [q[name]["right"] - q["baseline"]["right"] for q in asked]
        gained, lost, n = changes.count(1), changes.count(-1), max(1, len(asked))
        found[name] = {
            "n": len(asked), "right": sum(q[name]["right"] for q in asked),
            "unparsed": sum(q[name]["unparsed"] for q in asked), "gained": gained, "lost": lost,
            "p": sign_test(gained, lost), "p_holm": 1.0, "difference": (gained - lost) / n,
            "interval": interval(changes, videos, seed), "detectable": detectable(n, gained + lost),
            "errors": len(questions) - len(asked)}
    tried = [found[name] for name in names if name != "baseline"]
    for variant, p in zip(tried, holm([variant["p"] for variant in tried])):
        variant["p_holm"] = p
    return found


def summarise(answers: list[dict], seed: int = 0) -> dict:
    """What --json prints: of the questions with an answer of every variant, the last of each.
    Raises: ValueError if there are none."""
    by_id, tasks = defaultdict(dict), defaultdict(list)
    for line in answers:
        by_id[line["id"]][line["variant"]] = line
    names = list(dict.fromkeys(line["variant"] for line in answers))
    questions = [by_id[id] for id in sorted(by_id) if len(by_id[id]) == len(names)]
    for q in questions:
        tasks[q["baseline"]["task"]].append(q)
    if not questions:
        raise ValueError("no question has an answer of every variant yet; let the run go on")
    found = compare(questions, names, seed)
    return {"questions": len(questions), "videos": len({q["baseline"]["video"] for q in questions}),
            "errors": found["baseline"]["errors"], "seed": seed, "variants": found,
            "tasks": {task: compare(tasks[task], names, seed) for task in sorted(tasks) if task}}


def table_of_differences(found: dict) -> str:
    """The report in numbers and words, of `evaluate.summarise`; differences are in points.

    A difference is shown where p, corrected, is below 0.05 and the interval leaves out 0: p takes
    questions for independent, the interval only videos. Source: ours.
    """
    lines = [f"{found['questions']} questions on {found['videos']} videos; seed {found['seed']}",
             "", f"{'':14}{'right':>7}{'unparsed':>10}{'gained':>8}{'lost':>6}"
             f"{'difference, 95 % interval':>27}{'p':>9}{'Holm':>9}{'detectable':>12}  shown"]
    for task, variants in [("all", found["variants"]), *found["tasks"].items()]:
        n, errors = variants["baseline"]["n"], variants["baseline"]["errors"]
        lines.append(f"{task}: {n} questions" + f", {errors} errors" * (errors > 0))
        for name, v in variants.items():
            line = f"  {name:12}{v['right'] / max(n, 1):>7.1%}{v['unparsed']:>10}"
            if name != "baseline":
                points = "{:+.2f} ({:+.2f} to {:+.2f})".format(
                    *(100 * share for share in (v["difference"], *v["interval"])))
                line += (f"{v['gained']:>8}{v['lost']:>6}{points:>27}{v['p']:>9.2g}"
                         f"{v['p_holm']:>9.2g}{100 * v['detectable']:>12.2f}  {verdict(v)}")
            lines.append(line)
    lines.append("")
    for name, v in list(found["variants"].items())[1:]:
        if verdict(v) == "no":
            lines.append(f"{name}: no difference from the baseline is shown; with so many changed "
                         f"answers, {100 * v['detectable']:.2f} points could be")
        else:
            lines.append(f"{name}: {verdict(v)} than the baseline, by "
                         f"{abs(100 * v['difference']):.2f} points")
    if len(found["variants"]) > 2:
        lines.append("The best of several variants, picked by the questions that it is judged by, "
                     "is no result.")
    return "\n".join(lines)


def verdict(variant: dict) -> str:
    low, high = variant["interval"]
    if variant["p_holm"] >= 0.05 or low <= 0 <= high:
        return "no"
    return "better" if low > 0 else "worse"


def draw_differences(found: dict) -> Image.Image:
    """Every variant's difference from the baseline with its interval, of `evaluate.summarise`."""
    rows = [(f"{task}: {name}", *(100 * x for x in (v["difference"], *v["interval"])))
            for task, variants in [("all", found["variants"]), *found["tasks"].items()]
            for name, v in variants.items() if name != "baseline"]
    height, left = 24 * len(rows) + 24, 300
    most = max([1.0, *(abs(x) for _, *points in rows for x in points)])
    image, draw = canvas(height + 90, (
        f"Right answers more than the baseline's, in points, with 95 % intervals by resampling "
        f"videos (seed {found['seed']}): {found['questions']} questions on {found['videos']} "
        f"videos. Where the interval holds 0, no difference is shown."))
    marks = [("line", [(0, 0), (0, len(rows) + 1)], PALE)]
    for y, (_, difference, low, high) in enumerate(reversed(rows), start=1):
        marks += [("line", [(low, y), (high, y)], BLUE), ("dots", [(difference, y)], MARK)]
    labels = {y: shorten(label, left - 30).strip("'")
              for y, (label, *_) in enumerate(reversed(rows), start=1)}
    chart(image, (left, 40, WIDTH - 40, 40 + height),
          {most * n / 2: f"{most * n / 2:+.1f}" for n in range(-2, 3)},
          {0: "", **labels, len(rows) + 1: ""}, ("points", ""), marks)
    return image
