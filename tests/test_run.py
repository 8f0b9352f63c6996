"""run.py: what it prints, what it writes, and its error messages. See also test_cli.py."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TOY, writable_copy
from PIL import Image
from safetensors.torch import load_file, save_file

from minioutro import OutRo
from minioutro.lab import figures
from minioutro.support.cli import run_command

sys.path.insert(0, str(ROOT))
import run  # noqa: E402

CLIP = TOY / "clip.mp4"
SHORT = ("--frames", 2, "--max-new-tokens", 1)


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """Run the command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        code = 0
        try:
            run_command(run.main, "run.py")
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()
    return call


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the toy that a test may spoil."""
    return writable_copy(TOY, tmp_path / "model")


# ---- what it prints ----


def test_json(call):
    code, out, err = call("--json", "--frames", 3, "--max-new-tokens", 2)
    found = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert found["seconds"] == [1.0, 4.0, 7.0] and found["total_frames"] == 64
    assert {sink["position"] for sink in found["sinks"]} == {0}
    assert [sink["layer"] for sink in found["sinks"] if sink["opened"]] == [found["sinks"][0]["layer"]]
    assert found["cosine"][0] < found["cosine"][1]
    assert len(found["baseline"]["token_ids"]) == 2 and found["outro"]["seconds"] > 0


def test_switches(call):
    off = json.loads(call("--no-relax", "--no-align", "--json", "--frames", 2, "--max-new-tokens", 4)[1])
    assert off["sinks"] and not any(sink["opened"] for sink in off["sinks"])
    assert off["cosine"][0] == off["cosine"][1]
    assert off["baseline"]["token_ids"] == off["outro"]["token_ids"]
    weak, strong = (json.loads(call("--gamma", gamma, "--json", *SHORT)[1]) for gamma in (0.1, 9))
    assert weak["cosine"][1] < strong["cosine"][1]


def sink(layer, position, ratio, opened=False):
    return {"layer": layer, "position": position, "token": "abc"[position], "ratio": ratio, "opened": opened}


def test_sink_lines():
    """Neighbouring layers with the same sinks share a line. At most three sinks are described."""
    sinks = [sink(1, 0, 1200.4), sink(1, 2, 3000), sink(2, 0, 900), sink(2, 2, 3000), sink(4, 2, 5)]
    assert run.sink_lines(sinks, 6) == [
        "layer 0: none",
        "layers 1-2: position 0 'a', 900 to 1,200 times the median; position 2 'c', 3,000 times the median",
        "layer 3: none", "layer 4: position 2 'c', 5 times the median", "layer 5: none"]
    five = [{**sink(0, 0, 7), "position": i} for i in range(5)]
    assert run.sink_lines(five, 1)[0].endswith("position 2 'a', 7 times the median; and 2 more")


def test_mask_of_first_opened_layer():
    """If two layers opened rows, only one mask is drawn, and the title says of which layer."""
    sinks = [sink(2, 0, 9, opened=True), sink(4, 0, 9), sink(4, 1, 9, opened=True)]
    title, *rows = run.mask_lines(sinks, ["a", "b", "c"], OutRo())
    assert title == "rows opened in layers 2, 4; 3 of 3 positions in the mask of layer 2:"
    assert rows == ["■ · ·     ■ ■ ■   <- 0 'a' opened", "■ ■ ·     ■ ■ ·   <- 1 'b'", "■ ■ ■     ■ ■ ■   <- 2 'c'"]


def test_no_sink_found(call):
    """The thresholds that run.py suggests make the nearest token a sink."""
    out = call("--median-multiple", 1e7, "--abs-threshold", 1e8, *SHORT)[1]
    assert "the highest ratio is" in out and "causal in every layer" in out and "nothing was aligned" in out
    flags = out.split("to call it a sink: ")[1].splitlines()[0].split()
    assert flags[::2] == ["--median-multiple", "--abs-threshold"]
    assert "position 0 '<|im_start|>'" in call(*flags, *SHORT)[1].split("sinks")[1].split("mask")[0]


def test_every_token_a_sink(call):
    code, out, err = call("--median-multiple", 0, "--abs-threshold", 0, *SHORT)
    assert (code, err) == (0, "") and "every token is a sink, so nothing was aligned" in out


def test_answer_with_characters_across_tokens(capsys):
    class Bytes:
        decode = staticmethod(lambda ids: bytes(ids).decode("utf-8", "replace").strip())
    said = run.print_answer("outro", iter(" é\nü ".encode()), Bytes, print)
    assert capsys.readouterr().out == "outro     é ü\n" and said["text"] == "é\nü"


def test_terminal_escapes(call, tmp_path):
    shutil.copy(CLIP, tmp_path / "a\x1b[31m\n.mp4")
    code, out, _ = call("a\x1b[31m\n.mp4", "what\x1b]0;x\x07\nis it?", "--model", TOY, *SHORT)
    assert code == 0 and "\x1b" not in out and "\x07" not in out
    assert r"a\x1b[31m\n.mp4: 2 of" in out and r"question  what\x1b]0;x\x07\nis it?" in out
    assert_refused(call("b\x1b[31m\n.mp4"), r"b\x1b[31m .mp4: no such file")


# ---- pictures ----


def test_figures(call, tmp_path):
    code, out, _ = call("--figures", tmp_path / "new" / "folder", *SHORT)
    pictures = {path.name: Image.open(path) for path in (tmp_path / "new" / "folder").iterdir()}
    assert code == 0 and sorted(pictures) == ["attention.png", "attention_frames.png", "cosine.png",
                                              "frames.png", "masks.png", "rotation.png", "run.png",
                                              "sinks.png"]
    assert pictures["run.png"].height == sum(
        pictures[name].height for name in ("frames.png", "masks.png", "sinks.png"))
    for picture in pictures.values():
        colours = [colour for _, colour in picture.convert("RGB").getcolors(1 << 24)]
        assert picture.width == 880 and len(colours) > 10
    assert (205, 60, 45) in [colour for _, colour in pictures["masks.png"].getcolors(1 << 24)]


def test_figures_without_sinks(call, tmp_path):
    code, out, err = call("--figures", tmp_path / "pictures", "--median-multiple", 1e7, *SHORT)
    assert (code, err) == (0, "") and len(list((tmp_path / "pictures").iterdir())) == 8


def test_figures_are_written_whole(tmp_path, monkeypatch):
    def save(image, path):
        Path(path).write_bytes(b"half of a picture")
        raise KeyboardInterrupt
    (tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt):
        figures.save({"a": Image.new("RGB", (8, 8))}, tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


# ---- errors of the user: those of videos and of checkpoints are in test_video.py and test_weights.py ----


def assert_refused(result, *parts):
    code, out, err = result
    assert code == 2 and out == "" and err.count("\n") == 1, (code, out, err)
    for part in parts:
        assert str(part) in err, err


@pytest.mark.parametrize("flag, value", [
    ("--frames", "0"), ("--frames", "many"), ("--frames", "9" * 400), ("--fps", "-1"), ("--fps", "inf"),
    ("--temperature", "0"), ("--gamma", "nan"), ("--max-new-tokens", "0"), ("--median-multiple", "-1"),
    ("--dtype", "int8")])
def test_senseless_numbers(call, flag, value):
    assert_refused(call(flag, value), flag, value[:20], "--help")


def test_flag_errors(call):
    assert_refused(call(CLIP, " \n", "--model", TOY), "question is empty")
    assert_refused(call("", "what?"), "argument video: the name is empty")
    assert_refused(call("--figures", "/proc/self/new"), "--figures /proc/self/new", "is not a writable folder")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    missing = next(device for device, is_there in there.items() if not is_there)    # no machine has both
    assert_refused(call("--device", missing), f"this machine has no device {missing}", "use the CPU")


def edit(path, section=None, **values):
    content = json.loads(path.read_text())
    target = content if section is None else content[section]
    target.update(values)
    path.write_text(json.dumps(content))


def test_files_of_two_checkpoints(call, checkpoint):
    edit(checkpoint / "config.json", image_token_id=7)
    assert_refused(call(CLIP, "?", "--model", checkpoint), "id of <image>", "from one checkpoint")
    shutil.copyfile(TOY / "config.json", checkpoint / "config.json")
    edit(checkpoint / "processor_config.json", image_seq_len=17)
    assert_refused(call(CLIP, "?", "--model", checkpoint), "tokens a frame", "17", "16")


def test_hub_cannot_be_reached(call, monkeypatch, tmp_path):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert_refused(call(CLIP), run.HUB_MODEL, "cannot be fetched", "copy its files into a folder")
    assert not (tmp_path / "cache").exists()


def test_logits_that_are_not_finite(call, checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.text_model.norm.weight"][3] = math.nan
    save_file(tensors, checkpoint / "model.safetensors")
    code, _, err = call(CLIP, "?", "--model", checkpoint, *SHORT)
    assert code == 2 and err.count("\n") == 1 and "no finite numbers as float32" in err


def test_prompt_that_does_not_fit(call, checkpoint):
    """A prompt may be as long as the model's context. If it is longer, the message gives the number that fits."""
    asked = (CLIP, "What happens?", "--model", checkpoint, "--max-new-tokens", 1)
    total = int(call(*asked)[1].split(" text = ")[1].split()[0])
    for context, parts in ((total - 1, (f"{total} tokens with 8 frames", f"holds {total - 1}", "--frames 7")),
                           (30, (f"{total} tokens", "shorten the question"))):
        edit(checkpoint / "config.json", "text_config", max_position_embeddings=context)
        assert_refused(call(*asked), *parts)
    edit(checkpoint / "config.json", "text_config", max_position_embeddings=total)
    assert call(*asked)[0] == 0
