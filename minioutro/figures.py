"""Pictures of a run: the frames, the mask before and after, the sinks. Drawn with Pillow alone."""

import math

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minioutro.model import open_sink_rows
from minioutro.video import Video

INK, PALE, PAPER, MARK = (40, 40, 48), (226, 226, 232), (255, 255, 255), (205, 60, 45)
FONT, SMALL = ImageFont.load_default(15), ImageFont.load_default(12)
WIDTH = 880                                 # pixels; about what a README shows unscaled
PAD = 14


def sketch_positions(is_sink: Tensor, n: int = 8) -> list[int]:
    """About n positions that stand for a whole prompt: its ends, evenly spread ones, up to 3 sinks.

    is_sink: bool[S].
    """
    S = len(is_sink)
    spread = {round(i * (S - 1) / (n - 1)) for i in range(n)}
    return sorted(spread | set(is_sink.nonzero().flatten()[:3].tolist()))


def canvas(height: int, caption: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """White paper with a caption in its last lines."""
    lines = caption.split("\n")
    image = Image.new("RGB", (WIDTH, height + 18 * len(lines) + PAD), PAPER)
    draw = ImageDraw.Draw(image)
    for n, line in enumerate(lines):
        draw.text((PAD, height + 18 * n), line, INK, SMALL)
    return image, draw


def draw_frames(video: Video, tokens_per_frame: int) -> Image.Image:
    """The frames that the model was shown, each with its time."""
    columns = min(8, len(video.frames))
    side = min(160, (WIDTH - PAD) // columns - PAD)
    row = side + 30
    rows = math.ceil(len(video.frames) / columns)
    image, draw = canvas(rows * row + PAD, (
        f"The {len(video.frames)} frames that the model is shown, of {video.total_frames}, as it "
        f"sees them: square, {tokens_per_frame} tokens each."))
    for n, (frame, seconds) in enumerate(zip(video.frames, video.seconds)):
        x, y = PAD + n % columns * (side + PAD), PAD + n // columns * row
        image.paste(frame.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + side + 4), f"{seconds:.1f} s", INK, SMALL)
    return image


def draw_masks(may_attend: Tensor, opened: Tensor, layer: int, tokens: list[str]) -> Image.Image:
    """The causal mask, and that of the layer that opened the rows of its sinks, at a few positions.

    may_attend: bool[S,S]; opened: bool[S], the sinks whose rows were opened; tokens: S texts.
    """
    positions = sketch_positions(opened, n=12)
    cell, left, top = 22, 150, 2 * PAD + 14
    after = open_sink_rows(may_attend, opened[None])[0]
    change = ("what OutRo makes of it, with the opened row of each sink in red" if opened.any() else
              "the same, since no row was opened")
    image, draw = canvas(top + cell * len(positions) + PAD, (
        f"Who may attend to whom in layer {layer}: a row is a query, a column a key. "
        f"{len(positions)} of {len(tokens)} positions are drawn.\n"
        f"Left: the causal mask. Right: {change}."))
    step = cell * len(positions) + 40
    for n, (mask, title) in enumerate(((may_attend, "before"), (after, "after"))):
        x0 = left + n * step
        draw.text((x0, PAD), title, INK, FONT)
        for y, query in enumerate(positions):
            for x, key in enumerate(positions):
                fill = PALE if not mask[query, key] else MARK if n and opened[query] else INK
                corner = x0 + x * cell, top + y * cell
                draw.rectangle((*corner, corner[0] + cell - 3, corner[1] + cell - 3), fill)
    for y, query in enumerate(positions):
        text = f"{query}  {tokens[query]!r}"
        text = text if len(text) <= 21 else text[:20] + "…"
        draw.text((left - 8, top + y * cell + 9), text, MARK if opened[query] else INK, SMALL, "rm")
    return image


def draw_ratios(ratios: Tensor, is_sink: Tensor, median_multiple: float) -> Image.Image:
    """Which token is massive in which layer: ratios and is_sink are [L,S]."""
    L, S = ratios.shape
    cell, left, top = max(6, min(20, 320 // L)), 66, PAD
    image, draw = canvas(top + cell * L + 30, (
        f"Largest |h| of each token over the median |h| of the prompt, by layer; logarithmic, "
        f"black is {median_multiple:,.0f} and more.\n"
        f"Red: what the rule marks as a sink. The largest ratio is {ratios.max():,.0f}."))
    width = (WIDTH - left - PAD) / S
    shade = (ratios.clamp(min=1).log() / math.log(max(2, median_multiple))).clamp(max=1)
    for l in range(L):
        for s in range(S):
            fill = tuple(int(p + (i - p) * shade[l, s].item()) for p, i in zip(PALE, INK))
            x, y = left + s * width, top + l * cell
            draw.rectangle((x, y, x + width, y + cell - 2), fill)
        if l % max(1, math.ceil(14 / cell)) == 0:
            draw.text((left - 8, top + l * cell + cell / 2), f"layer {l}", INK, SMALL, "rm")
    for l, s in is_sink.nonzero().tolist():     # wide enough to be seen as one among a thousand
        x, y = left + s * width, top + l * cell
        draw.rectangle((x, y, x + max(width, 6), y + cell - 2), MARK)
    draw.text((left - 8, top + cell * L + 6), "position", INK, SMALL, "ra")
    for s in range(0, S, max(1, round(S / 8))):
        draw.text((left + s * width, top + cell * L + 6), str(s), INK, SMALL)
    return image


def stack(images: list[Image.Image]) -> Image.Image:
    """Pictures of one width, one below the other."""
    whole = Image.new("RGB", (WIDTH, sum(image.height for image in images)), PAPER)
    y = 0
    for image in images:
        whole.paste(image, (0, y))
        y += image.height
    return whole
