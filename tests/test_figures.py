"""The pictures: the right places are coloured, and nothing touches the edge, even with a long prompt."""

import runpy
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageFont

from minioutro import OutRo, Video
from minioutro.lab import figures
from minioutro.lab.figures import MARK, PAPER, SMALL, WIDTH


def places(picture, colour):
    """Where a picture has exactly this colour: (y, x) of every such pixel."""
    x = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    x = x.view(picture.height, picture.width, 3).int()
    return (x == torch.tensor(colour)).all(-1).nonzero()


def test_shorten_measures_few_letters(monkeypatch):
    """A text of 4,000 letters is measured once as a whole, then only as far as it fits. Odd letters are escaped."""
    assert figures.shorten("日\n", 200) == r"'\u65e5\n'" and figures.shorten("W", 5) == "..."
    assert 80 < figures.font(SMALL).getlength(figures.shorten("W" * 300, 100)) <= 100
    measured = []
    monkeypatch.setattr(figures, "font", lambda size: SimpleNamespace(
        getlength=lambda text: measured.append(len(text)) or 7 * len(text)))
    assert figures.shorten("a" * 4000, 70) == "'aaaaaa..."
    assert sum(measured) < 4002 + 100


def test_import_without_freetype(monkeypatch):
    """run.py imports figures even if it draws nothing. So a Pillow without FreeType fails only when it draws."""
    def load_default(size=None):
        raise ImportError("The _imagingft C module is not installed")
    monkeypatch.setattr(ImageFont, "load_default", load_default)
    anew = runpy.run_path(figures.__file__)
    assert anew["sketch_positions"](torch.ones(1).bool()) == [0]
    with pytest.raises(ValueError, match="without FreeType"):
        anew["canvas"](9, "caption")


def test_masks_opened_row_is_red():
    """Ten tokens, and token 4 is a sink: the right half has a red row of ten cells, and its label is red."""
    opened = torch.arange(10) == 4
    picture = figures.draw_masks(opened, 2, [str(n) for n in range(10)])
    red = places(picture, MARK)
    cells = red[red[:, 1] > WIDTH // 2]
    assert len(cells) > 5000 and cells[:, 0].max() - cells[:, 0].min() < 40
    assert len(cells) + (red[:, 1] < 170).sum() == len(red)             # the rest is the label
    nothing = figures.draw_masks(torch.zeros(10, dtype=torch.bool), 2, ["t"] * 10)
    assert len(places(nothing, MARK)) == 0


def test_attention_on_frames():
    """Two frames of four tokens, at positions 1-4 and 5-8. The last token attends to position 7."""
    weights = torch.zeros(1, 10, 10)
    weights[0, -1, 7] = 0.5
    is_image = torch.tensor([False] + [True] * 8 + [False])
    video = Video([Image.new("RGB", (8, 8), "black")] * 2, [0.0, 1.0], 2.0, 2)
    none = torch.zeros(10, dtype=torch.bool)
    picture = figures.draw_attention_on_frames(video, weights, is_image, none, 0, 0)
    red = places(picture.convert("RGB"), tuple(round(110 + (m - 110) * 230 / 255) for m in MARK))
    assert len(red) == 2 * 50 * 50                          # the head and the mean over heads
    assert red[:, 1].min() == 14 + 106 and red[:, 1].max() < 14 + 106 + 50
    assert red[:, 0].min() == 14 + 24 + 50                  # the third token is in the second row
    opened = torch.arange(10) == 0
    assert figures.draw_attention_on_frames(video, weights, is_image, opened, 0, 0).height > picture.height


@pytest.mark.parametrize("n_frames, S, L, H, M", [(1, 5, 1, 1, 1), (64, 2000, 32, 2, 16)])
def test_nothing_touches_the_edge(n_frames, S, L, H, M):
    """With one token and with a long prompt, many layers and tokens of very long text."""
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(S)
    is_image = (position >= 2) & (position < 2 + n_frames * M)
    is_sink = (position == 0) | (position == S // 2) | (position == S - 1)
    weights = torch.rand(H, S, S, generator=generator).tril().softmax(-1)
    ratios, cosines = 1e7 * torch.rand(L, S, generator=generator), torch.zeros(L, H, S)
    video = Video([Image.new("RGB", (64, 48), (70, 90, 80))] * n_frames, [4000.0] * n_frames, 4e3, 10**6)
    for picture in (figures.draw_frames(video, M), figures.draw_masks(is_sink, 31, ["WM@\n" * 40] * S),
                    figures.draw_ratios(ratios, is_sink.expand(L, S), 1000.0),
                    figures.draw_attention(weights, is_image, is_sink, 31, 0),
                    figures.draw_attention_on_frames(video, weights, is_image, is_sink, 31, 0),
                    figures.draw_cosines(cosines, cosines + 1, ~is_sink.expand(L, S)),
                    figures.draw_rotation(cosines[0], cosines[0] + 1, 31, OutRo(gamma=123.4))):
        edge = Image.new("RGB", picture.size, PAPER)
        edge.paste(picture.crop((6, 6, WIDTH - 6, picture.height - 6)), (6, 6))
        assert picture.width == WIDTH and edge.tobytes() == picture.tobytes()
