"""The web page in Chromium: it shows the numbers of a trace, and keys, clicks and addresses work."""

import math
import socket

import pytest
import torch
from chromium import Chromium
from helpers import TOY

from minioutro import OutRo, Trace, read_video
from minioutro.lab import page
from minioutro.lab.page import write_page
from minioutro.model import activation_ratio

QUESTION = "What happens in this video?"
NASTY = "</script><b>bold</b> <image> \u202eright to left\u202c \U0001f600 {{DATA}}?"
HEAD, TOKEN = 1, 275


@pytest.fixture(scope="module")
def browser():
    browser = Chromium()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def clip(toy):
    return read_video(TOY / "clip.mp4", longest_edge=toy[1].longest_edge)


@pytest.fixture(scope="module")
def sink_page(toy, clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "sink.html"
    write_page(path, *toy, clip, QUESTION)
    return path


@pytest.fixture(scope="module")
def traces(toy, clip):
    """The traces of the baseline and of OutRo, with the weights of every layer."""
    model, processor = toy
    inputs, traces = processor(clip, QUESTION), {}
    for name, outro in (("baseline", None), ("outro", OutRo())):
        traces[name] = Trace(weights_of=range(8))
        with torch.no_grad():
            model.hidden_states(inputs.input_ids, inputs.pixel_values, outro=outro, trace=traces[name])
    return traces


def number(x: float) -> str:
    """A number as the page writes it."""
    digits = 2 if x < 10 else 1 if x < 100 else 0
    text = f"{x:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if digits else text


def percent(x: float) -> str:
    return "less than 1 %" if 0 < x < 0.01 else f"{100 * x:.0f} %"


def step(browser, n: int) -> tuple[str, str, bool]:
    """The figure of a step, its text, and whether it is grey."""
    item = f"#steps li:nth-child({n})"
    is_grey = browser.run(f"document.querySelector('{item}').className") == "off"
    return browser.text(f"{item} span"), browser.text(f"{item} p"), is_grey


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_steps_equal_the_trace(browser, sink_page, traces, layer):
    trace, at = traces["outro"], f"layers.{layer}."
    browser.open(sink_page, f"#layer={layer}&head={HEAD}&token={TOKEN}&run=outro")
    largest, median = activation_ratio(trace[at + "hidden"])
    most = largest[0].argmax().item()
    figure, text, is_grey = step(browser, 1)
    assert f"largest |h| in this layer's input is {number(largest[0, most].item())}, at token {most} " in text
    assert f"{number(trace[at + 'ratio'][0, most].item())} times the median, {number(median.item())}." in text
    has_sink = trace[at + "is_sink"].any().item()
    assert (figure, is_grey) == (("1 sink", False) if has_sink else ("none", True))

    figure, text, is_grey = step(browser, 2)
    assert figure == "276 × 276" and "38,226 of 76,176 pairs" in text and not is_grey

    figure, text, is_grey = step(browser, 3)
    opened = {0: ("–", True, "There is no sink in this layer."),
              2: ("1 row", False, "In this layer token 0 may attend to all 276 tokens."),
              4: ("none", True, "This sink's row was opened in layer 2.")}[layer]
    assert (figure, is_grey) == opened[:2] and opened[2] in text

    weights = trace[at + "weights"][0, HEAD, TOKEN]
    figure, text, is_grey = step(browser, 4)
    assert figure == f"{percent(weights.max().item())} to {weights.argmax()}" and not is_grey
    image = torch.tensor(browser.run("data.image"))
    assert text.endswith(f"All image tokens together get {percent(weights[image].sum().item())}.")

    value, is_aligned = step(browser, 5), step(browser, 6)
    if not has_sink:
        assert value == is_aligned == ("–", "There is no sink in this layer.", True)
        return
    length = trace[at + "v_sink"][0, HEAD // 2].norm().item()
    output = trace[at + "out"][0, HEAD].norm(dim=-1).mean().item()
    assert value[0] == f"|v| = {number(length)}" and f"mean length of {number(output)}." in value[1]
    before, after = (torch.rad2deg(trace[at + name][0, HEAD].clamp(-1, 1).acos())
                     for name in ("cosine", "cosine_aligned"))
    assert is_aligned[0] == f"{before[TOKEN]:.0f}° → {after[TOKEN]:.0f}°"
    gate = math.tanh(max(0, trace[at + "cosine"][0, HEAD, TOKEN].item()) / 0.1)
    assert f"The gate is {gate:.2f} (0 is shut, 1 is open) and gamma is 3" in is_aligned[1]
    assert is_aligned[1].endswith(f"In head {HEAD} of this layer, {(before - after >= 0.5).sum()} of 276 tokens turn.")


def test_baseline_and_outro_differ(browser, sink_page):
    for layer in (2, 5):
        address = f"#layer={layer}&head={HEAD}&token={TOKEN}&run="
        browser.open(sink_page, address + "baseline")
        steps = [step(browser, n) for n in range(1, 7)]
        assert [is_grey for *_, is_grey in steps] == [True, False, True, False, True, True]
        browser.run("window.kept = [...shown.weights]; 0")
        browser.key("o")
        rows = browser.run("""[...Array(276).keys()].filter(row => {
            const cells = [...Array(276).keys()].map(column => 276 * row + column);
            return cells.some(cell => kept[cell] !== shown.weights[cell]);
        })""")
        assert rows == [0] if layer == 2 else len(rows) > 100                # layer 5 reads the opened sink
    browser.open(sink_page, f"#layer=3&head={HEAD}&token={TOKEN}&run=outro")
    assert step(browser, 6)[0] == "stays" and not step(browser, 6)[2]        # not grey: 52 other tokens turn
    browser.open(sink_page, "#layer=7&run=outro")
    assert step(browser, 1)[0] == "–" and "never touches the last 2 layers" in step(browser, 6)[1]
    browser.open(sink_page, "#layer=4&head=2&token=0&run=outro")                    # a sink is not turned towards itself
    assert step(browser, 6)[1].startswith("Token 0 has been a sink since layer 2.")


def test_address(browser, sink_page):
    browser.open(sink_page)
    first = browser.drawn()
    assert first == f"#layer=2&head={HEAD}&token=275&run=outro"         # row opened, head 1 turns most
    browser.open(sink_page, "#layer=99&head=-1&token=x&run=__proto__")
    assert browser.drawn() == first and not browser.problems
    browser.open(sink_page, "#layer=4&head=mean&token=51&run=baseline")
    assert browser.drawn() == "#layer=4&head=mean&token=51&run=baseline"
    browser.run("location.hash = '#layer=5'")
    assert browser.drawn_as("#layer=5&head=mean&token=51&run=baseline")
    assert browser.text("#steps_title") == "Layer 5, step by step, with Baseline"


def test_keys(browser, sink_page):
    browser.open(sink_page, "#layer=6&head=3&token=274&run=outro")
    for key, expected in (("ArrowRight", "#layer=7&head=3&token=274&run=outro"),
                          ("ArrowRight", "#layer=7&head=3&token=274&run=outro"),
                          ("ArrowLeft", "#layer=6&head=3&token=274&run=outro"),
                          ("ArrowDown", "#layer=6&head=mean&token=274&run=outro"),
                          ("ArrowUp", "#layer=6&head=3&token=274&run=outro"),
                          ("ArrowDown", "#layer=6&head=mean&token=274&run=outro"),
                          ("o", "#layer=6&head=mean&token=274&run=baseline"),
                          ("n", "#layer=6&head=mean&token=275&run=baseline"),
                          ("p", "#layer=6&head=mean&token=274&run=baseline"),
                          ("s", "#layer=6&head=mean&token=0&run=baseline"),
                          ("p", "#layer=6&head=mean&token=0&run=baseline"),
                          ("e", "#layer=6&head=mean&token=275&run=baseline")):
        assert browser.key(key) == expected, key


def test_many_quick_keys(browser, sink_page):
    """Layers are unpacked in the background. The last choice must be drawn in the end, not an earlier one."""
    browser.open(sink_page, "#layer=0&head=0&token=275&run=outro")
    browser.run("""for (const key of "ArrowRight ArrowRight o ArrowDown ArrowRight o ArrowLeft".split(" "))
                   dispatchEvent(new KeyboardEvent("keydown", {key}))""")
    assert browser.drawn() == "#layer=2&head=1&token=275&run=outro"
    weights = browser.run("[...shown.weights]")
    browser.open(sink_page, "#layer=2&head=1&token=275&run=outro")
    assert browser.run("[...shown.weights]") == weights


def test_clicks_choose(browser, sink_page):
    browser.open(sink_page, "#layer=2&head=0&token=275&run=outro")
    assert "head=3" in browser.click("#heads button:nth-of-type(4)")
    assert "run=baseline" in browser.click("#runs button:nth-of-type(1)")
    pressed = browser.run("[...document.querySelectorAll('[aria-pressed=true]')].map(b => b.innerText)")
    assert pressed == ["3", "Baseline"]
    assert "token=0" in browser.click("#tokens span:nth-child(1)")
    image = browser.run("data.image")
    assert f"token={image[16 + 5]}&" in browser.click("#frames div:nth-child(2)", 1.5 / 4, 75 / 176 * 1.5 / 2)
    assert "token=137&" in browser.click("#map_plot", 0.25, 137.5 / 276)
    assert "layer=5&head=3&token=10&" in browser.click("#ratios_plot", 10.5 / 276, 5.5 / 8)
    assert "layer=0&" in browser.click("#layer", 0.01, 0.5)


def test_pointing_at_a_cell(browser, sink_page, traces):
    browser.open(sink_page, "#layer=2&head=1&token=275&run=outro")
    browser.point("#map_plot", 0.5 / 276, 200.5 / 276)
    weight = 100 * traces["outro"]["layers.2.weights"][0, 1, 200, 0].item()
    pair, shown = browser.text("#pair").split(": ")
    assert pair == 'token 200 "<image>" → token 0 "<|im_start|>"'
    assert float(shown.rstrip(" %")) == pytest.approx(weight, abs=0.5)
    browser.point("#map_plot", 200.5 / 276, 100.5 / 276)
    assert browser.text("#pair").endswith("may not attend")


def test_texts_are_shown_as_texts(browser, toy, clip, tmp_path):
    answers = {"baseline": "<img src=x onerror=alert(1)>", "outro": "a < b & c"}
    write_page(tmp_path / "nasty.html", *toy, clip, NASTY, answers=answers)
    browser.open(tmp_path / "nasty.html", "#token=3")
    assert browser.text("#question") == NASTY.replace("\u2068", "")
    assert browser.run("document.querySelectorAll('b').length") == 6                     # the names of the six steps
    assert browser.text("#answers dd") == answers["baseline"]
    assert not browser.problems


def test_page_with_few_layers(browser, toy, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_BYTES", 500_000)
    write_page(tmp_path / "few.html", *toy, clip, QUESTION, OutRo(median_multiple=1e9, align=False),
               answers={"baseline": "", "outro": ""})
    browser.open(tmp_path / "few.html", "#layer=7")
    layers = browser.run("LAYERS")
    assert 1 < len(layers) < 8 and f"layer={layers[-1]}&" in browser.drawn()
    for key in ["ArrowLeft"] * 8 + ["s"]:
        address = browser.key(key)
    assert "layer=0&" in address and "token=275&" in address              # there is no sink to choose
    assert not browser.problems


def test_nothing_is_loaded_from_outside(browser, sink_page, tmp_path):
    """A changed copy of the page asks for an address on this machine, but the page's policy forbids it."""
    browser.open(sink_page)
    assert browser.requests[0].startswith("file:///") and len(browser.requests) == 9
    assert all(request.startswith("data:image/png;base64,") for request in browser.requests[1:])
    assert not browser.problems
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        copy = tmp_path / "copy.html"
        html = sink_page.read_text(encoding="utf-8")
        copy.write_text(html.replace("\nstart();", f"""
            const image = new Image(); image.src = "{url}a"; fetch("{url}b").catch(() => 0); start();"""), "utf-8")
        browser.open(copy)
        assert len(browser.problems) >= 2 and all("Content Security Policy" in text for text in browser.problems)
        with pytest.raises(TimeoutError):
            server.accept()
