"""Ask a small video language model about a video, see its attention sink, and OutRo's answer.

    python run.py                                    the bundled clip and the bundled toy model
    python run.py VIDEO "QUESTION"                   SmolVLM2-256M from the Hugging Face hub
    python run.py VIDEO "QUESTION" --model FOLDER    any SmolVLM2 checkpoint
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path

TOY = Path(__file__).parent / "minioutro" / "toy"
HUB_MODEL = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (try --help)\n")


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("video", nargs="?", help="a video, animation or picture (default: the bundled clip)")
    add("question", nargs="?", default="What happens in this video?", help="default: %(default)s")
    add("--model", metavar="DIR_OR_REPO", help="folder of a checkpoint, or repository of the hub "
        f"(default: {HUB_MODEL}; for the bundled clip the bundled toy)")
    add("--revision", help="branch, tag or commit of the repository (default: the newest)")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="default: %(default)s")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of weights and activations (default: %(default)s)")
    add("--frames", type=int, default=64, metavar="N", help="at most so many (default: %(default)s)")
    add("--fps", type=float, default=1.0, metavar="F", help="frames a second (default: %(default)s)")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    outro = parser.add_argument_group("OutRo")
    add = outro.add_argument
    add("--gamma", type=float, default=3.0, metavar="G", help="strength of the alignment "
        "(default: %(default)s)")
    add("--temperature", type=float, default=0.1, metavar="T", help="of its gate (default: %(default)s)")
    add("--no-relax", action="store_true", help="do not open the rows of the sinks")
    add("--no-align", action="store_true", help="do not align the other tokens with the sinks")
    add("--median-multiple", type=float, default=1000.0, metavar="M", help="a sink has an activation of "
        "at least M times the median (default: %(default)s)")
    add("--abs-threshold", type=float, default=100.0, metavar="A", help="and of at least A "
        "(default: %(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--figures", metavar="DIR", help="write pictures of the run into this folder")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"run.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: argparse.Namespace) -> None:
    import torch  # here and not above, so that --help and a mistyped flag answer at once

    from minioutro import OutRo, Processor, VideoLM, read_video

    outro = OutRo(abs_threshold=args.abs_threshold, median_multiple=args.median_multiple,
                  relax=not args.no_relax, align=not args.no_align, gamma=args.gamma,
                  temperature=args.temperature)
    path, question = Path(args.video or TOY / "clip.mp4"), args.question
    name = args.model or (HUB_MODEL if args.video else TOY)
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available()}
    if not available[args.device]:
        raise ValueError(f"--device {args.device}: there is none here; leave it out to use the cpu")
    if not question.strip():
        raise ValueError("the question is empty; ask something about the video")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: give at least 1")
    if args.figures and Path(args.figures).exists() and not Path(args.figures).is_dir():
        raise ValueError(f"--figures {args.figures} is a file; give a folder")
    read_video(path, max_frames=1)      # a wrong file is told before a model is downloaded

    processor = Processor.from_pretrained(name, args.revision)
    video = read_video(path, args.fps, args.frames, processor.longest_edge)
    inputs = processor(video, question)
    model = VideoLM.from_pretrained(name, args.revision, args.device, getattr(torch, args.dtype))
    check_length(model, processor, video, question, inputs.input_ids.shape[1])

    say = (lambda *_, **__: None) if args.json else print
    S, F = inputs.input_ids.shape[1], len(video.frames)
    image_tokens = F * processor.tokens_per_frame
    times = [f"{seconds:.1f}" for seconds in video.seconds]
    times = times if F <= 12 else [*times[:4], "...", times[-1]]
    say(f"video     {path.name}: {F} of {video.total_frames} frames, at {' '.join(times)} s of "
        f"{video.duration:.1f} s")
    say(f"weights   {name.name if name == TOY else name}: {model.load_report}")
    say(f"prompt    {F} frames x {processor.tokens_per_frame} tokens + {S - image_tokens} text = {S} tokens")
    say(f"question  {question}")

    trace, input_ids = {}, inputs.input_ids.to(args.device)
    with torch.inference_mode():
        features = model.encode(inputs.pixel_values.to(args.device))
        model(input_ids[:, :1])         # pages the weights in; neither of the answers should pay for it
    ask = dict(features=features, max_new_tokens=args.max_new_tokens)
    # OutRo's prompt is read first, since it fills the trace that is shown before the answers.
    started = time.perf_counter()
    outro_stream = model.stream(input_ids, outro=outro, trace=trace, **ask)
    first = next(outro_stream)
    spent = time.perf_counter() - started
    texts = [processor.token_text(token_id) for token_id in inputs.input_ids[0].tolist()]
    L = model.config.text_config.num_hidden_layers
    for line in report(trace, texts, outro, L):
        say(line)
    # The baseline files a trace as well, so that the times differ by OutRo alone.
    baseline = answer("baseline", model.stream(input_ids, trace={}, **ask), processor, say)
    changed = answer("outro", chain([first], outro_stream), processor, say, spent)
    ratio = changed["seconds"] / baseline["seconds"]
    say(f"time      baseline {baseline['seconds']:.2f} s, outro {changed['seconds']:.2f} s: "
        f"{ratio:.2f} times as long")

    if args.figures:
        write_figures(Path(args.figures), video, trace, texts, outro, processor.tokens_per_frame, L)
        say(f"figures   in {args.figures}: frames.png, masks.png, sinks.png and all of them in run.png")
    if args.json:
        print(json.dumps({
            "video": str(path), "frames": F, "total_frames": video.total_frames,
            "seconds": video.seconds, "duration": video.duration, "question": question,
            "weights": model.load_report, "tokens_per_frame": processor.tokens_per_frame,
            "prompt_tokens": S, "sinks": list_sinks(trace, texts, L), "cosine": mean_cosines(trace, L),
            "baseline": baseline, "outro": changed, "time_ratio": ratio}, ensure_ascii=False))


def check_length(model, processor, video, question: str, length: int) -> None:
    """Raise ValueError if the prompt does not fit the model's context; say how many frames would."""
    context = model.config.text_config.max_position_embeddings
    if length <= context:
        return
    fits = len(video.frames)
    while fits and length > context:
        fits -= 1
        part = replace(video, frames=video.frames[:fits], seconds=video.seconds[:fits])
        length = len(processor.tokenize(processor.pieces(part, question))) if fits else 0
    what = f"at most {fits} frames fit, try --frames {fits}" if fits else "shorten the question"
    total = len(processor.tokenize(processor.pieces(video, question)))
    raise ValueError(f"the prompt has {total} tokens with {len(video.frames)} frames, the model's context "
                     f"holds {context}; {what}")


def answer(label: str, stream, processor, say, spent: float = 0.0) -> dict:
    """Print an answer as it is generated; spent is what its first token has already taken, in seconds."""
    say(f"{label:<10}", end="", flush=True)
    token_ids, text, started = [], "", time.perf_counter()
    for token_id in stream:
        token_ids.append(token_id)
        longer = " ".join(processor.decode(token_ids).split("\n"))
        if not longer.endswith("\ufffd"):       # half of a character; the next token completes it
            say(longer[len(text):], end="", flush=True)
            text = longer
    spent += time.perf_counter() - started
    say()
    return {"text": processor.decode(token_ids), "token_ids": token_ids, "seconds": spent}


def by_layer(trace: dict, name: str, L: int):
    """What the trace holds for the prompt under layers.l.name, of all layers: [L,S]."""
    import torch
    return torch.stack([trace[f"layers.{l}.{name}"][0] for l in range(L)]).cpu()


def list_sinks(trace: dict, texts: list[str], L: int) -> list[dict]:
    """Every sink that was found, by layer and position."""
    is_sink, ratio, opened = (by_layer(trace, name, L) for name in ("is_sink", "ratio", "relaxed"))
    return [{"layer": l, "position": i, "token": texts[i], "ratio": round(ratio[l, i].item(), 1),
             "opened": bool(opened[l, i])} for l, i in is_sink.nonzero().tolist()]


def mean_cosines(trace: dict, L: int) -> tuple[float, float] | None:
    """Mean cosine to the sink's value before and after alignment, over the layers that have a sink,
    their heads, and the tokens that were no sink up to there."""
    is_sink = by_layer(trace, "is_sink", L)
    pairs = []
    for l in is_sink.any(1).nonzero().flatten().tolist():
        others = ~is_sink[:l + 1].any(0)
        pairs.append([trace[f"layers.{l}.{name}"][0][:, others].mean().item()
                      for name in ("cosine", "cosine_aligned")])
    return tuple(sum(column) / len(pairs) for column in zip(*pairs)) if pairs else None


def report(trace: dict, texts: list[str], outro, L: int):
    """Yield the lines about sinks, mask and alignment."""
    from minioutro.figures import sketch_positions
    from minioutro.model import causal_mask, open_sink_rows, show_mask

    is_sink, ratio, opened = (by_layer(trace, name, L) for name in ("is_sink", "ratio", "relaxed"))
    searched = max(0, L - outro.skip_last)
    runs = [(l, tuple(is_sink[l].nonzero().flatten().tolist())) for l in range(searched)]
    label = "sinks"
    for positions, group in groupby(runs, key=lambda run: run[1]):      # equal neighbours in one line
        layers = [l for l, _ in group]
        span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        tokens = []
        for i in positions[:3]:
            low, high = ratio[layers, i].min().item(), ratio[layers, i].max().item()
            between = f"{low:,.0f}" if f"{low:.0f}" == f"{high:.0f}" else f"{low:,.0f} to {high:,.0f}"
            tokens.append(f"position {i} {texts[i]!r}, {between} times the median")
        if len(positions) > 3:
            tokens.append(f"and {len(positions) - 3} more")
        yield f"{label:<10}{span}: {'; '.join(tokens) or 'none'}"
        label = ""
    if not is_sink.any() and searched:
        l, i = divmod(ratio[:searched].argmax().item(), len(texts))
        largest = trace[f"layers.{l}.hidden"][0, i].abs().max().item()
        below = lambda value: int(value) if value >= 10 else int(value * 100) / 100
        flags = [f"--median-multiple {below(ratio[l, i].item())}"] * (ratio[l, i] < outro.median_multiple)
        flags += [f"--abs-threshold {below(largest)}"] * (largest < outro.abs_threshold)
        yield (f"{'':<10}the highest ratio is {ratio[l, i]:,.1f}, of position {i} {texts[i]!r} in layer {l} "
               f"(|h| {largest:,.1f}); to call it a sink: {' '.join(flags)}")

    layers = opened.any(1).nonzero().flatten().tolist()
    if layers:
        positions = sketch_positions(opened[layers[0]])
        before = causal_mask(len(texts), len(texts))
        after = open_sink_rows(before, opened[layers[0]][None])[0]
        labels = [f"{i} {texts[i]!r}" + " opened" * bool(opened[layers[0], i]) for i in positions]
        sketch = [show_mask(mask[positions][:, positions], names).split("\n")
                  for mask, names in ((before, None), (after, labels))]
        yield f"{'mask':<10}rows opened in layer {', '.join(map(str, layers))}; at {len(positions)} positions:"
        yield from (f"{'':<10}{left}     {right}" for left, right in zip(*sketch))
    else:
        yield f"{'mask':<10}causal in every layer; no row was opened" + " (--no-relax)" * (not outro.relax)
    cosine = mean_cosines(trace, L)
    if cosine:
        yield (f"{'cosine':<10}of the other tokens to the sink's value, on average: {cosine[0]:+.3f} before "
               f"alignment, {cosine[1]:+.3f} after" + " (--no-align)" * (not outro.align))
    else:
        yield f"{'cosine':<10}no sink, so nothing was aligned"


def write_figures(folder: Path, video, trace: dict, texts: list[str], outro, tokens: int, L: int) -> None:
    from minioutro.figures import draw_frames, draw_masks, draw_ratios, stack
    from minioutro.model import causal_mask

    is_sink, ratio, opened = (by_layer(trace, name, L) for name in ("is_sink", "ratio", "relaxed"))
    layer = opened.any(1).int().argmax().item()         # the first that opened a row
    pictures = {"frames.png": draw_frames(video, tokens),
                "masks.png": draw_masks(causal_mask(len(texts), len(texts)), opened[layer], layer, texts),
                "sinks.png": draw_ratios(ratio, is_sink, outro.median_multiple)}
    pictures["run.png"] = stack(list(pictures.values()))
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / name)


if __name__ == "__main__":
    main()
