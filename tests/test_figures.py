"""The pictures: what is dark where, and that nothing leaves the paper, however long the prompt."""

import runpy
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageFont

from minioutro import OutRo, Video
from minioutro.lab import figures
from minioutro.lab.figures import BLUE, INK, MARK, PALE, PAPER, SMALL, WIDTH


def places(picture, colour):
    """Where a picture has exactly this colour: (y, x) of every such pixel."""
    x = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    x = x.view(picture.height, picture.width, 3).int()
    return (x == torch.tensor(colour)).all(-1).nonzero()


def test_heat_keeps_a_single_peak():
    """One of 5,000 columns is dark; of 100 pixels the one over it is."""
    shade = torch.zeros(1, 5000)
    shade[0, 1234] = 1.0
    assert places(figures.heat(shade, 100, 3), INK).tolist() == [[y, 24] for y in range(3)]
    assert figures.heat(torch.tensor([[0.0, 0.5, 7.0]]), 3, 1).tobytes() == bytes(
        [*PALE, *(round((a + b) / 2) for a, b in zip(PALE, INK)), *INK])


def test_shorten_measures_few_letters(monkeypatch):
    """Of a text of 4,000 letters, the whole once, then no more than fit. Odd letters are escaped."""
    assert figures.shorten("日\n", 200) == r"'\u65e5\n'" and figures.shorten("W", 5) == "..."
    assert 80 < figures.font(SMALL).getlength(figures.shorten("W" * 300, 100)) <= 100
    measured = []
    monkeypatch.setattr(figures, "font", lambda size: SimpleNamespace(
        getlength=lambda text: measured.append(len(text)) or 7 * len(text)))
    assert figures.shorten("a" * 4000, 70) == "'aaaaaa..."
    assert sum(measured) < 4002 + 100


def test_import_without_freetype(monkeypatch):
    """Text reports import figures and need no font. A Pillow without FreeType fails when something is drawn."""
    def load_default(size=None):
        raise ImportError("The _imagingft C module is not installed")
    monkeypatch.setattr(ImageFont, "load_default", load_default)
    anew = runpy.run_path(figures.__file__)
    assert anew["sketch_positions"](torch.ones(1).bool()) == [0]
    with pytest.raises(ValueError, match="without FreeType"):
        anew["canvas"](9, "caption")


def test_masks_opened_row_is_red():
    """Ten tokens, sink at 4: a red row of ten cells in the right half, and its red label."""
    opened = torch.arange(10) == 4
    picture = figures.draw_masks(opened, 2, [str(n) for n in range(10)])
    red = places(picture, MARK)
    cells = red[red[:, 1] > WIDTH // 2]
    assert len(cells) > 5000 and cells[:, 0].max() - cells[:, 0].min() < 40
    assert len(cells) + (red[:, 1] < 170).sum() == len(red)             # the rest is the label
    nothing = figures.draw_masks(torch.zeros(10, dtype=torch.bool), 2, ["t"] * 10)
    assert len(places(nothing, MARK)) == 0


def test_ratios_at_layer_and_position():
    ratios = torch.ones(4, 100)
    ratios[2, 50], ratios[3, 99] = 5000.0, 40.0
    red = places(figures.draw_ratios(ratios, ratios > 1000, 1000.0), MARK)
    y, x = red.float().mean(0).tolist()
    assert 14 + 2 * 20 < y < 14 + 3 * 20 and x == pytest.approx(66 + 50.5 * 8, abs=4)


def test_attention_is_dark_at_its_weight():
    """Head 1 of 2 attends to token 3 alone; the mean over heads gives it half."""
    S = 10
    weights = torch.stack([torch.eye(S), torch.eye(S)[3].expand(S, S)])
    is_image, is_sink = torch.arange(S) > 7, torch.arange(S) == 3
    picture = figures.draw_attention(weights, is_image, is_sink, 5, 1)
    dark = places(picture.crop((74, 60, 444, 430)), INK)
    assert (dark[:, 1] // 37).unique().tolist() == [3] and (dark[:, 0] // 37).unique().numel() == S
    right = places(picture.crop((490, 60, 860, 430)), INK)                     # only 1/2 + 1/2 is dark
    assert {(y // 37, x // 37) for y, x in right.tolist()} == {(3, 3)}
    assert len(places(picture, BLUE)) and len(places(picture, MARK))


def test_attention_on_frames_is_red_on_its_part():
    """Two frames of four tokens: positions 1-4 and 5-8; the last token looks at position 7."""
    weights = torch.zeros(1, 10, 10)
    weights[0, -1, 7] = 0.5
    is_image = torch.tensor([False] + [True] * 8 + [False])
    video = Video([Image.new("RGB", (8, 8), "black")] * 2, [0.0, 1.0], 2.0, 2)
    none = torch.zeros(10, dtype=torch.bool)
    picture = figures.draw_attention_on_frames(video, weights, is_image, none, 0, 0)
    red = places(picture.convert("RGB"), tuple(round(110 + (m - 110) * 230 / 255) for m in MARK))
    assert len(red) == 2 * 50 * 50                                      # the head and the mean over heads
    assert red[:, 1].min() == 14 + 106 and red[:, 1].max() < 14 + 106 + 50
    assert red[:, 0].min() == 14 + 24 + 50                                          # third token: second row
    opened = torch.arange(10) == 0
    assert figures.draw_attention_on_frames(video, weights, is_image, opened, 0, 0).height > picture.height


def test_cosines_average_what_counts():
    """Half of the tokens have cosine 1 and are not counted, the others -1: the dot is at the bottom."""
    cosines = torch.ones(2, 3, 4)
    cosines[1, :, :2] = -1.0
    counts = torch.zeros(2, 4, dtype=torch.bool)
    counts[1, :2] = True
    red = places(figures.draw_cosines(cosines, cosines, counts), MARK)
    assert red[:, 0].min() > 240
    assert not len(places(figures.draw_cosines(cosines, cosines, counts & False), MARK))


def test_rotation_draws_formula_and_outputs():
    """With gamma 0 the red curve is the diagonal; with 3 it lies below, where 80 degrees become 56."""
    before = torch.tensor([[0.5]])
    def height(gamma):                                              # of the curve at 80 degrees
        picture = figures.draw_rotation(before, before, 3, OutRo(gamma=gamma))
        at = places(picture.crop((74 + 141, 40, 74 + 143, 320)), MARK)
        return 320 - (40 + at[:, 0].float().mean().item())
    assert height(0.0) == pytest.approx(280 * 80 / 180, abs=3)
    assert height(3.0) == pytest.approx(280 * 56 / 180, abs=3)
    assert len(places(figures.draw_rotation(before, before, 3, OutRo()), BLUE)) > 5


@pytest.mark.parametrize("n_frames, S, L, H, M", [(1, 5, 1, 1, 1), (64, 2000, 32, 2, 16)])
def test_nothing_touches_the_edge(n_frames, S, L, H, M):
    """Also not for a long prompt, many layers, and tokens of endless text."""
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
