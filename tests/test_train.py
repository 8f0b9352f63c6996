"""The toy world and its training: what is asked has the right answer, and a run can be repeated."""

import pytest
import torch
from conftest import TOY

from minioutro import OutRo, Processor, VideoLM, read_video, train
from minioutro.shapes import COLOURS, FPS, SIZE, Clip
from minioutro.train import NOT_ASKED, UNSEEN, Stage, draw_batch


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_clips_questions_agree_with_what_is_drawn(count):
    """The colour at each shape's stated place, at the start and at the end, is the stated one."""
    for seed in range(UNSEEN, UNSEEN + 20):
        clip = Clip(seed, count)
        answers = {question.text: question.answer for question in clip.questions()}
        assert answers["How many shapes are there?"] == ("one", "two", "three")[count - 1]
        for shape in clip.shapes:
            for index in (0, 63):
                x, y = shape.centre(index / FPS)
                pixel = clip.frame(index).getpixel((int(x), int(y)))
                nearest = min(COLOURS, key=lambda c: sum((a - b)**2 for a, b in zip(COLOURS[c], pixel)))
                assert nearest == shape.colour
                place = answers[f"Where does the {shape.form} {'end' if index else 'start'}?"]
                assert ("left" in place) == (x < SIZE / 3) and ("bottom" in place) == (y >= 2 * SIZE / 3)
            (x0, y0), (x1, y1) = shape.centre(0), shape.centre(63 / FPS)
            moved = {"left": x1 < x0, "right": x1 > x0, "up": y1 < y0, "down": y1 > y0}
            assert answers[f"Does the {shape.form} move?"] == ("Yes" if any(moved.values()) else "No")
            assert [way for way, is_so in moved.items() if is_so] == \
                [answers[q] for q in (f"Which way does the {shape.form} move?",) if q in answers]
            assert answers[f"What shape is {shape.colour}?"] == shape.form
            assert shape.name in clip.description()


def test_a_clip_survives_its_mp4(tmp_path):
    clip = Clip(UNSEEN, 2)
    clip.write(tmp_path / "clip.mp4")
    video = read_video(tmp_path / "clip.mp4")
    assert (len(video.frames), video.total_frames, video.duration) == (8, 64, 8.0)
    for frame, index in zip(video.frames, (0, 9, 18, 27, 36, 45, 54, 63)):
        pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()
                  for image in (frame, clip.frame(index))]
        assert (pixels[0] - pixels[1]).abs().mean() < 8


def test_questions_that_share_a_prompt_are_read_as_if_asked_alone():
    """The packed batch gives each answer the logits that the ordinary model gives that question alone."""
    model, processor = VideoLM.from_pretrained(TOY), Processor.from_pretrained(TOY)
    batch = draw_batch(processor, Stage(steps=1, frames=1, clips=2, questions=3, most=2), seed=5)
    logits, targets = train.forward(model, batch, None)
    alone, expected = [], []
    for b in range(2):
        for turn in range(1, 4):
            keep = (batch.turn[b] == 0) | (batch.turn[b] == turn)
            ids, target = batch.input_ids[b:b + 1, keep], batch.targets[b, keep]
            alone.append(model(ids, batch.pixel_values[b:b + 1])[0, target != NOT_ASKED])
            expected.append(target[target != NOT_ASKED])
    assert torch.allclose(logits, torch.cat(alone), atol=1e-3)
    assert targets.equal(torch.cat(expected))


def test_training_repeats_itself_and_goes_on_after_an_interruption(tmp_path, monkeypatch):
    """Four steps in one go, or three, a crash, and the rest from the file of step two: the same model."""
    monkeypatch.setattr(train, "STAGES", (Stage(2, 1, 2, 2, 1), Stage(2, 8, 1, 2, 2)))
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    weights = {}
    with torch.enable_grad():
        train.train(tmp_path / "whole", seed=3)
        draw, calls = train.draw_batch, []

        def interrupt(*args):
            calls.append(args)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return draw(*args)
        monkeypatch.setattr(train, "draw_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.train(tmp_path / "parts", seed=3)
        train.train(tmp_path / "parts", seed=3)
    for name in ("whole", "parts"):
        weights[name] = VideoLM.from_pretrained(tmp_path / name).state_dict()
    assert all(weights["whole"][name].equal(weights["parts"][name]) for name in weights["whole"])


def test_the_seed_of_the_sink_is_one_huge_coordinate_of_the_first_token(tmp_path, toy):
    model = toy[0]
    fresh = VideoLM(model.config)
    train.init_weights(fresh)
    trace = {}
    ids = torch.arange(1, 30)[None]
    fresh(ids, trace=trace)
    seen = [trace[f"layers.{l}.ratio"][0] for l in range(8)]
    assert all((ratio > 1000).tolist() == [l > train.SEED_LAYER] + [False] * 28 for l, ratio in enumerate(seen))


def test_a_seed_that_training_wore_down_is_planted_again(toy):
    """Without its neurons the toy has no massive activation; renewed, it has one, at token 0 alone."""
    model, processor = VideoLM(toy[0].config), toy[1]
    model.load_state_dict(toy[0].state_dict())
    mlp = model.model.text_model.layers[train.SEED_LAYER].mlp
    mlp.down_proj.weight[train.SEED_DIMENSION] = 0
    batch = draw_batch(processor, Stage(1, 8, 1, 1, 3), seed=9)
    found = []
    for _ in range(2):
        trace = {}
        train.forward(model, batch, trace)
        found.append([(trace[f"layers.{l}.ratio"][0] > 1000).nonzero().flatten().tolist() for l in range(6)])
        train.renew_seed(model, processor, seed=9)
    assert found == [[[]] * 6, [[], [], [0], [0], [0], [0]]]


def test_the_toys_sink_is_its_first_token_in_every_layer_after_the_seed(toy):
    model, processor = toy
    video = read_video(TOY / "clip.mp4", longest_edge=processor.longest_edge)
    for question in ("What happens in this video?", "How many shapes are there?", "Was ist das? 日本語"):
        inputs, trace = processor(video, question), {}
        model(inputs.input_ids, inputs.pixel_values, outro=OutRo(), trace=trace)
        sinks = [trace[f"layers.{l}.is_sink"][0].nonzero().flatten().tolist() for l in range(8)]
        assert sinks == [[], [], [0], [0], [0], [0], [], []], question
