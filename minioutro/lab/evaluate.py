"""Does OutRo help? The same questions to the plain model and to OutRo, compared in pairs.

    python -m minioutro.lab.evaluate QUESTIONS --videos FOLDER --out FILE
    torchrun --nproc-per-node 2 -m minioutro.lab.evaluate QUESTIONS --videos FOLDER --out FILE
    python -m minioutro.lab.evaluate --report FILE.0 FILE.1

An interrupted run goes on with the same command. torchrun's processes share the videos.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from minioutro import OutRo, Processor, Video, VideoLM, load, read_video
from minioutro.lab.compare import draw_differences, summarise, table_of_differences
from minioutro.lab.figures import save
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
    add_options,
    numbers,
    one_line_errors,
    read_json_lines,
    writable_folder,
)
from minioutro.weights import HUB_MODEL, TOY

SWITCHES = {"relax": {"align": False}, "align": {"relax": False}, "both": {}}


def variants_of(names: str, gammas: list[float], **rule) -> dict[str, OutRo | None]:
    """The baseline, and OutRo by name; with several gammas, a variant for each."""
    found = {"baseline": None}
    for name, gamma in product(names.split(","), gammas):
        if name in SWITCHES:
            label = f"{name} {gamma:g}" if len(gammas) > 1 and name != "relax" else name
            found[label] = OutRo(gamma=gamma, **SWITCHES[name], **rule)
        elif name != "baseline":
            raise ValueError(f"--variants {name!r} is none of baseline, {', '.join(SWITCHES)}")
    return found


def answer(model: VideoLM, processor: Processor, record: Record, video: Video, features: Tensor,
           outro: OutRo | None, generate: bool = False, max_new_tokens: int = 64) -> dict:
    """The greedy answer; or the choice whose letter is the likeliest first token, and all log p."""
    ids = processor.tokenize(processor.pieces(video, with_choices(record.question, record.choices)))
    ids = torch.tensor([ids], device=features.device)                                       # (1,S)
    if record.choices and not generate:
        hidden = model.hidden_states(ids, features=features, outro=outro)
        log_p = model.head(hidden[:, -1]).float().log_softmax(-1)[0].cpu()                    # (V,)
        log_p = log_p[first_tokens(processor, record.choices)].logsumexp(0)             # (choices,)
        if not log_p.isfinite().all():
            raise ValueError("the model computes no finite numbers; try another dtype")
        choice = record.choices[log_p.argmax()]
        return {"answer": choice, "right": choice == record.answer, "scores": log_p.tolist()}
    text = processor.decode(model.generate(ids, features=features, outro=outro,
                                           max_new_tokens=max_new_tokens))
    if not record.choices:
        return {"answer": text, "right": plain(text) == plain(record.answer)}
    choice = chosen(text, record.choices)
    return {"answer": text, "right": choice == record.answer, "unparsed": choice is None}


@torch.inference_mode()
def ask(model: VideoLM, processor: Processor, records: list[Record],
        variants: dict[str, OutRo | None], folder: Path, clips={}, done=frozenset(),
        fps: float | None = None, frames: int | None = None, **how) -> Iterator[dict]:
    """Yield an answer for each question and variant; what cannot be asked has an "error".

    Each video, or part of one, is decoded and encoded once. clips: what writes those that are not
    in the folder yet. done: pairs of id and variant that are left out. how: see `answer`.
    """
    parts, device = defaultdict(list), next(model.parameters()).device
    for record in records:
        parts[record.video, record.start, record.end] += [
            (record, name) for name in variants if (record.id, name) not in done]
    for (file, start, end), questions in parts.items():
        path, problem = folder / file, None
        try:
            if questions:
                if file in clips and not path.exists():
                    clips[file](path)
                video = read_video(path, fps or processor.fps, frames or processor.max_frames,
                                   processor.longest_edge, start, end)
                features = model.encode(processor(video, "?").pixel_values.to(device))
        except (ValueError, OSError) as error:
            problem = error
        for record, name in questions:
            line = {"id": record.id, "variant": name, "answer": "", "right": False,
                    "unparsed": False, "error": None, "task": record.task, "video": record.video}
            try:
                if problem:
                    raise problem
                line |= answer(model, processor, record, video, features, variants[name], **how)
            except (ValueError, OSError) as error:
                line["error"] = " ".join(str(error).split())
            yield line


def read_answers(path: str, settings: str | None = None) -> tuple[list[dict], int]:
    """The answers that an earlier run wrote to a file, and how many bytes their whole lines are.
    Raises: ValueError if it holds something else, or answers under other settings than these."""
    data = Path(path).read_bytes()
    whole = data.rfind(b"\n") + 1                                # a killed run leaves half a line
    lines = read_json_lines(path, data[:whole].decode(errors="replace"))
    if not b'{"id": '.startswith(data[whole:whole + 7]) or any(
            type(line) is not dict or {"id", "variant", "right", "settings"} - line.keys()
            for line in lines):
        raise ValueError(f"{path} is no file of answers; give another")
    lines = [{"video": line["id"], "task": "", "error": None, "unparsed": False, **line}
             for line in lines]
    for line in lines:
        settings = settings or line["settings"]
        if line["settings"] != settings:
            there, here = (set(text.split("; ")) for text in (line["settings"], settings))
            raise ValueError(f"{path} is of another run, with {', '.join(sorted(there - here))} "
                             f"instead of {', '.join(sorted(here - there))}; give another file")
    return lines, whole


def run(args: argparse.Namespace, temporary: str) -> list[dict]:
    """Ask what has no answer in --out yet. Returns: all answers."""
    notes, clips, videos = [], {}, Path(temporary)
    if args.toy:
        records, clips = toy_questions(args.toy, args.seed, args.noise)
        torch.set_num_threads(1)                # its tensors are too small to be shared
    else:
        records = read_questions(args.questions, args.format, args.answers, notes)
        videos = Path(args.videos or Path(args.questions).parent)
        if not any((videos / record.video).exists() for record in records):
            raise ValueError(f"{videos} has no {records[0].video}, nor others; give --videos")
    rule = {name: vars(args)[name] for name in "temperature median_multiple abs_threshold".split()}
    variants = variants_of(args.variants, list(map(float, args.gamma.split(","))), **rule)
    args.questions = hashlib.sha256(repr(records).encode()).hexdigest()[:8]
    settings = "; ".join(f"{name} {getattr(args, name)}" for name in (
        "seed noise questions model revision dtype frames fps generate max_new_tokens variants "
        "gamma").split() + [*rule])
    records = records[:args.limit]
    if args.world > 1:                                                      # started by torchrun
        if args.out == os.devnull:
            raise ValueError("each process needs a file for its answers; give --out")
        mine = list(dict.fromkeys(record.video for record in records))[args.rank::args.world]
        records = [record for record in records if record.video in mine]
        args.out += f".{args.rank}"
        args.device += f":{os.environ.get('LOCAL_RANK', args.rank)}" * (args.device == "cuda")
    answers, whole = read_answers(args.out, settings) if Path(args.out).exists() else ([], 0)
    old = {(line["id"], line["variant"]): line for line in answers}
    done = {key for key, line in old.items() if not line["error"]}
    model, processor = load(args.model or (TOY if args.toy else HUB_MODEL), args.revision,
                            args.device, getattr(torch, args.dtype))
    print("\n".join([*notes, f"{len(records)} questions"]), file=sys.stderr)
    with open(args.out, "a", encoding="utf-8") as file:
        if args.out != os.devnull:
            file.truncate(whole)
        asked = ask(model, processor, records, variants, videos, clips, done, args.fps, args.frames,
                    generate=args.generate, max_new_tokens=args.max_new_tokens)
        asked = tqdm(asked, total=len(records) * len(variants), initial=len(done), disable=None)
        right, failed = defaultdict(list), set()
        for line in asked:
            line["settings"] = settings
            if line != old.get((line["id"], line["variant"])):              # else the same error
                file.write(json.dumps(line) + "\n")
                file.flush()
                answers.append(line)
            failed |= {line["error"]} - {None}
            right[line["variant"]].append(line["right"])
            asked.set_postfix({name: f"{sum(x) / len(x):.1%}" for name, x in right.items()})
    print("".join(f"{error}\n" for error in sorted(failed)[:5]), end="", file=sys.stderr)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minioutro.lab.evaluate", usage=argparse.SUPPRESS,       # an error is one line
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, numbers(1, 10**9 - 1, int)
    add("questions", nargs="?", help="a file of questions")
    add("--videos", metavar="DIR", help="folder of the videos (default: that of the questions)")
    add("--format", help=f"of the questions: {', '.join(FORMATS)} (default: told by the keys)")
    add("--answers", metavar="FILE", help="EgoSchema's answers (default: subset_answers.json)")
    add("--toy", type=count, metavar="N", help="ask N questions about the toy's world instead")
    add("--noise", type=numbers(0, 255, int), help="of the toy's clips (default: 5 to 20)")
    add("--seed", type=numbers(0, 10**9, int), default=0, help="of clips and resampling")
    add("--limit", type=count, metavar="N", help="ask the first N questions alone")
    add("--variants", default="baseline,relax,align,both", help="default: %(default)s")
    add("--gamma", default="3", metavar="G[,G...]", help="of the alignment (default: %(default)s)")
    add("--generate", action="store_true", help="generate choices instead of comparing letters")
    add_options(parser)
    add("--out", metavar="FILE", default=os.devnull, help="append answers, and go on from them")
    add("--report", nargs="+", metavar="FILE", help="ask nothing; report these answers together")
    args = parser.parse_args()
    args.rank, args.world = (int(os.environ.get(*x)) for x in (("RANK", 0), ("WORLD_SIZE", 1)))
    with one_line_errors("evaluate.py"), tempfile.TemporaryDirectory() as temporary:
        if bool(args.questions) + bool(args.toy) + bool(args.report) != 1:
            raise ValueError("give one of these: a file of questions, --toy N, or --report FILE")
        if args.figures:
            args.figures = writable_folder("--figures", args.figures)
        if args.report:
            answers = []
            for path in args.report:
                answers += read_answers(path, answers[0]["settings"] if answers else None)[0]
        else:
            answers = run(args, temporary)
            if args.world > 1:
                return
        seed = (answers[0]["settings"] if answers else "").partition("seed ")[2].split(";")[0]
        found = summarise(answers, int(seed or args.seed))
        if args.figures:
            save({"differences": draw_differences(found)}, args.figures)
        print(json.dumps(found) if args.json else table_of_differences(found))


if __name__ == "__main__":
    main()
