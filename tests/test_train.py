"""The toy world and its training: what is asked has the right answer, and a run can be repeated."""

import pytest
import torch
from conftest import FIXTURES, TOY, assert_close
from safetensors.torch import load_file

from minioutro import OutRo, Processor, VideoLM, read_video, train
from minioutro.evaluate import UNSEEN
from minioutro.shapes import COLOURS, FPS, SHAPES, SIZE, Clip, Shape
from minioutro.train import NOT_ASKED, Run, Stage, draw_batch


def colour_at(clip, index, x, y):
    """The name of the colour of frame `index` there, or None for the grey background."""
    pixel = clip.frame(index).getpixel((int(x), int(y)))
    names = {**COLOURS, None: (clip.grey,) * 3}
    return min(names, key=lambda name: sum((a - b)**2 for a, b in zip(names[name], pixel)))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_clips_questions_agree_with_what_is_drawn(count):
    """Each shape's pixels, followed through the frames, tell what the answers say."""
    for seed in range(UNSEEN, UNSEEN + 30):
        clip = Clip(seed, count)
        answers = {question.text: question.answer for question in clip.questions()}
        assert answers["How many shapes are there?"] == ("one", "two", "three")[count - 1]
        late = []
        for shape in clip.shapes:
            rim = 0.8 * shape.radius                   # all three forms are drawn there, left of the centre
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
            assert answers.get(f"Does the {shape.form} turn back?") == ({True: "Yes", False: "No"}[back] if ways else None)
            assert answers[f"What colour is the {shape.form}?"] == shape.colour
            assert answers[f"What shape is {shape.colour}?"] == shape.form
            does = f"moves {ways[0]}" + " and back" * back if ways else "stays still"
            assert f"a {shape.name} {does}" in clip.description().lower()
        assert late == [answers[q] for q in ("Which shape appears later?",) if q in answers]


def test_the_names_of_image_tokens_say_what_lies_under_them():
    """One shape, one frame: the token at its centre has its name, one far away has none."""
    for seed in range(40):
        clip = Clip(seed, 1)
        shape = clip.shapes[0]
        x, y = shape.centre(20 / FPS)
        names = train.names_of_cells(clip, 20, 2)
        assert len(names) == 16
        assert names[4 * int(y // 16) + int(x // 16)][:4] == (
            SHAPES.index(shape.form), list(COLOURS).index(shape.colour), int(x // 4), int(y // 4))
        way = names[4 * int(y // 16) + int(x // 16)][4]            # before second 4, nothing turns back
        assert way == train.MOTIONS.index(shape.direction)
        opposite = 4 * (0 if y > SIZE / 2 else 3) + (0 if x > SIZE / 2 else 3)
        assert names[opposite] == (len(SHAPES), len(COLOURS), NOT_ASKED, NOT_ASKED, NOT_ASKED)


def test_a_motion_that_cannot_be_seen_is_not_asked_for():
    shape = Shape("red", "ring", "right", turns=True, appears=0.0, start=(16, 32), distance=32, radius=8)
    right, left = train.MOTIONS.index("right"), train.MOTIONS.index("left")
    assert train.motion(shape, 18, None) == NOT_ASKED                               # the first frames
    assert [train.motion(shape, *pair) for pair in ((18, 0), (63, 45), (41, 23))] == [right, left, NOT_ASKED]
    late = Shape("red", "ring", "right", turns=False, appears=3.0, start=(16, 32), distance=32, radius=8)
    assert train.motion(late, 36, 18) == NOT_ASKED and train.motion(late, 45, 27) == right


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
    features = model.encode(batch.pixel_values)
    logits, targets, elsewhere, images = train.answer(model, batch, features, priced=3)
    alone, expected = [], []
    for b in range(2):
        for turn in range(1, 4):
            keep = (batch.turn[b] == 0) | (batch.turn[b] == turn)
            ids, target = batch.input_ids[b:b + 1, keep], batch.targets[b, keep]
            alone.append(model(ids, batch.pixel_values[b:b + 1])[0, target != NOT_ASKED])
            expected.append(target[target != NOT_ASKED])
    assert torch.allclose(logits, torch.cat(alone), atol=1e-3)
    assert targets.equal(torch.cat(expected))
    assert 0 < elsewhere < 1 and images.shape == features.shape


def test_training_repeats_itself_and_goes_on_after_an_interruption(tmp_path, monkeypatch):
    """Six steps in one go, or five, a crash, and the rest from the file of step four: the same model."""
    monkeypatch.setattr(train, "STAGES", (Stage(2, 1, 2, 0, 1), Stage(2, 1, 2, 2, 1),
                                          Stage(2, 8, 1, 2, 2, rate=1e-3, price=0.1, motion=True, again=("moves",))))
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    run = Run(".", share=1.0)
    weights = {}
    with torch.enable_grad():
        train.train(tmp_path / "whole", run, seed=3)
        draw, calls = train.draw_batch, []

        def interrupt(*args):
            calls.append(args)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return draw(*args)
        monkeypatch.setattr(train, "draw_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.train(tmp_path / "parts", run, seed=3)
        train.train(tmp_path / "parts", run, seed=3)
    for name in ("whole", "parts"):
        weights[name] = VideoLM.from_pretrained(tmp_path / name).state_dict()
    assert all(weights["whole"][name].equal(weights["parts"][name]) for name in weights["whole"])


def test_price_and_seed_can_be_left_out(tmp_path, monkeypatch):
    """After a few dear steps: with the price less attention elsewhere, without the seed no sink."""
    monkeypatch.setattr(train, "STAGES", (Stage(15, 1, 1, 2, 1, rate=0.008),))
    monkeypatch.setattr(train, "PRICE", 20.0)
    ids, to_first, ratio = torch.arange(1, 30)[None], {}, {}
    for name, run in train.CONTROLS.items():
        with torch.enable_grad():
            train.train(tmp_path / name, Run(name, 1.0, run.price, run.seed), seed=3)
        trace = {"weights_of": range(8)}
        VideoLM.from_pretrained(tmp_path / name)(ids, trace=trace)
        to_first[name] = torch.stack([trace[f"layers.{l}.weights"][0, :, 1:, 0] for l in range(2, 8)]).mean()
        ratio[name] = [trace[f"layers.{l}.ratio"][0] for l in range(8)]
    assert to_first["with both"] > to_first["without the price"] + 0.05
    behind = train.SEED_LAYER + 1
    for name in ("with both", "without the price"):
        assert ratio[name][behind][0] > 1000 > max(ratio[name][behind][1:].max(), ratio[name][behind - 1].max())
    assert max(r.max() for r in ratio["without the seed"]) < 1000


def test_the_toys_sink_is_its_first_token_in_every_layer_after_the_seed(toy):
    model, processor = toy
    video = read_video(TOY / "clip.mp4", longest_edge=processor.longest_edge)
    for question in ("What happens in this video?", "How many shapes are there?", "Was ist das? 日本語"):
        inputs, trace = processor(video, question), {}
        model(inputs.input_ids, inputs.pixel_values, outro=OutRo(), trace=trace)
        sinks = [trace[f"layers.{l}.is_sink"][0].nonzero().flatten().tolist() for l in range(8)]
        assert sinks == [[], [], [0], [0], [0], [0], [], []], question


def test_the_toy_equals_transformers_from_its_video_file_to_its_logits(toy):
    """Pins the bundled clip, the processor, the weights and the model at once."""
    model, processor = toy
    golden = load_file(FIXTURES / "toy.safetensors")
    video = read_video(TOY / "clip.mp4", longest_edge=processor.longest_edge)
    inputs = processor(video, "What happens in this video?")
    logits = model(inputs.input_ids, inputs.pixel_values)
    assert_close(logits[:, -golden["logits"].shape[1]:], golden["logits"])
    assert [model.generate(inputs.input_ids, inputs.pixel_values)] == golden["answer"].tolist()


def test_the_toys_page_is_written_with_what_was_measured(tmp_path, monkeypatch):
    """Text stays, blocks are replaced in their order: the toy, then its three controls."""
    monkeypatch.setattr(train, "load", lambda folder: (None, folder.name))
    monkeypatch.setattr(train, "report", lambda model, processor, ways="all": f"{processor}, {len(ways)}")
    train.write_readme(tmp_path)
    written, bundled = (path.read_text(encoding="utf-8").split("```")
                        for path in (tmp_path / "README.md", TOY / "README.md"))
    assert written[0::2] == bundled[0::2] and "price" in bundled[0] and "tenth" in bundled[2]
    assert written[1::2] == [f"\n{tmp_path.name}, 3\n", "\nshort, 1\n", "\nshort_no_price, 1\n",
                             "\nshort_no_seed, 1\n"]
    assert all(run.share == 0.1 for run in train.CONTROLS.values())


@pytest.mark.parametrize("arguments, said", [
    (["--evaluate", "--folder", "/no/toy"], "/no/toy is neither a folder here nor the name of a repository"),
    (["--device", "mps"], "--device mps: there is none here"),
])
def test_errors_of_the_command_line_are_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        train.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(f"train.py: {said}") and error.count("\n") == 1
