"""The figures: what counts as right, what is compared with what, and what the tables say."""

import pytest
import torch

from minioutro import OutRo, evaluate, read_video
from minioutro.shapes import Clip


@pytest.fixture(scope="module")
def items(toy):
    return evaluate.draw_items(*toy, clips=3)


def test_items_are_questions_of_unseen_clips_read_from_their_mp4(toy, items, tmp_path):
    model, processor = toy
    assert len(items) == 3 * evaluate.QUESTIONS
    for n in range(3):
        clip, asked = Clip(evaluate.UNSEEN + n, 1 + n % 3), items[10 * n:10 * n + 10]
        known = {question.text: question.answer for question in clip.questions()}
        assert all(known[item.question.text] == item.question.answer for item in asked)
        assert len({item.question.text for item in asked}) == 10
        assert {item.question.kind for item in asked} == {question.kind for question in clip.questions()}
        clip.write(tmp_path / "clip.mp4")
        video = read_video(tmp_path / "clip.mp4")
        inputs = processor(video, asked[0].question.text)
        assert inputs.input_ids[0].tolist() == asked[0].input_ids
        assert torch.allclose(model.encode(inputs.pixel_values)[0], asked[0].features, atol=1e-5)


@pytest.mark.parametrize("outro", [None, OutRo()], ids=["baseline", "outro"])
def test_right_is_what_generation_says(toy, items, outro):
    """Two batched calls decide the same as generating each answer alone and comparing texts."""
    model, processor = toy
    alone = [processor.decode(model.generate(torch.tensor([item.input_ids]), features=item.features[None],
                                             outro=outro)) == item.question.answer for item in items]
    wrong = [item.__class__(item.question, item.input_ids, [*item.answer_ids[:-1], 5], item.features)
             for item in items]
    assert evaluate.answered_rightly(model, items, outro) == alone
    assert 0 < sum(alone)
    assert not any(evaluate.answered_rightly(model, wrong, outro))


def test_the_sign_test_by_hand():
    assert evaluate.sign_test(5, 5) == evaluate.sign_test(0, 0) == 1
    assert evaluate.sign_test(0, 3) == evaluate.sign_test(3, 0) == 2 / 8
    assert evaluate.sign_test(1, 5) == 2 * (1 + 6) / 64


def test_masking_a_token_that_the_answer_does_not_need_changes_nothing(toy, items):
    """The last token is seen by nobody else; of the words of ten questions, one at least is needed."""
    model = toy[0]
    item = items[0]
    S = len(item.input_ids)
    answer = model.generate(torch.tensor([item.input_ids]), features=item.features[None])
    assert evaluate.unchanged_without(model, item, [S + len(answer) - 2]) == [True]
    stays = []
    for item in items[:10]:
        S = len(item.input_ids)
        stays += evaluate.unchanged_without(model, item, range(S - 10, S))
    assert not all(stays)


def test_the_report_counts_what_the_answers_were(toy, items, monkeypatch):
    """Made-up answers: right where the question is on colour, and with OutRo also where it is on counts."""
    def made_up(model, items, outro):
        kinds = ("colour",) if outro is None else ("count",) if outro.align else ("colour", "count")
        return [item.question.kind in kinds for item in items]
    monkeypatch.setattr(evaluate, "answered_rightly", made_up)
    lines = evaluate.answers_table(toy[0], items, evaluate.WAYS).splitlines()
    n = {kind: sum(item.question.kind == kind for item in items) for kind in ("colour", "count")}
    rows = {line[:14].strip(): line[14:].split() for line in lines}
    table = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert table["colour"][0] == str(n["colour"]) and table["colour"][2:] == ["100.0%", "100.0%", "0.0%", "0.0%"]
    assert table["count"][1:] == ["33.3%", "0.0%", "100.0%", "100.0%", "100.0%"]
    assert rows["relax"][1:3] == [str(n["count"]), "0"]
    assert rows["both 3"][1:3] == [str(n["count"]), str(n["colour"])]
    assert rows["both 3"][0] == f"{n['count'] / 30:.1%}"


def test_the_toys_sink_is_found(toy, items):
    model, processor = toy
    sinks = evaluate.find_first_sink(model, processor, items[::10])
    assert sinks.marked == [2, 3, 4, 5]
    rows = evaluate.sink_table(sinks).splitlines()
    assert [row.split()[1] for row in rows[1:9]] == ["0%", "0%", "100%", "100%", "100%", "100%", "0%", "0%"]
    assert (sinks.full <= 1).all() and (sinks.far > 0.95 * sinks.full).all()
    assert sinks.changed.shape == (3, 1 + evaluate.OTHERS)


def test_contrast_needs_a_head_that_rests_and_one_that_works():
    """Layers 1 to 3 are marked, 0 is not always; only layer 1 has a head above 0.7 and one below 0.3."""
    far = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.4], [0.6, 0.1]])
    full = torch.tensor([[1.0, 1.0], [0.8, 0.0], [0.4, 0.0], [0.0, 0.0]])
    changed = torch.tensor([[True] + [False] * 8, [True] + [True] * 4 + [False] * 4])
    zero = torch.zeros(4)
    sinks = evaluate.Sinks(torch.tensor([0.5, 1, 1, 1]), zero, zero, far, far, full, changed)
    assert sinks.marked == [1, 2, 3] and sinks.contrast == [True, False, False]
    said = " ".join(evaluate.sink_table(sinks).split())
    assert "of the 3 layers where token 0 is always a sink, 1 have a head" in said
    assert "20% of their (head, token) pairs" in said                          # (0.8 + 0.4) / 6
    assert "of 2 answers, 2 change when token 0 is masked; 0.5 do, on average" in said


def test_hard_clips_are_the_same_with_more_noise(toy):
    clean, hard = (evaluate.draw_items(*toy, clips=1, noise=noise) for noise in (None, evaluate.HARD_NOISE))
    assert [item.question for item in clean] == [item.question for item in hard]
    assert (clean[0].features - hard[0].features).abs().max() > 0.1
