"""One web page that steps through the method, layer by layer: `python run.py --page sink.html`.

page.html is the page, and write_page puts the numbers of one prompt into it, as JSON. Large arrays
are compressed by gzip and written in base64. The browser unpacks them. An attention weight is
stored as 255 times its square root, in one byte, so that small weights still differ.
"""

import base64
import gzip
import io
import json
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minioutro.model import OutRo, Trace, VideoLM, activation_ratio, repeat_heads
from minioutro.prompt import Processor
from minioutro.support.checks import advice_on_length
from minioutro.support.cli import writable_folder, written_whole
from minioutro.video import Video

TEMPLATE = Path(__file__).with_name("page.html")
MOST_TOKENS = 800                   # of a prompt: the browser draws every pair of them as one cell
MOST_BYTES = 60_000_000             # of a page. Attention weights take nearly all of it
CONSTANTS = ("abs_threshold", "median_multiple", "relax", "align", "gamma", "temperature",
             "skip_last")           # the fields of OutRo that the page names


def check_page(path, processor: Processor, video: Video, question: str) -> None:
    """Raise ValueError if the file cannot be written, or if the prompt is too long for a page."""
    if Path(path).is_dir():
        raise ValueError(f"--page {path} is a folder; give the name of a file")
    writable_folder("--page", Path(path).parent)
    S = len(processor.tokenize(processor.pieces(video, question)))
    if S > MOST_TOKENS:
        raise ValueError(f"the prompt has {S} tokens with {len(video.frames)} frames, but a page "
                         f"holds {MOST_TOKENS}; "
                         f"{advice_on_length(processor, video, question, MOST_TOKENS)}")


@torch.inference_mode()
def write_page(path, model: VideoLM, processor: Processor, video: Video, question: str,
               outro: OutRo = OutRo(), features: Tensor | None = None,
               answers: dict[str, str] | None = None) -> None:
    """Write the page of one prompt: a single file that needs no network.

    features: float[1,F*M,C] from `model.encode`; answers: the texts of "baseline" and "outro". Both
    are computed if they are not given. The file is written whole or not at all.
    Raises: ValueError in the cases of `check_page`, and if the attention weights are not finite.
    """
    path = Path(path).expanduser()
    check_page(path, processor, video, question)
    inputs = processor(video, question)
    device = model.model.text_model.norm.weight.device
    input_ids = inputs.input_ids.to(device)
    if features is None:
        features = model.encode(inputs.pixel_values.to(device))
    methods = {"baseline": None, "outro": outro}
    if answers is None:
        answers = {}
        for name, method in methods.items():
            token_ids = model.generate(input_ids, features=features, outro=method)
            answers[name] = processor.decode(token_ids)
    runs = {name: run_of(model, input_ids, features, method) for name, method in methods.items()}
    weights = [run.pop("weights") for run in runs.values()]
    text = model.config.text_config
    data = {
        "L": text.num_hidden_layers, "H": text.num_attention_heads,
        "question": question, "answers": answers,
        "seconds": [f"{second:.1f}" for second in video.seconds],
        "frames": [picture(frame, processor.size) for frame in video.frames],
        "tokens": [processor.token_text(token_id) for token_id in input_ids[0].tolist()],
        "image": (input_ids[0] == model.config.image_token_id).nonzero().flatten().tolist(),
        "outro": constants(outro, text.num_hidden_layers), "runs": runs}
    room = MOST_BYTES - len(json.dumps(data)) - TEMPLATE.stat().st_size
    data["weights"] = packed_weights(*weights, by_interest(runs["outro"]), room)
    # In JSON, "<" occurs only in strings, where it may be written as \u003c. So no text of a user
    # can contain "</script>" and end the script.
    numbers = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", numbers)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as half:
        half.write_text(page, encoding="utf-8")


def run_of(model: VideoLM, input_ids: Tensor, features: Tensor, outro: OutRo | None) -> dict:
    """Read the prompt once. Returns: what the page shows of each layer, and the weights as bytes.
    """
    text = model.config.text_config
    L, H = text.num_hidden_layers, text.num_attention_heads
    trace = Trace(weights_of=range(L))
    model.hidden_states(input_ids, features=features, outro=outro, trace=trace)

    def of_layers(name: str) -> Tensor:                                         # (L,...)
        return torch.stack([trace[f"layers.{l}.{name}"][0] for l in range(L)]).cpu()

    weights = []
    for l in range(L):
        weights.append(as_bytes(trace.pop(f"layers.{l}.weights")[0], l))        # (H,S,S)
    ratios = [activation_ratio(trace[f"layers.{l}.hidden"]) for l in range(L)]
    largest = torch.cat([largest for largest, _ in ratios]).cpu()               # (L,S)
    return {
        "weights": weights,
        "largest": packed(largest.float()),
        "median": [median.item() for _, median in ratios],
        "sinks": [positions(is_sink) for is_sink in of_layers("is_sink")],
        "opened": [positions(opened) for opened in of_layers("relaxed")],
        "before": packed(angles(of_layers("cosine"))),                          # (L,H,S)
        "after": packed(angles(of_layers("cosine_aligned"))),
        "value_length": rounded(repeat_heads(of_layers("v_sink"), H).float().norm(dim=-1)),  # (L,H)
        "output_length": rounded(of_layers("out").float().norm(dim=-1).mean(-1))}   # (L,H)


def as_bytes(weights: Tensor, layer: int) -> Tensor:
    """Probabilities -> uint8, 255 times the square root."""
    if not weights.isfinite().all():
        raise ValueError(f"the attention weights of layer {layer} are not finite as "
                         f"{str(weights.dtype)[6:]}, so no page is written; try --dtype float32")
    return (weights.float().sqrt() * 255).round().to(torch.uint8).cpu()


def angles(cosine: Tensor) -> Tensor:
    """Cosines -> hundredths of a degree, 0 to 18,000, as uint16."""
    degrees = cosine.float().clamp(-1, 1).acos() * 180 / math.pi
    return (degrees * 100).round().to(torch.int32).to(torch.uint16)


def positions(is_one: Tensor) -> list[int]:
    return is_one.nonzero().flatten().tolist()


def rounded(values: Tensor) -> list[list[float]]:
    return [[float(f"{x:.4g}") for x in row] for row in values.tolist()]


def packed(values: Tensor) -> str:
    """The bytes of a tensor, little-endian, compressed, as text."""
    small = gzip.compress(values.contiguous().numpy().tobytes(), 6, mtime=0)
    return base64.b64encode(small).decode()


def packed_weights(baseline: list[Tensor], outro: list[Tensor], order: list[int],
                   room: int) -> dict:
    """The weights of both runs by layer: the first layers of this order that fit into the room.

    room: bytes. OutRo's weights are stored as the difference from the baseline's, modulo 256. The
    difference is zero in all layers before the first sink, and zeros compress to nearly nothing.
    """
    layers, used = {}, 0
    for l in order:
        layers[l] = {"baseline": packed(baseline[l]), "difference": packed(outro[l] - baseline[l])}
        used += len(json.dumps({l: layers[l]}))
        if used > room and len(layers) > 1:
            del layers[l]
            break
    return dict(sorted(layers.items()))


def by_interest(run: dict) -> list[int]:
    """All layers: first those in which something happens, then the others, evenly spread.

    Something happens in a layer that opens a row, in the layer after it, and in a layer whose sinks
    differ from those of the layer before.
    """
    L, order = len(run["sinks"]), []
    for l in range(1, L):
        changed = run["sinks"][l] != run["sinks"][l - 1]
        if changed or run["opened"][l] or run["opened"][l - 1]:
            order.append(l)
    step = 2**(L - 1).bit_length()
    while step:                                     # every 16th layer, every 8th, every 4th, ...
        order += [l for l in range(0, L, step) if l not in order]
        step //= 2
    return order


def constants(outro: OutRo, L: int) -> dict:
    """OutRo's settings for the page. every: rows may be opened in multiples of this layer."""
    every = max(1, L // 7) if outro.relax_every is None else outro.relax_every
    named = {name: getattr(outro, name) for name in CONSTANTS}
    return named | {"every": every, "own_rule": outro.rule is not None}


def picture(frame: Image.Image, size: int) -> str:
    """A frame as the model sees it, square, as a data URL: an address that contains the PNG."""
    file = io.BytesIO()
    frame.convert("RGB").resize((size, size), Image.Resampling.LANCZOS).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
