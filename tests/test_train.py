"""The toy's world and its training: the questions have the right answers, and a run can be repeated."""

import functools
import random
import shutil
from collections import Counter

import pytest
import torch
from helpers import FIXTURES, TOY, assert_close
from PIL import ImageChops, ImageStat
from safetensors.torch import load_file

from minioutro import OutRo, Processor, VideoLM, read_video
from minioutro.lab import train_toy
from minioutro.lab.shapes import COLOURS, FPS, HARD_NOISE, SHAPES, SIZE, UNSEEN, Clip
from minioutro.lab.train_toy import NOT_ASKED, Stage, draw_batch

build_tokenizer = functools.cache(train_toy.build_tokenizer)


@pytest.fixture(autouse=True)
def quick_training(monkeypatch):
    monkeypatch.setattr(train_toy, "HELD_OUT", 1)
    monkeypatch.setattr(train_toy, "build_tokenizer", build_tokenizer)


def colour_at(clip, index, x, y):
    """The name of the colour at (x, y) in frame `index`, or None for the grey background."""
    pixel = clip.frame(index).getpixel((int(x), int(y)))
    names = {**COLOURS, None: (clip.grey,) * 3}
    return min(names, key=lambda name: sum((a - b)**2 for a, b in zip(names[name], pixel)))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_questions_agree_with_the_picture(count):
    """We follow the pixels of each shape through the frames, and compare them with the answers."""
    for seed in range(UNSEEN, UNSEEN + 12):
        clip = Clip(seed, count)
        answers = {question.text: question.answer for question in clip.questions()}
        assert answers["How many shapes are there?"] == ("one", "two", "three")[count - 1]
        late = []
        for shape in clip.shapes:
            rim = 0.8 * shape.radius                   # left of the centre, where all forms have ink
            seen = [index for index in range(0, 64, 3)
                    if colour_at(clip, index, shape.centre(index / FPS)[0] - rim,
                                 shape.centre(index / FPS)[1]) == shape.colour]
            assert seen == [index for index in range(0, 64, 3) if index >= shape.appears * FPS]
            late += [shape.form] * (seen[0] > 0)

            (x0, y0), (x1, y1), (x2, y2) = (shape.centre(index / FPS) for index in (0, 48, 64))
            moved = {"left": x1 < x0, "right": x1 > x0, "up": y1 < y0, "down": y1 > y0}
            ways = [way for way, is_so in moved.items() if is_so]
            question = f"Which way does the {shape.form} move first?"
            assert ways == [answers[q] for q in (question,) if q in answers]
            assert answers[f"Does the {shape.form} move?"] == ("Yes" if ways else "No")
            back = (x0, y0) == pytest.approx((x2, y2))
            turns_back = {True: "Yes", False: "No"}[back] if ways else None
            assert answers.get(f"Does the {shape.form} turn back?") == turns_back
            assert answers[f"What colour is the {shape.form}?"] == shape.colour
            does = f"moves {ways[0]}" + " and back" * back if ways else "stays still"
            assert f"a {shape.name} {does}" in clip.description().lower()
        assert late == [answers[q] for q in ("Which shape appears later?",) if q in answers]


def test_clip_survives_its_mp4(tmp_path):
    """The file is the same each time, and its frames are those of the clip."""
    for name in "ab":
        Clip(UNSEEN, 2).write(tmp_path / f"{name}.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    for path, clip in ((tmp_path / "a.mp4", Clip(UNSEEN, 2)), (TOY / "clip.mp4", train_toy.EXAMPLE)):
        video = read_video(path)
        assert (len(video.frames), video.total_frames, video.duration) == (8, 64, 8.0)
        for frame, index in zip(video.frames, (0, 9, 18, 27, 36, 45, 54, 63)):
            difference = ImageStat.Stat(ImageChops.difference(frame, clip.frame(index)))
            assert max(difference.mean) < 8


def test_noise_changes_nothing_else():
    clip, noisy = Clip(UNSEEN + 1, 2), Clip(UNSEEN + 1, 2, noise=HARD_NOISE)
    assert noisy.shapes == clip.shapes and noisy.questions() == clip.questions()
    assert noisy.frame(9) != clip.frame(9)


def test_names_of_cells():
    """With one shape in one frame, the token at its centre has its name, and a token far away has none."""
    for seed in range(10):
        clip = Clip(seed, 1)
        shape = clip.shapes[0]
        x, y = shape.centre(20 / FPS)
        names = train_toy.names_of_cells(clip, 20, 2)
        assert len(names) == 16
        assert names[4 * int(y // 16) + int(x // 16)][:4] == (
            SHAPES.index(shape.form), list(COLOURS).index(shape.colour), int(x // 4), int(y // 4))
        way = names[4 * int(y // 16) + int(x // 16)][4]            # before second 4, nothing turns back
        assert way == train_toy.MOTIONS.index(shape.direction)
        opposite = 4 * (0 if y > SIZE / 2 else 3) + (0 if x > SIZE / 2 else 3)
        assert names[opposite] == (len(SHAPES), len(COLOURS), NOT_ASKED, NOT_ASKED, NOT_ASKED)


def test_packed_questions_are_read_alone():
    """Each answer in a packed batch gets the same logits as if its question was asked alone."""
    model, processor = VideoLM.from_pretrained(TOY), Processor.from_pretrained(TOY)
    batch = draw_batch(processor, Stage(steps=1, frames=1, clips=2, questions=3, shapes=(1, 2)), "5")
    features = model.encode(batch.pixel_values)
    logits, targets = train_toy.answer_logits(model, batch, features, trace=None)
    alone, expected = [], []
    for b in range(2):
        for question in range(1, 4):
            keep = (batch.question[b] == 0) | (batch.question[b] == question)
            ids, target = batch.input_ids[b:b + 1, keep], batch.targets[b, keep]
            alone.append(model(ids, batch.pixel_values[b:b + 1])[0, target != NOT_ASKED])
            expected.append(target[target != NOT_ASKED])
    assert torch.allclose(logits, torch.cat(alone), atol=1e-3)
    assert targets.equal(torch.cat(expected))


def test_interrupted_training(tmp_path, monkeypatch):
    """Six steps in one go give the same model as five steps, a crash, and the rest from the file of step four.

    The control goes on from the same state in both runs.
    """
    monkeypatch.setattr(train_toy, "STAGES", (Stage(2, 1, 2, 0), Stage(1, 1, 2, 2), Stage(3, 8, 1, 2)))
    monkeypatch.setattr(train_toy, "SAVE_EVERY", 2)
    run, control = train_toy.TOY, train_toy.CONTROLS[-1]
    weights = {}
    with torch.enable_grad():
        train_toy.train(tmp_path / "whole", run, random_seed=3)
        train_toy.train(tmp_path / "whole", control, random_seed=3)
        draw, calls = train_toy.draw_batch, []

        def interrupt(*args):
            calls.append(args)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return draw(*args)
        monkeypatch.setattr(train_toy, "draw_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_toy.train(tmp_path / "parts", run, random_seed=3)
        train_toy.train(tmp_path / "parts", run, random_seed=3)
        train_toy.train(tmp_path / "parts", control, random_seed=3)
        with pytest.raises(ValueError, match="state.pt is from a run with --seed 3, not 4; use another --folder"):
            train_toy.train(tmp_path / "parts", run, random_seed=4)
    for name in ("whole", "parts"):
        weights[name] = [VideoLM.from_pretrained(tmp_path / name / run.folder).state_dict()
                         for run in (train_toy.TOY, control)]
    for whole, parts in zip(weights["whole"], weights["parts"]):
        assert all(whole[name].equal(parts[name]) for name in whole)
    assert not all(weights["whole"][0][name].equal(weights["whole"][1][name]) for name in weights["whole"][0])


def test_unlearned_kinds_come_twice():
    clip, rng = Clip(UNSEEN, 3), random.Random(0)
    kinds = {question.kind for question in clip.questions(20)}
    drawn = train_toy.draw_questions(clip, 20, 2 * len(kinds) - 1, rng, learned={"count"})
    assert Counter(question.kind for question in drawn) == {kind: 1 if kind == "count" else 2 for kind in kinds}


def test_toys_sink_is_its_first_token(toy):
    model, processor = toy
    video = read_video(TOY / "clip.mp4", longest_edge=processor.longest_edge)
    for question in ("What happens in this video?", "How many shapes are there?", "Was ist das? 日本語"):
        inputs, trace = processor(video, question), {}
        model(inputs.input_ids, inputs.pixel_values, outro=OutRo(), trace=trace)
        sinks = [trace[f"layers.{l}.is_sink"][0].nonzero().flatten().tolist() for l in range(8)]
        assert sinks == [[], [], [0], [0], [0], [0], [], []], question


def test_toy_equals_transformers(toy):
    """One test for the bundled clip, the processor, the weights and the model."""
    model, processor = toy
    golden = load_file(FIXTURES / "toy.safetensors")
    video = read_video(TOY / "clip.mp4", longest_edge=processor.longest_edge)
    inputs = processor(video, "What happens in this video?")
    logits = model(inputs.input_ids, inputs.pixel_values)
    assert_close(logits[:, -golden["logits"].shape[1]:], golden["logits"])
    assert [model.generate(inputs.input_ids, inputs.pixel_values)] == golden["answer"].tolist()


def test_damaged_state_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(train_toy, "STAGES", (Stage(1, 1, 1, 0),))
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 half of a file")
    with pytest.raises(ValueError, match=r"state.pt cannot be read \(.*remove it") as error:
        train_toy.train(tmp_path, train_toy.TOY, random_seed=3)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"before_last_stage.pt is missing.*remove .*state.pt to train the toy again"):
        train_toy.train(tmp_path, train_toy.CONTROLS[0], random_seed=3)
    (tmp_path / "before_last_stage.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"before_last_stage.pt cannot .*remove it and .*state.pt to train the toy again"):
        train_toy.train(tmp_path, train_toy.CONTROLS[0], random_seed=3)
    shutil.rmtree(tmp_path / train_toy.CONTROLS[0].folder)
    (tmp_path / "before_last_stage.pt").unlink()
    (tmp_path / "state.pt").unlink()
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train_toy, "save_file", full)
    with torch.enable_grad(), pytest.raises(OSError, match="No space"):
        train_toy.train(tmp_path, train_toy.TOY, random_seed=3)
    assert {*whole, "state.pt", "before_last_stage.pt", "log.txt"} == {path.name for path in tmp_path.iterdir()}
