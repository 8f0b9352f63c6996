"""How fast, and how much memory: `python tests/by_hand/bench.py` prints one table, in about ten minutes.

It is run by hand, on an otherwise quiet machine; CI does not call it. The model has the shape of
SmolVLM2-256M and random weights, with a massive activation planted in the embedding of the first
token, so that OutRo has a sink to work with. Two ways of doing the same are timed in turn, A B A B;
loading, memory and videos each in processes of their own. Where transformers is installed it stands
beside ours, with its fused attention; the model's rows are timed in the same process.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
CONFIG = {
    "architectures": ["SmolVLMForConditionalGeneration"], "model_type": "smolvlm",
    "image_token_id": 49190, "scale_factor": 4, "tie_word_embeddings": False, "torch_dtype": "float32",
    "text_config": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
                    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                    "head_dim": 64, "vocab_size": 49280, "max_position_embeddings": 8192,
                    "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "pad_token_id": 2},
    "vision_config": {"model_type": "smolvlm_vision", "hidden_size": 768, "intermediate_size": 3072,
                      "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 512,
                      "patch_size": 16}}
F, TEXT, NEW = 8, 202, 64               # frames, text tokens of the prompt, tokens to generate
LONG = 64, 878                          # frames and text tokens of a video of a minute or more
THEIRS = importlib.util.find_spec("transformers") is not None
STATUS = Path("/proc/self/status")


# ---- what is measured with ----


def in_turn(repeats, **ways):
    """Seconds of each way, called in turn after one call each that is not timed."""
    seconds = {name: [] for name in ways}
    for n in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if n:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def middle(values):
    return statistics.median(values)


def spread(values, digits=3):
    """Median, and from the least to the most."""
    return f"{middle(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def row(what, ours, other, ratio, target):
    """Print a row as soon as it is known."""
    print(f"{what:<34} {ours:<24} {other:<24} {ratio:>7} {target:>8}", flush=True)


def compare(what, ours, theirs, at_most, unit="s", digits=3):
    """A row of our seconds or MB over another's."""
    if theirs is None:
        return row(what, f"{spread(ours, digits)} {unit}", "no transformers here", "-", f"<= {at_most}")
    ratio = middle(ours) / middle(theirs)
    row(what, f"{spread(ours, digits)} {unit}", f"{spread(theirs, digits)} {unit}", f"{ratio:.2f}",
        f"<= {at_most}")


def status(field):
    """A line of this process's memory in MB: VmRSS now, VmHWM at most."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) / 1000


def in_a_process(part, *arguments):
    """What one part, in a process of its own, prints as JSON."""
    command = [sys.executable, __file__, "--part", part, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


# ---- the model and its prompt ----


def write_checkpoint(folder):
    import torch
    from safetensors.torch import save_file

    from minioutro.model import VideoLM, read_config
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VideoLM(read_config(folder)).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.ones(shape) if "norm" in name and name.endswith("weight") else
               torch.empty(shape).normal_(std=0.02, generator=generator) for name, shape in shapes.items()}
    tensors["model.text_model.embed_tokens.weight"][1, 5] = 10_000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def prompt(frames=F, text=TEXT):
    """Token ids (1,S) and pixels (1,F,3,size,size), drawn at random; the first token is the sink."""
    import torch
    vision, generator = CONFIG["vision_config"], torch.Generator().manual_seed(1)
    M = (vision["image_size"] // vision["patch_size"] // CONFIG["scale_factor"])**2
    ids = torch.randint(100, 49000, (1, frames * M + text), generator=generator)
    ids[0, 0] = 1
    for f in range(frames):
        ids[0, 40 + f * (M + 13):][:M] = CONFIG["image_token_id"]
    pixels = torch.rand(1, frames, 3, *[vision["image_size"]] * 2, generator=generator) * 2 - 1
    return ids, pixels


def load_theirs(folder):
    import torch
    from transformers import SmolVLMForConditionalGeneration
    return SmolVLMForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def answer_ours(model, ids, features, outro=None):
    """Seconds of the prompt, and of NEW steps behind it."""
    started, times = time.perf_counter(), []
    for _ in model.stream(ids, features=features, max_new_tokens=NEW + 1, outro=outro):
        times.append(time.perf_counter() - started)
    return times[0], times[-1] - times[0]


def answer_theirs(model, ids, features):
    """The same in the barest loop over transformers' model."""
    started = time.perf_counter()
    out = model(input_ids=ids, image_hidden_states=features, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    token.item()
    prefill = time.perf_counter() - started
    for _ in range(NEW):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        token.item()
    return prefill, time.perf_counter() - started - prefill


def long_rows(ours, theirs, repeats):
    """The prompt of a long video; its features are drawn at random, since only their number counts."""
    import torch

    from minioutro import OutRo
    ids, _ = prompt(*LONG)
    count = (ids == CONFIG["image_token_id"]).sum().item()
    features = torch.randn(1, count, ours.config.text_config.hidden_size)
    ways = {"ours": lambda: next(ours.stream(ids, features=features)),
            "outro": lambda: next(ours.stream(ids, features=features, outro=OutRo()))}
    if theirs:
        ways["theirs"] = lambda: theirs(input_ids=ids, image_hidden_states=features, use_cache=True,
                                        logits_to_keep=1)
    seconds = in_turn(repeats, **ways)
    what = f"prefill, {LONG[0]} frames"
    compare(f"{what}, {ids.shape[1]} tokens", seconds["ours"], seconds.get("theirs"), 1.03)
    compare(f"OutRo, {what}", seconds["outro"], seconds["ours"], 1.08)


def model_rows(folder, repeats):
    import torch

    from minioutro import OutRo, VideoLM
    torch.set_num_threads(1)
    ids, pixels = prompt()
    ours, theirs = VideoLM.from_pretrained(folder), load_theirs(folder) if THEIRS else None
    features = ours.encode(pixels)
    trace = {}
    ours.hidden_states(ids, features=features, outro=OutRo(), trace=trace)
    text = ours.config.text_config
    V, C, L = text.vocab_size, text.hidden_size, text.num_hidden_layers
    found = sum(trace[f"layers.{l}.is_sink"].sum().item() for l in range(L))
    assert found == L - 2, f"in {L} layers {found} sinks are found, not the one planted in all but two"

    ways = {"ours": lambda: ours.encode(pixels)}
    if THEIRS:
        ways["theirs"] = lambda: theirs.model.get_image_features(pixels)
    seconds = in_turn(repeats, **ways)
    compare(f"vision encoder, {F} frames", seconds["ours"], seconds.get("theirs"), 1.03)

    times = {name: ([], []) for name in ("ours", "theirs", "outro")}
    for n in range(2 * repeats + 1):
        timed = {"ours": answer_ours(ours, ids, features),
                 "outro": answer_ours(ours, ids, features, OutRo())}
        if THEIRS:
            timed["theirs"] = answer_theirs(theirs, ids, features)
        for name, pair in timed.items():
            for values, value in zip(times[name], pair):
                if n:                                           # the first time only warms up
                    values.append(value)
    (prefill, decode), (prefill_on, decode_on) = times["ours"], times["outro"]
    prefill_theirs, decode_theirs = times["theirs"]
    compare(f"prefill, {ids.shape[1]} tokens", prefill, prefill_theirs or None, 1.03)
    rate = [NEW / t for t in decode]
    if THEIRS:
        rate_theirs = [NEW / t for t in decode_theirs]
        row(f"decoding, {NEW} tokens", f"{spread(rate, 1)} /s", f"{spread(rate_theirs, 1)} /s",
            f"{middle(rate) / middle(rate_theirs):.2f}", ">= 1.1")
    else:
        row(f"decoding, {NEW} tokens", f"{spread(rate, 1)} /s", "no transformers here", "-", ">= 1.1")

    # Each product takes another table, as each layer of a step takes other weights: one table alone
    # may lie in the processor's cache, where it is read faster than memory can be.
    vector, tables = torch.randn(C), [torch.randn(V, C) for _ in range(6)]
    turns = itertools.cycle(tables)
    product = in_turn(60, mv=lambda: torch.mv(next(turns), vector))["mv"]
    limit = tables[0].numel() * 4 / middle(product) / 1e9
    layers = ours.model.text_model.layers.parameters()
    read = (sum(p.numel() for p in layers) + tables[0].numel()) * 4
    keys_and_values = 2 * L * text.num_key_value_heads * text.head_dim
    read += keys_and_values * (ids.shape[1] + NEW / 2) * 4
    reached = read * middle(rate) / 1e9
    row("decoding against memory", f"{reached:.1f} GB/s", f"{limit:.1f} GB/s matrix-vector",
        f"{reached / limit:.2f}", ">= 0.75")

    compare("OutRo, prefill", prefill_on, prefill, 1.08)
    compare("OutRo, decoding", decode_on, decode, 1.05)
    encode = middle(seconds["ours"])
    compare("OutRo, whole answer", [encode + p + d for p, d in zip(prefill_on, decode_on)],
            [encode + p + d for p, d in zip(prefill, decode)], 1.03)
    long_rows(ours, theirs, repeats)


# ---- parts that need a process of their own ----


def part_memory(who, folder):
    """MB above the imports after loading and one answer."""
    import torch
    torch.set_num_threads(1)
    if who == "ours":
        from minioutro import VideoLM
    else:
        from transformers import SmolVLMForConditionalGeneration  # noqa: F401
    ids, pixels = prompt()
    before = status("VmRSS")
    with torch.inference_mode():
        if who == "ours":
            model = VideoLM.from_pretrained(folder)
            answer_ours(model, ids, model.encode(pixels))
        else:
            model = load_theirs(folder)
            features = model.model.get_image_features(pixels)
            answer_theirs(model, ids, features.pooler_output)
    return status("VmHWM") - before


def part_load(who, folder):
    """Seconds of loading, three times."""
    import torch
    torch.set_num_threads(1)
    if who == "ours":
        from minioutro import VideoLM
        ways = {"load": lambda: VideoLM.from_pretrained(folder)}
    else:
        ways = {"load": lambda: load_theirs(folder)}
    return in_turn(3, **ways)["load"]


def part_video(how, path):
    """Seconds, MB above the imports, and the frames' pixels in one number."""
    import zlib

    from minioutro import read_video
    from minioutro.support.media import decode, open_video
    from minioutro.video import resize_longest_edge, sample_indices
    before, started = status("VmRSS"), time.perf_counter()
    if how == "ours":
        video = read_video(path, longest_edge=512)
        frames, total = video.frames, video.total_frames
    else:
        chosen, frames, total = set(sample_indices(15_000, 25.0, 600.0)), [], 0
        with open_video(Path(path)) as stream:
            stream.thread_type = "AUTO"
            for total, frame in enumerate(decode(stream), start=1):
                if total - 1 in chosen:
                    frames.append(resize_longest_edge(frame.to_image(), 512))
    seconds = time.perf_counter() - started
    return seconds, status("VmHWM") - before, [len(frames), total, zlib.crc32(
        b"".join(frame.tobytes() for frame in frames))]


def write_video(path):
    """Ten minutes of 1280x720 H.264 at 25 frames a second, a keyframe every 50 frames."""
    import av
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    clouds = Image.fromarray(rng.integers(0, 256, (12, 32, 3), dtype=np.uint8)).resize((1920, 720))
    grain = rng.integers(-4, 5, (720, 1920, 3))
    canvas = (np.asarray(clouds) + grain).clip(0, 255).astype(np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={
            "preset": "ultrafast", "g": "50", "keyint_min": "50", "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for n in range(15_000):
            shown = np.ascontiguousarray(canvas[:, 3 * n % 640:][:, :1280])
            shown[:32, :32] = n % 256                                   # no two frames are alike
            file.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        file.mux(stream.encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--rows", nargs="+", choices=("model", "memory", "load", "run", "video"),
                        default=("model", "memory", "load", "run", "video"), help="default: all")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part, who, path = args.part
        print(json.dumps(globals()[f"part_{part}"](who, path)))
        return
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: give 1 or more")
    if not STATUS.exists() and {"memory", "video"} & set(args.rows):
        parser.error(f"memory is read from {STATUS}, which this system does not have; leave out "
                     f"these rows: --rows model load run")
    os.environ["OMP_NUM_THREADS"] = "1"                 # of the processes that are started from here
    row("what", "ours", "transformers or other", "ratio", "target")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if {"model", "memory", "load"} & set(args.rows):
            write_checkpoint(folder)
        if "model" in args.rows:
            import torch
            with torch.inference_mode():
                model_rows(folder, args.repeats)
        who = ("ours", "theirs") if THEIRS else ("ours",)
        if "memory" in args.rows:
            weights = (folder / "model.safetensors").stat().st_size / 1e6
            peak = {name: [in_a_process("memory", name, folder)] for name in who}
            row("peak memory over the weights", f"{peak['ours'][0]:.0f} MB", f"{weights:.0f} MB of weights",
                f"{(peak['ours'][0] - weights) / 1000:.2f}", "<= 0.6 GB")
            compare("peak memory, load and one answer", peak["ours"], peak.get("theirs"), 1, "MB", 0)
        if "load" in args.rows:
            load = {name: in_a_process("load", name, folder) for name in who}
            compare("load from a folder", load["ours"], load.get("theirs"), 1)
        if "run" in args.rows:
            quiet = dict(check=True, stdout=subprocess.DEVNULL)
            seconds = in_turn(args.repeats,
                              ours=lambda: subprocess.run([sys.executable, ROOT / "run.py"], **quiet),
                              other=lambda: subprocess.run([sys.executable, "-c", "import torch"], **quiet))
            compare("run.py against import torch", seconds["ours"], seconds["other"], 2.5)
        if "video" in args.rows:
            write_video(folder / "clip.mp4")
            ours, other = (in_a_process("video", how, folder / "clip.mp4") for how in ("ours", "all"))
            assert ours[2] == other[2], f"the frames differ: {ours[2]} and {other[2]}"
            row("read_video against decoding all", f"{ours[0]:.2f} s", f"{other[0]:.2f} s",
                f"{other[0] / ours[0]:.1f}", ">= 6")
            row("read_video, memory", f"{ours[1]:.0f} MB", f"{other[1]:.0f} MB", "-", "<= 100")


if __name__ == "__main__":
    main()
