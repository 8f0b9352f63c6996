"""Pictures, each one function, drawn with Pillow alone: of a run, which `run.py --figures DIR`
writes, and of what evaluate.py found, which is also a table.

Captions say what is drawn: layer, head, probabilities or cosines, and what was averaged. Tensors
are those of one prompt, without B; shapes are named as in model.py.
"""

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minioutro.model import OutRo, Trace, VideoLM, align_with_sink, causal_mask, open_sink_rows
from minioutro.support.cli import written_whole
from minioutro.video import Video

INK, PALE, PAPER, MARK = (40, 40, 48), (226, 226, 232), (255, 255, 255), (205, 60, 45)
BLUE = (95, 150, 205)
FONT, SMALL = ImageFont.load_default(15), ImageFont.load_default(12)
WIDTH = 880                                 # pixels; about what a README shows unscaled
PAD = 14


def canvas(height: int, caption: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """White paper with a caption in its last lines."""
    lines = textwrap.wrap(caption, 150)
    image = Image.new("RGB", (WIDTH, height + 18 * len(lines) + PAD), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((PAD, height), "\n".join(lines), INK, SMALL, spacing=6)
    return image, draw


def heat(shade: Tensor, width: int, height: int) -> Image.Image:
    """A map of values from 0 (pale) to 1 (dark); a pixel takes the largest of those under it."""
    shade = F.adaptive_max_pool2d(shade.float().clamp(0, 1)[None], (height, width))[0, :, :, None]
    colours = torch.tensor(PALE) + shade * (torch.tensor(INK) - torch.tensor(PALE))
    return Image.frombytes("RGB", (width, height), bytes(colours.round().int().flatten().tolist()))


def scale_bar(image: Image.Image, x: int, y: int, title: str, labels: list[str]) -> None:
    """What pale and dark stand for: evenly spaced labels under a strip."""
    draw, width = ImageDraw.Draw(image), 200
    draw.text((x - 10, y), title, INK, SMALL, "ra")
    image.paste(heat(torch.linspace(0, 1, width)[None], width, 12), (x, y + 1))
    for n, label in enumerate(labels):
        draw.text((x + n * width / (len(labels) - 1), y + 16), label, INK, SMALL, "ma")


def position_axis(draw: ImageDraw.ImageDraw, x: float, y: float, width: float, S: int) -> None:
    for s in range(0, S, math.ceil(S * 90 / width)):
        draw.text((x + (s + 0.5) * width / S, y), str(s), INK, SMALL, "ma")


def shorten(text: str, width: float) -> str:
    """A token's text, cut to so many pixels; what is not ASCII is escaped: the font may lack it."""
    text, end = ascii(text), ""
    while SMALL.getlength(text + end) > width:
        text, end = text[:-1], "..."
    return text + end


def sketch_positions(is_sink: Tensor, n: int = 8) -> list[int]:
    """About n of bool[S] that stand for a prompt: its ends, evenly spread ones, up to 3 sinks."""
    S = len(is_sink)
    spread = {round(i * (S - 1) / (n - 1)) for i in range(n)}
    return sorted(spread | set(is_sink.nonzero().flatten()[:3].tolist()))


def stack(images: list[Image.Image]) -> Image.Image:
    """Pictures of one width, one below the other."""
    whole = Image.new("RGB", (WIDTH, sum(image.height for image in images)), PAPER)
    y = 0
    for image in images:
        whole.paste(image, (0, y))
        y += image.height
    return whole


def save(pictures: dict[str, Image.Image], folder: Path) -> None:
    """Write each as NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        with written_whole(folder / f"{name}.png") as half:
            picture.save(half)


def draw_frames(video: Video, tokens_per_frame: int) -> Image.Image:
    """The frames that the model was shown, each with its time."""
    F = len(video.frames)
    columns = min(8, F)
    side = min(160, (WIDTH - PAD) // columns - PAD)
    wide, high = side + PAD, side + 30                              # of a frame with its time
    image, draw = canvas(math.ceil(F / columns) * high + PAD, (
        f"The {F} frames that the model is shown, of {video.total_frames}, as it sees them: "
        f"square, {tokens_per_frame} tokens each."))
    for n, (frame, seconds) in enumerate(zip(video.frames, video.seconds)):
        row, column = divmod(n, columns)
        x, y = PAD + column * wide, PAD + row * high
        image.paste(frame.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + side + 4), f"{seconds:.1f} s", INK, SMALL)
    return image


def draw_masks(opened: Tensor, layer: int, tokens: list[str]) -> Image.Image:
    """The causal mask, and that of the layer that opened the rows of its sinks, at a few positions.

    opened: bool[S], the sinks whose rows were opened; tokens: S texts.
    """
    positions = sketch_positions(opened, n=12)
    left, top, gap, n, S = 170, 60, 40, len(positions), len(tokens)
    cell = (WIDTH - left - gap - PAD) // 2 // n
    before = causal_mask(S, S)
    after = open_sink_rows(before, opened[None])[0]
    change = ("what OutRo makes of it, with the opened row of each sink in red" if opened.any() else
              "the same, since no row was opened")
    image, draw = canvas(top + cell * n + PAD, (
        f"Who may attend to whom in layer {layer}: a row is a query, a column a key, dark is "
        f"allowed. {n} of {S} positions are drawn. Left: the causal mask. Right: {change}."))
    draw_mask(draw, (left, top), cell, "before", before, positions, torch.zeros_like(opened))
    draw_mask(draw, (left + cell * n + gap, top), cell, "after", after, positions, opened)
    for y, query in enumerate(positions):
        text = f"{query}  {shorten(tokens[query], left - 62)}"
        colour = MARK if opened[query] else INK
        draw.text((left - 10, top + (y + 0.5) * cell - 1), text, colour, SMALL, "rm")
    return image


def draw_mask(draw: ImageDraw.ImageDraw, corner: tuple[int, int], cell: int, title: str,
              may_attend: Tensor, positions: list[int], marked: Tensor) -> None:
    """One mask, bool[S,S], at these positions, each a cell of so many pixels; marked: bool[S]."""
    (x0, y0), S = corner, len(may_attend)
    draw.text((x0, PAD), title, INK, FONT)
    for x, key in enumerate(positions):
        if S <= 1000 or x % 2 == 0:                             # four digits need two columns
            draw.text((x0 + (x + 0.5) * cell, y0 - 4), str(key), INK, SMALL, "ms")
        for y, query in enumerate(positions):
            allowed = MARK if marked[query] else INK
            left, top = x0 + x * cell, y0 + y * cell
            draw.rectangle((left, top, left + cell - 3, top + cell - 3),
                           allowed if may_attend[query, key] else PALE)


def draw_ratios(ratios: Tensor, is_sink: Tensor, median_multiple: float) -> Image.Image:
    """Which token is massive in which layer: ratios and is_sink are [L,S]."""
    L, S = ratios.shape
    cell, left, top = max(8, min(20, 320 // L)), 66, PAD
    width, bottom, darkest = WIDTH - left - PAD, top + cell * L, max(2.0, median_multiple)
    image, draw = canvas(bottom + 68, (
        f"Largest |h| of each token over the median |h| of the prompt, at the input of each layer "
        f"(logarithmic). Red: what the rule marks as a sink, in the layers that it searches. The "
        f"largest ratio is {ratios.max():,.0f}; the rule asks for {median_multiple:,.0f}."))
    shades = ratios.clamp(min=1).log() / math.log(darkest)
    for l in range(L):
        image.paste(heat(shades[l:l + 1], width, cell - 1), (left, top + l * cell))
        if l % math.ceil(14 / cell) == 0:
            draw.text((left - 8, top + (l + 0.5) * cell), f"layer {l}", INK, SMALL, "rm")
    for l, s in is_sink.nonzero().tolist():     # wide enough to be seen as one among a thousand
        wide = max(width / S, 6)
        x, y = left + min(s * width / S, width - wide), top + l * cell
        draw.rectangle((x, y, x + wide - 1, y + cell - 2), MARK)
    draw.text((left - 8, bottom + 4), "position", INK, SMALL, "ra")
    position_axis(draw, left, bottom + 4, width, S)
    labels = [f"{darkest**(n / 3):,.0f}" for n in range(4)]
    scale_bar(image, left + 60, bottom + 28, "ratio", labels)
    return image


def draw_attention(weights: Tensor, is_image: Tensor, is_sink: Tensor, layer: int,
                   head: int) -> Image.Image:
    """The attention of one head, and the mean over all heads, from every query to every key.

    weights: float[H,S,S], probabilities; is_image, is_sink: bool[S].
    """
    H, S, _ = weights.shape
    size, left, top = 370, 74, 60
    image, draw = canvas(top + size + 76, (
        f"Attention in layer {layer}: probabilities, each row sums to 1 (logarithmic). Left: head "
        f"{head}. Right: the mean over all {H} heads. A pixel shows the largest of the weights "
        f"under it. Blue: the image tokens; red: the sinks."))
    shown = {f"head {head}": weights[head], f"mean over {H} heads": weights.mean(0)}
    for n, (title, weights_shown) in enumerate(shown.items()):
        x0 = left + n * (size + 46)
        draw.text((x0, PAD), title, INK, FONT)
        shade = 1 + weights_shown.clamp(min=1e-4).log10() / 4           # 0.0001 is 0, 1 is 1
        image.paste(heat(shade, size, size), (x0, top))
        mark_tokens(draw, (x0, top), size, is_image, BLUE, least=1)
        mark_tokens(draw, (x0, top), size, is_sink, MARK, least=4)
        position_axis(draw, x0, top + size + 4, size, S)
    for s in range(0, S, math.ceil(S / 6)):
        draw.text((left - 14, top + (s + 0.5) * size / S), str(s), INK, SMALL, "rm")
    draw.text((left - 14, top - 8), "query", INK, SMALL, "rs")
    draw.text((left - 14, top + size + 4), "key", INK, SMALL, "ra")
    scale_bar(image, left + 100, top + size + 34, "probability", "0.0001 0.001 0.01 0.1 1".split())
    return image


def mark_tokens(draw: ImageDraw.ImageDraw, corner: tuple[int, int], size: int, tokens: Tensor,
                colour: tuple, least: int) -> None:
    """Mark tokens, bool[S], above and beside a map of size x size, `least` pixels wide or more."""
    (x0, y0), S = corner, len(tokens)
    for s in tokens.nonzero().flatten().tolist():
        start = s * size // S
        end = max(start + least, (s + 1) * size // S) - 1
        draw.rectangle((x0 + start, y0 - 8, x0 + end, y0 - 4), colour)
        draw.rectangle((x0 - 8, y0 + start, x0 - 4, y0 + end), colour)


def draw_attention_on_frames(video: Video, weights: Tensor, is_image: Tensor, opened: Tensor,
                             layer: int, head: int) -> Image.Image:
    """Which part of which frame is attended to: by the last token, and by a sink that was opened.

    weights: float[H,S,S], probabilities; is_image, opened: bool[S].
    """
    F, mean = len(video.frames), weights.mean(0)
    rows = {f"last token, head {head}": weights[head, -1],
            f"last token, mean over {len(weights)} heads": mean[-1]}
    for i in opened.nonzero().flatten()[:1].tolist():
        rows[f"opened sink at position {i}, mean over {len(weights)} heads"] = mean[i]
    columns = min(F, 8 if F <= 8 else 16)
    step = min(106, (WIDTH - PAD) // columns)                       # pixels from frame to frame
    block = math.ceil(F / columns) * step + 32
    image, draw = canvas(len(rows) * block + PAD, (
        f"Attention in layer {layer} to the image tokens of every frame, in time order: "
        f"probabilities, linear from 0 (grey) to the largest of the block (red), which is given "
        f"beside its title, with the sum over all images."))
    for n, (title, row) in enumerate(rows.items()):
        row, y0 = row[is_image].float(), PAD + n * block
        text = f"{title}: largest {row.max():.2g}, sum {row.sum():.2g}"
        draw.text((PAD, y0), text, INK, FONT)
        shares = (row / row.max().clamp(min=1e-12)).view(F, -1)                         # (F,M)
        for f, frame in enumerate(video.frames):
            y, x = divmod(f, columns)
            picture = frame_in_red(frame, shares[f], step - 6)
            image.paste(picture, (PAD + x * step, y0 + 24 + y * step))
    return image


def frame_in_red(frame: Image.Image, shares: Tensor, size: int) -> Image.Image:
    """A frame in grey, size x size pixels, each of its M tokens as red as its share, 0 to 1."""
    side = math.isqrt(len(shares))
    alpha = Image.frombytes("L", (side, side), bytes((shares * 230).int().tolist()))
    grey = frame.resize((size, size)).convert("L").point(lambda g: 110 + g // 2).convert("RGB")
    grey.paste(MARK, (0, 0, size, size), alpha.resize((size, size), Image.Resampling.NEAREST))
    return grey


def chart(image: Image.Image, box: tuple, x_ticks: dict, y_ticks: dict, titles: tuple[str, str],
          marks: list) -> None:
    """Marks, each ("line" or "dots", points, colour), in axes from the first to the last tick.

    box: the four edges, in pixels. All is painted three times larger and averaged.
    """
    (x0, y0, x1, y1), draw = box, ImageDraw.Draw(image)
    (xa, *_, xb), (ya, *_, yb) = x_ticks, y_ticks

    def place(x, y, scale=1):
        return scale * (x - xa) / (xb - xa) * (x1 - x0), scale * (yb - y) / (yb - ya) * (y1 - y0)
    area = Image.new("RGB", (3 * (x1 - x0), 3 * (y1 - y0)), PAPER)
    paint = ImageDraw.Draw(area)
    for kind, points, colour in marks:
        points = [place(x, y, 3) for x, y in points]
        if kind == "line":
            paint.line(points, colour, 6, "curve")
        else:
            for point in points:
                paint.circle(point, 10, colour)
    image.paste(area.reduce(3), (x0, y0))
    draw.line((x0, y0, x0, y1, x1, y1), INK)
    for x, text in x_ticks.items():
        draw.text((x0 + place(x, 0)[0], y1 + 5), text, INK, SMALL, "ma")
    for y, text in y_ticks.items():
        draw.text((x0 - 8, y0 + place(0, y)[1]), text, INK, SMALL, "rm")
    draw.text(((x0 + x1) / 2, y1 + 22), titles[0], INK, SMALL, "ma")
    draw.text((x0 - 40, y0 - 12), titles[1], INK, SMALL, "ls")


def draw_cosines(before: Tensor, after: Tensor, counts: Tensor) -> Image.Image:
    """Cosine of the heads' outputs to the sink's value, by layer.

    before, after: float[L,H,S]; counts: bool[L,S], what is averaged: none in layers without sink.
    """
    L, layers = len(before), counts.any(1).nonzero().flatten().tolist()
    image, draw = canvas(310, (
        f"Cosine of the attention outputs to the sink's value, before (black) and after (red) the "
        f"alignment: the mean over all heads and over the tokens that were no sink so far, in "
        f"{len(layers) or 'none'} of {L} layers, those with a sink and with such tokens."))
    ticks = {-1: "", **{l: str(l) for l in range(0, L, math.ceil(L / 24))}, L: ""}
    marks = [("line", [(-1, 0), (L, 0)], PALE)]
    for cosines, colour in ((before, INK), (after, MARK)) if layers else ():
        points = [(l, cosines[l][:, counts[l]].mean().item()) for l in layers]
        marks += [("line", points, colour), ("dots", points, colour)]
    chart(image, (74, 40, WIDTH - PAD, 250), ticks, {-1: "-1", 0: "0", 1: "1"}, ("layer", "cosine"),
          marks)
    return image


def draw_rotation(before: Tensor, after: Tensor, layer: int, outro: OutRo) -> Image.Image:
    """What the alignment does to the angle between an output and the sink's value.

    before, after: float[H,N], cosines in this layer of the tokens that are aligned.
    """
    angles = torch.arange(0, 181)
    out = torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], dim=-1)         # (181,2)
    out = align_with_sink(out[None, None], torch.tensor([[[1.0, 0.0]]]),
                          torch.zeros(1, 181, dtype=torch.bool), outro.gamma, outro.temperature)
    turned = torch.atan2(out[0, 0, :, 1], out[0, 0, :, 0]).abs().rad2deg().tolist()
    seen = torch.stack([before.flatten(), after.flatten()], dim=-1)                     # (H*N,2)
    seen = seen[::math.ceil(max(1, len(seen)) / 1500)].clamp(-1, 1).acos().rad2deg().tolist()
    image, draw = canvas(370, (
        f"The alignment turns an output towards the sink's value, with gamma {outro.gamma:g} and "
        f"temperature {outro.temperature:g}. Left: the angle between them, before and after; red"
        f" is the formula, blue dots are {len(seen)} of the {before.numel()} outputs (heads and "
        f"tokens) in layer {layer}. Right: outputs in their plane with the sink's value, before "
        f"(black) and after (red), of the same length. From 90 degrees on nothing turns."))
    ticks = {angle: f"{angle}°" for angle in range(0, 181, 30)}
    chart(image, (74, 40, 394, 320), ticks, ticks, ("angle before", "angle after"),
          [("line", [(0, 0), (180, 180)], PALE), ("dots", seen, BLUE),
           ("line", list(enumerate(turned)), MARK)])
    x0, y0, r = 650, 300, 190
    draw.line((x0 - r, y0, x0 + r, y0), INK)
    draw.text((x0 + r, y0 + 8), "direction of the sink's value", INK, SMALL, "ra")
    for start in (45, 80, 120):
        for angle, colour in ((start, INK), (turned[start], MARK)):
            x, y = math.cos(math.radians(angle)), -math.sin(math.radians(angle))
            draw.line((x0, y0, x0 + r * x, y0 + r * y), colour, 2)
            draw.text((x0 + (r + 18) * x, y0 + (r + 18) * y), f"{angle:.0f}°", colour, SMALL, "mm")
    return image


def draw_run(model: VideoLM, video: Video, input_ids: Tensor, features: Tensor, texts: list[str],
             outro: OutRo, layer: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield the pictures of a run by name, after one more pass that keeps the attention weights.

    texts: of each token; layer: whose mask, attention and rotation are drawn. The head is the one
    whose last token attends most to the sinks, or to token 0 if there are none.
    Raises: ValueError if the attention weights are not finite.
    """
    n_layers, trace = model.config.text_config.num_hidden_layers, Trace(weights_of=[layer])
    with torch.inference_mode():
        model.hidden_states(input_ids, features=features, outro=outro, trace=trace)
    of_layers = {name: torch.stack([trace[f"layers.{l}.{name}"][0] for l in range(n_layers)]).cpu()
                 for name in ("is_sink", "ratio", "cosine", "cosine_aligned")}
    opened = trace[f"layers.{layer}.relaxed"][0].cpu()                                  # (S,)
    weights = trace[f"layers.{layer}.weights"][0]                                       # (H,S,S)
    if not weights.isfinite().all():
        raise ValueError(f"the attention weights of layer {layer} are not finite as "
                         f"{str(weights.dtype)[6:]}, so they cannot be drawn; leave --figures out, "
                         f"or try another --dtype")
    weights = weights.float().cpu()
    is_sink, before, after = (of_layers[name] for name in ("is_sink", "cosine", "cosine_aligned"))
    ever_sink = is_sink.any(0)                                                          # (S,)
    attended = ever_sink.nonzero().flatten() if ever_sink.any() else torch.tensor([0])
    head = weights[:, -1, attended].sum(1).argmax().item()
    is_image = input_ids[0].cpu() == model.config.image_token_id
    # tokens that were not a sink so far, in the layers with a sink: (L,S)
    counts = is_sink.any(1, keepdim=True) & (is_sink.cumsum(0) == 0)

    yield "frames", draw_frames(video, is_image.sum().item() // len(video.frames))
    yield "masks", draw_masks(opened, layer, texts)
    yield "sinks", draw_ratios(of_layers["ratio"].nan_to_num(posinf=torch.finfo(torch.float32).max),
                               is_sink, outro.median_multiple)
    yield "attention", draw_attention(weights, is_image, ever_sink, layer, head)
    yield "attention_frames", draw_attention_on_frames(video, weights, is_image, opened, layer,
                                                       head)
    yield "cosine", draw_cosines(before, after, counts)
    yield "rotation", draw_rotation(before[layer][:, counts[layer]], after[layer][:, counts[layer]],
                                    layer, outro)
