"""Pictures, each drawn by one function with Pillow alone. `run.py --figures DIR` writes them.

A caption says what is drawn: layer, head, probabilities or cosines, and what was averaged. Tensors
are those of one prompt, without B. Shapes are named as in model.py. Colours are (red, green, blue).
"""

import math
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minioutro.model import OutRo, Trace, VideoLM, align_with_sink, causal_mask, open_sink_rows
from minioutro.support.cli import written_whole
from minioutro.video import Video

INK = (40, 40, 48)
PALE = (226, 226, 232)
PAPER = (255, 255, 255)
MARK = (205, 60, 45)                        # red
BLUE = (95, 150, 205)
WIDTH = 880                                 # pixels: a README shows about this width unscaled
PAD = 14                                    # pixels around what is drawn
TITLE = 15                                  # size of the font of titles
SMALL = 12                                  # size of the font of all other text


# ---- Pieces of all pictures ---------------------------------------------------------------------


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font. It is loaded only when something is drawn, because some builds lack it.

    Raises: ValueError if this Pillow cannot draw text.
    """
    try:
        return ImageFont.load_default(size)
    except ImportError:
        raise ValueError("this Pillow was built without FreeType and cannot draw text; install "
                         "Pillow again with pip, or draw no pictures") from None


def canvas(height: int, caption: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """White paper of this height with a caption below it."""
    lines = textwrap.wrap(caption, 150)
    image = Image.new("RGB", (WIDTH, height + 18 * len(lines) + PAD), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((PAD, height), "\n".join(lines), INK, font(SMALL), spacing=6)
    return image, draw


def heat(shade: Tensor, width: int, height: int) -> Image.Image:
    """A map of values from 0 (pale) to 1 (dark). A pixel shows the largest of the values under it.

    shade: float[rows,columns].
    """
    shade = F.adaptive_max_pool2d(shade.float().clamp(0, 1)[None], (height, width))
    shade = shade[0, :, :, None]                                                # (height,width,1)
    pale, ink = torch.tensor(PALE), torch.tensor(INK)
    colours = (pale + shade * (ink - pale)).round().int()                       # (height,width,3)
    return Image.frombytes("RGB", (width, height), bytes(colours.flatten().tolist()))


def scale_bar(image: Image.Image, x: int, y: int, title: str, labels: list[str]) -> None:
    """A strip from pale to dark with evenly spaced labels, which say what the shades stand for."""
    draw = ImageDraw.Draw(image)
    width = 200
    draw.text((x - 10, y), title, INK, font(SMALL), "ra")
    image.paste(heat(torch.linspace(0, 1, width)[None], width, 12), (x, y + 1))
    step = width / (len(labels) - 1)
    for n, label in enumerate(labels):
        draw.text((x + n * step, y + 16), label, INK, font(SMALL), "ma")


def position_axis(draw: ImageDraw.ImageDraw, x: float, y: float, width: float, S: int) -> None:
    """The numbers of some of the S positions, at least 90 pixels apart."""
    for s in range(0, S, math.ceil(S * 90 / width)):
        draw.text((x + (s + 0.5) * width / S, y), str(s), INK, font(SMALL), "ma")


def shorten(text: str, width: float) -> str:
    """A token's text, cut to `width` pixels. Letters that are not ASCII are escaped, because the
    font may lack them."""
    length = font(SMALL).getlength
    text = ascii(text)
    if length(text) <= width:
        return text
    kept = ""
    for letter in text:                     # from the left, so that a long text costs little time
        if length(kept + letter + "...") > width:
            break
        kept += letter
    return kept + "..."


def sketch_positions(is_sink: Tensor, n: int = 8) -> list[int]:
    """About n positions to draw of a prompt: its two ends, some between, and up to three sinks.

    is_sink: bool[S].
    """
    last = len(is_sink) - 1
    spread = {round(i * last / (n - 1)) for i in range(n)}
    sinks = set(is_sink.nonzero().flatten()[:3].tolist())
    return sorted(spread | sinks)


def stack(images: list[Image.Image]) -> Image.Image:
    """One picture of several, one below the other."""
    whole = Image.new("RGB", (WIDTH, sum(image.height for image in images)), PAPER)
    y = 0
    for image in images:
        whole.paste(image, (0, y))
        y += image.height
    return whole


def save(pictures: dict[str, Image.Image], folder: Path) -> None:
    """Write each picture as NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        with written_whole(folder / f"{name}.png") as half:
            picture.save(half)


# ---- The frames ---------------------------------------------------------------------------------


def draw_frames(video: Video, tokens_per_frame: int) -> Image.Image:
    """The frames that the model was shown, each with its time."""
    n_frames = len(video.frames)
    columns = min(8, n_frames)
    side = min(160, (WIDTH - PAD) // columns - PAD)
    wide = side + PAD
    high = side + 30                                                # of a frame with its time
    image, draw = canvas(math.ceil(n_frames / columns) * high + PAD, (
        f"The {n_frames} frames that the model is shown, of {video.total_frames}, as it sees them: "
        f"square, {tokens_per_frame} tokens each."))
    for n, (frame, seconds) in enumerate(zip(video.frames, video.seconds)):
        row, column = divmod(n, columns)
        x = PAD + column * wide
        y = PAD + row * high
        image.paste(frame.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + side + 4), f"{seconds:.1f} s", INK, font(SMALL))
    return image


# ---- Masks --------------------------------------------------------------------------------------


def draw_masks(opened: Tensor, layer: int, tokens: list[str]) -> Image.Image:
    """The causal mask, and the mask of the layer that opened the rows of its sinks, at a few
    positions.

    opened: bool[S], the sinks whose rows were opened; tokens: S texts.
    """
    S = len(tokens)
    positions = sketch_positions(opened, n=12)
    n = len(positions)
    left, top, gap = 170, 60, 40
    cell = (WIDTH - left - gap - PAD) // 2 // n
    before = causal_mask(S, S)
    after = open_sink_rows(before, opened[None])[0]
    change = "the same, since no row was opened"
    if opened.any():
        change = "what OutRo makes of it, with the opened row of each sink in red"
    image, draw = canvas(top + cell * n + PAD, (
        f"Who may attend to whom in layer {layer}: a row is a query, a column a key, dark is "
        f"allowed. {n} of {S} positions are drawn. Left: the causal mask. Right: {change}."))
    draw_mask(draw, (left, top), cell, "before", before, positions, torch.zeros_like(opened))
    draw_mask(draw, (left + cell * n + gap, top), cell, "after", after, positions, opened)
    for y, query in enumerate(positions):
        text = f"{query}  {shorten(tokens[query], left - 62)}"
        colour = MARK if opened[query] else INK
        draw.text((left - 10, top + (y + 0.5) * cell - 1), text, colour, font(SMALL), "rm")
    return image


def draw_mask(draw: ImageDraw.ImageDraw, corner: tuple[int, int], cell: int, title: str,
              may_attend: Tensor, positions: list[int], marked: Tensor) -> None:
    """One mask, bool[S,S], at these positions.

    cell: pixels on each side of a cell; marked: bool[S], the queries whose allowed keys are red.
    """
    x0, y0 = corner
    all_have_room = len(may_attend) <= 1000             # a number of four digits needs two columns
    draw.text((x0, PAD), title, INK, font(TITLE))
    for x, key in enumerate(positions):
        if all_have_room or x % 2 == 0:
            draw.text((x0 + (x + 0.5) * cell, y0 - 4), str(key), INK, font(SMALL), "ms")
        for y, query in enumerate(positions):
            colour = PALE
            if may_attend[query, key]:
                colour = MARK if marked[query] else INK
            left = x0 + x * cell
            top = y0 + y * cell
            draw.rectangle((left, top, left + cell - 3, top + cell - 3), colour)


# ---- Massive activations ------------------------------------------------------------------------


def draw_ratios(ratios: Tensor, is_sink: Tensor, median_multiple: float) -> Image.Image:
    """Which token is massive in which layer.

    ratios: float[L,S], max |h| divided by the median |h|; is_sink: bool[L,S].
    """
    L, S = ratios.shape
    cell = max(8, min(20, 320 // L))                    # the height of a layer
    left, top = 66, PAD
    width = WIDTH - left - PAD
    bottom = top + cell * L
    darkest = max(2.0, median_multiple)
    image, draw = canvas(bottom + 68, (
        f"Largest |h| of each token over the median |h| of the prompt, at the input of each layer "
        f"(logarithmic). Red: what the rule marks as a sink, in the layers that it searches. The "
        f"largest ratio is {ratios.max():,.0f}; the rule asks for {median_multiple:,.0f}."))
    shades = ratios.clamp(min=1).log() / math.log(darkest)
    for l in range(L):
        image.paste(heat(shades[l:l + 1], width, cell - 1), (left, top + l * cell))
    for l in range(0, L, math.ceil(14 / cell)):         # a label needs 14 pixels
        draw.text((left - 8, top + (l + 0.5) * cell), f"layer {l}", INK, font(SMALL), "rm")

    wide = max(width / S, 6)            # of a sink: one among a thousand tokens must still be seen
    for l, s in is_sink.nonzero().tolist():
        x = left + min(s * width / S, width - wide)
        y = top + l * cell
        draw.rectangle((x, y, x + wide - 1, y + cell - 2), MARK)
    draw.text((left - 8, bottom + 4), "position", INK, font(SMALL), "ra")
    position_axis(draw, left, bottom + 4, width, S)
    labels = [f"{darkest**(n / 3):,.0f}" for n in range(4)]
    scale_bar(image, left + 60, bottom + 28, "ratio", labels)
    return image


# ---- Attention ----------------------------------------------------------------------------------


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
        draw.text((x0, PAD), title, INK, font(TITLE))
        shade = 1 + weights_shown.clamp(min=1e-4).log10() / 4           # 0.0001 is 0, 1 is 1
        image.paste(heat(shade, size, size), (x0, top))
        mark_tokens(draw, (x0, top), size, is_image, BLUE, least=1)
        mark_tokens(draw, (x0, top), size, is_sink, MARK, least=4)
        position_axis(draw, x0, top + size + 4, size, S)
    for s in range(0, S, math.ceil(S / 6)):
        draw.text((left - 14, top + (s + 0.5) * size / S), str(s), INK, font(SMALL), "rm")
    draw.text((left - 14, top - 8), "query", INK, font(SMALL), "rs")
    draw.text((left - 14, top + size + 4), "key", INK, font(SMALL), "ra")
    labels = ["0.0001", "0.001", "0.01", "0.1", "1"]
    scale_bar(image, left + 100, top + size + 34, "probability", labels)
    return image


def mark_tokens(draw: ImageDraw.ImageDraw, corner: tuple[int, int], size: int, tokens: Tensor,
                colour: tuple, least: int) -> None:
    """Mark tokens, bool[S], above and beside a map of size x size. least: pixels for each mark."""
    x0, y0 = corner
    S = len(tokens)
    for s in tokens.nonzero().flatten().tolist():
        start = s * size // S
        end = max(start + least, (s + 1) * size // S) - 1
        draw.rectangle((x0 + start, y0 - 8, x0 + end, y0 - 4), colour)
        draw.rectangle((x0 - 8, y0 + start, x0 - 4, y0 + end), colour)


def draw_attention_on_frames(video: Video, weights: Tensor, is_image: Tensor, opened: Tensor,
                             layer: int, head: int) -> Image.Image:
    """Which parts of the frames the last token attends to, and which parts an opened sink.

    weights: float[H,S,S], probabilities; is_image, opened: bool[S].
    """
    n_frames = len(video.frames)
    rows = attention_rows(weights, opened, head)
    columns = n_frames if n_frames <= 8 else min(n_frames, 16)
    step = min(106, (WIDTH - PAD) // columns)                       # pixels from frame to frame
    block = math.ceil(n_frames / columns) * step + 32               # the height of a row's frames
    image, draw = canvas(len(rows) * block + PAD, (
        f"Attention in layer {layer} to the image tokens of every frame, in time order: "
        f"probabilities, linear from 0 (grey) to the largest of the block (red), which is given "
        f"beside its title, with the sum over all images."))
    for n, (title, row) in enumerate(rows.items()):
        row = row[is_image].float()                                 # (F*M,)
        y0 = PAD + n * block
        text = f"{title}: largest {row.max():.2g}, sum {row.sum():.2g}"
        draw.text((PAD, y0), text, INK, font(TITLE))
        shares = (row / row.max().clamp(min=1e-12)).view(n_frames, -1)          # (F,M)
        for f, frame in enumerate(video.frames):
            y, x = divmod(f, columns)
            picture = frame_in_red(frame, shares[f], step - 6)
            image.paste(picture, (PAD + x * step, y0 + 24 + y * step))
    return image


def attention_rows(weights: Tensor, opened: Tensor, head: int) -> dict[str, Tensor]:
    """The rows of attention, float[S], of the last token and of the first opened sink, by title."""
    H = len(weights)
    mean = weights.mean(0)                                                      # (S,S)
    rows = {f"last token, head {head}": weights[head, -1],
            f"last token, mean over {H} heads": mean[-1]}
    if opened.any():
        i = opened.nonzero()[0].item()
        rows[f"opened sink at position {i}, mean over {H} heads"] = mean[i]
    return rows


def frame_in_red(frame: Image.Image, shares: Tensor, size: int) -> Image.Image:
    """A frame in grey, size x size pixels. Each of its M tokens is as red as its share, 0 to 1."""
    side = math.isqrt(len(shares))
    alpha = Image.frombytes("L", (side, side), bytes((shares * 230).int().tolist()))
    grey = frame.resize((size, size)).convert("L").point(lambda g: 110 + g // 2).convert("RGB")
    grey.paste(MARK, (0, 0, size, size), alpha.resize((size, size), Image.Resampling.NEAREST))
    return grey


# ---- The alignment ------------------------------------------------------------------------------


def chart(image: Image.Image, box: tuple[int, int, int, int], x_ticks: dict, y_ticks: dict,
          titles: tuple[str, str], marks: list[tuple]) -> None:
    """Marks in axes that reach from the first to the last tick.

    box: left, top, right and bottom edge in pixels. ticks: value -> label. titles: of the x axis
    and of the y axis. marks: a list of ("line" or "dots", [(x, y), ...], colour).
    """
    left, top, right, bottom = box
    x_first, x_last = min(x_ticks), max(x_ticks)
    y_first, y_last = min(y_ticks), max(y_ticks)

    def across(x: float, scale: int = 1) -> float:          # pixels from the left edge
        return scale * (x - x_first) / (x_last - x_first) * (right - left)

    def down(y: float, scale: int = 1) -> float:            # pixels from the top edge
        return scale * (y_last - y) / (y_last - y_first) * (bottom - top)

    scale = 3                   # paint the marks larger and average, so that they are smooth
    area = Image.new("RGB", (scale * (right - left), scale * (bottom - top)), PAPER)
    paint = ImageDraw.Draw(area)
    for kind, points, colour in marks:
        places = [(across(x, scale), down(y, scale)) for x, y in points]
        if kind == "line":
            paint.line(places, colour, 2 * scale, "curve")
        else:
            for place in places:
                paint.circle(place, 10, colour)
    image.paste(area.reduce(scale), (left, top))

    draw = ImageDraw.Draw(image)
    draw.line((left, top, left, bottom, right, bottom), INK)
    for x, label in x_ticks.items():
        draw.text((left + across(x), bottom + 5), label, INK, font(SMALL), "ma")
    for y, label in y_ticks.items():
        draw.text((left - 8, top + down(y)), label, INK, font(SMALL), "rm")
    x_title, y_title = titles
    draw.text(((left + right) / 2, bottom + 22), x_title, INK, font(SMALL), "ma")
    draw.text((left - 40, top - 12), y_title, INK, font(SMALL), "ls")


def draw_cosines(before: Tensor, after: Tensor, counts: Tensor) -> Image.Image:
    """Cosine of the heads' outputs to the sink's value, by layer.

    before, after: float[L,H,S]; counts: bool[L,S], the tokens that are averaged. A layer in which
    no token counts has no dot.
    """
    L = len(before)
    layers = counts.any(1).nonzero().flatten().tolist()
    image, draw = canvas(310, (
        f"Cosine of the attention outputs to the sink's value, before (black) and after (red) the "
        f"alignment: the mean over all heads and over the tokens that have not been a sink so far. "
        f"It is drawn for {len(layers) or 'none'} of {L} layers, those with a sink and such tokens."
    ))
    marks = [("line", [(-1, 0), (L, 0)], PALE)]
    if layers:
        for cosines, colour in ((before, INK), (after, MARK)):
            points = [(l, cosines[l][:, counts[l]].mean().item()) for l in layers]
            marks.append(("line", points, colour))
            marks.append(("dots", points, colour))
    x_ticks = {-1: "", L: ""}                           # room on both sides
    for l in range(0, L, math.ceil(L / 24)):
        x_ticks[l] = str(l)
    y_ticks = {-1: "-1", 0: "0", 1: "1"}
    chart(image, (74, 40, WIDTH - PAD, 250), x_ticks, y_ticks, ("layer", "cosine"), marks)
    return image


def draw_rotation(before: Tensor, after: Tensor, layer: int, outro: OutRo) -> Image.Image:
    """What the alignment does to the angle between an output and the sink's value.

    before, after: float[H,N], cosines in this layer of the N tokens that are aligned.
    """
    turned = aligned_angles(outro)
    seen = torch.stack([before.flatten(), after.flatten()], dim=-1)                     # (H*N,2)
    every = math.ceil(max(1, len(seen)) / 1500)                     # at most 1,500 dots are drawn
    seen = seen[::every].clamp(-1, 1).acos().rad2deg().tolist()
    image, draw = canvas(370, (
        f"The alignment turns an output towards the sink's value, with gamma {outro.gamma:g} and "
        f"temperature {outro.temperature:g}. Left: the angle between them, before and after; red"
        f" is the formula, blue dots are {len(seen)} of the {before.numel()} outputs (heads and "
        f"tokens) in layer {layer}. Right: outputs in their plane with the sink's value, before "
        f"(black) and after (red), of the same length. From 90 degrees on nothing turns."))
    ticks = {angle: f"{angle}°" for angle in range(0, 181, 30)}
    marks = [("line", [(0, 0), (180, 180)], PALE),
             ("dots", seen, BLUE),
             ("line", list(enumerate(turned)), MARK)]
    chart(image, (74, 40, 394, 320), ticks, ticks, ("angle before", "angle after"), marks)
    draw_turns(draw, turned)
    return image


def aligned_angles(outro: OutRo) -> list[float]:
    """The angles to the sink after the alignment, in degrees, for 0, 1, ... 180 degrees before."""
    angles = torch.arange(0, 181).deg2rad()
    out = torch.stack([angles.cos(), angles.sin()], dim=-1)[None, None]             # (1,1,181,2)
    v_sink = torch.tensor([[[1.0, 0.0]]])                                       # (1,1,2)
    ever_sink = torch.zeros(1, 181, dtype=torch.bool)
    out = align_with_sink(out, v_sink, ever_sink, outro.gamma, outro.temperature)
    return torch.atan2(out[0, 0, :, 1], out[0, 0, :, 0]).abs().rad2deg().tolist()


def draw_turns(draw: ImageDraw.ImageDraw, turned: list[float]) -> None:
    """Draw three outputs as hands of a clock, before and after. The sink's value points right."""
    x0, y0, r = 650, 300, 190
    draw.line((x0 - r, y0, x0 + r, y0), INK)
    draw.text((x0 + r, y0 + 8), "direction of the sink's value", INK, font(SMALL), "ra")
    for start in (45, 80, 120):
        for angle, colour in ((start, INK), (turned[start], MARK)):
            x = math.cos(math.radians(angle))
            y = -math.sin(math.radians(angle))
            draw.line((x0, y0, x0 + r * x, y0 + r * y), colour, 2)
            place = (x0 + (r + 18) * x, y0 + (r + 18) * y)
            draw.text(place, f"{angle:.0f}°", colour, font(SMALL), "mm")


def draw_run(model: VideoLM, video: Video, input_ids: Tensor, features: Tensor, texts: list[str],
             outro: OutRo, layer: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield the pictures of a run by name, after one more pass that keeps the attention weights.

    texts: the text of each token; layer: the layer whose mask, attention and rotation are drawn.
    The head is the one in which the last token attends most to the sinks, or to token 0 if there
    are none.
    Raises: ValueError if the attention weights are not finite.
    """
    trace = Trace(weights_of=[layer])
    with torch.inference_mode():
        model.hidden_states(input_ids, features=features, outro=outro, trace=trace)
    n_layers = model.config.text_config.num_hidden_layers
    is_sink, ratio, before, after = (
        torch.stack([trace[f"layers.{l}.{name}"][0] for l in range(n_layers)]).cpu()
        for name in ("is_sink", "ratio", "cosine", "cosine_aligned"))
    opened = trace[f"layers.{layer}.relaxed"][0].cpu()                                  # (S,)
    weights = finite_weights(trace, layer)                                              # (H,S,S)
    ever_sink = is_sink.any(0)                                                          # (S,)
    attended = ever_sink.nonzero().flatten() if ever_sink.any() else torch.tensor([0])
    head = weights[:, -1, attended].sum(1).argmax().item()
    is_image = input_ids[0].cpu() == model.config.image_token_id
    ratio = ratio.nan_to_num(posinf=torch.finfo(torch.float32).max)     # where the median is 0
    # in the layers with a sink, the tokens that have not been a sink so far: (L,S)
    counts = is_sink.any(1, keepdim=True) & (is_sink.cumsum(0) == 0)
    counted = counts[layer]

    yield "frames", draw_frames(video, is_image.sum().item() // len(video.frames))
    yield "masks", draw_masks(opened, layer, texts)
    yield "sinks", draw_ratios(ratio, is_sink, outro.median_multiple)
    yield "attention", draw_attention(weights, is_image, ever_sink, layer, head)
    yield "attention_frames", draw_attention_on_frames(
        video, weights, is_image, opened, layer, head)
    yield "cosine", draw_cosines(before, after, counts)
    yield "rotation", draw_rotation(
        before[layer][:, counted], after[layer][:, counted], layer, outro)


def finite_weights(trace: dict, layer: int) -> Tensor:
    """The attention weights of a layer, float[H,S,S]. Raises: ValueError if some are not finite."""
    weights = trace[f"layers.{layer}.weights"][0]
    if not weights.isfinite().all():
        dtype = str(weights.dtype).removeprefix("torch.")
        raise ValueError(f"the attention weights of layer {layer} are not finite as {dtype}, so "
                         f"they cannot be drawn; leave --figures out, or try another --dtype")
    return weights.float().cpu()
