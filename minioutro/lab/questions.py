"""Questions -> records: our own files, public benchmarks' as they are, and the toy's world.

A format is a row of FORMATS. Our own is JSON lines: id, video, question and answer, and if wanted
choices, task, start and end.
"""

import math
import random
import re
from collections import namedtuple
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from reprlib import repr as shown
from string import ascii_uppercase as LETTERS
from typing import NamedTuple

import torch
from torch import Tensor

from minioutro.lab.shapes import UNSEEN, Clip
from minioutro.prompt import Processor
from minioutro.support.cli import read_rows


class Record(NamedTuple):
    id: str
    video: str                      # its file, below the folder of the videos
    question: str
    choices: tuple[str, ...]        # without letters; empty where the answer is free
    answer: str                     # one of the choices, if there are any
    task: str
    start: float | None = None      # seconds: only this part of the video is shown
    end: float | None = None


# Where a record's fields are. mark: keys that only files of this format have; question, choices and
# answer: keys of a row, some of which `complete` adds; gold: whether the answer is a letter, an
# index from 0 or the text; id, video and task: templates over a row, its number n and the file.
Format = namedtuple("Format", "mark question choices answer gold id video task")
FORMATS = {
    "avhbench": Format("video_id text", "text", "choices", "label", "text", "{video_id}_{n}",
                       "{video_id}.mp4", "{task}"),
    "daily-omni": Format("Choice", "Question", "Choice", "Answer", "letter", "{video_id}_{n}",
                         "{video_id}/{video_id}_video.mp4", "{Type}"),
    "video-mme": Format("videoID", "question", "options", "answer", "letter", "{question_id}",
                        "{videoID}.mp4", "{task_type}"),
    "worldsense": Format("task_domain", "question", "candidates", "answer", "letter",
                         "{video}_{key}", "{video}.mp4", "{task_type}"),
    "mvbench": Format("candidates", "question", "candidates", "answer", "text", "{file}_{n}",
                      "{video}", "{file}"),
    "nextqa": Format("qid", "question", "choices", "answer", "index", "{video}_{qid}",
                     "{mapped}.mp4", "{type}"),
    "egoschema": Format("q_uid", "question", "choices", "answer", "index", "{q_uid}", "{q_uid}.mp4",
                        ""),
    "ours": Format("id", "question", "choices", "answer", "text", "{id}", "{video}", "{task}"),
}
DEFAULTS = {"ours": {"choices": (), "task": ""}, "avhbench": {"choices": ("Yes", "No")}}
ABOUT_SOUND = ("avhbench", "daily-omni", "worldsense")
OF_A_CLIP = 10                      # questions about each clip of the toy's world


def read_questions(path, format: str | None = None, answers=None,
                   notes: list[str] | None = None) -> list[Record]:
    """The records of a file whose format is told by its keys, unless it is given.

    answers: the file with EgoSchema's answers; if None, subset_answers.json beside the questions.
    notes: a list that receives what a reader of the results should know.
    Raises: OSError or ValueError that names the file, the record and what is wrong with it.
    """
    path, records, left_out = Path(path), {}, 0
    rows = read_rows(path)
    rows = [{"video": video, "key": key, **task} for row in rows[:1]        # WorldSense is nested
            for video, tasks in row.items() if isinstance(tasks, dict)
            for key, task in tasks.items() if key[:4] == "task" and isinstance(task, dict)] or rows
    keys = set().union(*rows)
    known = [name for name, f in FORMATS.items() if keys.issuperset(f.mark.split())]
    name, listed = format or (known or ["unknown"])[0], ", ".join(sorted(keys))[:300]
    if rows and name not in FORMATS:
        raise ValueError(f"{path}: its format is {name}, with the keys {listed}; known formats are "
                         f"{', '.join(FORMATS)}")
    for n, row in enumerate(complete(rows, name, path, answers), start=1):
        f, where = FORMATS[name], f"record {n}"
        there = {"n": n, "file": path.stem, **DEFAULTS.get(name, {}), **{
            key: value for key, value in row.items() if value is not None and str(value).strip()}}
        try:
            where = f"record {f.id.format_map(there)!r}"
            if row.get("task") == "AV Captioning" or f.answer in row and f.answer not in there:
                left_out += 1
                continue
            start, end = (float(there[key]) if key in there else None for key in ("start", "end"))
            record = Record(f.id.format_map(there), f.video.format_map(there),
                            str(there[f.question]).strip(), *choose(f, there),
                            f.task.format_map(there), start, end)
            if records.setdefault(record.id, record) is not record:
                raise ValueError("this id is there twice")
        except (KeyError, ValueError, TypeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, {where}: {what}; correct it (format {name}, with the keys "
                             f"{listed})") from None
    if notes is not None:
        notes += [f"left out: {left_out} captions, or without an answer"] * (left_out > 0)
        notes += [f"{name} asks about sound, and these models are deaf"] * (name in ABOUT_SOUND)
    if not records:
        raise ValueError(f"{path} has no questions with answers; give another file")
    return list(records.values())


def complete(rows: list[dict], name: str, path: Path, answers) -> list[dict]:
    """The rows, with what a format leaves out, spreads over keys, or keeps in another file."""
    def numbered(row: dict, key: str) -> list[str]:
        return [row[k] for k in takewhile(row.get, map(key.format, range(len(LETTERS))))]
    if name == "nextqa":                # VidOR has its videos in folders
        beside = path.with_name("map_vid_vidorID.json")
        folders = read_rows(beside)[0] if beside.exists() else {}
        return [{**row, "choices": numbered(row, "a{}"),
                 "mapped": folders.get(row.get("video"), row.get("video"))} for row in rows]
    if name == "egoschema":
        right = read_rows(Path(answers or path.with_name("subset_answers.json")))[0]
        return [{**row, "choices": numbered(row, "option {}"),
                 "answer": right.get(str(row.get("q_uid")))} for row in rows]
    return rows


def choose(f: Format, row: dict) -> tuple[tuple[str, ...], str]:
    """The choices of a row, without letters, and the right one of them."""
    options, answer = row[f.choices], str(row[f.answer]).strip()
    if f is FORMATS["ours"] and not options:
        return (), answer
    if not isinstance(options, (list, tuple)) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"its choices are {shown(options)}, not a list of 2 to {len(LETTERS)}")
    options = [str(option).strip() for option in options]
    marks = [re.match(rf"\(?{letter}[.):]\s*", option) for letter, option in zip(LETTERS, options)]
    choices = tuple(option[mark.end():] if all(marks) else option
                    for mark, option in zip(marks, options))
    if f.gold == "index":
        right = dict(zip("0123456789", choices)).get(answer)
    else:
        right = answer if f.gold == "text" and answer in choices else chosen(answer, choices)
    if right is None:
        raise ValueError(f"its answer {shown(answer)} is none of the choices {shown(choices)}")
    return choices, right


def toy_questions(n: int, seed: int = 0, noise: int | None = None
                  ) -> tuple[list[Record], dict[str, Callable]]:
    """n questions about clips that training never draws, and by the video's name what writes each.
    noise: see `Clip`."""
    records, clips = [], {}
    for number in range(10**6 * seed, 10**6 * seed + math.ceil(n / OF_A_CLIP)):
        clip, video = Clip(UNSEEN + number, 1 + number % 3, noise), f"{number}.mp4"
        clips[video] = clip.write
        asked = clip.sample_questions(OF_A_CLIP, random.Random(number))
        records += [Record(f"{number}-{k}", video, q.text, (), q.answer, q.kind)
                    for k, q in enumerate(asked)]
    return records[:n], clips


# ---- How choices are asked, and answers are read ----


def is_yes_no(choices: tuple[str, ...]) -> bool:
    return sorted(map(str.casefold, choices)) == ["no", "yes"]


def with_choices(question: str, choices: tuple[str, ...]) -> str:
    """A question that asks for a letter, or for yes or no; without choices it stays as it is.

    Source: release, the wording of both requests; ours, the options' layout.
    """
    if not choices:
        return question
    if is_yes_no(choices):
        return f"{question} Answer yes or no."
    *first, last = LETTERS[:len(choices)]
    letters = f"{', '.join(first)}{',' * (len(first) > 1)} or {last}"
    return "\n".join([question, *map("{}. {}".format, LETTERS, choices),
                      f"Respond with only the letter ({letters}) of the correct option."])


def plain(text: str) -> str:
    """What texts have in common that differ by case, articles, spaces and end marks."""
    words = text.casefold().strip(" \t\n.!?,;:").split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def chosen(text: str, choices: tuple[str, ...]) -> str | None:
    """The choice that an answer names, if it does: by the first whole word yes or no; else by a
    letter, alone or before . ) or :, or by the choice's text. Source: release; the latter ours."""
    if is_yes_no(choices):
        word = re.search(r"\b(yes|no)\b", text.casefold())
        return {choice.casefold(): choice for choice in choices}.get(word and word[0])
    letter = re.match(r"\(?([A-Z])([.):]|$)", text.strip())
    by_text = {plain(choice): choice for choice in choices}.get(plain(text))
    return dict(zip(LETTERS, choices)).get(letter[1], by_text) if letter else by_text


def first_tokens(processor: Processor, choices: tuple[str, ...]) -> Tensor:
    """The tokens that answer with each choice's letter, or yes and no: int64[forms,choices].

    Forms are with a space before it and without; those that are one token for every choice.
    """
    names = choices if is_yes_no(choices) else LETTERS[:len(choices)]
    forms = [[processor.tokenize([space + name]) for name in names] for space in (" ", "")]
    whole = [sum(form, []) for form in forms if all(len(ids) == 1 for ids in form)]
    if not whole:
        raise ValueError(f"the tokenizer has no token for {' or '.join(names)}; generate answers")
    return torch.tensor(whole)
