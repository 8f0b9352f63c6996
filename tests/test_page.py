"""The web page without a browser: what is in the file, and what is refused. tests/with_browser opens the page."""

import base64
import gzip
import json
import math
import re
import sys

import numpy
import pytest
import torch
from helpers import ROOT, TOY

from minioutro import OutRo, Trace, Video, read_video
from minioutro.lab import page
from minioutro.lab.page import TEMPLATE, as_bytes, by_interest, check_page, packed_weights, write_page

QUESTION = "What happens in this video?"
NASTY = "</script><b>bold</b><!-- <script> \u202eright to left\u202c \U0001f600 \\u003c {{DATA}} What?"


@pytest.fixture(scope="module")
def clip(toy):
    return read_video(TOY / "clip.mp4", longest_edge=toy[1].longest_edge)


@pytest.fixture(scope="module")
def html(toy, clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "sink.html"
    write_page(path, *toy, clip, QUESTION)
    return path.read_text(encoding="utf-8")


def data_of(html: str) -> dict:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert len(found) == 1
    return json.loads(found[0])


def unpacked(text: str, kind: str, shape: tuple) -> torch.Tensor:
    values = numpy.frombuffer(gzip.decompress(base64.b64decode(text)), dtype=kind)
    return torch.tensor(values.astype("float64")).view(shape)


def test_page_holds_both_traces(html, toy, clip):
    model, processor = toy
    inputs, data = processor(clip, QUESTION), data_of(html)
    S, L, H = inputs.input_ids.shape[1], data["L"], data["H"]
    assert (S, L, H) == (len(data["tokens"]), 8, 4) and len(data["image"]) == 8 * 16
    for name, outro in (("baseline", None), ("outro", OutRo())):
        trace, run = Trace(weights_of=range(L)), data["runs"][name]
        model.hidden_states(inputs.input_ids, inputs.pixel_values, outro=outro, trace=trace)
        for l in range(L):
            stored = unpacked(data["weights"][str(l)]["baseline"], "u1", (H, S, S))
            if outro:
                stored = (stored + unpacked(data["weights"][str(l)]["difference"], "u1", (H, S, S))) % 256
            assert torch.allclose(stored / 255, trace[f"layers.{l}.weights"][0].sqrt().double(), atol=0.003)
            assert run["sinks"][l] == trace[f"layers.{l}.is_sink"][0].nonzero().flatten().tolist()
            assert run["opened"][l] == trace[f"layers.{l}.relaxed"][0].nonzero().flatten().tolist()
            ratio = unpacked(run["largest"], "<f4", (L, S))[l] / run["median"][l]
            assert torch.allclose(ratio.float(), trace[f"layers.{l}.ratio"][0], rtol=1e-5)
            for angles, cosines in (("before", "cosine"), ("after", "cosine_aligned")):
                cosine = torch.cos(unpacked(run[angles], "<u2", (L, H, S))[l] / 100 * math.pi / 180)
                assert torch.allclose(cosine.float(), trace[f"layers.{l}.{cosines}"][0], atol=2e-4)
    assert data["runs"]["outro"]["opened"][2] == [0] and not any(data["runs"]["baseline"]["sinks"])
    assert data["answers"]["outro"].startswith("A blue cross")


def test_page_asks_nothing_of_the_network(html):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)[1]
    assert policy.startswith("default-src 'none'; img-src data:;") and "connect-src" not in policy
    assert "http" not in html.replace("http-equiv", "") and "@import" not in html and "url(" not in html
    assert len(html) < 2_000_000
    code = re.sub(r"//.*", "", TEMPLATE.read_text(encoding="utf-8"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", code)


def test_texts_cannot_become_markup(html, toy, clip, tmp_path):
    write_page(tmp_path / "nasty.html", *toy, clip, NASTY, answers={"baseline": NASTY, "outro": "<i>"})
    nasty = (tmp_path / "nasty.html").read_text(encoding="utf-8")
    assert nasty.lower().count("<script") == html.lower().count("<script") == 2
    assert nasty.lower().count("</script") == 2 and "<b>" not in nasty and "<!--" not in nasty
    data = data_of(nasty)
    assert data["question"] == data["answers"]["baseline"] == NASTY and data["answers"]["outro"] == "<i>"


def test_long_prompt_is_refused(toy, clip, tmp_path):
    model, processor = toy

    def video(n):
        return Video([clip.frames[0]] * n, [float(i) for i in range(n)], 64.0, 64)
    with pytest.raises(ValueError, match="tokens with 64 frames.*holds 800; use --frames") as error:
        check_page("x.html", processor, video(64), QUESTION)
    fitting = int(str(error.value).split("--frames ")[1].split(",")[0])
    check_page("x.html", processor, video(fitting), QUESTION)
    with pytest.raises(ValueError):
        check_page("x.html", processor, video(fitting + 1), QUESTION)
    with pytest.raises(ValueError, match="shorten the question"):
        write_page(tmp_path / "sink.html", model, processor, video(2), "word " * 900)
    assert not list(tmp_path.iterdir())


def test_page_needs_a_writable_file(toy, clip, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--page .* is a folder; give the name of a file"):
        check_page(tmp_path, toy[1], clip, QUESTION)
    with pytest.raises(ValueError, match="not a writable folder"):
        check_page(tmp_path / "file" / "sink.html", toy[1], clip, QUESTION)
    check_page(tmp_path / "new" / "folder" / "sink.html", toy[1], clip, QUESTION)


def test_weights_not_finite():
    with pytest.raises(ValueError, match="layer 7 are not finite as float16.*float32"):
        as_bytes(torch.tensor([0.5, math.nan], dtype=torch.float16), 7)
    assert as_bytes(torch.tensor([0.0, 1e-4, 0.25, 1.0]), 0).tolist() == [0, 3, 128, 255]


def test_interesting_layers_come_first():
    """Token 0 is a sink in layers 2 to 9, and its row is opened in layer 4. Token 5 is a sink in layer 7."""
    sinks = [[]] * 2 + [[0]] * 5 + [[0, 5]] + [[0]] * 2 + [[]] * 2
    opened = [[0] if l == 4 else [] for l in range(12)]
    order = by_interest({"sinks": sinks, "opened": opened})
    assert order == [2, 4, 5, 7, 8, 10, 0, 6, 1, 3, 9, 11]
    assert by_interest({"sinks": [[]] * 5, "opened": [[]] * 5}) == [0, 4, 2, 1, 3]


def test_layers_that_fit():
    generator = torch.Generator().manual_seed(0)
    baseline = [torch.randint(0, 256, (3, 7, 7), generator=generator, dtype=torch.uint8) for _ in range(6)]
    outro = [x.flip(0) for x in baseline]
    whole = packed_weights(baseline, outro, [3, 0, 5, 1, 2, 4], 10**6)
    assert list(whole) == [0, 1, 2, 3, 4, 5]
    room = sum(len(json.dumps({l: whole[l]})) for l in (0, 3, 5))
    for bytes_left, layers in ((room, [0, 3, 5]), (room - 1, [0, 3]), (0, [3])):
        assert packed_weights(baseline, outro, [3, 0, 5, 1, 2, 4], bytes_left) == {l: whole[l] for l in layers}


def test_page_stays_below_limit(toy, clip, tmp_path, monkeypatch, html):
    monkeypatch.setattr(page, "MOST_BYTES", 600_000)
    write_page(tmp_path / "sink.html", *toy, clip, QUESTION, answers={"baseline": "", "outro": ""})
    few = data_of((tmp_path / "sink.html").read_text(encoding="utf-8"))["weights"]
    assert (tmp_path / "sink.html").stat().st_size < 600_000 < len(html)
    assert 2 <= len(few) < 8 and {"2", "3"} <= set(few)             # layer 2 opens the row, layer 3 reads it


def test_run_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    import run
    path = tmp_path / "new" / "sink.html"
    options = ["--max-new-tokens", "2", "--frames", "2", "--gamma", "2"]
    monkeypatch.setattr(sys, "argv", ["run.py", "--page", str(path), *options])
    run.main()
    assert f"page      {path}: open it in a browser" in capsys.readouterr().out
    data = data_of(path.read_text(encoding="utf-8"))
    assert len(data["frames"]) == 2 and data["outro"]["gamma"] == 2 and data["question"] == QUESTION
