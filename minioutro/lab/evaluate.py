"""Does OutRo help? Ask the plain model and OutRo the same questions, and compare in pairs.

    python -m minioutro.lab.evaluate QUESTIONS --videos FOLDER --out FILE
    torchrun --nproc-per-node 2 -m minioutro.lab.evaluate QUESTIONS --videos FOLDER --out FILE
    python -m minioutro.lab.evaluate --report FILE.0 FILE.1

Only one comparison is tested: the baseline with "outro", which is OutRo with the constants of its
release. Other variants are for exploration: they get a difference and an interval, but no test.
An interrupted run goes on with the same command. The processes of torchrun share the videos.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minioutro import OutRo, Processor, Video, VideoLM, load, read_video
from minioutro.lab.compare import counted, summarise, table_of_differences
from minioutro.lab.questions import (
    FORMATS,
    Record,
    chosen,
    first_tokens,
    plain,
    read_questions,
    toy_questions,
    with_choices,
)
from minioutro.support.cli import (
    COUNT,
    STRENGTH,
    Parser,
    add_model_options,
    add_outro_constants,
    add_video_options,
    escaped,
    not_empty,
    number,
    print_json,
    progress,
    read_json_lines,
    run_command,
    writable_folder,
)
from minioutro.weights import HUB_MODEL, TOY

SWITCHES = {"outro": {}, "relax": {"align": False}, "align": {"relax": False}}
MOST_SAMPLES = 4096                 # values of each tensor that go into a fingerprint
ERRORS_SHOWN = 5
OF_ONE_QUESTION = (ValueError, OSError, torch.OutOfMemoryError)    # the next question may go well


# ---- 1. Asking ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class How:
    """How a question is asked. None: the checkpoint's own setting."""
    fps: float | None = None
    frames: int | None = None       # the most frames of a video
    generate: bool = False          # generate a text even if the question has choices
    max_new_tokens: int = 64


def variants_of(names: Sequence[str] = (), gammas: Sequence[float] = (),
                **constants) -> dict[str, OutRo | None]:
    """The variants to ask, by name. The first two are always "baseline" and "outro".

    names: "relax", "align" or both: further variants in which only this switch is on.
    gammas: strengths at which each variant that aligns is asked as well, as "outro gamma 0.5".
    constants: further fields of every OutRo.
    """
    for name in names:
        if name != "baseline" and name not in SWITCHES:
            raise ValueError(f"--variants {name!r} is not one of baseline, {', '.join(SWITCHES)}")
    switched = {name: SWITCHES[name] for name in SWITCHES if name == "outro" or name in names}
    found = {"baseline": None}
    for name, switches in switched.items():
        found[name] = OutRo(**switches, **constants)
    for name, switches in switched.items():
        for gamma in gammas:
            outro = OutRo(gamma=gamma, **switches, **constants)
            if outro.align and outro not in found.values():
                found[f"{name} gamma {gamma:g}"] = outro
    return found


def score_choices(model: VideoLM, processor: Processor, choices: tuple[str, ...],
                  input_ids: Tensor, features: Tensor, outro: OutRo | None) -> Tensor:
    """For each choice, log p that the answer begins with its letter, or with its yes or no."""
    hidden = model.hidden_states(input_ids, features=features, outro=outro)             # (1,S,C)
    log_p = model.head(hidden[:, -1]).float().log_softmax(-1)[0].cpu()                  # (V,)
    scores = log_p[first_tokens(processor, choices)].logsumexp(0)                       # (choices,)
    if not scores.isfinite().all():
        raise ValueError("the model computes no finite numbers; try another dtype")
    return scores


def answer(model: VideoLM, processor: Processor, record: Record, video: Video, features: Tensor,
           outro: OutRo | None, how: How = How()) -> dict:
    """Answer one question with the likeliest choice, or with a text that is generated greedily.

    Returns: answer and right. For the likeliest choice also scores, the log p of each choice. For a
    generated text also unparsed: whether it names no choice.
    """
    pieces = processor.pieces(video, with_choices(record.question, record.choices))
    input_ids = torch.tensor([processor.tokenize(pieces)], device=features.device)      # (1,S)
    if record.choices and not how.generate:
        scores = score_choices(model, processor, record.choices, input_ids, features, outro)
        position = scores.argmax().item()
        return {"answer": record.choices[position], "right": is_right(position, record),
                "scores": scores.tolist()}
    token_ids = model.generate(input_ids, features=features, outro=outro,
                               max_new_tokens=how.max_new_tokens)
    text = processor.decode(token_ids)
    if not record.choices:
        return {"answer": text, "right": plain(text) == plain(record.answer)}
    position = chosen(text, record.choices)
    return {"answer": text, "right": is_right(position, record), "unparsed": position is None}


def is_right(position: int | None, record: Record) -> bool:
    return position == record.choices.index(record.answer)


@torch.inference_mode()
def ask(model: VideoLM, processor: Processor, records: list[Record],
        variants: Mapping[str, OutRo | None], folder: Path,
        clips: Mapping[str, Callable[[Path], None]] | None = None,
        done: Collection[tuple[str, str]] = (), how: How = How()) -> Iterator[dict]:
    """Yield an answer for each question and variant. If one cannot be asked, it has an "error".

    Each video, or part of one, is decoded and encoded once for all of its questions.
    clips: functions that write videos which are not in the folder yet, by the name of the video.
    done: pairs of id and variant that are not asked again.
    """
    device = next(model.parameters()).device
    fps = processor.fps if how.fps is None else how.fps
    frames = processor.max_frames if how.frames is None else how.frames
    questions_of = defaultdict(list)
    for record in records:
        for name in variants:
            if (record.id, name) not in done:
                questions_of[record.video, record.start, record.end].append((record, name))
    for (file, start, end), questions in questions_of.items():
        problem = None
        try:
            path = folder / file
            if clips and file in clips and not path.exists():
                clips[file](path)
            video = read_video(path, fps, frames, processor.longest_edge, start, end)
            features = model.encode(processor(video, "?").pixel_values.to(device))
        except OF_ONE_QUESTION as error:
            problem = error
        for record, name in questions:
            line = {"id": record.id, "variant": name, "answer": "", "right": False,
                    "unparsed": False, "error": None, "task": record.task, "video": record.video}
            try:
                if problem:
                    raise problem
                line |= answer(model, processor, record, video, features, variants[name], how)
            except OF_ONE_QUESTION as error:
                line["error"] = " ".join(str(error).split())
            yield line


# ---- 2. Files of answers ------------------------------------------------------------------------

NEEDED = {"id": str, "variant": str, "right": bool, "settings": str}    # fields of each line
OPTIONAL = {"video": str, "task": str, "unparsed": bool}                # fields that may be absent


def check_regular(path: Path) -> None:
    """Raise ValueError unless this is an ordinary file or nothing yet. A pipe may never end."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file of answers")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe or a device; give a file of answers")


def whole_lines(data: bytes) -> int:
    """The number of bytes up to the last line break. A killed run may leave half a line after it.
    """
    return data.rfind(b"\n") + 1


def read_answers(path: Path) -> list[dict]:
    """The answers of an earlier run, all under the same settings.

    Raises: ValueError if the file holds something else, or the answers of two different runs.
    """
    check_regular(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    data = path.read_bytes()
    whole = whole_lines(data)
    half_a_line = data[whole:]
    begins = b'{"id": '
    if not half_a_line.startswith(begins[:len(half_a_line)]):
        raise ValueError(f"{path} is not a file of answers; give another file")
    lines = read_json_lines(path, data[:whole].decode(errors="replace"))
    answers = [checked_line(path, line) for line in lines]
    for line in answers:
        check_settings(path, line["settings"], answers[0]["settings"])
    return answers


def checked_line(path: Path, line) -> dict:
    """A line of a file of answers with its optional fields. Raises: ValueError if it is not one."""
    if not isinstance(line, dict) or not NEEDED.keys() <= line.keys():
        raise ValueError(f"{path} is not a file of answers; give another file")
    line = {"video": str(line["id"]), "task": "", "error": None, "unparsed": False, **line}
    if type(line["id"]) is int:
        line["id"] = str(line["id"])
    for key, kind in {**NEEDED, **OPTIONAL}.items():
        if not isinstance(line[key], kind):
            raise ValueError(f"{path}: {key} of the question {line['id']!r} is {line[key]!r}; "
                             f"correct it")
    return line


def check_settings(path: Path, there: str, here: str) -> None:
    """Raises: ValueError that names the settings in which two runs differ."""
    if there == here:
        return
    of_file = there.split("; ")
    of_other = here.split("; ")
    only_there = ", ".join(x for x in of_file if x not in of_other)
    only_here = ", ".join(x for x in of_other if x not in of_file)
    raise ValueError(f"{path} is from another run, with {only_there or 'fewer settings'} instead "
                     f"of {only_here or 'nothing'}; give another file")


def read_reports(paths: Sequence[str]) -> list[dict]:
    """The answers of several files, which the processes of one run have written."""
    answers = []
    for path in map(Path, paths):
        of_file = read_answers(path)
        if answers and of_file:
            check_settings(path, of_file[0]["settings"], answers[0]["settings"])
        answers += of_file
    return answers


def seed_of(answers: list[dict], otherwise: int) -> int:
    """The seed of the run that wrote the answers."""
    match = re.search(r"\bseed (\d+)", answers[0]["settings"]) if answers else None
    return int(match[1]) if match else otherwise


# ---- 3. One run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """The part of the work that this process does, if torchrun has started several."""
    rank: int = 0
    world: int = 1
    local_rank: int = 0             # the number of its GPU

    @classmethod
    def of_environment(cls) -> "Share":
        """Read RANK and WORLD_SIZE, but only under torchrun. Clusters set them for other reasons.
        """
        if not os.environ.get("TORCHELASTIC_RUN_ID"):
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        values = [os.environ.get(name, "").strip() for name in names]
        rank, world, local_rank = (int(value) if value else None for value in values)
        if rank is None or world is None:
            return cls()
        return cls(rank, world, rank if local_rank is None else local_rank)

    def records(self, records: list[Record]) -> list[Record]:
        """The questions for this process. Questions about one video stay together."""
        videos = list(dict.fromkeys(record.video for record in records))
        mine = set(videos[self.rank::self.world])
        return [record for record in records if record.video in mine]


@dataclass
class Source:
    """The questions, and where their videos are."""
    records: list[Record]
    folder: Path
    clips: dict[str, Callable[[Path], None]]
    notes: list[str]


def read_source(args: argparse.Namespace, temporary: Path) -> Source:
    """The toy's questions, whose clips are written into a temporary folder, or those of a file."""
    if args.toy:
        records, clips = toy_questions(args.toy, args.seed, args.noise)
        return Source(records, temporary, clips, [])
    notes = []
    records = read_questions(args.questions, args.format, notes)
    folder = Path(args.videos) if args.videos else Path(args.questions).parent
    if not any(is_there(folder / record.video) for record in records):
        raise ValueError(f"{folder} has neither {records[0].video} nor any of the other videos; "
                         f"give their folder as --videos")
    return Source(records, folder, {}, notes)


def is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):       # a name that is too long, for example
        return False


def file_of_answers(name: str | None, share: Share) -> Path | None:
    """The file that this process writes to. None: the answers are not kept.

    Raises: ValueError if the file cannot be written to.
    """
    if name is None or name == os.devnull:
        if share.world > 1:
                raise ValueError("each process needs a file for its answers; give --out")
        return None
    path = Path(name).expanduser()
    check_regular(path)
    if share.world > 1:
        path = path.with_name(f"{path.name}.{share.rank}")
        check_regular(path)
    if not path.parent.is_dir():
        raise ValueError(f"--out {name}: there is no folder {path.parent}; make the folder first")
    writable_folder("--out", path.parent)
    return path


def fingerprint(model: VideoLM, processor: Processor) -> str:
    """Identify a checkpoint, wherever it lies: a hash of samples of its weights, of its tokenizer
    and of its settings for videos."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        every = max(1, tensor.numel() // MOST_SAMPLES)
        values = tensor.flatten()[::every].cpu().contiguous()
        found.update(f"{name} {list(tensor.shape)} ".encode())
        found.update(bytes(values.view(torch.uint8).tolist()))
    found.update(processor.tokenizer.to_str().encode())
    found.update(repr((processor.size, processor.longest_edge, processor.tokens_per_frame,
                       processor.fps, processor.max_frames)).encode())
    return found.hexdigest()[:16]


def settings_of(args: argparse.Namespace, records: list[Record], variants: Collection[str],
                model: VideoLM, processor: Processor) -> str:
    """Everything that the answers of a run depend on, as one line. So --limit and --device are not
    part of it."""
    settings = {
        "seed": args.seed,
        "noise": args.noise,
        "questions": hashlib.sha256(repr(records).encode()).hexdigest()[:8],
        "weights": fingerprint(model, processor),
        "dtype": args.dtype,
        "frames": args.frames,
        "fps": args.fps,
        "generate": args.generate,
        "max_new_tokens": args.max_new_tokens,
        "variants": ",".join(variants),
        "temperature": args.temperature,
        "median_multiple": args.median_multiple,
        "abs_threshold": args.abs_threshold,
    }
    return "; ".join(f"{name} {value}" for name, value in settings.items())


def load_model(args: argparse.Namespace, share: Share) -> tuple[VideoLM, Processor]:
    """The model that --model names. The default is the toy for its own clips, else the hub's."""
    name = args.model
    if name is None:
        name = TOY if args.toy else HUB_MODEL
    device = args.device
    if device == "cuda" and share.world > 1:
        device = f"cuda:{share.local_rank}"
    return load(name, args.revision, device, getattr(torch, args.dtype))


def run(args: argparse.Namespace, temporary: Path, share: Share) -> list[dict]:
    """Ask the questions that have no answer in --out yet. Returns: all answers, earlier ones first.
    """
    variants = variants_of(args.variants, args.gamma, temperature=args.temperature,
                           median_multiple=args.median_multiple, abs_threshold=args.abs_threshold)
    source = read_source(args, temporary)
    out = file_of_answers(args.out, share)
    earlier = [] if out is None or not out.exists() else read_answers(out)
    if args.toy:
        torch.set_num_threads(1)        # the toy's tensors are too small for several threads
    model, processor = load_model(args, share)
    settings = settings_of(args, source.records, variants, model, processor)
    if earlier:
        check_settings(out, earlier[0]["settings"], settings)

    all_records = source.records[:args.limit]
    records = share.records(all_records)
    notes = [*source.notes, counted(len(records), "question")]
    if share.world > 1:
        notes[-1] = (f"process {share.rank} of {share.world}: {len(records)} of "
                     f"{counted(len(all_records), 'question')}; --report all files when all "
                     f"processes have ended")
    for note in notes:
        print(escaped(note), file=sys.stderr)

    last = {(line["id"], line["variant"]): line for line in earlier}
    done = {pair for pair, line in last.items() if not line["error"]}
    how = How(args.fps, args.frames, args.generate, args.max_new_tokens)
    asked = ask(model, processor, records, variants, source.folder, source.clips, done, how)
    total = len(records) * len(variants)
    lines = with_running_scores(asked, total, len(done))
    answers = write_answers(lines, out, settings, last)
    return earlier + answers


def with_running_scores(asked: Iterator[dict], total: int, done: int) -> Iterator[dict]:
    """Pass the answers on. A progress bar shows the share of right answers of each variant."""
    n, right = Counter(), Counter()
    bar = progress(asked, "questions", total=total, initial=done)
    for line in bar:
        n[line["variant"]] += 1
        right[line["variant"]] += line["right"]
        bar.set_postfix({name: f"{right[name] / n[name]:.1%}" for name in n})
        yield line


def write_answers(lines: Iterator[dict], out: Path | None, settings: str,
                  last: Mapping[tuple[str, str], dict]) -> list[dict]:
    """Append answers to a file as they come, and print the first errors at the end.

    last: earlier answers. An error that is in the file already is not written again.
    """
    answers = []
    errors = set()
    with open(os.devnull if out is None else out, "ab") as file:
        if out is not None:
            file.truncate(whole_lines(out.read_bytes()))
        for line in lines:
            line["settings"] = settings
            if line["error"]:
                errors.add(line["error"])
            if line != last.get((line["id"], line["variant"])):
                text = json.dumps(line, allow_nan=False)
                file.write(f"{text}\n".encode())
                file.flush()
                answers.append(line)
    for error in sorted(errors)[:ERRORS_SHOWN]:
        print(escaped(error), file=sys.stderr)
    if len(errors) > ERRORS_SHOWN:
        print(f"and {len(errors) - ERRORS_SHOWN} other errors", file=sys.stderr)
    return answers


# ---- 4. The command -----------------------------------------------------------------------------


def names_of(text: str) -> list[str]:
    """A type for argparse: names, with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def strengths_of(text: str) -> list[float]:
    """A type for argparse: numbers, with commas between them."""
    return [STRENGTH(part) for part in names_of(text)]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m minioutro.lab.evaluate", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("questions", nargs="?", type=not_empty, help="a file of questions")
    add("--videos", type=not_empty, metavar="DIR",
        help="folder of the videos (default: the folder of the questions)")
    add("--format", choices=tuple(FORMATS),
        help="format of the questions (default: recognised by the keys)")
    add("--toy", type=COUNT, metavar="N",
        help="instead of a file, ask N questions about the toy's own clips")
    add("--noise", type=number(0, 255, int), metavar="N",
        help="noise in the toy's clips, from 0 to 255 (default: 5 to 20)")
    add("--seed", type=number(0, 10**9, int), default=0, metavar="N",
        help="seed of the toy's clips and of the intervals (default: %(default)s)")
    add("--limit", type=COUNT, metavar="N", help="ask only the first N questions")
    add("--variants", type=names_of, default=[], metavar="NAME[,NAME]",
        help="ask further variants, which are not tested: relax, align or both of them")
    add("--gamma", type=strengths_of, default=[], metavar="G[,G]",
        help="ask further variants, which are not tested, with these strengths of the alignment")
    add("--generate", action="store_true",
        help="generate a text for questions with choices, instead of comparing their letters")
    add("--max-new-tokens", type=COUNT, default=64, metavar="N",
        help="end an answer after N tokens (default: %(default)s)")
    add_model_options(parser)
    add_video_options(parser)
    add_outro_constants(parser)
    add("--out", type=not_empty, metavar="FILE",
        help="append the answers to this file, and do not repeat those that it already has")
    add("--report", nargs="+", type=not_empty, metavar="FILE",
        help="ask nothing, and report all answers in these files as those of one run")
    add("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args()
    given = [what for what in (args.questions, args.toy, args.report) if what is not None]
    if len(given) != 1:
        parser.error("give one of these: a file of questions, --toy N, or --report FILE")
    return args


def main() -> None:
    args = parse_arguments()
    if args.report:
        answers = read_reports(args.report)
    else:
        share = Share.of_environment()
        with tempfile.TemporaryDirectory() as temporary:
            answers = run(args, Path(temporary), share)
        if share.world > 1:
            return                      # the answers of the other processes are missing
    found = summarise(answers, seed_of(answers, args.seed))
    if args.json:
        print_json(found)
    else:
        print(table_of_differences(found))


if __name__ == "__main__":
    run_command(main, "evaluate.py", "with --out, the same command goes on where it stopped")
