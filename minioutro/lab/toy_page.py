"""Measure a toy and write its page.

    python -m minioutro.lab.toy_page                        print the figures of the bundled toy
    python -m minioutro.lab.toy_page --folder toy_run       print the figures of another toy
    python -m minioutro.lab.toy_page --write                write the page of the bundled toy

The page compares the bundled toy with toys of other random seeds. Train each of them with
`python -m minioutro.lab.train_toy --seed N --folder FOLDER`, and give it as `--seed N FOLDER`.
With `--out FILE` the measured figures are kept in a file, and only what is missing there is
measured. So an interrupted run goes on with the same command, and a row can be added later.

The whole page is made here from the figures, including its sentences. So a sentence cannot
contradict the table beside it.
"""

import hashlib
import json
import math
import random
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from minioutro import Cache, OutRo, Processor, Trace, VideoLM, load, read_video
from minioutro.lab.compare import ALPHA, sign_test, summarise, table_of_differences
from minioutro.lab.evaluate import ask, variants_of
from minioutro.lab.questions import OF_A_CLIP, Record, toy_questions
from minioutro.lab.shapes import HARD_NOISE
from minioutro.lab.train_toy import CONTROLS, PRICED_HEADS, STAGES, Stage
from minioutro.model import causal_mask
from minioutro.prompt import IMAGE
from minioutro.support.cli import (
    Parser,
    not_empty,
    number,
    progress,
    run_command,
    written_whole,
)
from minioutro.weights import TOY

ASKED = 2000                                # questions for the page
CLIPS = {"ordinary": None, "noise": HARD_NOISE}     # the noise of the clips, see shapes.Clip
GAMMAS = (0.5, 1.0, 2.0)                    # weaker alignments, which are asked as well
BUNDLED_SEED = "0"                          # the bundled toy was trained with --seed 0
FAR = 16                                    # a token at least this far from the first one is far
OTHERS = 8                                  # text tokens that are masked to compare with the sink
LEANING = 0.1                               # above this cosine, the output of a head leans
FORMAT = 1                                  # version of the file of figures

# ---- 1. Measuring: what makes the first token a sink --------------------------------------------


@dataclass
class FirstSink:
    """What makes the first token a sink: means over prompts. L layers, H heads, G value heads.

    The last four lists are about the tokens after the first, and the value of the layer's sinks.
    """
    prompts: int                            # number of prompts
    marked: list[float]                     # [L], how often the first token is marked as a sink
    others: list[float]                     # [L], how many other tokens are marked
    ratio: list[float]                      # [L], its largest coordinate divided by the median
    attention: list[list[float]]            # [L][H], attention to it from far tokens
    attention_of_answer: list[list[float]]  # [L][H], attention to it from the tokens that answer
    full: list[list[float]]                 # [L][H], share of far tokens that give it over 0.95
    changed: list[float]                    # [1 + OTHERS], share of answers that change without
                                            # it, and without each of some other text tokens
    cosine: list[list[float]]               # [L][H], of a head's output with the sinks' value
    leaning: list[list[float]]              # [L][H], share of cosines above LEANING
    turned: list[list[float]]               # [L][H], degrees by which alignment turns the output
    value: list[list[float]]                # [L][G], length of the sinks' value / median length

    @property
    def layers(self) -> list[int]:
        """The layers where the first token is a sink in every prompt."""
        return [l for l, share in enumerate(self.marked) if share > 0.999]

    def mean(self, of_layers: list[list[float]]) -> float:
        """The mean over `layers` and over heads. NaN if there is no such layer."""
        values = []
        for l in self.layers:
            values += of_layers[l]
        return sum(values) / len(values) if values else math.nan

    @property
    def without_first(self) -> int:
        """Answers that change when nobody may attend to the first token."""
        return round(self.changed[0] * self.prompts)

    @property
    def without_another(self) -> float:
        """Answers that change when nobody may attend to another text token: the mean over some."""
        return sum(self.changed[1:]) / OTHERS * self.prompts


def answer_stays_without(model: VideoLM, prompt: Tensor, features: Tensor,
                         columns: list[int]) -> Tensor:
    """Whether the baseline's answer stays the same when one token is hidden from all others.

    columns: the positions of n tokens, which are hidden one at a time. Returns: bool[n].
    """
    answer = torch.tensor([model.generate(prompt, features=features)])
    ids = torch.cat([prompt, answer[:, :-1]], dim=1)
    n = len(columns)
    may_attend = causal_mask(ids.shape[1], ids.shape[1]).repeat(n, 1, 1)                # (n,S,S)
    for i, column in enumerate(columns):
        may_attend[i, column + 1:, column] = False              # the token still sees itself
    hidden = model.hidden_states(ids.repeat(n, 1), features=features.repeat(n, 1, 1),
                                 masks=[may_attend] * model.config.text_config.num_hidden_layers)
    likeliest = model.head(hidden[:, -answer.shape[1]:]).argmax(-1)                     # (n,answer)
    return (likeliest == answer).all(1)


def stacked(trace: dict, name: str, L: int) -> Tensor:
    """One entry of a trace, collected from all layers, for its only prompt: (L,...)."""
    return torch.stack([trace[f"layers.{l}.{name}"][0] for l in range(L)])


def marks_of(model: VideoLM, prompt: Tensor, features: Tensor) -> dict[str, Tensor]:
    """What the rule finds in the plain model: fields of FirstSink."""
    L = model.config.text_config.num_hidden_layers
    trace = {}
    model(prompt, features=features, outro=OutRo(align=False, relax=False), trace=trace)
    is_sink = stacked(trace, "is_sink", L).float()                                      # (L,S)
    return {
        "marked": is_sink[:, 0],
        "others": is_sink[:, 1:].sum(1),
        "ratio": stacked(trace, "ratio", L)[:, 0],
    }


def attention_to_first(model: VideoLM, prompt: Tensor, features: Tensor,
                       answer: list[int]) -> dict[str, Tensor]:
    """Attention of the plain model to the first token: fields of FirstSink. answer: the right one.
    """
    L = model.config.text_config.num_hidden_layers
    trace = Trace(weights_of=range(L))
    ids = torch.cat([prompt, torch.tensor([answer])], dim=1)
    model(ids, features=features, trace=trace)
    to_first = stacked(trace, "weights", L)[:, :, :, 0]                                 # (L,H,S)
    far = to_first[:, :, FAR:]
    return {
        "attention": far.mean(-1),
        "attention_of_answer": to_first[:, :, prompt.shape[1] - 1:].mean(-1),
        "full": (far > 0.95).float().mean(-1),
    }


def leaning_of(model: VideoLM, prompt: Tensor, features: Tensor) -> dict[str, Tensor]:
    """How far the heads' outputs lean towards the sinks' value with OutRo: fields of FirstSink."""
    L = model.config.text_config.num_hidden_layers
    trace = {}
    cache = Cache()
    model(prompt, features=features, outro=OutRo(), trace=trace, cache=cache)
    cosine = stacked(trace, "cosine", L)[:, :, 1:]                                      # (L,H,S-1)
    cosine_aligned = stacked(trace, "cosine_aligned", L)[:, :, 1:]
    radians = cosine.clamp(-1, 1).acos() - cosine_aligned.clamp(-1, 1).acos()
    of_tokens = torch.stack([cache.values(l)[0, :, 1:].norm(dim=-1) for l in range(L)])  # (L,G,S-1)
    of_sinks = stacked(trace, "v_sink", L).norm(dim=-1)                                 # (L,G)
    return {
        "cosine": cosine.mean(-1),
        "leaning": (cosine > LEANING).float().mean(-1),
        "turned": radians.rad2deg().mean(-1),
        "value": of_sinks / of_tokens.median(dim=-1).values,
    }


def text_tokens(processor: Processor, prompt: Tensor) -> list[int]:
    """The positions of the text tokens between the first token and the last image token."""
    image = processor.tokenizer.token_to_id(IMAGE)
    ids = prompt[0].tolist()
    last_image = len(ids) - 1 - ids[::-1].index(image)
    return [n for n in range(1, last_image) if ids[n] != image]


@torch.inference_mode()
def find_first_sink(model: VideoLM, processor: Processor, records: list[Record],
                    folder: Path) -> FirstSink:
    """Measure the first token on these questions, whose videos are in the folder."""
    rng = random.Random(0)
    of_prompts = []
    for record in progress(records, "sink"):
        inputs = processor(read_video(folder / record.video), record.question)
        prompt = inputs.input_ids
        features = model.encode(inputs.pixel_values)
        answer = processor.tokenize([f" {record.answer}"])
        masked = [0, *rng.sample(text_tokens(processor, prompt), OTHERS)]
        stays = answer_stays_without(model, prompt, features, masked)
        of_prompts.append({
            **marks_of(model, prompt, features),
            **attention_to_first(model, prompt, features, answer),
            **leaning_of(model, prompt, features),
            "changed": (~stays).float(),
        })
    means = {}
    for name in of_prompts[0]:
        mean = torch.stack([of_prompt[name] for of_prompt in of_prompts]).double().mean(0)
        means[name] = mean.round(decimals=6).tolist()
    return FirstSink(prompts=len(records), **means)


# ---- 2. Measuring: what a toy can do ------------------------------------------------------------


def compare_on_clips(model: VideoLM, processor: Processor, noise: int | None,
                     variants: dict[str, OutRo | None], folder: Path) -> tuple[dict, list[Record]]:
    """The result of `summarise` on clips that the training never drew, and the questions.

    For the kinds of question, only the rows of the baseline and of OutRo are kept.
    """
    records, clips = toy_questions(ASKED, noise=noise)
    answers = ask(model, processor, records, variants, folder, clips)
    what = "ordinary clips" if noise is None else f"noise {noise}"
    found = summarise(list(progress(answers, what, total=len(records) * len(variants))))
    for kind, rows in found["tasks"].items():
        found["tasks"][kind] = {name: rows[name] for name in ("baseline", "outro")}
    return found, records


@torch.inference_mode()
def measure(folder: Path, explore: bool = False) -> dict:
    """The figures of one toy, in a form that JSON can store.

    explore: also ask each part of OutRo alone, and weaker alignments.
    Returns: "checkpoint", the result of `checkpoint`. For each name in CLIPS, the result of
    `summarise`. "sink", the fields of a FirstSink.
    """
    model, processor = load(folder)
    variants = variants_of()
    if explore:
        variants |= variants_of(("relax", "align")) | variants_of((), GAMMAS)
    figures = {"checkpoint": checkpoint(folder)}
    for name, noise in CLIPS.items():
        with tempfile.TemporaryDirectory() as videos:
            found, records = compare_on_clips(model, processor, noise, variants, Path(videos))
            figures[name] = found
            if noise is None:
                sink = find_first_sink(model, processor, records[::OF_A_CLIP], Path(videos))
                figures["sink"] = asdict(sink)
    return figures


def checkpoint(folder: Path) -> str:
    """Identify a checkpoint by the beginning of the SHA-256 of its weights."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; train a toy there first: "
                                f"python -m minioutro.lab.train_toy --folder {folder}")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# ---- 3. Figures in tables -----------------------------------------------------------------------


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def in_words(items: list) -> str:
    """"1", "1 and 2", "1, 2 and 3"."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def sink_table(sink: FirstSink) -> str:
    """A row for each layer."""
    rows = []
    for l in range(len(sink.marked)):
        of_heads = " ".join(f"{share:.2f}" for share in sink.attention[l])
        of_answer = " ".join(f"{share:.2f}" for share in sink.attention_of_answer[l])
        rows.append([str(l), f"{sink.marked[l]:.0%}", f"{sink.others[l]:.2f}",
                     f"{sink.ratio[l]:,.0f}", of_heads, of_answer])
    return markdown_table(
        ["layer", "token 0 is a sink", "other sinks", "largest / median",
         "attention to token 0, by head", "the same, from the answer"], rows)


def sink_in_words(sink: FirstSink) -> str:
    """The table of layers in sentences."""
    masked = (f"Of {sink.prompts} answers, {sink.without_first} change if no token may attend to "
              f"token 0. If another text token is hidden instead, "
              f"{sink.without_another:.1f} change on average.")
    if not sink.layers:
        return paragraph("There is no layer where token 0 is a sink in every prompt.", masked)
    contrast = 0
    for l in sink.layers:
        if max(sink.attention[l]) > 0.7 and min(sink.attention[l]) < 0.3:
            contrast += 1
    return paragraph(
        f"Token 0 is a sink in every prompt in {len(sink.layers)} layers: {in_words(sink.layers)}.",
        f"Of these, {contrast} have both a head that gives it more than 0.7 of its attention and "
        f"one that gives it less than 0.3.",
        f"In these layers, {sink.mean(sink.full):.0%} of the pairs of a head and a token give it "
        f"more than 0.95.", masked)


# What may explain the differences between toys: name -> field of FirstSink, and its format.
LEANINGS = {
    "mean cosine": ("cosine", "{:.2f}"),
    f"cosine above {LEANING}": ("leaning", "{:.0%}"),
    "angle turned": ("turned", "{:.1f}°"),
    "value's length": ("value", "{:.2f}"),
}


def leanings_of(sink: FirstSink) -> list[float]:
    return [sink.mean(getattr(sink, name)) for name, _ in LEANINGS.values()]


def leaning_table(toys: dict[str, dict]) -> str:
    rows = []
    for seed, figures in toys.items():
        leanings = leanings_of(FirstSink(**figures["sink"]))
        printed = [form.format(value)
                   for value, (_, form) in zip(leanings, LEANINGS.values(), strict=True)]
        rows.append([seed, *printed, f"{net_change(figures, 'ordinary'):+}",
                     f"{net_change(figures, 'noise'):+}"])
    return markdown_table(["seed", *LEANINGS, "mended minus spoilt", "with noise"], rows)


def net_change(figures: dict, clips: str) -> int:
    """The number of answers that OutRo mends minus the number that it spoils."""
    outro = figures[clips]["variants"]["outro"]
    return outro["gained"] - outro["lost"]


def seed_table(toys: dict[str, dict]) -> str:
    rows = []
    for seed, figures in toys.items():
        row = [seed]
        for clips in CLIPS:
            found = figures[clips]["variants"]
            outro = found["outro"]
            row += [f"{share_right(found['baseline']):.1%}", str(outro["gained"]),
                    str(outro["lost"]), f"{p_of(outro):.2g}"]
        rows.append(row)
    columns = ["right", "mended", "spoilt", "p"]
    return markdown_table(["seed", *columns, *(f"{column}, noise" for column in columns)], rows)


def share_right(variant: dict) -> float:
    return variant["right"] / variant["n"]


def p_of(variant: dict) -> float:
    return sign_test(variant["gained"], variant["lost"])


# ---- 4. Figures in sentences --------------------------------------------------------------------


def effect_in_words(found: dict) -> str:
    """What OutRo does to the answers of one toy."""
    outro = found["variants"]["outro"]
    p = found["test"]["p"]
    said = (f"OutRo mends {outro['gained']} of {outro['n']:,} answers and spoils {outro['lost']} "
            f"(p = {p:.2g})")
    verdict = found["test"]["verdict"]
    if verdict in ("better", "worse"):
        return f"{said}: with OutRo this toy is {verdict}."
    return f"{said}: no difference is shown."


def seeds_in_words(toys: dict[str, dict], clips: str) -> str:
    """In how many toys OutRo mends more answers than it spoils, and in which of them p is small."""
    worse = [seed for seed, figures in toys.items() if net_change(figures, clips) < 0]
    better = [seed for seed, figures in toys.items() if net_change(figures, clips) > 0]
    small = [seed for seed, figures in toys.items()
             if p_of(figures[clips]["variants"]["outro"]) < ALPHA]
    where = "On ordinary clips" if clips == "ordinary" else f"With noise {HARD_NOISE}"
    text = (f"{where} OutRo spoils more answers than it mends in {len(worse)} of {len(toys)} toys, "
            f"and mends more than it spoils in {len(better)}.")
    if not small:
        return f"{text} In none is p below {ALPHA}."
    seeds = "seed" if len(small) == 1 else "seeds"
    return f"{text} p is below {ALPHA} for {seeds} {in_words(small)}."


def is_ordered_by(values: list[float], measure: list[float]) -> bool:
    """Whether the values always rise with a measure, or always fall. Equal values do neither."""
    slopes = []
    for (m, value), (next_m, next_value) in pairwise(sorted(zip(measure, values))):
        slopes.append((next_value - value) * (next_m - m))
    return all(slope > 0 for slope in slopes) or all(slope < 0 for slope in slopes)


def explanations(toys: dict[str, dict], clips: str) -> list[str]:
    """The measures with which the net change always rises from toy to toy, or always falls."""
    changes = [net_change(figures, clips) for figures in toys.values()]
    of_toys = [leanings_of(FirstSink(**figures["sink"])) for figures in toys.values()]
    found = []
    for n, name in enumerate(LEANINGS):
        if is_ordered_by(changes, [leanings[n] for leanings in of_toys]):
            found.append(name)
    return found


def explanations_in_words(toys: dict[str, dict]) -> str:
    if len(toys) < 3:
        return "Fewer than three toys cannot show whether the effect follows one of these measures."
    sentences = []
    any_found = False
    for clips, where in (("ordinary", "on ordinary clips"), ("noise", "with noise")):
        found = explanations(toys, clips)
        if found:
            any_found = True
            sentences.append(f"The net change {where} follows this in order: {in_words(found)}.")
        else:
            sentences.append(f"The net change {where} follows none of these measures.")
    if any_found:
        sentences.append(f"But with {len(LEANINGS)} measures and only {len(toys)} toys, one of "
                         f"them can agree by chance. So this explains nothing yet.")
    else:
        sentences.append("So the table does not explain the difference.")
    return paragraph(*sentences)


# ---- 5. The page --------------------------------------------------------------------------------


def stage_row(number_of_stage: int, stage: Stage) -> list[str]:
    trained = "the whole model" if stage.questions else "only the encoder"
    frames = "1 frame" if stage.frames == 1 else f"{stage.frames} frames of a whole clip"
    return [str(number_of_stage), trained, f"{stage.steps:,}", frames, str(stage.clips),
            str(stage.questions)]


def stage_table() -> str:
    rows = [stage_row(n, stage) for n, stage in enumerate(STAGES)]
    return markdown_table(["stage", "trains", "steps, at most", "a clip is", "clips in a batch",
                           "questions about each"], rows)


INTRODUCTION = """\
# The toy

A small SmolVLM, trained from scratch on clips of moving shapes (`minioutro/lab/shapes.py`) by
`python -m minioutro.lab.train_toy`. `load("minioutro/toy")` loads it. It is small enough to look at
every number in it. It has an attention sink, because its training gave it one.

`python -m minioutro.lab.toy_page` prints its figures, and with `--write` it writes this page. The
sentences about results are also made from the figures. So do not edit this page by hand.

## How it was trained

{stages}

The learning rates fall to zero in each stage. Muon trains the matrices of the layers, and AdamW the
rest. In the last stage AdamW trains all weights. Stages 1 and 2 end early if every kind of question
is learned on held-out clips. Kinds that are not learned yet are asked twice as often.

The first stage trains the encoder to name form, colour and place of what each image token shows.
This task goes on in the other stages. There, a layer in the middle of the decoder has a similar
task, at each form and colour in a question or an answer. For example, at the word "blue" it has to
name the blue shape. Without this task, some runs never learn "is anything blue?" and "what shape is
blue?". From stage 2 on the model sees whole clips. Then it has two more tasks. At these words it
also names what the shape does. At each image token it names how the object it shows has moved in
the last two frames. Questions that share a clip do not see each other, so each is read as if it was
asked alone. In training the frames are degraded by JPEG. The figures below are of frames of real
mp4 files.

All stages except the last train an ordinary model. In the last stage two things give it a sink.
Both are artificial:

- **The seed.** A neuron of an early MLP reads a coordinate that only the first token has, and
  writes a huge value into another coordinate. These weights are set again before each step.
- **The price.** In heads {heads} of the layers after the seed, attention to all tokens except the
  first raises the loss. The price is paid in full for half of the stage. Then it falls, and in the
  last fifth it is zero. So these two heads rest on the first token, and the other two work.
"""

ABILITIES = """\
## What it can do

The toy answers {asked} questions about {clips} clips. The training never saw these clips, but we
looked at them while we designed the training. Only one thing is tested: with the constants of its
release, is OutRo better or worse than the baseline, over all questions? *gained* counts the answers
that OutRo mends, and *lost* counts those that it spoils. The test is an exact sign test over both
(McNemar). The *difference* is in points, which are hundredths of the questions. Its 95 % interval
comes from resampling clips. Other rows have only one part of OutRo or a weaker alignment, or are
about one kind of question. They are exploration, so they are not tested.

{effect}

```
{table}
```

### With heavier noise

These are the same questions about the same clips. Now each pixel is mixed with a random grey. The
share of the grey is {noise} / 255. The training had no such noise, so the baseline makes more
mistakes here, and there is more to mend.

{effect_noise}

```
{table_noise}
```
"""

SEEDS = """\
## One toy is one draw

The toy above is one example. Another random seed gives another toy: the training is the same, but
the first weights and the clips are drawn again. Each row is one toy with the same {asked}
questions. *right* is the baseline's share of right answers. *mended* and *spoilt* count answers
that OutRo changed, and *p* is the sign test over both. Seed {bundled} is the bundled toy. The
weights of the others are not part of the repository.

{table}

{over_seeds}

Each p is a test of one toy on one set of clips. If OutRo did nothing, one such test in twenty would
still come out below {alpha}.

To add a row, train a toy and measure it:

    python -m minioutro.lab.train_toy --seed 4 --folder toy_4
    python -m minioutro.lab.toy_page --write --out tests/fixtures/toy_page.json --seed 4 toy_4

The sums of a training also depend on the processor's vector instructions and on the number of
threads. So you may get another toy from the same seed.

### What could explain the difference

Alignment turns a head's output only if it already leans towards the sink's value. So one could
think that OutRo changes most in the toy whose outputs lean most. The table has four measures:

- the mean cosine of a head's output with the sink's value, before it is aligned,
- the share of these cosines above {leaning},
- the angle by which alignment turns the output,
- the length of the sink's value, divided by the median length of the other tokens' values.

They are means over ordinary clips, over the layers where token 0 is a sink, over heads, and over
the tokens after the first. The last two columns are the number of answers that OutRo mends minus
the number that it spoils.

{leanings}

{explained}
"""

SINK = """\
## What makes the first token its sink

Here, a sink is a token that `find_sinks` marks with the constants of the release. The last two
layers are not searched. Attention is the mean over {prompts} prompts and over the tokens at least
{far} tokens away from the first. In the last column it is the mean over the tokens of the answer.

{table}

{said}
"""

CONTROLS_IN_WORDS = """\
## The toy without the sink

Which of the two makes the sink, the seed or the price? Two controls repeat the last stage from the
same state and with the same clips, one without the price and one without the seed.
`python -m minioutro.lab.train_toy` trains them after the toy, in the folders {folders}
below the toy's folder. `python -m minioutro.lab.toy_page --folder toy_run/no_seed` prints the
figures of the second one.

The controls were measured with an earlier training of this toy, and not again with its present
weights. At least 99.5 % of their answers to the ordinary questions were right.

- Without the price, the rule of the release marks token 0 in layers 2 to 5, as in the toy. But no
  head gives it more than 0.18 of its attention. If it is hidden, 1 of 200 answers changes.
- Without the seed, heads {heads} give token 0 between 0.82 and 1.00 of their attention from layer 2
  on. If it is hidden, 10 of 200 answers change. But no coordinate is more than 10 times the median,
  so the rule finds no sink, and OutRo has nothing to work with.

So the controls separate two definitions of a sink: the token that draws the attention, and the
token with the massive activation.
"""


def paragraph(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 100)


def page(toys: dict[str, dict]) -> str:
    """The whole page. toys: seed -> figures of that toy. The bundled toy is among them."""
    toys = {seed: toys[seed] for seed in sorted(toys, key=int)}
    bundled = toys[BUNDLED_SEED]
    sink = FirstSink(**bundled["sink"])
    sections = [
        INTRODUCTION.format(stages=stage_table(), heads=in_words(PRICED_HEADS)),
        ABILITIES.format(
            asked=f"{bundled['ordinary']['questions']:,}",
            clips=bundled["ordinary"]["videos"],
            effect=effect_in_words(bundled["ordinary"]),
            table=table_of_differences(bundled["ordinary"]),
            noise=HARD_NOISE,
            effect_noise=effect_in_words(bundled["noise"]),
            table_noise=table_of_differences(bundled["noise"])),
        SEEDS.format(
            asked=f"{bundled['ordinary']['questions']:,}",
            bundled=BUNDLED_SEED,
            table=seed_table(toys),
            over_seeds=paragraph(*(seeds_in_words(toys, clips) for clips in CLIPS)),
            alpha=ALPHA,
            leaning=LEANING,
            leanings=leaning_table(toys),
            explained=explanations_in_words(toys)),
        SINK.format(prompts=sink.prompts, far=FAR, table=sink_table(sink),
                    said=sink_in_words(sink)),
        CONTROLS_IN_WORDS.format(folders=in_words([f"`{run.folder}`" for run in CONTROLS]),
                                 heads=in_words(PRICED_HEADS)),
    ]
    return "\n".join(sections)


def figures_as_text(figures: dict) -> str:
    """The figures of one toy, as the command prints them."""
    sink = FirstSink(**figures["sink"])
    blocks = ["Ordinary clips", table_of_differences(figures["ordinary"]),
              f"The same clips with noise {HARD_NOISE}", table_of_differences(figures["noise"]),
              "The sink", sink_table(sink), sink_in_words(sink), leaning_table({"-": figures})]
    return "\n\n".join(blocks)


# ---- 6. The command -----------------------------------------------------------------------------


def read_figures(path: Path | None) -> dict[str, dict]:
    """The figures of toys by their seed, from the file of an earlier run."""
    if path is None or not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise ValueError
        return stored["toys"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a file of this command's figures; remove it, or give "
                         f"another --out") from None


def write_figures(path: Path | None, toys: dict[str, dict]) -> None:
    if path is None:
        return
    in_order = {seed: toys[seed] for seed in sorted(toys, key=int)}
    with written_whole(path) as half:
        half.write_text(json.dumps({"format": FORMAT, "toys": in_order}, indent=1) + "\n")


def measure_if_new(toys: dict[str, dict], seed: str, folder: Path, out: Path | None) -> None:
    """Measure the toy in a folder, unless there are figures of these weights already."""
    if toys.get(seed, {}).get("checkpoint") != checkpoint(folder):
        toys[seed] = measure(folder, explore=seed == BUNDLED_SEED)
        write_figures(out, toys)


def write_page(others: list[list[str]], out: Path | None) -> None:
    """Write the page of the bundled toy. others: seed and folder of each other toy."""
    toys = read_figures(out)
    measure_if_new(toys, BUNDLED_SEED, TOY, out)
    for seed, folder in others:
        measure_if_new(toys, str(int(seed)), Path(folder), out)
    with written_whole(TOY / "README.md") as half:
        half.write_text(page(toys), encoding="utf-8")


def main() -> None:
    parser = Parser(
        prog="python -m minioutro.lab.toy_page",
        description=f"Ask a toy {ASKED:,} questions, look at its sink, and print the figures. With "
        f"--write, write the page of the bundled toy, minioutro/toy/README.md.")
    add = parser.add_argument
    add("--folder", type=not_empty, help="print the figures of this toy (default: the bundled one)")
    add("--write", action="store_true", help="write the page of the bundled toy")
    add("--seed", nargs=2, action="append", default=[], metavar=("N", "FOLDER"),
        help="with --write: add a row for the toy in FOLDER, which was trained with --seed N (may "
             "be repeated)")
    add("--out", type=not_empty, metavar="FILE",
        help="with --write: keep the figures in FILE, and measure only what FILE does not have")
    add("--threads", type=number(1, 999, int), default=1,
        help="number of CPU threads (default: %(default)s)")
    args = parser.parse_args()
    if not args.write and (args.seed or args.out):
        raise ValueError("--seed and --out are only for the page; also give --write")
    if args.write and args.folder:
        raise ValueError("--write is for the bundled toy; leave out --folder, or give the toy as "
                         "--seed N FOLDER")
    for seed, folder in args.seed:
        if not seed.isdecimal() or int(seed) == int(BUNDLED_SEED):
            raise ValueError(f"--seed {seed} {folder}: {seed} is not a whole number of at least 1; "
                             f"give the seed with which the toy was trained, then its folder")
        checkpoint(Path(folder))                        # fail before the first long measurement
    torch.set_num_threads(args.threads)
    if args.write:
        write_page(args.seed, Path(args.out) if args.out else None)
    else:
        print(figures_as_text(measure(Path(args.folder or TOY), explore=True)))


if __name__ == "__main__":
    run_command(main, "toy_page.py",
                when_interrupted="with --out, the same command goes on from what is saved")
