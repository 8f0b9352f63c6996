"""Damaged videos, senseless checkpoints and odd questions: python tests/by_hand/fuzz.py --minutes 10 --seed 1

For each input, run.py's own `main` runs in a process of its own, which may crash. It must end with
an answer, or with one line on stderr and exit code 2, within a minute. The first input that does not is
saved in a folder of its own, with its number. `--seed S --first N` makes the same input again.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import av
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import run  # noqa: E402
from minioutro.support.cli import run_command  # noqa: E402
from minioutro.weights import TOY  # noqa: E402

SECONDS = 60                            # an input that takes longer is a failure

# ---- damaged videos and pictures ----

VIDEOS = {"mp4": "libx264", "mov": "mpeg4", "mkv": "ffv1", "avi": "mjpeg", "mpg": "mpeg1video", "ts": "mpeg2video",
          "wmv": "wmv2", "flv": "flv", "nut": "mpeg4", "webm": "libvpx", "mxf": "mpeg2video"}
ANIMATIONS = ("gif", "webp", "png", "tiff", "avif")
PICTURES = (*ANIMATIONS, "jpg", "bmp", "ico")


def picture(n):
    image = Image.new("RGB", (48, 32), (8 * n, 100, 200))
    image.paste((20 * n, 200, 50), (n, 4, n + 8, 20))
    return image


def write_video(path, codec, images):
    """Write the same bytes each time: no random ids, one thread, and the plain C code of the encoder."""
    with av.open(str(path), "w", options={"fflags": "bitexact"}) as file:
        options = {"x264-params": "asm=0"} if codec == "libx264" else {}
        stream = file.add_stream(codec, rate=25, options=options)
        stream.codec_context.thread_count = 1
        stream.width, stream.height = 48, 32
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for image in images:
            file.mux(stream.encode(av.VideoFrame.from_image(image)))
        file.mux(stream.encode())


def damage(data, rng):
    """Overwrite, cut out or double some bytes, or cut off the end, a few times."""
    for _ in range(rng.choice((0, 1, 1, 2, 5, 20))):
        # half of the damage is in the header, because readers trust it
        start = rng.randrange(rng.choice((len(data), min(len(data), 200))) + 1)
        end = start + rng.choice((1, 2, 4, 8, 64, 1000))
        piece, after = data[start:end], data[end:]
        n = len(piece)
        if rng.random() < 0.1:
            after = b""
        data = data[:start] + rng.choice((bytes(n), b"\xff" * n, rng.randbytes(n), b"", piece + piece)) + after
    return data


def video_case(folder, rng):
    suffix = rng.choice((*VIDEOS, *PICTURES))
    path = folder / f"clip.{suffix}"
    images = [picture(n) for n in range(rng.choice((1, 4, 12)))]
    if suffix in VIDEOS:
        write_video(path, VIDEOS[suffix], images)
    elif suffix in ANIMATIONS:
        images[0].save(path, save_all=True, append_images=images[1:])
    else:
        images[0].save(path)
    path.write_bytes(damage(path.read_bytes(), rng))
    return [f"./{path.name}", "What?", "--model", str(TOY)]


# ---- damaged or senseless checkpoints ----

VALUES = [None, True, False, 0, 1, -1, 2, 7, 10**5, 2**31, 2**63, 2**70, 10**400, 0.5, -0.5, 1e-300, 1e308,
          float("nan"), float("inf"), "", "64", "default", "é", [], [1], [[]], {}, {"longest_edge": 64},
          {"rope_type": "default"}, {"rope_type": "yarn"}, ["full_attention"] * 8]
FIELDS = ["rope_scaling", "layer_types", "sliding_window", "repetition_penalty", "no_repeat_ngram_size", "eos_token_id",
          "image_mean", "image_std", "do_rescale", "resample", "size", "tie_word_embeddings", "num_heads"]


def change_value(content, rng):
    """Change, remove or add one value, somewhere in nested objects and lists."""
    inner = content
    while True:
        key = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
        is_full = isinstance(inner[key], (dict, list)) and inner[key]
        if not is_full or rng.random() < 0.1:
            break
        inner = inner[key]
    kind = rng.choice(("change", "change", "change", "remove", "add"))
    if kind == "add" and isinstance(inner, dict):
        key = rng.choice(FIELDS)
    inner[key] = rng.choice(VALUES)
    if kind == "remove" and len(inner) > 1:
        del inner[key]


def checkpoint_case(folder, rng):
    model = shutil.copytree(TOY, folder / "model", copy_function=shutil.copyfile)
    model.chmod(0o755)                              # the project may be read-only
    path = rng.choice(sorted(model.glob("*.json")))
    kind = rng.choice((*["values"] * 8, "settings", "weights"))
    if kind == "values":
        content = json.loads(path.read_text(encoding="utf-8"))
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            change_value(content, rng)
        path.write_text(json.dumps(content), encoding="utf-8")
        return [str(TOY / "clip.mp4"), "What?", "--model", "model"]
    if kind == "weights":
        path = model / "model.safetensors"
    path.write_bytes(damage(path.read_bytes(), rng))
    return [str(TOY / "clip.mp4"), "What?", "--model", "model"]


# ---- questions and flags ----

PIECES = ["<image>", "<end_of_utterance>", "\n", "\r", "\t", "\x1b[31m", "\u202e", "\udce9", "🙂", "日本", "é",
          "e\u0301", "a" * 500, " ", "<|im_start|>", "\ufeff", "\x7f", "%s", "'", '"', "\\", "{}", "-", "?"]
FLAGS = {"--frames": ["1", "3", "64", "999", "0", "-1", "9" * 400, "1e3", "٣"],
         "--fps": ["0.1", "1", "1000", "1e308", "1e-308", "nan", "inf", "0", "-1"],
         "--gamma": ["0", "3", "1e6", "1e38", "1e308", "nan"], "--temperature": ["0.1", "1e-300", "1e300", "0"],
         "--median-multiple": ["0", "1e-30", "5", "1e308"], "--abs-threshold": ["0", "5", "1e308"],
         "--dtype": ["bfloat16", "float16"], "--max-new-tokens": ["1", "5", "2000"],
         "--device": ["cpu", "tpu"], "--no-relax": [], "--no-align": []}


def question_case(folder, rng):
    question = "".join(rng.choice(PIECES) for _ in range(rng.randrange(9)))
    arguments = [str(TOY / "clip.mp4"), f"?{question}", "--model", str(TOY)]
    for flag in rng.sample(sorted(FLAGS), rng.randrange(4)):
        arguments.append(flag)
        if FLAGS[flag]:
            arguments.append(rng.choice(FLAGS[flag]))
    return arguments


def make(seed, number, folder):
    """Write the files of input `number` into the folder. Returns: its kind, and run.py's arguments."""
    rng = random.Random(f"{seed} {number}")
    case = rng.choice((video_case, video_case, checkpoint_case, checkpoint_case, question_case))
    arguments = [*case(folder, rng), "--json"]
    if case != question_case:
        arguments += ["--max-new-tokens", "2"]
    return case.__name__, arguments


# ---- one input, in a process of its own ----


def start(main, arguments, folder):
    """Run a command in a folder, and write its stdout and stderr into two files there."""
    os.chdir(folder)
    os.dup2(os.open("stdout", os.O_WRONLY | os.O_CREAT), 1)         # C libraries write there too
    os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout, sys.stderr = open(1, "w", encoding="utf-8"), open(2, "w", encoding="utf-8")
    sys.argv = ["run.py", *arguments]
    run_command(main, "run.py")


def ask(main, arguments, folder):
    """Run a command in a process of its own. Returns: its exit code, and what is wrong with its end, or None."""
    process = multiprocessing.get_context("fork").Process(target=start, args=(main, arguments, folder))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None, f"it did not end within {SECONDS} s"
    out = (folder / "stdout").read_text(encoding="utf-8", errors="replace")
    err = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
    return process.exitcode, judge(process.exitcode, out, err)


def refuse(name):
    raise ValueError(f"{name} is not a number in JSON")


def judge(code, out, err):
    """What is wrong with the end of a command, or None."""
    if code == 2 and out == "" and err.endswith("\n") and err[:-1].isprintable():
        return None
    if code != 0 or err:
        return f"exit code {code}, {len(out)} letters of answer, stderr {err[-400:]!r}"
    try:
        json.loads(out, parse_constant=refuse)
    except ValueError as error:
        return f"stdout is not JSON: {error}"


def fuzz(seed, first, end, deadline, keep):
    """Try inputs until one fails, or until `end` or the deadline. Returns: a report, and what is wrong, or None."""
    ends, wrong = Counter(), None
    for number in range(first, end):
        if wrong or time.monotonic() > deadline:
            break
        with tempfile.TemporaryDirectory() as folder:
            kind, arguments = make(seed, number, Path(folder))
            code, wrong = ask(run.main, arguments, Path(folder))
            ends[f"{kind}: exit code {code}"] += 1
            if wrong:
                saved = shutil.copytree(folder, keep / f"seed_{seed}_input_{number}", dirs_exist_ok=True)
                (saved / "arguments.json").write_text(json.dumps(arguments))
                wrong = f"--seed {seed} --first {number}, saved in {saved}: {wrong}"
    lines = [f"{count:6} {how}" for how, count in sorted(ends.items())]
    return "\n".join([f"{ends.total()} inputs", *lines]), wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to try (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (default: %(default)s)")
    parser.add_argument("--end", type=int, default=sys.maxsize, help="stop before the input with this number")
    parser.add_argument("--keep", type=Path, default=Path("fuzz_finds"),
                        help="where to save an input that fails (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)                # a forked process has no other threads
    report, wrong = fuzz(args.seed, args.first, args.end, time.monotonic() + 60 * args.minutes, args.keep)
    print(report)
    if wrong:
        sys.exit(wrong)


if __name__ == "__main__":
    main()
