"""Ask a small video language model about a video, see its attention sink, and OutRo's answer.

    python run.py                                    the bundled clip and the bundled toy model
    python run.py VIDEO "QUESTION"                   SmolVLM2-256M from the Hugging Face hub
    python run.py VIDEO "QUESTION" --model FOLDER    any SmolVLM2 checkpoint
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

if __name__ == "__main__":
    # `python -I` and runpy do not add the script's folder, in which the package lies
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from torch import Tensor

from minioutro import OutRo, Processor, Video, VideoLM, load, read_video
from minioutro.lab import figures
from minioutro.lab.page import check_page, write_page
from minioutro.model import causal_mask, open_sink_rows, show_mask
from minioutro.support.checks import check_prompt
from minioutro.support.cli import (
    COUNT,
    Parser,
    add_model_options,
    add_outro_options,
    add_video_options,
    escaped,
    not_empty,
    print_json,
    progress,
    run_command,
    writable_folder,
)
from minioutro.weights import HUB_MODEL, TOY


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="run.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("video", nargs="?", type=not_empty,
        help="a video, animation or picture (default: the bundled clip)")
    add("question", nargs="?", default="What happens in this video?",
        help="a question about it (default: %(default)s)")
    add_model_options(parser)
    add_video_options(parser)
    add("--max-new-tokens", type=COUNT, default=64, metavar="N",
        help="end an answer after N tokens (default: %(default)s)")
    add_outro_options(parser.add_argument_group("OutRo"))
    add = parser.add_argument_group("output").add_argument
    add("--figures", type=not_empty, metavar="DIR", help="write pictures of the run to this folder")
    add("--page", type=not_empty, metavar="FILE.html",
        help="write a web page that steps through the prompt, layer by layer")
    add("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args()


@dataclass
class Asked:
    """A question about a video, and the model that is asked."""
    path: Path
    video: Video
    question: str
    model_name: str                 # as the header shows it
    model: VideoLM
    processor: Processor
    pixel_values: Tensor            # float[1,F,3,size,size]
    input_ids: Tensor               # int64[1,S]
    texts: list[str]                # the text of each token of the prompt


def main() -> None:
    args = parse_arguments()
    if not args.question.strip():
        raise ValueError("the question is empty; ask something about the video")
    outro = OutRo(abs_threshold=args.abs_threshold, median_multiple=args.median_multiple,
                  relax=not args.no_relax, align=not args.no_align, gamma=args.gamma,
                  temperature=args.temperature)
    if args.figures is not None:
        folder = writable_folder("--figures", args.figures)
    say = say_nothing if args.json else print

    asked = prepare(args)
    if args.page is not None:
        check_page(args.page, asked.processor, asked.video, asked.question)
    print_header(asked, say)
    features = encode(asked)
    summary, baseline, changed = answer_both(asked, features, outro, args.max_new_tokens, say)
    ratio = time_ratio(baseline, changed)
    say(f"time      {time_line(baseline, changed, ratio)}")
    if args.figures is not None:
        write_figures(folder, asked, features, outro, summary)
        say(f"figures   in {escaped(folder)}: frames, masks and sinks (together in run.png), "
            f"attention, cosine and rotation")
    if args.page is not None:
        answers = {"baseline": baseline["text"], "outro": changed["text"]}
        write_page(args.page, asked.model, asked.processor, asked.video, asked.question, outro,
                   features, answers)
        say(f"page      {escaped(args.page)}: open it in a browser")
    if args.json:
        video = asked.video
        print_json({
            "video": str(asked.path), "frames": len(video.frames),
            "total_frames": video.total_frames, "seconds": video.seconds,
            "duration": video.duration, "question": asked.question,
            "weights": asked.model.load_report,
            "tokens_per_frame": asked.processor.tokens_per_frame,
            "prompt_tokens": len(asked.texts), "sinks": summary["sinks"],
            "cosine": summary["cosine"], "baseline": baseline, "outro": changed,
            "time_ratio": ratio})


def say_nothing(*args, **kwargs) -> None:
    """Used in place of print with --json."""


# ---- 1. Read everything, and encode the frames --------------------------------------------------


def prepare(args: argparse.Namespace) -> Asked:
    """Read the video, the model and the prompt.

    Raises: ValueError or OSError for a file or a value that does not fit.
    """
    if args.video is None:
        path, default_model = TOY / "clip.mp4", TOY
    else:
        path, default_model = Path(args.video), HUB_MODEL
    read_video(path, max_frames=1)      # a wrong file is reported before a model is downloaded
    source = default_model if args.model is None else args.model
    model, processor = load(source, args.revision, args.device, getattr(torch, args.dtype))

    fps = processor.fps if args.fps is None else args.fps
    max_frames = processor.max_frames if args.frames is None else args.frames
    video = read_video(path, fps, max_frames, processor.longest_edge)
    inputs = processor(video, args.question)
    check_prompt(model, processor, video, args.question, inputs.input_ids)
    texts = [processor.token_text(token_id) for token_id in inputs.input_ids[0].tolist()]
    name = TOY.name if source == TOY else source
    return Asked(path, video, args.question, name, model, processor,
                 inputs.pixel_values.to(args.device), inputs.input_ids.to(args.device), texts)


def print_header(asked: Asked, say) -> None:
    video, S, F = asked.video, len(asked.texts), len(asked.video.frames)
    times = [f"{seconds:.1f}" for seconds in video.seconds]
    if F > 12:
        times = [*times[:4], "...", times[-1]]
    M = asked.processor.tokens_per_frame
    say(f"video     {escaped(asked.path.name)}: {F} of {video.total_frames} frames, at "
        f"{' '.join(times)} s of {video.duration:.1f} s")
    say(f"weights   {escaped(asked.model_name)}: {asked.model.load_report}")
    say(f"prompt    {F} frames x {M} tokens + {S - F * M} text = {S} tokens")
    say(f"question  {escaped(asked.question)}")


@torch.inference_mode()
def encode(asked: Asked) -> Tensor:
    """The image tokens of all frames: float[1,F*M,C]."""
    frames = asked.pixel_values.split(1, dim=1)
    features = [asked.model.encode(frame) for frame in progress(frames, "frames")]
    return torch.cat(features, dim=1)


# ---- 2. Both answers, and how long they take ----------------------------------------------------


def answer_both(asked: Asked, features: Tensor, outro: OutRo, max_new_tokens: int,
                say) -> tuple[dict, dict, dict]:
    """Print the sinks and both answers. Returns: the summary of the sinks, and both answers.

    OutRo's prompt is read first, because the sinks are printed first. The baseline fills a trace as
    well, so that the only difference in time is OutRo.
    """
    model, trace = asked.model, {}
    asks = {"features": features, "max_new_tokens": max_new_tokens}
    with torch.inference_mode():
        # read the weights from disk now, so that the time of neither answer includes it
        model(asked.input_ids[:, :1])
    outro_seconds, baseline_seconds = [], []
    outro_stream = timed(model.stream(asked.input_ids, outro=outro, trace=trace, **asks),
                         outro_seconds)
    first = next(outro_stream)
    n_layers = model.config.text_config.num_hidden_layers
    searched = max(0, n_layers - outro.skip_last)
    summary = summarise(trace, n_layers, searched, asked.texts)
    trace.clear()                           # a long prompt's trace takes gigabytes
    print_sinks(summary, searched, asked.texts, outro, say)
    baseline_stream = timed(model.stream(asked.input_ids, trace={}, **asks), baseline_seconds)
    baseline = print_answer("baseline", baseline_stream, asked.processor, say)
    changed = print_answer("outro", chain([first], outro_stream), asked.processor, say)
    return summary, baseline | times_of(baseline_seconds), changed | times_of(outro_seconds)


def timed(stream: Iterator[int], seconds: list[float]) -> Iterator[int]:
    """Yield the tokens of a stream, and append to `seconds` how long each of them took."""
    while True:
        started = time.perf_counter()
        token_id = next(stream, None)
        if token_id is None:
            return
        seconds.append(time.perf_counter() - started)
        yield token_id


def times_of(seconds: list[float]) -> dict:
    """Total seconds, seconds up to the first token, and tokens per second after it."""
    prompt, *later = seconds
    rate = len(later) / sum(later) if later else None
    return {"seconds": sum(seconds), "prompt_seconds": prompt, "tokens_per_second": rate}


def time_ratio(baseline: dict, changed: dict) -> float | None:
    """OutRo's time divided by the baseline's. None if an answer took less than two seconds, because
    that is too short to compare.
    """
    if min(baseline["seconds"], changed["seconds"]) < 2:
        return None
    return changed["seconds"] / baseline["seconds"]


def time_line(baseline: dict, changed: dict, ratio: float | None) -> str:
    answers = (baseline, changed)
    prompts = " and ".join(f"{answer['prompt_seconds']:.2f}" for answer in answers)
    line = f"baseline and outro: {prompts} s for the prompt"
    rates = [answer["tokens_per_second"] for answer in answers]
    if None not in rates:
        line += f", then {rates[0]:.0f} and {rates[1]:.0f} tokens a second"
    if ratio is None:
        return f"{line}; too short to compare"
    return f"{line}; outro took {ratio:.2f} times as long"


def print_answer(label: str, stream: Iterator[int], processor: Processor, say) -> dict:
    """Print an answer as it is generated, in one line."""
    say(f"{label:<10}", end="", flush=True)
    token_ids, printed = [], ""
    for token_id in stream:
        token_ids.append(token_id)
        text = escaped(" ".join(processor.decode(token_ids).split("\n")))
        if not text.endswith("\ufffd"):     # part of a character, which the next token completes
            say(text[len(printed):], end="", flush=True)
            printed = text
    say()
    return {"text": processor.decode(token_ids), "token_ids": token_ids}


# ---- 3. What the trace says about sinks, mask and alignment -------------------------------------


def summarise(trace: dict, n_layers: int, searched: int, texts: list[str]) -> dict:
    """The sinks, the token that comes nearest to being one, and the cosines to the sink's value.

    searched: how many layers OutRo searches for sinks. The summary is small, so that the trace,
    which is large, need not be kept.
    """
    is_sink, opened = of_layers(trace, "is_sink", n_layers), of_layers(trace, "relaxed", n_layers)
    # the ratio is infinite where the median is 0
    ratio = of_layers(trace, "ratio", n_layers).nan_to_num(posinf=torch.finfo(torch.float32).max)
    sinks = []
    for l, i in is_sink.nonzero().tolist():
        sinks.append({"layer": l, "position": i, "token": texts[i], "ratio": ratio[l, i].item(),
                      "opened": opened[l, i].item()})
    nearest = None
    if searched > 0:
        l, i = divmod(ratio[:searched].argmax().item(), len(texts))
        activation = trace[f"layers.{l}.hidden"][0, i].abs().max().item()
        nearest = {"layer": l, "position": i, "token": texts[i], "ratio": ratio[l, i].item(),
                   "activation": activation}
    return {"sinks": sinks, "nearest": nearest, "cosine": mean_cosines(trace, is_sink)}


def of_layers(trace: dict, name: str, n_layers: int) -> Tensor:
    """One entry of a trace, collected from every layer: (L,S)."""
    return torch.stack([trace[f"layers.{l}.{name}"][0] for l in range(n_layers)]).cpu()


def mean_cosines(trace: dict, is_sink: Tensor) -> tuple[float, float] | None:
    """The mean cosine to the sink's value, before and after alignment. is_sink: bool[L,S].

    In each layer with a sink, the mean is over the tokens that have not been a sink so far. The
    result is the mean over these layers.
    """
    before, after = [], []
    for l in is_sink.any(1).nonzero().flatten().tolist():
        others = ~is_sink[:l + 1].any(0)
        if others.any():
            before.append(trace[f"layers.{l}.cosine"][0].cpu()[:, others].mean().item())
            after.append(trace[f"layers.{l}.cosine_aligned"][0].cpu()[:, others].mean().item())
    if not before:
        return None
    return sum(before) / len(before), sum(after) / len(after)


def opened_layers(sinks: list[dict]) -> list[int]:
    return sorted({sink["layer"] for sink in sinks if sink["opened"]})


def print_sinks(summary: dict, searched: int, texts: list[str], outro: OutRo, say) -> None:
    lines = sink_lines(summary["sinks"], searched)
    if searched == 0:
        lines = [f"none: OutRo skips the last {outro.skip_last} layers, and the model has no more"]
    elif not summary["sinks"]:
        lines.append(nearest_line(summary["nearest"], outro))
    say(in_block("sinks", lines))
    say(in_block("mask", mask_lines(summary["sinks"], texts, outro)))
    say(in_block("cosine", [cosine_line(summary, outro)]))


def in_block(label: str, lines: list[str]) -> str:
    """Lines in a column to the right of one label."""
    first, *others = lines
    return "\n".join([f"{label:<10}{first}", *(f"{'':<10}{line}" for line in others)])


def sink_lines(sinks: list[dict], searched: int) -> list[str]:
    """The sinks by layer. Neighbouring layers with the same sinks share a line."""
    by_layer = [[] for _ in range(searched)]
    for sink in sinks:
        by_layer[sink["layer"]].append(sink)
    lines, first = [], 0
    for _, group in groupby(by_layer, key=lambda found: [sink["position"] for sink in found]):
        same = list(group)
        last = first + len(same) - 1
        span = f"layer {first}" if first == last else f"layers {first}-{last}"
        lines.append(f"{span}: {sink_texts(same)}")
        first = last + 1
    return lines


def sink_texts(layers: list[list[dict]]) -> str:
    """The sinks of several layers that have the same sinks. At most three are described."""
    described = []
    for of_token in list(zip(*layers))[:3]:
        position, token = of_token[0]["position"], of_token[0]["token"]
        ratios = [sink["ratio"] for sink in of_token]
        low, high = f"{min(ratios):,.0f}", f"{max(ratios):,.0f}"
        times = low if low == high else f"{low} to {high}"
        described.append(f"position {position} {token!r}, {times} times the median")
    more = len(layers[0]) - 3
    if more > 0:
        described.append(f"and {more} more")
    return "; ".join(described) if described else "none"


def nearest_line(nearest: dict, outro: OutRo) -> str:
    """The token that comes nearest to being a sink, and thresholds that it would reach."""
    ratio, activation = nearest["ratio"], nearest["activation"]
    flags = []
    if ratio < outro.median_multiple:
        flags.append(f"--median-multiple {rounded_down(ratio)}")
    if activation < outro.abs_threshold:
        flags.append(f"--abs-threshold {rounded_down(activation)}")
    return (f"the highest ratio is {ratio:,.1f}, of position {nearest['position']} "
            f"{nearest['token']!r} in layer {nearest['layer']}, |h| {activation:,.1f}; to call it "
            f"a sink: {' '.join(flags)}")


def rounded_down(value: float) -> float:
    """Round down, so that the suggested threshold is one that this value reaches."""
    return math.floor(value) if value >= 10 else math.floor(value * 100) / 100


def mask_lines(sinks: list[dict], texts: list[str], outro: OutRo) -> list[str]:
    """The causal mask, and beside it the mask of the first layer that opened rows."""
    layers = opened_layers(sinks)
    if not layers:
        off = "" if outro.relax else " (--no-relax)"
        return [f"causal in every layer; no row was opened{off}"]
    S = len(texts)
    opened = torch.zeros(S, dtype=torch.bool)
    for sink in sinks:
        if sink["opened"] and sink["layer"] == layers[0]:
            opened[sink["position"]] = True
    positions = figures.sketch_positions(opened)
    labels = [f"{i} {texts[i]!r} opened" if opened[i] else f"{i} {texts[i]!r}" for i in positions]
    before = causal_mask(S, S)
    after = open_sink_rows(before, opened[None])[0]
    left = show_mask(before[positions][:, positions]).split("\n")
    right = show_mask(after[positions][:, positions], labels).split("\n")
    drawn = f"{len(positions)} of {S} positions"
    title = f"rows opened in layer {layers[0]}; {drawn}:"
    if len(layers) > 1:
        title = (f"rows opened in layers {', '.join(map(str, layers))}; {drawn} in the mask of "
                 f"layer {layers[0]}:")
    return [title, *(f"{row}     {new_row}" for row, new_row in zip(left, right))]


def cosine_line(summary: dict, outro: OutRo) -> str:
    if summary["cosine"] is None:
        what = "every token is a sink" if summary["sinks"] else "no sink"
        return f"{what}, so nothing was aligned"
    before, after = summary["cosine"]
    off = "" if outro.align else " (--no-align)"
    return (f"of the other tokens to the sink's value, on average: {before:+.3f} before alignment, "
            f"{after:+.3f} after{off}")


# ---- 4. Pictures --------------------------------------------------------------------------------


def write_figures(folder: Path, asked: Asked, features: Tensor, outro: OutRo,
                  summary: dict) -> None:
    """Draw all pictures, and write them only when all are drawn.

    A picture of one layer shows the first layer that opened a row. If none did, it shows the layer
    with the highest ratio.
    """
    layers = opened_layers(summary["sinks"])
    if layers:
        layer = layers[0]
    elif summary["nearest"] is not None:
        layer = summary["nearest"]["layer"]
    else:
        layer = 0
    drawing = figures.draw_run(asked.model, asked.video, asked.input_ids, features, asked.texts,
                               outro, layer)
    pictures = dict(progress(drawing, "pictures", total=7))
    pictures["run"] = figures.stack([pictures[name] for name in ("frames", "masks", "sinks")])
    figures.save(pictures, folder)


if __name__ == "__main__":
    run_command(main, "run.py")
