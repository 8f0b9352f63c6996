"""Damaged videos, senseless checkpoints and odd questions: python tests/by_hand/fuzz.py --minutes 10 --seed 1

Each input is asked about by run.py's own `main`, in a process that may die without harm. It must end in
an answer, or in one line on stderr and exit code 2, within a minute. The first input that does not is
saved in a folder of its own, with its number: `--seed S --first N` makes it again.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import av
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
TOY = ROOT / "minioutro" / "toy"
SECONDS = 60                            # the most that one input may take

# ---- videos and pictures, damaged ----

VIDEOS = [("mp4", "libx264"), ("mov", "mpeg4"), ("mkv", "ffv1"), ("mkv", "libx264"), ("avi", "mjpeg"),
          ("avi", "mpeg4"), ("mpg", "mpeg1video"), ("ts", "mpeg2video"), ("wmv", "wmv2"), ("flv", "flv"),
          ("nut", "mpeg4"), ("webm", "libvpx"), ("mxf", "mpeg2video")]
PICTURES = ["png", "jpg", "webp", "gif", "tiff", "bmp", "ico", "avif"]


def picture(rng, n=0):
    image = Image.new("RGB", (48, 32), tuple(rng.randrange(256) for _ in range(3)))
    image.paste((20 * n % 256, 200, 50), (n % 40, 4, n % 40 + 8, 20))
    return image


def write_video(path, codec, rng):
    with av.open(str(path), "w") as file:
        # one thread and plain C: the same seed is the same file
        options = {"x264-params": "asm=0"} if codec == "libx264" else {}
        stream = file.add_stream(codec, rate=25, options=options)
        stream.codec_context.thread_count = 1
        stream.width, stream.height = 48, 32
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for n in range(rng.choice((1, 12, 30))):
            file.mux(stream.encode(av.VideoFrame.from_image(picture(rng, n))))
        file.mux(stream.encode())


def write_picture(path, rng):
    frames = [picture(rng, n) for n in range(rng.choice((1, 1, 4)))]
    several = path.suffix in (".gif", ".webp", ".png", ".tiff", ".avif") and len(frames) > 1
    more = {"save_all": True, "append_images": frames[1:], "duration": 100} if several else {}
    frames[0].save(path, **more)


def damage(data, rng):
    """A few of: bytes changed, a piece cut out, doubled, zeroed, moved, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 5, 20))):
        if not data:
            break
        # headers stand at the ends, and are what readers believe
        span = len(data) if rng.random() < 0.5 else min(len(data), 200)
        a = rng.randrange(span) if rng.random() < 0.7 else len(data) - 1 - rng.randrange(span)
        b = min(len(data), a + rng.choice((1, 1, 2, 4, 8, 64, 1000)))
        kind = rng.randrange(7)
        if kind < 3:
            data[a:b] = rng.choice((bytes(b - a), b"\xff" * (b - a), rng.randbytes(b - a)))
        elif kind == 3:
            data[a] ^= 1 << rng.randrange(8)
        elif kind == 4:
            del data[a:b]
        elif kind == 5:
            data[a:a] = data[a:b]
        else:
            del data[a:]
    return bytes(data)


def video_case(folder, rng):
    kind = rng.randrange(len(VIDEOS) + len(PICTURES))
    if kind < len(VIDEOS):
        muxer, codec = VIDEOS[kind]
        path = folder / f"clip.{muxer}"
        write_video(path, codec, rng)
    else:
        path = folder / f"picture.{PICTURES[kind - len(VIDEOS)]}"
        write_picture(path, rng)
    path.write_bytes(damage(path.read_bytes(), rng))
    if rng.random() < 0.1:                                  # under another name
        path = path.rename(folder / rng.choice(("clip", "a b.mp4", "x.txt", "%d.png", "-clip.gif", "é🙂.mkv")))
    return [f"./{path.name}", "What?", "--model", str(TOY)]


# ---- checkpoints, damaged or senseless ----

VALUES = [None, True, False, 0, 1, -1, 2, 3, 7, 10**5, 2**31, 2**63, 2**70, 10**400, 0.5, -0.5, 1e-300, 1e308,
          float("nan"), float("inf"), "", "64", "default", "é", [], [1], [[]], {}, {"longest_edge": 64},
          {"rope_type": "default"}, {"rope_type": "yarn"}, ["full_attention"] * 8]
FIELDS = ["rope_scaling", "layer_types", "sliding_window", "repetition_penalty", "no_repeat_ngram_size", "eos_token_id",
          "image_mean", "image_std", "do_rescale", "resample", "size", "tie_word_embeddings", "num_heads"]


def places(value, path=()):
    """The path of every value in nested objects and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def change_json(path, rng):
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, (dict, list)):
        return
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        inside = [path for path in places(content) if path]
        if not inside:
            return
        *way, last = rng.choice(inside)
        inner = content
        for key in way:
            inner = inner[key]
        kind = rng.randrange(6)
        if kind == 0 and isinstance(inner, dict):
            inner.pop(last, None)
        elif kind == 1 and isinstance(inner, dict):
            inner[rng.choice(FIELDS)] = rng.choice(VALUES)
        else:
            inner[last] = rng.choice(VALUES)
    path.write_text(json.dumps(content), encoding="utf-8")


def checkpoint_case(folder, rng):
    model = shutil.copytree(TOY, folder / "model", ignore=shutil.ignore_patterns("*.mp4", "*.md"),
                            copy_function=shutil.copyfile)
    model.chmod(0o755)          # that of a read-only checkout is read-only as well
    settings = sorted(model.glob("*.json"))
    for _ in range(rng.choice((1, 1, 2))):
        path, kind = rng.choice(settings), rng.randrange(12)
        if kind < 8:
            small = [p for p in settings if p.name != "tokenizer.json"] if kind < 7 else settings
            path = rng.choice(small)
            if path.exists():
                try:
                    change_json(path, rng)
                except (ValueError, RecursionError):        # damaged before
                    path.unlink()
        elif kind == 8 and path.exists():
            path.write_bytes(damage(path.read_bytes(), rng))
        elif kind == 9:
            path.write_text(rng.choice(("[" * 100_000, "9" * 5000, '{"a": ' + "9" * 5000 + "}", "null", "", "\x00",
                                        '{"a":' * 50_000, "[]", '"x"', "{}")))
        elif kind == 10:
            path.unlink(missing_ok=True)
        else:
            weights = model / "model.safetensors"
            weights.write_bytes(damage(weights.read_bytes(), rng))
    return [str(TOY / "clip.mp4"), "What?", "--model", "model"]


# ---- questions and flags ----

PIECES = ["<image>", "<end_of_utterance>", "\n", "\r", "\t", "\x1b[31m", "\x00"[:0], "\u202e", "\udce9", "🙂", "日本", "é",
          "e\u0301", "a" * 500, " ", "<|im_start|>", "\ufeff", "\x7f", "%s", "'", '"', "\\", "{}", "-", "?", "\U0010ffff"]
FLAGS = {"--frames": ["1", "3", "64", "999", "0", "-1", "9" * 400, "1e3", "٣"],
         "--fps": ["0.1", "1", "1000", "1e308", "1e-308", "nan", "inf", "0", "-1"],
         "--gamma": ["0", "3", "1e6", "1e38", "1e308", "nan"], "--temperature": ["0.1", "1e-300", "1e300", "0"],
         "--median-multiple": ["0", "1e-30", "5", "1e308"], "--abs-threshold": ["0", "5", "1e308"],
         "--dtype": ["bfloat16", "float16"], "--max-new-tokens": ["1", "5", "2000"],
         "--device": ["cpu", "tpu"], "--no-relax": [], "--no-align": []}


def question_case(folder, rng):
    question = "".join(rng.choice(PIECES) for _ in range(rng.randrange(9))) or "?"
    flags = []
    for flag in rng.sample(sorted(FLAGS), rng.randrange(4)):
        flags += [flag, *rng.sample(FLAGS[flag], min(1, len(FLAGS[flag])))]
    return [str(TOY / "clip.mp4"), question.lstrip("-") or "?", "--model", str(TOY), *flags]


KINDS = {"video": video_case, "checkpoint": checkpoint_case, "question": question_case}


# ---- one input, in a process of its own ----


def make(seed, number, folder):
    """The kind of input `number`, and run.py's arguments for it; its files lie in the folder."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choice(("video", "video", "checkpoint", "checkpoint", "question"))
    return kind, [*KINDS[kind](folder, rng), "--json", *["--max-new-tokens", "2"] * (kind != "question")]


def ask(connection, root):
    """Answer what comes through a pipe: for (folder, arguments) exit code, stdout, stderr and MB."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(root))
    import run
    from minioutro.support.cli import run_command
    while True:
        folder, arguments = connection.recv()
        os.chdir(folder)
        sys.argv, out, err, code = ["run.py", *arguments], io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO(), 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                run_command(run.main, "run.py")
            except SystemExit as stop:
                code = stop.code
            except BaseException as error:
                code = repr(error)
        out.flush()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        connection.send((code, out.buffer.getvalue(), err.getvalue(), peak))


def refuse(name):
    raise ValueError(f"{name} is no number of JSON")


class Worker:
    """A process that answers; its own stderr, where C libraries write, is watched as well."""

    def __init__(self):
        self.log, spawn = tempfile.TemporaryFile(), multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        saved = os.dup(2)
        os.dup2(self.log.fileno(), 2)
        self.process = spawn.Process(target=ask, args=(theirs, ROOT), daemon=True)
        self.process.start()
        os.dup2(saved, 2)
        os.close(saved)
        theirs.close()

    def result(self, folder, arguments):
        """What is wrong, or None; the outcome in a word; seconds; MB."""
        started = time.perf_counter()
        self.connection.send((folder, arguments))
        try:
            if not self.connection.poll(SECONDS):
                return f"no end within {SECONDS} s", "hang", SECONDS, 0.0
            code, out, err, peak = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            last = self.printed().decode("utf-8", "replace").splitlines()[-1:]
            return f"the process died with {self.process.exitcode}: {last}", "death", 0.0, 0.0
        seconds, printed = time.perf_counter() - started, self.printed()
        if printed:
            return f"printed by a library: {printed[:200]!r}", "noise", seconds, peak
        if code == 0 and err == "":
            try:
                json.loads(out.decode("utf-8"), parse_constant=refuse)
            except ValueError as error:
                return f"no JSON: {error}", "no JSON", seconds, peak
            return None, "answer", seconds, peak
        if code == 2 and out == b"" and err.endswith("\n") and err[:-1].isprintable():
            return None, "one line", seconds, peak
        return f"exit code {code}, {len(out)} bytes of answer, stderr {err[:400]!r}", "wrong", seconds, peak

    def printed(self):
        self.log.seek(0)
        text = self.log.read()
        self.log.seek(0)
        self.log.truncate()
        return text

    def end(self):
        self.process.kill()
        self.process.join()


def fuzz(seed, first, last, deadline, keep):
    """Try inputs until one is wrong, or `last` or the deadline is reached: a report, and what is wrong."""
    outcomes, worst_time, worst_memory, worker, number = Counter(), (0.0, first), 0.0, Worker(), first
    try:
        while number < last and time.monotonic() < deadline:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                kind, arguments = make(seed, number, folder)
                wrong, outcome, seconds, memory = worker.result(folder, arguments)
                outcomes[f"{kind}: {outcome}"] += 1
                worst_time, worst_memory = max(worst_time, (seconds, number)), max(worst_memory, memory)
                if wrong:
                    place = keep / f"seed_{seed}_input_{number}"
                    shutil.copytree(folder, place, dirs_exist_ok=True)
                    (place / "arguments.json").write_text(json.dumps(arguments))
                    wrong = f"--seed {seed} --first {number}, saved in {place}: {wrong}"
                    break
            number += 1
    finally:
        worker.end()
    report = [f"{sum(outcomes.values())} inputs"]
    report += [f"{count:6} {outcome}" for outcome, count in sorted(outcomes.items())]
    report += [f"worst time {worst_time[0]:.1f} s (input {worst_time[1]}), worst memory {worst_memory:.0f} MB"]
    return "\n".join(report), wrong if number < last and sum(outcomes.values()) else None


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (default: %(default)s)")
    parser.add_argument("--keep", type=Path, default=Path("fuzz_finds"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    report, wrong = fuzz(args.seed, args.first, sys.maxsize, time.monotonic() + 60 * args.minutes, args.keep)
    print(report)
    if wrong:
        sys.exit(wrong)


if __name__ == "__main__":
    main()
