"""Ask a small video language model about a video, see its attention sink, and OutRo's answer.

    python run.py                                    the bundled clip and the bundled toy model
    python run.py VIDEO "QUESTION"                   SmolVLM2-256M from the Hugging Face hub
    python run.py VIDEO "QUESTION" --model FOLDER    any SmolVLM2 checkpoint
"""

import os
import signal
import sys

if __name__ == "__main__":
    # Ctrl-C ends it at once, also while torch is imported, which would swallow an exception.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))     # python -I leaves it out

import argparse  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
from bisect import bisect_right  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from itertools import chain, groupby  # noqa: E402
from pathlib import Path  # noqa: E402

TOY = Path(__file__).resolve().parent / "minioutro" / "toy"
HUB_MODEL = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"


def shown(text: str) -> str:
    """A text in one line, in which characters that would steer a terminal are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {shown(message)} (try --help)\n")


def numbers(least: float, most: float, kind: type = float):
    """As weights.numbers, which needs torch: what reads a number from `least` to `most`."""
    def number(text: str):
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text[:20]!r} is not from {least} to {most}")
        return value
    return number


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count, strength = parser.add_argument, numbers(1, 10**9 - 1, int), numbers(0, 1e12)
    add("video", nargs="?", help="a video, animation or picture (default: the bundled clip)")
    add("question", nargs="?", default="What happens in this video?", help="default: %(default)s")
    add("--model", metavar="DIR_OR_REPO", help="folder of a checkpoint, or repository of the hub "
        f"(default: {HUB_MODEL}; for the bundled clip the bundled toy)")
    add("--revision", help="branch, tag or commit of the repository (default: the newest)")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="default: %(default)s")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of weights and activations (default: %(default)s)")
    add("--frames", type=count, metavar="N", help="at most (default: the checkpoint's, mostly 64)")
    add("--fps", type=numbers(1e-9, 1e9), metavar="F",
        help="frames a second (default: the checkpoint's, mostly 1)")
    add("--max-new-tokens", type=count, default=64, metavar="N", help="default: %(default)s")
    add = parser.add_argument_group("OutRo").add_argument
    add("--gamma", type=strength, default=3.0, metavar="G",
        help="strength of the alignment (default: %(default)s)")
    add("--temperature", type=numbers(1e-12, 1e12), default=0.1, metavar="T",
        help="of the alignment's gate (default: %(default)s)")
    add("--no-relax", action="store_true", help="do not open the rows of the sinks")
    add("--no-align", action="store_true", help="do not align the other tokens with the sinks")
    add("--median-multiple", type=strength, default=1000.0, metavar="M",
        help="a sink has an activation of at least M times the median (default: %(default)s)")
    add("--abs-threshold", type=strength, default=100.0, metavar="A",
        help="and of at least A (default: %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--figures", metavar="DIR", help="write pictures of the run into this folder")
    add("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args()


def main() -> None:
    for name in ("stdout", "stderr"):                   # None where the caller has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    args = arguments()
    if args.json:
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    else:
        sys.stdout.reconfigure(errors="replace")        # not every terminal can show a square
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:                             # the reader, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        print(f"run.py: {shown(' '.join(str(error).splitlines()))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: argparse.Namespace) -> None:
    import torch  # here and not above, so that --help and a mistyped flag answer at once

    check_arguments(args)
    outro, model, processor, video, inputs = prepare(args)
    say = (lambda *_, **__: None) if args.json else print
    print_header(args, model, processor, video, inputs, say)
    input_ids = inputs.input_ids.to(args.device)
    texts = [processor.token_text(token_id) for token_id in input_ids[0].tolist()]
    with torch.inference_mode():
        frames = inputs.pixel_values.to(args.device).split(1, dim=1)
        features = torch.cat([model.encode(frame) for frame in progress(frames, "frames", args)], 1)
        model(input_ids[:, :1])         # pages the weights in; neither answer should pay for that
    seen, baseline, changed = answer_both(args, model, processor, input_ids, features, texts, outro,
                                          say)
    ratio = changed["seconds"] / baseline["seconds"]
    ratio = ratio if min(baseline["seconds"], changed["seconds"]) >= 2 else None        # luck
    say(f"time      {time_line(baseline, changed, ratio)}")

    if args.figures:
        signal.signal(signal.SIGINT, signal.default_int_handler)        # to leave no half picture
        write_figures(args, model, video, input_ids, features, texts, outro, seen)
        say(f"figures   in {shown(str(args.figures))}: frames, masks and sinks (together in "
            f"run.png), attention, cosine and rotation")
    if args.json:
        print(json.dumps({
            "video": str(args.video), "frames": len(video.frames),
            "total_frames": video.total_frames, "seconds": video.seconds,
            "duration": video.duration, "question": args.question, "weights": model.load_report,
            "tokens_per_frame": processor.tokens_per_frame, "prompt_tokens": len(texts),
            "sinks": list_sinks(seen, texts), "cosine": seen.cosine,
            "baseline": baseline, "outro": changed, "time_ratio": ratio}, ensure_ascii=False))


def check_arguments(args: argparse.Namespace) -> None:
    """Fill in what was left out. Raises: ValueError for what is wrong before anything is read."""
    for what in ("video", "model", "figures"):
        if getattr(args, what) == "":
            raise ValueError(f"the name given for {what} is empty; give one, or leave it out")
    if not args.question.strip():
        raise ValueError("the question is empty; ask something about the video")
    args.model = args.model or (HUB_MODEL if args.video else TOY)
    args.video = Path(args.video or TOY / "clip.mp4")
    if args.figures:
        from minioutro.support.cli import writable_folder
        args.figures = writable_folder("--figures", args.figures)


def prepare(args: argparse.Namespace):
    """OutRo, model, processor, video and inputs. Raises: ValueError if they do not fit together."""
    import torch

    from minioutro import OutRo, load, read_video

    outro = OutRo(abs_threshold=args.abs_threshold, median_multiple=args.median_multiple,
                  relax=not args.no_relax, align=not args.no_align, gamma=args.gamma,
                  temperature=args.temperature)
    read_video(args.video, max_frames=1)    # a wrong file is told before a model is downloaded
    model, processor = load(args.model, args.revision, args.device, getattr(torch, args.dtype))
    video = read_video(args.video, args.fps or processor.fps, args.frames or processor.max_frames,
                       processor.longest_edge)
    inputs = processor(video, args.question)
    check_length(model, processor, video, args.question, inputs)
    return outro, model, processor, video, inputs


def print_header(args: argparse.Namespace, model, processor, video, inputs, say) -> None:
    S, F, M = inputs.input_ids.shape[1], len(video.frames), processor.tokens_per_frame
    times = [f"{seconds:.1f}" for seconds in video.seconds]
    times = times if F <= 12 else [*times[:4], "...", times[-1]]
    say(f"video     {shown(args.video.name)}: {F} of {video.total_frames} frames, at "
        f"{' '.join(times)} s of {video.duration:.1f} s")
    say(f"weights   {TOY.name if args.model == TOY else shown(args.model)}: {model.load_report}")
    say(f"prompt    {F} frames x {M} tokens + {S - F * M} text = {S} tokens")
    say(f"question  {shown(args.question)}")


def answer_both(args: argparse.Namespace, model, processor, input_ids, features, texts: list[str],
                outro, say) -> tuple["Seen", dict, dict]:
    """Print the sinks and both answers. OutRo's prompt is read first, since its trace is shown; the
    baseline fills a trace as well, so that the times differ by OutRo alone."""
    ask, trace = dict(features=features, max_new_tokens=args.max_new_tokens), {}
    outro_stream = Timed(model.stream(input_ids, outro=outro, trace=trace, **ask))
    first = next(outro_stream)
    seen = Seen.of(trace, model.config.text_config.num_hidden_layers)
    trace.clear()                       # a long prompt's takes gigabytes
    for line in sink_lines(seen, texts, outro):
        say(line)
    baseline_stream = Timed(model.stream(input_ids, trace={}, **ask))
    baseline = print_answer("baseline", baseline_stream, processor, say)
    changed = print_answer("outro", chain([first], outro_stream), processor, say)
    return seen, {**baseline, **baseline_stream.summary()}, {**changed, **outro_stream.summary()}


def progress(items, what: str, args: argparse.Namespace):
    """The items, with a bar on stderr while they are worked on, if a person watches."""
    if args.json or not (sys.stdout.isatty() and sys.stderr.isatty()):
        return items
    from huggingface_hub.utils import tqdm
    return tqdm(items, desc=what, leave=False)


def check_length(model, processor, video, question: str, inputs) -> None:
    """Raise ValueError if the prompt has tokens that the model lacks, or is too long for it."""
    text = model.config.text_config
    largest, V = inputs.input_ids.max().item(), text.vocab_size
    if largest >= V:
        raise ValueError(f"tokenizer.json gives token id {largest}, config.json has {V} tokens; "
                         f"take all files from one checkpoint")
    S, F = inputs.input_ids.shape[1], len(video.frames)
    context = text.max_position_embeddings
    if S <= context:
        return

    def length(n: int) -> int:
        part = replace(video, frames=video.frames[:n], seconds=video.seconds[:n])
        return len(processor.tokenize(processor.pieces(part, question)))
    fit = bisect_right(range(1, F), context, key=length)        # how many of 1, 2, ... frames fit
    advice = (f"at most {fit} frames fit, try --frames {fit}" if fit else
              "not one frame fits, shorten the question")
    raise ValueError(f"the prompt has {S} tokens with {F} frames, the model's context holds "
                     f"{context}; {advice}")


class Timed:
    """A stream of token ids that keeps how many seconds each of them took."""

    def __init__(self, stream):
        self.stream, self.seconds = stream, []

    def __iter__(self):
        return self

    def __next__(self) -> int:
        started = time.perf_counter()
        token_id = next(self.stream)
        self.seconds.append(time.perf_counter() - started)
        return token_id

    def summary(self) -> dict:
        """Seconds in all, those of the prompt (and first token), and tokens a second behind it."""
        prompt, *later = self.seconds
        return {"seconds": prompt + sum(later), "prompt_seconds": prompt,
                "tokens_per_second": len(later) / sum(later) if later else None}


def time_line(baseline: dict, changed: dict, ratio: float | None) -> str:
    prompts = [f"{answer['prompt_seconds']:.2f}" for answer in (baseline, changed)]
    rates = [answer["tokens_per_second"] for answer in (baseline, changed)]
    line = f"baseline and outro: {' and '.join(prompts)} s for the prompt"
    if all(rates):
        line += f", then {' and '.join(f'{rate:.0f}' for rate in rates)} tokens a second"
    return line + (f"; {ratio:.2f} times as long" if ratio else "; too short to compare")


def print_answer(label: str, stream, processor, say) -> dict:
    """Print an answer as it is generated, in one line."""
    say(f"{label:<10}", end="", flush=True)
    token_ids, text = [], ""
    for token_id in stream:
        token_ids.append(token_id)
        longer = shown(" ".join(processor.decode(token_ids).split("\n")))
        if not longer.endswith("\ufffd"):       # half of a character; the next token completes it
            say(longer[len(text):], end="", flush=True)
            text = longer
    say()
    return {"text": processor.decode(token_ids), "token_ids": token_ids}


@dataclass
class Seen:
    """What the report and the figures need of a trace."""
    is_sink: "torch.Tensor"                     # bool[L,S]
    ratio: "torch.Tensor"                       # float[L,S]
    opened: "torch.Tensor"                      # bool[L,S]
    largest: "torch.Tensor"                     # float[L,S], max |h|
    cosine: tuple[float, float] | None          # mean cosine to the sink before and after alignment

    @classmethod
    def of(cls, trace: dict, L: int) -> "Seen":
        import torch

        def stacked(name):
            return torch.stack([trace[f"layers.{l}.{name}"][0] for l in range(L)]).cpu()
        largest = [trace[f"layers.{l}.hidden"][0].abs().amax(-1) for l in range(L)]
        is_sink = stacked("is_sink")
        ratio = stacked("ratio").nan_to_num(posinf=torch.finfo(torch.float32).max)      # median 0
        pairs = []
        for l in is_sink.any(1).nonzero().flatten().tolist():
            others = ~is_sink[:l + 1].any(0)    # the tokens that were no sink up to this layer
            if not others.any():
                continue
            pairs.append([trace[f"layers.{l}.{name}"][0].cpu()[:, others].mean().item()
                          for name in ("cosine", "cosine_aligned")])
        cosine = tuple(sum(column) / len(pairs) for column in zip(*pairs)) if pairs else None
        largest = torch.stack(largest).cpu()
        return cls(is_sink, ratio, stacked("relaxed"), largest, cosine)


def list_sinks(seen: Seen, texts: list[str]) -> list[dict]:
    """Every sink that was found, by layer and position."""
    return [{"layer": l, "position": i, "token": texts[i], "ratio": seen.ratio[l, i].item(),
             "opened": bool(seen.opened[l, i])} for l, i in seen.is_sink.nonzero().tolist()]


def sink_lines(seen: Seen, texts: list[str], outro):
    """Yield the lines about sinks, mask and alignment."""
    from minioutro.lab.figures import sketch_positions
    from minioutro.model import causal_mask, open_sink_rows, show_mask

    searched = max(0, len(seen.is_sink) - outro.skip_last)
    found = [(l, seen.is_sink[l].nonzero().flatten().tolist()) for l in range(searched)]
    label = "sinks"
    for positions, layers in groupby(found, key=lambda pair: pair[1]):  # equal neighbours: one line
        layers = [l for l, _ in layers]
        span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        tokens = []
        for i in positions[:3]:
            low, high = (f"{r:,.0f}" for r in seen.ratio[layers, i].aminmax())
            times = low if low == high else f"{low} to {high}"
            tokens.append(f"position {i} {texts[i]!r}, {times} times the median")
        if len(positions) > 3:
            tokens.append(f"and {len(positions) - 3} more")
        yield f"{label:<10}{span}: {'; '.join(tokens) or 'none'}"
        label = ""
    if not searched:
        yield f"sinks     none: the model has no layers but the last {outro.skip_last}"
    elif not seen.is_sink.any():
        l, i = divmod(seen.ratio[:searched].argmax().item(), len(texts))
        ratio, largest = seen.ratio[l, i].item(), seen.largest[l, i].item()
        flags = [f"{flag} {below(value)}" for flag, value, limit in (
            ("--median-multiple", ratio, outro.median_multiple),
            ("--abs-threshold", largest, outro.abs_threshold)) if value < limit]
        yield (f"{'':<10}the highest ratio is {ratio:,.1f}, of position {i} {texts[i]!r} in layer "
               f"{l}, |h| {largest:,.1f}; to call it a sink: {' '.join(flags)}")

    layers = seen.opened.any(1).nonzero().flatten().tolist()
    if layers:
        opened = seen.opened[layers[0]]
        positions = sketch_positions(opened)
        before = causal_mask(len(texts), len(texts))
        after = open_sink_rows(before, opened[None])[0]
        labels = [f"{i} {texts[i]!r}" + (" opened" if opened[i] else "") for i in positions]
        left = show_mask(before[positions][:, positions]).split("\n")
        right = show_mask(after[positions][:, positions], labels).split("\n")
        where = ", ".join(map(str, layers))
        yield f"mask      rows opened in layer {where}; {len(positions)} of {len(texts)} positions:"
        yield from (f"{'':<10}{row}     {new}" for row, new in zip(left, right))
    else:
        off = "" if outro.relax else " (--no-relax)"
        yield f"mask      causal in every layer; no row was opened{off}"
    if seen.cosine:
        before, after = seen.cosine
        off = "" if outro.align else " (--no-align)"
        yield (f"cosine    of the other tokens to the sink's value, on average: {before:+.3f} "
               f"before alignment, {after:+.3f} after{off}")
    else:
        what = "every token is a sink" if seen.is_sink.any() else "no sink"
        yield f"cosine    {what}, so nothing was aligned"


def below(value: float) -> float:
    """A short number that is not above the value, for a threshold that it shall reach."""
    return int(value) if value >= 10 else int(value * 100) / 100


def write_figures(args: argparse.Namespace, model, video, input_ids, features, texts: list[str],
                  outro, seen: Seen) -> None:
    """Draw everything, after one more pass: no run whose time is told has to give weights.

    The layer of a picture is the first that opened a row, or else the one with the most massive
    activation; the head is the one whose last token attends most to the sinks (or to token 0).
    """
    import torch

    from minioutro import Trace
    from minioutro.lab import figures

    rows_opened = seen.opened.any(1)
    layer = (rows_opened.int() if rows_opened.any() else seen.ratio.amax(1)).argmax().item()
    trace = Trace(weights_of=[layer])
    with torch.inference_mode():
        model.hidden_states(input_ids, features=features, outro=outro, trace=trace)
    before, after = (torch.stack([trace[f"layers.{l}.{name}"][0] for l in range(len(seen.opened))])
                     for name in ("cosine", "cosine_aligned"))                          # (L,H,S)
    before, after = before.cpu(), after.cpu()
    weights = trace[f"layers.{layer}.weights"][0].float().cpu()                         # (H,S,S)
    if not weights.isfinite().all():
        raise ValueError(f"the attention weights of layer {layer} are not finite as {args.dtype}, "
                         f"so they cannot be drawn; leave --figures out, or try another --dtype")
    is_image = input_ids[0].cpu() == model.config.image_token_id
    sinks, opened = seen.is_sink.any(0), seen.opened[layer]
    head = weights[:, -1, sinks if sinks.any() else 0].view(len(weights), -1).sum(1).argmax().item()
    counts = seen.is_sink.any(1, keepdim=True) & (seen.is_sink.cumsum(0) == 0)          # (L,S)
    aligned = before[layer][:, counts[layer]], after[layer][:, counts[layer]]

    M = is_image.sum().item() // len(video.frames)
    draw = {
        "frames": lambda: figures.draw_frames(video, M),
        "masks": lambda: figures.draw_masks(opened, layer, texts),
        "sinks": lambda: figures.draw_ratios(seen.ratio, seen.is_sink, outro.median_multiple),
        "attention": lambda: figures.draw_attention(weights, is_image, sinks, layer, head),
        "attention_frames": lambda: figures.draw_attention_on_frames(
            video, weights, is_image, opened, layer, head),
        "cosine": lambda: figures.draw_cosines(before, after, counts),
        "rotation": lambda: figures.draw_rotation(*aligned, layer, outro)}
    pictures = {name: draw[name]() for name in progress(draw, "pictures", args)}
    pictures["run"] = figures.stack([pictures[name] for name in ("frames", "masks", "sinks")])
    figures.save(pictures, args.figures)


if __name__ == "__main__":
    main()
