"""Does a GPU compute what the CPU does? `python tests/by_hand/gpu.py` prints one table, in under five minutes.

It is run by hand, and CI does not call it. A row begins with "ok" or "WRONG", or with neither where it only tells
something, such as seconds. The exit code is 1 if a row is wrong. Where there is no GPU, `--device cpu` tries the script
itself. Then it takes fewer sizes, and its rows in float32 compare the CPU with itself.
"""

import argparse
import functools
import itertools
import json
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "with_transformers")]

from by_hand import bench  # noqa: E402
from helpers import FIXTURES, ROOT, TOY, Golden  # noqa: E402
from test_weights import HUB  # noqa: E402

from minioutro import Cache, OutRo, VideoLM, load, read_video  # noqa: E402
from minioutro.lab.evaluate import ask, variants_of  # noqa: E402
from minioutro.lab.questions import toy_questions  # noqa: E402
from minioutro.model import attention, causal_mask, fused_attention, open_sink_rows, read_config  # noqa: E402
from minioutro.support.checks import check_device  # noqa: E402
from minioutro.support.cli import Parser, run_command  # noqa: E402

TINY = {}
if bench.HAS_TRANSFORMERS:
    from test_attach import GREEDY, LONG, SHORT
    from tiny import IMAGE, PLANTED, TINY, composed, pixels
    from transformers import AutoModelForImageTextToText, SmolVLMConfig
    TINY["SmolVLM"] = lambda: composed("SmolVLM", [IMAGE] * 4, {"pixel_values": pixels(1, 1, 3, 16, 16)},
                                       text={"model_type": "llama"})

TYPES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}    # by how much outputs of attention may differ
EQUAL = 1e-4                    # logits in float32
NEAR = 0.02                     # half precision may decide otherwise about a ratio that is so near to the threshold
REFUSED = "No available kernel", "No viable backend"            # what torch says on a GPU, and on a CPU


def row(what, check, *args):
    """Print a row. check(*args) returns a text, and True, False, or None if it only tells something."""
    try:
        told, is_right = check(*args)
    except Exception as error:                  # one failure shall not hide what the other rows say
        told, is_right = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
    verdict = {True: "ok", False: "WRONG", None: ""}[is_right]
    print(f"{verdict:<6}{what:<42}{told}", flush=True)
    return is_right


def apart(found, expected):
    """The largest difference, divided by the standard deviation of what is expected."""
    found, expected = found.float().cpu(), expected.float().cpu()
    return ((found - expected).abs().max() / expected.std()).item()


def rows(device):
    """Yield of each row its name, its check and the check's arguments."""
    ways = {"OutRo": {}, "rows opened alone": {"align": False}, "aligned alone": {"relax": False}}
    for folder, inputs, outro in cases():
        yield f"{folder.name}, plain", golden, folder, inputs, None, device
        for what, switches in ways.items():
            yield f"{folder.name}, {what}", golden, folder, inputs, replace(outro, **switches), device
    kernels = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION,
               "memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    for what, backends in {"torch's choice": [*kernels.values()], **kernels}.items():
        for dtype in TYPES:
            yield f"attention, {what}, {dtype}", kernel, backends, device, dtype
    yield "cache on another device", cache_elsewhere, device
    for dtype in TYPES:
        yield f"run.py, {dtype}", bundled_clip, device, dtype
    yield "60 questions about the toy's world", toy_answers, device
    if not bench.HAS_TRANSFORMERS:
        yield "attach", lambda: ("no transformers here", None)
    for name in TINY:
        yield f"attach, {name}", attached, name, device
    prompts = list(itertools.product(HUB, [(bench.F, bench.TEXT), bench.LONG]))
    for size, (frames, text) in prompts[:1] if device == "cpu" else prompts:
        for way in ("plain", "OutRo", "transformers"):
            yield f"{size}, {frames} frames, {way}", speed, size, frames, text, way, device


def cases():
    """Every checkpoint of the fixtures, and the toy: its folder, token ids and pixels, and OutRo's constants."""
    for path in sorted(FIXTURES.glob("*/config.json")):
        g = Golden(path.parent.name)
        outro = g.outro() if "gamma" in g.meta else OutRo(abs_threshold=0.0, median_multiple=4.0)
        yield g.folder, (g.input_ids, g.pixels), outro
    _, processor = load(TOY)
    video = read_video(TOY / "clip.mp4", longest_edge=processor.longest_edge)
    inputs = processor(video, "What happens in this video?")
    yield TOY, (inputs.input_ids, inputs.pixel_values), OutRo()


def golden(folder, inputs, outro, device):
    """In all three types. Half precision need not give the same answer."""
    expected = read(folder, inputs, outro, "cpu", "float32")
    told, is_right = [], True
    for dtype in TYPES:
        found = read(folder, inputs, outro, device, dtype)
        difference = apart(found["logits"], expected["logits"])
        told.append(f"{dtype} {difference:.0e}")
        if dtype == "float32":
            is_right &= difference <= EQUAL and found["answer"] == expected["answer"]
        differs = found["is_sink"] != expected["is_sink"]                                           # (L,2,S)
        if not differs.any():
            is_right &= found["relaxed"].equal(expected["relaxed"])
            continue
        l = differs.flatten(1).any(1).nonzero()[0].item()       # the first such layer; what follows it depends on it
        far = (expected["ratio"][l] / outro.median_multiple - 1).abs() > NEAR                       # (2,S)
        is_right &= dtype != "float32" and not (differs[l] & far).any().item()
        told[-1] += f" ({differs.sum()} of the sinks differ, from layer {l} on)"
    return f"{', '.join(told)}; {expected['is_sink'].sum()} sinks, {expected['relaxed'].sum()} opened", is_right


def read(folder, inputs, outro, device, dtype):
    """What the model makes of two prompts in a batch, the second with other frames, and its answer to the first."""
    model = VideoLM.from_pretrained(folder, device=device, dtype=getattr(torch, dtype))
    ids, pixels = (tensor.to(device) for tensor in inputs)
    trace = {}
    found = {"answer": model.generate(ids, pixels, outro=outro, max_new_tokens=12),
             "logits": model(ids.expand(2, -1), torch.cat([pixels, -pixels]), outro=outro, trace=trace)}
    layers = range(model.config.text_config.num_hidden_layers)
    for name in ("is_sink", "relaxed", "ratio"):
        found[name] = torch.stack([trace[f"layers.{l}.{name}"] for l in layers]).cpu()              # (L,2,S)
    return found


def kernel(backends, device, dtype):
    """Fused attention against attention that is written out in float32. A kernel may refuse a call."""
    told, differences = [], []
    with warnings.catch_warnings(record=True) as caught, sdpa_kernel(backends):
        warnings.simplefilter("always")
        for what, (q, k, v, may_attend, is_causal) in attention_calls(device, getattr(torch, dtype)).items():
            try:
                out = fused_attention(q, k, v, may_attend, is_causal)
            except RuntimeError as error:
                if not str(error).startswith(REFUSED):
                    raise
                told.append(f"{what} refused")
                continue
            expected, _ = attention(q.float(), k.float(), v.float(), may_attend)
            differences.append((out.float() - expected).abs().max().item())
            told.append(f"{what} {differences[-1]:.0e}")
    warned = [str(warning.message).split(" (Triggered")[0] for warning in caught]
    why = [text for text in warned if "disabled" not in text and "not used because" not in text]
    return "; ".join([", ".join(told), *dict.fromkeys(why)]), max(differences) <= TYPES[dtype] if differences else None


def attention_calls(device, dtype):
    """Arguments of `fused_attention`: the heads of the 256M model, and two items with other sinks."""
    B, H, G, S, D = 2, 9, 3, 67, 64
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, n, S, D, generator=generator).to(device, dtype) for n in (H, G, G))
    causal, is_sink = causal_mask(S, S, device), torch.zeros(B, S, dtype=torch.bool, device=device)
    is_sink[0, 0] = is_sink[1, 5] = True
    return {"causal": (q, k, v, causal, True), "opened rows": (q, k, v, open_sink_rows(causal, is_sink), False),
            "one token": (q[:, :, -1:], k, v, causal[-1:], True), "two": (q[:, :, -2:], k, v, causal[-2:], False)}


def cache_elsewhere(device):
    """The prompt's cache is moved to another device before the next token. One sentence refuses it."""
    g = Golden("dev_a")
    model = VideoLM.from_pretrained(g.folder, device=device)
    ids = g.input_ids.to(device)
    cache = Cache()
    model(ids, g.pixels.to(device), cache=cache)
    elsewhere = "meta" if device == "cpu" else "cpu"
    moved = Cache([k.to(elsewhere) for k in cache.k], [v.to(elsewhere) for v in cache.v], cache.length)
    try:
        model(ids[:, :1], cache=moved)
    except ValueError as refusal:
        return str(refusal), "\n" not in str(refusal)
    return "not refused", False


def bundled_clip(device, dtype):
    """Sinks and opened rows as on the CPU in float32. Half precision need not give the same answers."""
    found = []
    for where, its_dtype in (("cpu", "float32"), (device, dtype)):
        with tempfile.TemporaryDirectory() as folder:
            said = json.loads(subprocess.check_output([
                sys.executable, ROOT / "run.py", "--json", "--device", where, "--dtype", its_dtype,
                "--page", f"{folder}/page.html", "--figures", folder]))
        sinks = [(sink["layer"], sink["position"], sink["opened"]) for sink in said["sinks"]]
        found.append((sinks, [said[way]["text"] for way in ("baseline", "outro")]))
    (expected_sinks, expected), (sinks, answers) = found
    is_right = sinks == expected_sinks and (answers == expected or dtype != "float32")
    return f"{len(sinks)} sinks, {'the same' if answers == expected else 'other'} answers, all files written", is_right


def toy_answers(device):
    records, clips = toy_questions(60)
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        for where in ("cpu", device):
            lines = ask(*load(TOY, device=where), records, variants_of(), Path(folder), clips)
            answers.append([line["error"] or line["answer"] for line in lines])
    same = [ours for ours, theirs in zip(*answers, strict=True) if ours == theirs]
    return f"{len(same)} of {len(answers[0])} answers are the same", answers[0] == answers[1]


def attached(name, device):
    """A tiny model of transformers with OutRo: on the CPU, then on the device in two types."""
    from minioutro.lab.attach import attach
    case, found = TINY[name](), []
    is_right = True
    for where, dtype in (("cpu", torch.float32), (device, torch.float32), (device, torch.bfloat16)):
        model = case.model.to(where, dtype)
        inputs = case.prompt(LONG, SHORT)
        for key, value in inputs.items():
            inputs[key] = value.to(where, dtype if value.is_floating_point() else value.dtype)
        with attach(model, OutRo()) as seen:
            logits = model(**inputs).logits[inputs["attention_mask"].bool()]
            found.append((logits, model.generate(**inputs, **GREEDY).tolist()))
        planted = inputs["input_ids"] == PLANTED
        is_right &= list(seen.is_sink) == list(range(3, 13)) and list(seen.opened) == [4]
        is_right &= all(tokens.equal(planted) for tokens in (*seen.is_sink.values(), *seen.opened.values()))
    (expected, answer), (full, same_answer), (half, _) = found
    is_right &= apart(full, expected) <= EQUAL and answer == same_answer
    return f"float32 {apart(full, expected):.0e}, bfloat16 {apart(half, expected):.0e}", is_right


def speed(size, frames, text, way, device):
    """Seconds, on a GPU of the second of two rounds, and the most memory that it needed, weights included."""
    if way == "transformers" and not bench.HAS_TRANSFORMERS:
        return "no transformers here", None
    ours, theirs, ids, pixels, features = prepared(size, frames, text, device)
    outro = OutRo() if way == "OutRo" else None
    encode, answer = ours.encode, functools.partial(bench.answer_ours, ours, ids, features, outro)
    if way == "transformers":
        encode, answer = theirs.model.get_image_features, functools.partial(bench.answer_theirs, theirs, ids, features)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 if device == "cpu" else 2):
        started = time.perf_counter()
        encode(pixels)
        torch.get_device_module(device).synchronize()
        encoder = time.perf_counter() - started
        prompt, tokens = answer()
    told = f"encoder {encoder:.3f} s, prompt {prompt:.3f} s, {bench.NEW} tokens {tokens:.3f} s"
    return f"{told}, GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB", None


@functools.lru_cache(maxsize=1)
def prepared(size, frames, text, device):
    """Our model in bfloat16 with random weights and a planted sink, transformers' with the same, and a prompt."""
    of_text, of_vision, scale, *_ = HUB[size]
    bench.CONFIG["scale_factor"] = scale                                    # bench.prompt reads this config
    bench.CONFIG["text_config"] |= {"num_attention_heads": 32, "num_key_value_heads": 32, **of_text}    # 32 in 2.2B
    bench.CONFIG["vision_config"] |= of_vision
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        Path(folder, "config.json").write_text(json.dumps(bench.CONFIG))
        ours = VideoLM(read_config(Path(folder))).to(torch.bfloat16)
    ours = ours.to_empty(device=device).eval()
    for name, weight in ours.named_parameters():
        weight.normal_(1 if "norm" in name else 0, 0.02)
    ours.model.text_model.embed_tokens.weight[1, 5] = 10_000
    theirs = None
    if bench.HAS_TRANSFORMERS:
        with torch.device(device):
            theirs = AutoModelForImageTextToText.from_config(
                SmolVLMConfig(**bench.CONFIG), dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        theirs.load_state_dict(ours.state_dict(), assign=True)
    ids, pixels = (tensor.to(device) for tensor in bench.prompt(frames, text))
    features = ours.encode(pixels)
    bench.check_sinks(ours, ids, features)
    return ours, theirs, ids, pixels, features


@torch.no_grad()
def main():
    parser = Parser(prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default here: %(default)s",
                        default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    check_device(device)
    torch.backends.cudnn.allow_tf32 = False             # of convolutions; for products of matrices it is off
    torch.manual_seed(0)
    bench.NEW = 8 if device == "cpu" else 64            # tokens after a prompt
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__}", flush=True)
    started = time.perf_counter()
    verdicts = [row(*asked) for asked in rows(device)]
    print(f"{len(verdicts)} rows, {verdicts.count(False)} wrong, {(time.perf_counter() - started) / 60:.1f} minutes")
    sys.exit(1 if False in verdicts else 0)


if __name__ == "__main__":
    run_command(main, "gpu.py")
