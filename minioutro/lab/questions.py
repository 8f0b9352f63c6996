"""Questions: files of them -> records, how choices are asked, and how answers are read.

Our own format is JSON lines with the keys id, video, question and answer. The keys choices, task,
start and end are optional. Four public benchmarks are read as their authors publish them. Each
format is one function from a row to a Record. For another benchmark, copy one and add it to
FORMATS.
"""

import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as shown
from string import ascii_uppercase as LETTERS
from typing import NamedTuple

import torch
from torch import Tensor

from minioutro.lab.shapes import UNSEEN, Clip
from minioutro.prompt import Processor
from minioutro.support.cli import read_rows

OF_A_CLIP = 10                      # questions about each clip of the toy's world


class Record(NamedTuple):
    id: str
    video: str                      # its file, below the folder of the videos
    question: str
    choices: tuple[str, ...]        # without letters, all different. Empty: the answer is free
    answer: str                     # one of the choices, if there are any
    task: str                       # the kind of question
    start: float | None = None      # seconds: only this part of the video is shown
    end: float | None = None


# ---- 1. Formats: a row of a file -> a record ----------------------------------------------------
# number: the row's place in the file, from 1. If a row is wrong, a ValueError says what is wrong.


def ours(row: dict, number: int) -> Record:
    unknown = sorted(row.keys() - set(Record._fields))
    if unknown:
        raise ValueError(f"its key {shown(unknown[0])} is unknown; leave it out, or name it as one "
                         f"of {', '.join(Record._fields)}")
    options = []
    if not is_missing(row.get("choices")) and row["choices"] != []:
        options = options_of(row, "choices")
    answer = text_of(row, "answer")
    start = seconds_of(row, "start")
    end = seconds_of(row, "end")
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"its end, {end:g} s, is not after its start")
    return Record(
        id=name_of(row, "id"),
        video=name_of(row, "video"),
        question=text_of(row, "question"),
        choices=without_letters(options),
        answer=answer_by_text(answer, options) if options else answer,
        task="" if is_missing(row.get("task")) else text_of(row, "task"),
        start=start,
        end=end)


def avhbench(row: dict, number: int) -> Record:
    """`read_questions` has left out the rows whose answer is a caption."""
    video = name_of(row, "video_id")
    return Record(
        id=f"{video}_{number}",
        video=f"{video}.mp4",
        question=text_of(row, "text"),
        choices=("Yes", "No"),
        answer=answer_by_text(text_of(row, "label"), ["Yes", "No"]),
        task=text_of(row, "task"))


def daily_omni(row: dict, number: int) -> Record:
    video = name_of(row, "video_id")
    options = options_of(row, "Choice")
    return Record(
        id=f"{video}_{number}",
        video=f"{video}/{video}_video.mp4",
        question=text_of(row, "Question"),
        choices=without_letters(options),
        answer=answer_by_letter(text_of(row, "Answer"), options),
        task=text_of(row, "Type"))


def video_mme(row: dict, number: int) -> Record:
    options = options_of(row, "options")
    return Record(
        id=name_of(row, "question_id"),
        video=name_of(row, "videoID") + ".mp4",
        question=text_of(row, "question"),
        choices=without_letters(options),
        answer=answer_by_letter(text_of(row, "answer"), options),
        task=text_of(row, "task_type"))


def worldsense(row: dict, number: int) -> Record:
    """A row of `rows_of_worldsense`."""
    video = name_of(row, "video")
    options = options_of(row, "candidates")
    return Record(
        id=f"{video}_{row['task']}",
        video=f"{video}.mp4",
        question=text_of(row, "question"),
        choices=without_letters(options),
        answer=answer_by_letter(text_of(row, "answer"), options),
        task=text_of(row, "task_type"))


def rows_of_worldsense(objects: list[dict]) -> list[dict]:
    """A row for each task of WorldSense's {video: {"duration": 60, "task0": {...}, ...}, ...}.

    A file may have all videos in one object, or some in each of several.
    """
    rows = []
    for videos in objects:
        for video, tasks in videos.items():
            if not is_video_of_worldsense(tasks):
                raise ValueError(f"video {shown(video)} has {shown(tasks)}, but no task")
            for task, row in tasks.items():
                if re.fullmatch(r"task\d+", task) and isinstance(row, dict):
                    rows.append({**row, "video": video, "task": task})
                elif task.startswith("task") or isinstance(row, dict):
                    raise ValueError(f"video {shown(video)} has {shown(task)}, which is "
                                     f"{shown(row)}; a task is an object named task0, task1 ...")
    return rows


def is_video_of_worldsense(value) -> bool:
    return isinstance(value, dict) and any(re.fullmatch(r"task\d+", key) for key in value)


FORMATS: dict[str, Callable[[dict, int], Record]] = {
    "ours": ours, "avhbench": avhbench, "daily-omni": daily_omni, "video-mme": video_mme,
    "worldsense": worldsense}
KEYS = {            # a file has the first of these formats whose keys occur in its rows
    "avhbench": {"video_id", "text"}, "daily-omni": {"Choice"}, "video-mme": {"videoID"},
    "worldsense": {"task_domain"}, "ours": {"id"}}
CAPTIONS = "AV Captioning"          # a task of AVHBench, whose answers are captions
ABOUT_SOUND = {                     # notes for the reader of the results
    "avhbench": "two of avhbench's three tasks ask about sound, which the model cannot hear",
    "daily-omni": "daily-omni asks about sound as well, which the model cannot hear",
    "worldsense": "worldsense asks about sound as well, which the model cannot hear"}


def read_questions(path, format: str | None = None,
                   notes: list[str] | None = None) -> list[Record]:
    """The records of a file. If no format is given, it is recognised by its keys.

    notes: a list to which notes for the reader of the results are added.
    Raises: OSError or ValueError that names the file, the record and what is wrong with it. No
    record is skipped silently: one that is not fully understood is an error.
    """
    path = Path(path)
    name, rows = rows_of_format(path, format)
    left_out = 0
    records = {}
    for number, row in enumerate(rows, start=1):
        if name == "avhbench" and row.get("task") == CAPTIONS:
            left_out += 1
            continue
        try:
            if path.suffix.lower() == ".csv":
                check_cells(row)
            record = FORMATS[name](row, number)
            if record.id in records:
                raise ValueError(f"an earlier record has the same id, {shown(record.id)}")
        except ValueError as error:
            raise ValueError(f"{path}, record {number}: {error}; correct it (format {name}, with "
                             f"the keys {listed(row)})") from None
        records[record.id] = record
    if not records:
        raise ValueError(f"{path} has no questions with answers; give another file")
    if notes is not None:
        if left_out:
            notes.append(f"captions left out: {left_out}")
        if name in ABOUT_SOUND:
            notes.append(ABOUT_SOUND[name])
    return list(records.values())


def rows_of_format(path: Path, format: str | None) -> tuple[str, list[dict]]:
    """The format of a file, and its rows."""
    rows = read_rows(path)
    if format in (None, "worldsense") and any(map(has_video_of_worldsense, rows)):
        try:
            return "worldsense", rows_of_worldsense(rows)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; correct it (format worldsense)") from None
    keys = set().union(*rows)
    if format is None:
        known = [name for name, of_format in KEYS.items() if of_format <= keys]
        format = known[0] if known else "unknown"
    if rows and format not in FORMATS:
        raise ValueError(f"{path}: its format is {format}, with the keys {listed(keys)}; give a "
                         f"file in one of the formats {', '.join(FORMATS)}")
    if rows and format == "worldsense":
        raise ValueError(f"{path}: a file of worldsense is an object of videos, each with tasks, "
                         f"but the keys here are {listed(keys)}; give another --format")
    return format, rows


def check_cells(row: dict) -> None:
    """Refuse a row of a csv file that has more or fewer cells than the first line."""
    if "further" in row:
        raise ValueError("it has more cells than the first line")
    if None in row.values():
        raise ValueError("it has fewer cells than the first line")


def has_video_of_worldsense(row: dict) -> bool:
    return any(is_video_of_worldsense(value) for value in row.values())


def listed(keys) -> str:
    return ", ".join(sorted(keys))[:300]


# ---- 2. Fields of a row -------------------------------------------------------------------------


def is_missing(value) -> bool:
    """None, a blank text or NaN, as tables write an empty cell."""
    return value is None or value != value or isinstance(value, str) and not value.strip()


def as_text(value, what: str) -> str:
    """A text, or a number as a text. Raises: ValueError if it is empty or something else."""
    if is_missing(value):
        raise ValueError(f"{what} is empty")
    if isinstance(value, dict):
        raise ValueError(f"{what} is the object {shown(value)}, not a text or a number (with "
                         f"orient='records', pandas writes one row for each record)")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not isinstance(value, str) and not (is_number and math.isfinite(value)):
        raise ValueError(f"{what} is {shown(value)}, not a text or a number")
    return str(value).strip()


def text_of(row: dict, key: str) -> str:
    if key not in row or row[key] is None:
        raise ValueError(f"it has no {key!r}")
    return as_text(row[key], f"its {key!r}")


def name_of(row: dict, key: str) -> str:
    """An id or the name of a file.

    A number with a decimal point is refused: pandas turns 7 into 7.0 if another row has no number.
    """
    name = text_of(row, key)
    if isinstance(row[key], float):
        raise ValueError(f"its {key!r} is {name}, with a decimal point; write it as a text")
    return name


def seconds_of(row: dict, key: str) -> float | None:
    """A time in the video, or None. Raises: ValueError if it is not a number of seconds."""
    if is_missing(row.get(key)):
        return None
    text = as_text(row[key], f"its {key!r}")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"its {key!r} is {shown(text)}, not a number of seconds of at least 0")
    return seconds


def options_of(row: dict, key: str) -> list[str]:
    """The options of a question as the file has them, with or without letters in front.

    Raises: ValueError unless they are a list of at least two texts, all different and none empty.
    """
    options = row.get(key)
    if is_missing(options):
        raise ValueError(f"it has no {key!r}")
    if isinstance(options, dict):
        as_text(options, f"its {key!r}")            # raises, and says how pandas writes rows
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"its {key!r} are {shown(options)}, not a list of 2 to {len(LETTERS)}")
    texts = [as_text(option, f"option {n} of its {key!r}") for n, option in enumerate(options, 1)]
    for texts_compared in (texts, without_letters(texts)):
        if "" in texts_compared:
            raise ValueError(f"option {texts_compared.index('') + 1} of its {key!r} is empty")
        if len(set(texts_compared)) < len(texts_compared):
            raise ValueError(f"its {key!r} are {shown(options)}, and two of them are equal")
    return texts


def without_letters(options: list[str]) -> tuple[str, ...]:
    """Remove the letters in front of the options, if every option has its own, in order.

    A letter counts only if a space or the end follows its mark: "A.D." stays. If every option is a
    letter and nothing else, the options stay as they are.
    """
    marks = []
    for letter, option in zip(LETTERS, options):
        marks.append(re.match(rf"\(?{letter}[.):]+(\s+|$)", option))
    if not all(marks):
        return tuple(options)
    rests = tuple(option[mark.end():] for option, mark in zip(options, marks))
    return rests if any(rests) else tuple(options)


def position_by_text(text: str, choices: tuple[str, ...]) -> int | None:
    """The position of the choice with this text, or else of the only one that is `plain`ly equal.
    """
    if text in choices:
        return choices.index(text)
    alike = [n for n, choice in enumerate(choices) if plain(choice) == plain(text)]
    return alike[0] if len(alike) == 1 else None


def position_by_letter(text: str, choices: tuple[str, ...]) -> int | None:
    """The position of the choice that "B", "(B)" or "B. a boat" names.

    "B. a boat" names a choice only if its text is "a boat".
    """
    match = re.fullmatch(r"\(?([A-Z])(?:[.):]+(?:\s+(.*))?)?", text, re.DOTALL)
    if match is None or match[1] not in LETTERS[:len(choices)]:
        return None
    position = LETTERS.index(match[1])
    if match[2] and plain(match[2]) != plain(choices[position]):
        return None
    return position


def answer_by_text(answer: str, options: list[str]) -> str:
    """The choice that an answer names, in a format where answers are texts. A letter is also read.
    """
    choices = without_letters(options)
    if answer in options:
        return choices[options.index(answer)]
    found = {position_by_text(answer, choices), position_by_letter(answer, choices)} - {None}
    if len(found) > 1:
        raise ValueError(f"its answer {shown(answer)} is the letter of one choice and the text of "
                         f"another, of {shown(choices)}")
    if not found:
        raise ValueError(f"its answer {shown(answer)} is not one of the choices {shown(choices)}")
    return choices[found.pop()]


def answer_by_letter(answer: str, options: list[str]) -> str:
    """The choice that an answer names, in a format where answers are "B" or "B. a boat"."""
    choices = without_letters(options)
    position = position_by_letter(answer, choices)
    return answer_by_text(answer, options) if position is None else choices[position]


# ---- 3. Questions about the toy's world ---------------------------------------------------------


def toy_questions(n: int, seed: int = 0, noise: int | None = None
                  ) -> tuple[list[Record], dict[str, Callable]]:
    """n questions about clips that the training never draws.

    noise: see `Clip`.
    Returns: the records, and for the name of each video a function that writes it to a path.
    """
    records = []
    clips = {}
    first = 10**6 * seed
    for number in range(first, first + math.ceil(n / OF_A_CLIP)):
        clip = Clip(UNSEEN + number, 1 + number % 3, noise)
        video = f"{number}.mp4"
        clips[video] = clip.write
        asked = clip.sample_questions(OF_A_CLIP, random.Random(number))
        for k, q in enumerate(asked):
            records.append(Record(f"{number}-{k}", video, q.text, (), q.answer, q.kind))
    return records[:n], clips


# ---- 4. How choices are asked, and how answers are read -----------------------------------------


def is_yes_no(choices: tuple[str, ...]) -> bool:
    return sorted(choice.casefold() for choice in choices) == ["no", "yes"]


def with_choices(question: str, choices: tuple[str, ...]) -> str:
    """A question that asks for a letter, or for yes or no. Without choices it stays as it is.

    Source: the sentences "Respond with only the letter ..." and, for AVHBench, "Answer yes or no."
    are the release's. The layout is *ours*. The release does not add "Answer yes or no." if the
    question has it already. For Daily-Omni it adds one more sentence at each end of the request,
    and gives no letters to the options.
    """
    if not choices:
        return question
    if is_yes_no(choices):
        return f"{question} Answer yes or no."
    letters = LETTERS[:len(choices)]
    if len(letters) == 2:
        named = " or ".join(letters)
    else:
        named = f"{', '.join(letters[:-1])}, or {letters[-1]}"
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices)]
    return "\n".join([question, *lines,
                      f"Respond with only the letter ({named}) of the correct option."])


def first_tokens(processor: Processor, choices: tuple[str, ...]) -> Tensor:
    """The token with which each choice is answered, a letter or yes or no: int64[forms,choices].

    There are two forms, with a space in front and without. A form is used if each of its answers is
    a single token.
    """
    names = choices if is_yes_no(choices) else LETTERS[:len(choices)]
    forms = []
    for space in (" ", ""):
        tokens = [processor.tokenize([space + name]) for name in names]
        if all(len(ids) == 1 for ids in tokens):
            forms.append([ids[0] for ids in tokens])
    if not forms:
        raise ValueError(f"the tokenizer has no single token for {' or '.join(names)}; use "
                         f"--generate")
    return torch.tensor(forms)


def plain(text: str) -> str:
    """A text without what does not matter: capitals, articles, double spaces and end marks."""
    words = text.casefold().strip(" \t\n.!?,;:").split()
    without_articles = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(without_articles or words)


def chosen(text: str, choices: tuple[str, ...]) -> int | None:
    """The position of the choice that a generated text names. None: it names no choice.

    For yes and no, the first whole word of the two counts. For other choices, the text begins with
    a letter that stands alone or has one of . ) : after it, or it is the text of a choice. A text
    that names several letters, or repeats "yes or no", names no choice.
    Source: *ours*, except for the whole word, which is the release's. The release reads letters
    more loosely: a text that begins with A, (A), [A] or "Answer: A" is A. So "A boat." is A there.
    """
    if is_yes_no(choices):
        return chosen_word(text, choices)
    text = text.strip()
    letters = LETTERS[:len(choices)]
    by_text = position_by_text(text, choices)
    mark = re.match(r"\(?([A-Z])(?:[.):]+(?=\s|$)|$)", text)
    if mark is None or mark[1] not in letters:
        return by_text
    rest = text[mark.end():].strip()
    if rest and by_text is not None:            # "A. Huxley" may be the text of a choice
        return by_text
    position = letters.index(mark[1])
    repeated = choices[position]
    if rest.casefold().startswith(repeated.casefold()):
        rest = rest[len(repeated):]             # "Vitamin C" in "B. Vitamin C" does not name C
    others = letters_named(rest, letters) - {mark[1]}
    return None if others else position


def chosen_word(text: str, choices: tuple[str, ...]) -> int | None:
    text = text.casefold()
    first = re.search(r"\b(yes|no)\b", text)
    is_repeated_request = re.search(r"\b(yes|no)\s*(or|/)\s*(yes|no)\b", text)
    if first is None or is_repeated_request:
        return None
    return [choice.casefold() for choice in choices].index(first[0])


def letters_named(text: str, letters: str) -> set[str]:
    """The letters that stand alone in a text, except for the words "A" and "I" in a sentence."""
    found = set()
    for match in re.finditer(r"(?<![\w.'])([A-Z])(?![\w'])(?!\.\w)", text):
        goes_on = re.match(r"\s+(?!or\b|and\b)\w", text[match.end():])
        is_word = match[1] in "AI" and goes_on
        if match[1] in letters and not is_word:
            found.add(match[1])
    return found
