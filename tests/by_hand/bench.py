"""How fast, and how much memory: `python tests/by_hand/bench.py` prints one table, in about ten minutes.

Run it by hand, on an otherwise quiet machine. CI does not run it. The model has the shape of SmolVLM2-256M and
random weights, with a massive activation planted in the embedding of the first token, so that OutRo has a sink to
work with. Two ways of doing the same are timed in turn, A B A B. Memory is measured in a process of its own. If
transformers is installed, its model is timed in the same process, with its fused attention.
"""

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from minioutro import OutRo, VideoLM  # noqa: E402
from minioutro.model import read_config  # noqa: E402

CONFIG = {
    "architectures": ["SmolVLMForConditionalGeneration"], "model_type": "smolvlm", "torch_dtype": "float32",
    "image_token_id": 49190, "scale_factor": 4, "tie_word_embeddings": False,
    "text_config": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280,
                    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "pad_token_id": 2},
    "vision_config": {"model_type": "smolvlm_vision", "hidden_size": 768, "intermediate_size": 3072,
                      "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 512, "patch_size": 16}}
F, TEXT, NEW = 8, 202, 64               # frames, text tokens of the prompt, tokens to generate
LONG = 64, 878                          # frames and text tokens of a video of a minute or more
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


# ---- tools for measuring ----


def in_turn(repeats, ways):
    """Call all ways in turn. Returns: the results of each way by name, without its first call, which warms up."""
    results = {name: [] for name in ways}
    for n in range(repeats + 1):
        for name, way in ways.items():
            result = way()
            if n > 0:
                results[name].append(result)
    return results


def timed(way):
    """A function that calls `way` and returns the seconds that it took."""
    def seconds():
        started = time.perf_counter()
        way()
        return time.perf_counter() - started
    return seconds


def spread(values, digits=3):
    """The median, and the smallest and the largest value."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def row(what, ours, other, ratio, target):
    """Print a row as soon as it is known."""
    print(f"{what:<34} {ours:<24} {other:<24} {ratio:>7} {target:>8}", flush=True)


def compare(what, ours, other, target, unit="s", digits=3):
    """Print a row with our numbers and those of another model. other: None if transformers is not installed."""
    if other:
        ratio = statistics.median(ours) / statistics.median(other)
        row(what, f"{spread(ours, digits)} {unit}", f"{spread(other, digits)} {unit}", f"{ratio:.2f}", target)
    else:
        row(what, f"{spread(ours, digits)} {unit}", "not installed", "-", target)


# ---- the model, its prompt and its answer ----


def write_checkpoint(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VideoLM(read_config(folder)).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        is_norm = "norm" in name and name.endswith("weight")
        tensors[name] = torch.ones(shape) if is_norm else 0.02 * torch.randn(shape, generator=generator)
    tensors["model.text_model.embed_tokens.weight"][1, 5] = 10_000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_theirs(folder):
    from transformers import SmolVLMForConditionalGeneration
    model = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


def prompt(frames=F, text=TEXT):
    """Random token ids (1,S) and pixels (1,F,3,size,size). The first token is the sink."""
    vision, generator = CONFIG["vision_config"], torch.Generator().manual_seed(1)
    M = (vision["image_size"] // vision["patch_size"] // CONFIG["scale_factor"])**2
    ids = torch.randint(100, 49000, (1, frames * M + text), generator=generator)
    ids[0, 0] = 1
    for f in range(frames):
        start = 40 + f * (M + 13)
        ids[0, start:start + M] = CONFIG["image_token_id"]
    pixels = torch.rand(1, frames, 3, *[vision["image_size"]] * 2, generator=generator) * 2 - 1
    return ids, pixels


def answer_ours(model, ids, features, outro=None):
    """The seconds that the prompt took, and the seconds of the NEW steps after it."""
    started, times = time.perf_counter(), []
    for _ in model.stream(ids, features=features, max_new_tokens=NEW + 1, outro=outro):
        times.append(time.perf_counter() - started)
    return times[0], times[-1] - times[0]


def answer_theirs(model, ids, features):
    """The same for the model of transformers, in the simplest loop."""
    started, times = time.perf_counter(), []
    given = {"input_ids": ids, "image_hidden_states": features}
    for _ in range(NEW + 1):
        out = model(**given, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        token.item()
        times.append(time.perf_counter() - started)
        given = {"input_ids": token, "past_key_values": out.past_key_values}
    return times[0], times[-1] - times[0]


# ---- the rows ----


def model_rows(folder, repeats):
    ours = VideoLM.from_pretrained(folder)
    theirs = load_theirs(folder) if HAS_TRANSFORMERS else None
    ids, pixels = prompt()
    ways = {"ours": timed(lambda: ours.encode(pixels))}
    if theirs:
        ways["theirs"] = timed(lambda: theirs.model.get_image_features(pixels))
    encoder = in_turn(repeats, ways)
    compare(f"vision encoder, {F} frames", encoder["ours"], encoder.get("theirs"), "<= 1.03")

    features = ours.encode(pixels)
    check_sinks(ours, ids, features)
    ways = {"ours": lambda: answer_ours(ours, ids, features),
            "outro": lambda: answer_ours(ours, ids, features, OutRo())}
    if theirs:
        ways["theirs"] = lambda: answer_theirs(theirs, ids, features)
    answers = in_turn(2 * repeats, ways)
    prefill = {name: [first for first, _ in pairs] for name, pairs in answers.items()}
    steps = {name: [rest for _, rest in pairs] for name, pairs in answers.items()}
    rate = {name: [NEW / seconds for seconds in values] for name, values in steps.items()}
    compare(f"prefill, {ids.shape[1]} tokens", prefill["ours"], prefill.get("theirs"), "<= 1.03")
    compare(f"decoding, {NEW} tokens", rate["ours"], rate.get("theirs"), ">= 1.1", "/s", 1)

    seen = statistics.median(encoder["ours"])
    whole = {name: [seen + first + rest for first, rest in pairs] for name, pairs in answers.items()}
    compare("OutRo, prefill", prefill["outro"], prefill["ours"], "<= 1.08")
    compare("OutRo, decoding", steps["outro"], steps["ours"], "<= 1.05")
    compare("OutRo, whole answer", whole["outro"], whole["ours"], "<= 1.03")
    long_rows(ours, theirs, repeats)


def check_sinks(model, ids, features):
    """Check that OutRo finds the planted sink in all layers except the last two, which it does not search."""
    trace, L = {}, model.config.text_config.num_hidden_layers
    model.hidden_states(ids, features=features, outro=OutRo(), trace=trace)
    found = sum(trace[f"layers.{l}.is_sink"].sum().item() for l in range(L))
    assert found == L - 2, f"{found} sinks in {L} layers, but the planted one should be found in {L - 2}"


def long_rows(ours, theirs, repeats):
    """The prompt of a long video. Its features are random numbers, because only their number matters."""
    ids, _ = prompt(*LONG)
    n_image = (ids == CONFIG["image_token_id"]).sum().item()
    features = torch.randn(1, n_image, ours.config.text_config.hidden_size)
    ways = {"ours": timed(lambda: next(ours.stream(ids, features=features))),
            "outro": timed(lambda: next(ours.stream(ids, features=features, outro=OutRo())))}
    if theirs:
        ways["theirs"] = timed(lambda: theirs(input_ids=ids, image_hidden_states=features, use_cache=True,
                                              logits_to_keep=1))
    seconds = in_turn(repeats, ways)
    compare(f"prefill, {LONG[0]} frames, {ids.shape[1]} tokens", seconds["ours"], seconds.get("theirs"), "<= 1.03")
    compare(f"OutRo, prefill, {LONG[0]} frames", seconds["outro"], seconds["ours"], "<= 1.08")


def memory_row(folder):
    """The peak memory of a process that loads the model and answers once, without the memory of its imports."""
    peak = float(subprocess.check_output([sys.executable, __file__, "--memory-of", folder]))
    weights = (folder / "model.safetensors").stat().st_size / 1e6
    row("peak memory over the weights", f"{peak:.0f} MB", f"{weights:.0f} MB of weights",
        f"{(peak - weights) / 1000:.2f}", "<= 0.6 GB")


def peak_memory(folder):
    """How many MB the memory of this process grows at most, when it loads the model and answers once."""
    ids, pixels = prompt()
    before = status("VmRSS")
    model = VideoLM.from_pretrained(folder)
    answer_ours(model, ids, model.encode(pixels))
    return status("VmHWM") - before


def status(field):
    """The memory of this process in MB: VmRSS is the current value, VmHWM the peak. Only Linux has this file."""
    shown = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", shown)[1]) / 1000


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="how often to measure (default: %(default)s)")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        print(peak_memory(args.memory_of))
        return
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: give 1 or more")
    row("what", "ours", "transformers or other", "ratio", "target")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        model_rows(Path(folder), args.repeats)
        memory_row(Path(folder))


if __name__ == "__main__":
    main()
