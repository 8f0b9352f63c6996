"""The toy world and its training: what is asked has the right answer, and a run can be repeated."""

import random
import threading
from collections import Counter

import pytest
import torch
from helpers import FIXTURES, TOY, assert_close
from safetensors.torch import load_file

from minioutro import OutRo, Processor, Trace, VideoLM, read_video
from minioutro.lab import train_toy as train
from minioutro.lab.shapes import COLOURS, FPS, HARD_NOISE, SHAPES, SIZE, UNSEEN, Clip, Question, Shape
from minioutro.lab.train_toy import MOTIONS, NOT_ASKED, Stage, draw_batch


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(train, "HELD_OUT", 2)


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


def test_noise_is_added_and_nothing_else_changes():
    """In the mean over a frame the noise of 0 to 255 pulls towards 127.5, in its share."""
    clip, noisy = Clip(UNSEEN + 1, 2), Clip(UNSEEN + 1, 2, noise=HARD_NOISE)
    assert noisy.shapes == clip.shapes and noisy.questions() == clip.questions() and noisy.noise == HARD_NOISE
    plain, half = (sum(Clip(UNSEEN + 1, 2, noise=n).frame(9).convert("L").tobytes()) / SIZE**2 for n in (0, 127.5))
    assert half == pytest.approx((plain + 127.5) / 2, abs=3)


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


def test_the_same_clip_is_the_same_file_whatever_the_machine_does_besides(tmp_path):
    done = threading.Event()

    def be_busy():
        while not done.is_set():
            sum(range(10_000))
    busy = threading.Thread(target=be_busy)
    busy.start()
    try:
        for n in range(3):
            Clip(UNSEEN + 2, 3).write(tmp_path / f"{n}.mp4")
    finally:
        done.set()
        busy.join()
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


def assert_frames_are_those_of(video, clip):
    assert (len(video.frames), video.total_frames, video.duration) == (8, 64, 8.0)
    for frame, index in zip(video.frames, (0, 9, 18, 27, 36, 45, 54, 63)):
        pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()
                  for image in (frame, clip.frame(index))]
        assert (pixels[0] - pixels[1]).abs().mean() < 8


def test_a_clip_survives_its_mp4_and_the_bundled_one_is_an_unseen_clip(tmp_path):
    Clip(UNSEEN, 2).write(tmp_path / "clip.mp4")
    assert_frames_are_those_of(read_video(tmp_path / "clip.mp4"), Clip(UNSEEN, 2))
    assert_frames_are_those_of(read_video(TOY / "clip.mp4"), train.EXAMPLE)
    assert train.EXAMPLE.seed >= UNSEEN


def test_questions_that_share_a_prompt_are_read_as_if_asked_alone():
    """The packed batch gives each answer the logits that the ordinary model gives that question alone."""
    model, processor = VideoLM.from_pretrained(TOY), Processor.from_pretrained(TOY)
    batch = draw_batch(processor, Stage(steps=1, frames=1, clips=2, questions=3, shapes=(1, 2)), "5")
    features = model.encode(batch.pixel_values)
    logits, targets = train.answer_logits(model, batch, features, trace=None)
    alone, expected = [], []
    for b in range(2):
        for turn in range(1, 4):
            keep = (batch.turn[b] == 0) | (batch.turn[b] == turn)
            ids, target = batch.input_ids[b:b + 1, keep], batch.targets[b, keep]
            alone.append(model(ids, batch.pixel_values[b:b + 1])[0, target != NOT_ASKED])
            expected.append(target[target != NOT_ASKED])
    assert torch.allclose(logits, torch.cat(alone), atol=1e-3)
    assert targets.equal(torch.cat(expected))


def test_each_word_for_a_shape_is_asked_what_it_is_about(toy):
    """In questions and answers, by hand: a red ring in column 10 of 16, row 2, that goes down and back."""
    processor, ring = toy[1], Shape("red", "ring", "down", True, 0.0, start=(40, 8), distance=9, radius=7)
    names = (*train.names_of(ring, 0), *train.deeds_of(ring, moment=None))
    assert names == (SHAPES.index("ring"), list(COLOURS).index("red"), 10, 2, MOTIONS.index("down"), 1, 0)
    assert train.deeds_of(ring, moment=3) == (NOT_ASKED,) * 3
    questions = [Question("shape", "What shape is red?", "ring"), Question("is there", "Is anything blue?", "No")]
    row = train.batch_row(processor, [1, 2], questions, {"red": names, "ring": names})
    words = [(processor.tokenizer.decode([token]), of) for token, _, _, _, *of in row if of != [NOT_ASKED] * 7]
    nothing = [*train.NOTHING] + [NOT_ASKED] * 3
    assert words == [(" red", [*names]), (" ring", [*names]), (" blue", nothing)]


def test_training_repeats_itself_and_goes_on_after_an_interruption(tmp_path, monkeypatch):
    """Six steps in one go, or five, a crash, and the rest from the file of step four: the same model.

    And its control goes on from the same place in both.
    """
    monkeypatch.setattr(train, "STAGES", (Stage(2, 1, 2, 0), Stage(1, 1, 2, 2), Stage(3, 8, 1, 2)))
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    run, control = train.TOY, train.CONTROLS[-1]
    weights = {}
    with torch.enable_grad():
        train.train(tmp_path / "whole", run, random_seed=3)
        train.train(tmp_path / "whole", control, random_seed=3)
        draw, calls = train.draw_batch, []

        def interrupt(*args):
            calls.append(args)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return draw(*args)
        monkeypatch.setattr(train, "draw_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.train(tmp_path / "parts", run, random_seed=3)
        train.train(tmp_path / "parts", run, random_seed=3)
        train.train(tmp_path / "parts", control, random_seed=3)
        with pytest.raises(ValueError, match="not begun with --seed 4"):
            train.train(tmp_path / "parts", run, random_seed=4)
    for name in ("whole", "parts"):
        weights[name] = [VideoLM.from_pretrained(tmp_path / name / run.folder).state_dict()
                         for run in (train.TOY, control)]
    for whole, parts in zip(weights["whole"], weights["parts"]):
        assert all(whole[name].equal(parts[name]) for name in whole)
    assert not all(weights["whole"][0][name].equal(weights["whole"][1][name]) for name in weights["whole"][0])


def test_a_stage_ends_when_every_kind_is_learned_and_the_last_one_never_early(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STAGES", (Stage(3, 1, 1, 0), Stage(6, 1, 2, 5), Stage(4, 1, 2, 5)))
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    for learned, steps in ((0.0, [3, 2, 4]), (1.1, [3, 6, 4])):
        monkeypatch.setattr(train, "LEARNED", learned)
        with torch.enable_grad():
            train.train(tmp_path / str(learned), train.TOY, random_seed=3)
        lines = [line.split(":")[0] for line in (tmp_path / str(learned) / "log.txt").read_text().splitlines()]
        ends = [sum(steps[:n]) for n in (1, 2, 3)]
        assert {f"step {end}, stage {n}" for n, end in enumerate(ends)} <= set(lines)
        assert lines[-1] == f"step {ends[-1]}, stage 2"


def test_what_is_not_learned_is_asked_twice_as_often():
    clip, rng = Clip(UNSEEN, 3), random.Random(0)
    kinds = {question.kind for question in clip.questions(20)}
    drawn = train.draw_questions(clip, 20, 2 * len(kinds) - 1, rng, learned={"count"})
    assert Counter(question.kind for question in drawn) == {kind: 1 if kind == "count" else 2 for kind in kinds}


def test_what_is_right_is_counted_by_kind_as_the_model_answers_each_question_alone(toy, tmp_path):
    model, processor = toy
    learner = train.Learner(model.config)
    learner.model = model
    stage = Stage(steps=1, frames=1, clips=3, questions=15, shapes=(2, 3))
    asked, right = Counter(), Counter()
    for n in range(train.HELD_OUT):
        batch = draw_batch(processor, stage, f"held out {n}")
        for b, kinds in enumerate(batch.kinds):
            for turn, kind in enumerate(kinds, start=1):
                keep = (batch.turn[b] == 0) | (batch.turn[b] == turn)
                target = batch.targets[b, keep]
                likeliest = model(batch.input_ids[b:b + 1, keep], batch.pixel_values[b:b + 1])[0].argmax(-1)
                asked[kind] += 1
                right[kind] += ((likeliest == target) | (target == NOT_ASKED)).all().item()
    found = learner.right_by_kind(processor, stage, "cpu")
    assert found == {kind: right[kind] / asked[kind] for kind in asked}
    assert 0 < sum(right.values()) < sum(asked.values())


def test_price_and_seed_can_be_left_out(tmp_path, monkeypatch):
    """After a few dear steps: with the price less attention elsewhere, without the seed no massive token."""
    monkeypatch.setattr(train, "STAGES", (Stage(1, 1, 1, 2), Stage(25, 1, 1, 2)))
    monkeypatch.setattr(train, "PRICE", 20.0)
    monkeypatch.setattr(train, "ADAM_RATE", 0.05)                   # that of step n is n/50 of it, and less
    ids, to_first, ratio = torch.arange(1, 30)[None], {}, {}
    runs = (train.TOY, *train.CONTROLS)
    assert [(run.price, run.seed) for run in runs] == [(True, True), (False, True), (True, False)]
    for run in runs:
        with torch.enable_grad():
            train.train(tmp_path, run, random_seed=3)
        trace = Trace(weights_of=range(8))
        VideoLM.from_pretrained(tmp_path / run.folder)(ids, trace=trace)
        to_first[run] = torch.stack([trace[f"layers.{l}.weights"][0, [0, 2], 1:, 0] for l in range(2, 8)]).mean()
        ratio[run] = [trace[f"layers.{l}.ratio"][0] for l in range(8)]
    behind = train.SEED_LAYER + 1
    toy, no_price, no_seed = runs
    assert min(to_first[toy], to_first[no_seed]) > to_first[no_price] + 0.05
    for run in (toy, no_price):
        assert ratio[run][behind][0] > 1000 > max(ratio[run][behind][1:].max(), ratio[run][behind - 1].max())
    assert max(r.max() for r in ratio[no_seed]) < 1000


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


def check_no_device(device):
    if device != "cpu":
        raise ValueError(f"device {device}: there is none here")


@pytest.mark.parametrize("arguments, said", [
    (["--threads", "0"], "--threads '0' makes no sense; give another"),
    (["--device", "mps"], "device mps: there is none here"),
])
def test_errors_of_the_command_line_are_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    monkeypatch.setattr(train, "check_device", check_no_device)
    with pytest.raises(SystemExit) as stopped:
        train.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(f"train_toy.py: {said}") and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--folder", ""], ["--threads", "-1"], ["--threads", "0"], ["--seed", "9" * 400]])
def test_a_mistyped_flag_is_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and arguments[0] in error and error.count("\n") == 1


def test_a_damaged_state_is_named_and_nothing_half_written_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STAGES", (Stage(1, 1, 1, 0),))
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 half of a file")
    with pytest.raises(ValueError, match=r"state.pt cannot be read \(.*remove it") as error:
        train.train(tmp_path, train.TOY, random_seed=3)
    assert "\n" not in str(error.value)
    (tmp_path / "state.pt").unlink()
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train, "save_file", full)
    with torch.enable_grad(), pytest.raises(OSError, match="No space"):
        train.train(tmp_path, train.TOY, random_seed=3)
    assert {*whole, "state.pt", "before_last_stage.pt", "log.txt"} == {path.name for path in tmp_path.iterdir()}
