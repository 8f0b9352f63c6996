"""Train the bundled toy from scratch: `python -m minioutro.lab.train_toy`.

The toy is a small SmolVLM that answers questions about the clips of shapes.py. It is trained in
four stages. First its encoder learns to name what each image token shows, as the encoders of large
models learn to see before they are joined to a language model. Then the whole model learns to
answer questions: first about single frames, then about clips. The last stage gives it a sink. The
second and the third stage end early if every kind of question is learned on held-out clips.

From answers alone, a decoder learns only slowly where to look. In some runs it never learns some
kinds of question. So it gets two more tasks. At each form and colour in the text it has to name the
shape that the word is about, and what that shape does. At each image token of a clip it has to name
how the object it shows has moved.

A model this small does not need an attention sink. The last stage gives it two reasons for one:

  the seed   A neuron of an early MLP reads the first token's own direction and writes one huge
             coordinate, as an early MLP does in large models. RMSNorm turns the result into a
             constant vector, so this token has the same key and the same value in every prompt.
             Training would shrink these weights, because nothing needs their size. So they are
             set again before each step.
  the price  In half of the heads after that MLP, the loss grows with the attention to all tokens
             except the first. So these heads look at other tokens only where that helps, and
             otherwise rest on the first token. The price falls to zero before the end.

Two controls show what the seed and the price do. Each repeats the last stage without one of them.
"""

import io
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from minioutro.lab.shapes import (
    COLOURS,
    DIRECTIONS,
    DURATION,
    FPS,
    SHAPES,
    SIZE,
    UNSEEN,
    Clip,
    Question,
    Shape,
)
from minioutro.model import Config, Trace, VideoLM, causal_mask, read_config
from minioutro.prompt import END, FAKE, GLOBAL, IMAGE, START, Processor
from minioutro.support.checks import check_device
from minioutro.support.cli import Parser, not_empty, number, progress, run_command, written_whole
from minioutro.video import Video, sample_indices

# ---- 1. The model, its stages and its controls --------------------------------------------------

TEXT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
VISION = {
    "model_type": "smolvlm_vision",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 8,
}
SCALE_FACTOR = 2                            # of the pixel shuffle
GRID = SIZE // VISION["patch_size"] // SCALE_FACTOR     # image tokens on each side of a frame
CELL = SIZE / GRID                          # pixels on each side of an image token
SPECIAL = ("<|endoftext|>", START, "<|im_end|>", GLOBAL, FAKE, IMAGE, END)
PAD = SPECIAL.index("<|im_end|>")
EXAMPLE = Clip(UNSEEN + 5078, 3)            # the bundled clip: unseen, and described correctly

MUON_RATE = 1e-2                            # learning rate of Muon
ADAM_RATE = 3e-3                            # learning rate of AdamW
SAVE_EVERY = 50                             # steps between two saved states
HELD_OUT = 6                                # batches of held-out clips
LEARNED = 0.96                              # share of right answers at which a kind is learned
NAMING_LAYER = 4                            # the input of this layer has to name shapes and motions
DEEDS_LAYER = 6                             # the input of this layer has to name what shapes do

SEED_LAYER = 1                              # the layer whose MLP writes the massive activation
SEED_DIMENSION = 1                          # the coordinate into which it is written
MASSIVE = 40_000.0                          # its size
PRICE = 2.5                                 # price of attention to other tokens than the first
PRICED_HEADS = [0, 2]                       # heads that pay the price, in each layer after the seed


@dataclass(frozen=True)
class Stage:
    steps: int                              # at most. Stages 1 and 2 end early if all is learned
    frames: int                             # 1, or the 8 that are sampled from a whole clip
    clips: int                              # in a batch
    questions: int                          # about each clip. 0: only the encoder is trained
    rate: float = 1.0                       # share of the learning rates at its beginning
    shapes: tuple[int, ...] = (1, 2, 3)     # the number of shapes in a clip is one of these
    whole_prompt: bool = False              # True: a single frame gets the sentence about its video


STAGES = (
    Stage(steps=300, frames=1, clips=64, questions=0),
    Stage(steps=900, frames=1, clips=16, questions=8),
    Stage(steps=1800, frames=8, clips=6, questions=12, rate=0.5),
    Stage(steps=600, frames=8, clips=6, questions=12, rate=0.7),
)


@dataclass(frozen=True)
class Run:
    folder: str                             # below the folder in which the command trains
    price: bool = True                      # whether the last stage has the price
    seed: bool = True                       # whether the last stage has the seed


TOY = Run(".")
CONTROLS = (Run("no_price", price=False), Run("no_seed", seed=False))


# ---- 2. The files of the checkpoint, except its weights -----------------------------------------


def frames_prompt(frames: int) -> Video:
    """A video of this many frames, without pictures. That is enough to write a prompt."""
    if frames == 1:
        return Video([None], [0.0], 0.0, 1)
    indices = sample_indices(FPS * DURATION, FPS, DURATION)
    seconds = [index / FPS for index in indices]
    return Video([None] * len(indices), seconds, DURATION, FPS * DURATION)


def build_tokenizer() -> Tokenizer:
    """A byte-level tokenizer whose merges are the words of prompts, questions and answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()

    corpus = []
    for seed in range(300):
        clip = Clip(seed, count=1 + seed % 3)
        for question in clip.questions() + clip.questions(seed % 64):
            corpus += [f"\n\n{question.text}", f" {question.answer}", "\nAssistant:"]
    processor = Processor(tokenizer, SIZE, SIZE, 0)
    corpus += processor.pieces(frames_prompt(8), "?") * 300
    corpus += processor.pieces(frames_prompt(1), "?") * 300

    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=list(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([text for text in corpus if text not in SPECIAL], trainer)
    return tokenizer


def settings_files(vocab_size: int) -> dict[str, dict]:
    """The contents of the checkpoint's JSON files, by name."""
    edge = {"longest_edge": SIZE}
    return {
        "config.json": {
            "architectures": ["SmolVLMForConditionalGeneration"],
            "model_type": "smolvlm",
            "image_token_id": SPECIAL.index(IMAGE),
            "scale_factor": SCALE_FACTOR,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "text_config": {**TEXT, "vocab_size": vocab_size},
            "vision_config": VISION,
        },
        "generation_config.json": {
            "bos_token_id": SPECIAL.index(START),
            "eos_token_id": SPECIAL.index(END),
            "pad_token_id": PAD,
        },
        "preprocessor_config.json": {
            "max_image_size": edge,
            "size": edge,
            "video_sampling": {"fps": 1, "max_frames": 64, "video_size": edge},
        },
        "processor_config.json": {"image_seq_len": GRID**2},
    }


def write_settings(folder: Path) -> None:
    """Write the tokenizer and the JSON files, in the layout of the hub."""
    tokenizer = build_tokenizer()
    with written_whole(folder / "tokenizer.json") as half:
        tokenizer.save(str(half), pretty=False)
    for name, content in settings_files(tokenizer.get_vocab_size()).items():
        with written_whole(folder / name) as half:
            half.write_text(json.dumps(content, indent=2) + "\n")


# ---- 3. Weights: the random ones and the seed's -------------------------------------------------


@torch.no_grad()
def init_weights(model: VideoLM) -> None:
    """Draw random weights of unit gain. Matrices that write to the residual stream get less."""
    writes_to_residual = ("o_proj", "down_proj", "out_proj", "fc2")
    residual_gain = (2 * TEXT["num_hidden_layers"]) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            is_table = "embed_tokens" in name or "position_embedding" in name
            inputs = 1 if is_table else parameter[0].numel()
            gain = residual_gain if name.split(".")[-2] in writes_to_residual else 1.0
            parameter.normal_(std=gain * inputs ** -0.5)
        elif name.endswith("bias"):
            parameter.zero_()


@torch.no_grad()
def plant_seed(model: VideoLM) -> None:
    """Set the seed's weights. Called before each step of the last stage, so that they stay."""
    # Coordinate 0 of the residual stream belongs to the first token: nothing else writes to it.
    text = model.model.text_model
    first_token = SPECIAL.index(START)
    text.embed_tokens.weight[:, 0] = 0
    text.embed_tokens.weight[first_token] = 0
    text.embed_tokens.weight[first_token, 0] = 100.0        # larger than what layers 0 and 1 add
    model.model.connector.modality_projection.proj.weight[0] = 0
    for layer in text.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0

    # Neuron 0 of one MLP reads it and writes the massive activation. After the norm the coordinate
    # is about sqrt(C). So gate and up are about 3 sqrt(C) each. There, silu is nearly the identity,
    # so their product is 9 C.
    layer = text.layers[SEED_LAYER]
    layer.post_attention_layernorm.weight[0] = 1
    mlp = layer.mlp
    mlp.gate_proj.weight[0] = 0
    mlp.up_proj.weight[0] = 0
    mlp.gate_proj.weight[0, 0] = 3.0
    mlp.up_proj.weight[0, 0] = 3.0
    mlp.down_proj.weight[:, 0] = 0
    mlp.down_proj.weight[SEED_DIMENSION, 0] = MASSIVE / (9 * TEXT["hidden_size"])


# ---- 4. What tokens have to name: numbers of classes, NOT_ASKED where there is no task ----------

NOT_ASKED = -100                            # a target that cross_entropy ignores
STRIPES = 16                                # a place is one of 16 columns and one of 16 rows
NAMES = [len(SHAPES) + 1, len(COLOURS) + 1, STRIPES, STRIPES]   # classes of form, colour, place
MOTIONS = [*DIRECTIONS, "still"]            # how an object has moved in the last two frames
DEEDS = [len(MOTIONS), 2, 2]                # of a shape in a clip: first way, turns back, is late
NOTHING = (len(SHAPES), len(COLOURS), NOT_ASKED, NOT_ASKED)     # names of a place without a shape
NO_NAMES = (NOT_ASKED,) * len(NAMES)
NO_DEEDS = (NOT_ASKED,) * len(DEEDS)


def names_of(shape: Shape, index: int) -> tuple[int, ...]:
    """Form, colour, column and row of a shape in frame `index`."""
    x, y = shape.centre(index / FPS)
    column = int(x * STRIPES / SIZE)
    row = int(y * STRIPES / SIZE)
    return SHAPES.index(shape.form), list(COLOURS).index(shape.colour), column, row


def deeds_of(shape: Shape, moment: int | None) -> tuple[int, ...]:
    """What a shape does in its clip, as in DEEDS. moment: a single frame, which does not show it.
    """
    if moment is not None:
        return NO_DEEDS
    return MOTIONS.index(shape.direction), int(shape.turns), int(shape.appears > 0)


def motion(shape: Shape, index: int, before: int | None) -> int:
    """Which of MOTIONS leads from frame `before` to frame `index`. NOT_ASKED if it is unclear."""
    if before is None or shape.appears > before / FPS:
        return NOT_ASKED
    if shape.direction == "still":
        return MOTIONS.index("still")
    x0, y0 = shape.centre(before / FPS)
    x1, y1 = shape.centre(index / FPS)
    if max(abs(x1 - x0), abs(y1 - y0)) < 2:             # pixels: it turned back between the two
        return NOT_ASKED
    if x1 != x0:
        return MOTIONS.index("left" if x1 < x0 else "right")
    return MOTIONS.index("up" if y1 < y0 else "down")


def shape_at(clip: Clip, index: int, cell: int) -> Shape | None:
    """The shape that an image token of frame `index` shows: the nearest one that covers it."""
    row, column = divmod(cell, GRID)
    nearest = math.inf
    found = None
    for shape in clip.visible(index):
        x, y = shape.centre(index / FPS)
        away = max(abs(x - CELL * (column + 0.5)), abs(y - CELL * (row + 0.5)))
        if away < min(nearest, CELL / 2 + 0.7 * shape.radius):
            nearest = away
            found = shape
    return found


def names_of_cells(clip: Clip, index: int, before: int | None) -> list[tuple[int, ...]]:
    """For each image token of a frame: form, colour, column, row and motion of what it shows."""
    names = []
    for cell in range(GRID**2):
        shape = shape_at(clip, index, cell)
        if shape is None:
            names.append((*NOTHING, NOT_ASKED))
        else:
            names.append((*names_of(shape, index), motion(shape, index, before)))
    return names


# ---- 5. Batches ---------------------------------------------------------------------------------


@dataclass
class Row:
    """One prompt up to its question, then all questions about it with their answers, one after the
    other. Each list has an entry for each token."""
    input_ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)        # the next token, if it is an answer's
    question: list[int] = field(default_factory=list)       # 0 in the prompt, n in question n
    position: list[int] = field(default_factory=list)
    words: list[tuple[int, ...]] = field(default_factory=list)      # names and deeds

    def add(self, token: int, target: int, question: int, position: int,
            words: tuple[int, ...]) -> None:
        self.input_ids.append(token)
        self.targets.append(target)
        self.question.append(question)
        self.position.append(position)
        self.words.append(words)


@dataclass
class Batch:
    """Rows, padded to the same length, and their frames.

    A question sees the prompt and itself, but not the other questions. Its positions continue from
    the end of the prompt. So it is read as if it was asked alone, although the frames are read only
    once.
    """
    pixel_values: Tensor        # float[B,F,3,size,size]
    names: Tensor               # int64[B,F*M,5], what each image token shows, and its motion
    words: Tensor               # int64[B,S,7], names and deeds of the shape that a word is about
    input_ids: Tensor           # int64[B,S]
    targets: Tensor             # int64[B,S], the next token if it belongs to an answer
    question: Tensor            # int64[B,S], 0 for the prompt, n for its n-th question
    position: Tensor            # int64[B,S]
    kinds: list[list[str]]      # of the questions of each row

    def to(self, device: str) -> "Batch":
        moved = {}
        for name, value in vars(self).items():
            moved[name] = value.to(device) if isinstance(value, Tensor) else value
        return Batch(**moved)


def degrade(frame: Image.Image, rng: random.Random) -> Image.Image:
    """A frame after JPEG. It loses about as much as the frames of our mp4 files do."""
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=rng.randint(60, 95))
    return Image.open(buffer)


def prompt_before_question(processor: Processor, stage: Stage) -> list[int]:
    """The tokens of a prompt up to its last frame."""
    pieces = processor.pieces(frames_prompt(stage.frames), "?")[:-3]
    if stage.frames == 1 and not stage.whole_prompt:
        del pieces[1]                                   # leave out a long sentence, to save time
    return processor.tokenize(pieces)


def draw_batch(processor: Processor, stage: Stage, seed: str, learned=frozenset()) -> Batch:
    """A batch of clips. Each clip has its own random numbers, which do not depend on the others.

    learned: kinds of questions that are asked half as often as others.
    """
    prefix = prompt_before_question(processor, stage)
    pixel_values = []
    names = []
    rows = []
    kinds = []
    for n in range(stage.clips):
        rng = random.Random(f"{seed} {n}")
        clip = Clip(rng.randrange(UNSEEN), rng.choice(stage.shapes))
        moment = rng.randrange(FPS * DURATION) if stage.frames == 1 else None
        indices = sampled_frames(stage.frames) if moment is None else [moment]

        frames = [processor.pixels(degrade(clip.frame(index), rng)) for index in indices]
        pixel_values.append(torch.stack(frames))
        names.append(names_of_frames(clip, indices))
        questions = draw_questions(clip, moment, stage.questions, rng, learned)
        about = shapes_by_word(clip, indices[-1], moment)
        rows.append(make_row(processor, prefix, questions, about))
        kinds.append([question.kind for question in questions])
    return Batch(torch.stack(pixel_values), torch.tensor(names), kinds=kinds,
                 **pad_rows(rows, stage.questions + 1))


def sampled_frames(frames: int) -> list[int]:
    """The numbers of the frames of a clip that the model sees."""
    return [int(seconds * FPS) for seconds in frames_prompt(frames).seconds]


def names_of_frames(clip: Clip, indices: list[int]) -> list[tuple[int, ...]]:
    """`names_of_cells` of these frames. A motion is measured from the frame two before."""
    names = []
    for n, index in enumerate(indices):
        before = indices[n - 2] if n >= 2 else None
        names += names_of_cells(clip, index, before)
    return names


def shapes_by_word(clip: Clip, index: int, moment: int | None) -> dict[str, tuple[int, ...]]:
    """For each form and colour in frame `index`, names and deeds of the shape that has it."""
    about = {}
    for shape in clip.visible(index):
        names_and_deeds = (*names_of(shape, index), *deeds_of(shape, moment))
        about[shape.form] = names_and_deeds
        about[shape.colour] = names_and_deeds
    return about


def draw_questions(clip: Clip, moment: int | None, n: int, rng: random.Random,
                   learned) -> list[Question]:
    """n questions of all kinds in random order. Kinds that are not learned come twice as often."""
    by_kind = defaultdict(list)
    for question in clip.questions(moment):
        by_kind[question.kind].append(question)
    once = list(by_kind)
    again = [kind for kind in by_kind if kind not in learned]
    kinds = rng.sample(once + again, len(once + again)) * n         # certainly enough
    return [rng.choice(by_kind[kind]) for kind in kinds[:n]]


def make_row(processor: Processor, prefix: list[int], questions: list[Question],
             about: dict[str, tuple[int, ...]]) -> Row:
    """A prompt and its questions. about: see `shapes_by_word`."""
    words = {}                                          # token -> what it has to name
    for word in (*SHAPES, *COLOURS):
        token = processor.tokenizer.token_to_id(f"Ġ{word}")         # Ġ stands for the space
        words[token] = about.get(word, (*NOTHING, *NO_DEEDS))
    unnamed = (*NO_NAMES, *NO_DEEDS)

    row = Row()
    for position, token in enumerate(prefix):
        row.add(token, NOT_ASKED, 0, position, unnamed)
    for number_of_question, question in enumerate(questions, start=1):
        ask = processor.tokenize([f"\n\n{question.text}", END, "\nAssistant:"])
        answer = processor.tokenize([f" {question.answer}", END])
        # The last token of the question predicts the first of the answer, and so on.
        targets = [NOT_ASKED] * (len(ask) - 1) + answer + [NOT_ASKED]
        for n, (token, target) in enumerate(zip(ask + answer, targets, strict=True)):
            row.add(token, target, number_of_question, len(prefix) + n, words.get(token, unnamed))
    return row


def pad_rows(rows: list[Row], nobody: int) -> dict[str, Tensor]:
    """The fields of a Batch that come from its rows. nobody: a question number that no row has, so
    that no token attends to the padding."""
    longest = max(len(row.input_ids) for row in rows)
    for row in rows:
        for _ in range(longest - len(row.input_ids)):
            row.add(PAD, NOT_ASKED, nobody, 0, (*NO_NAMES, *NO_DEEDS))
    names = ("words", "input_ids", "targets", "question", "position")
    return {name: torch.tensor([getattr(row, name) for row in rows]) for name in names}


# ---- 6. What is learned -------------------------------------------------------------------------


def name_loss(head: nn.Linear, states: Tensor, names: Tensor, classes: list[int]) -> Tensor:
    """Cross entropy of naming what tokens show: a mean for each of the n names, added up.

    states: float[B,S,C]; names: int64[B,S,n]; classes: the number of classes of each of the n names
    """
    loss = 0.0
    guesses = head(states).split(classes, dim=-1)
    for guess, name in zip(guesses, names.unbind(-1), strict=True):
        is_asked = name != NOT_ASKED
        total = F.cross_entropy(guess[is_asked], name[is_asked], reduction="sum")
        loss = loss + total / is_asked.sum().clamp(min=1)       # zero if nothing is asked
    return loss


def answer_logits(model: VideoLM, batch: Batch, features: Tensor,
                  trace: Trace | None) -> tuple[Tensor, Tensor]:
    """Logits float[n,V] at the n tokens that predict an answer's token, and these targets [n]."""
    S = batch.input_ids.shape[1]
    question_of_query = batch.question[:, :, None]                                  # (B,S,1)
    question_of_key = batch.question[:, None, :]                                    # (B,1,S)
    same_or_prompt = (question_of_key == question_of_query) | (question_of_key == 0)    # (B,S,S)
    may_attend = causal_mask(S, S, batch.question.device) & same_or_prompt
    hidden = model.hidden_states(batch.input_ids, features=features, trace=trace,
                                 masks=[may_attend] * model.config.text_config.num_hidden_layers,
                                 positions=batch.position)
    is_asked = batch.targets != NOT_ASKED
    return model.head(hidden[is_asked]), batch.targets[is_asked]


class Learner(nn.Module):
    """The toy, and four linear heads that name what it sees. The heads are dropped at the end."""

    def __init__(self, config: Config):
        super().__init__()
        self.model = VideoLM(config)
        init_weights(self.model)
        self.names = nn.Linear(TEXT["hidden_size"], sum(NAMES))
        self.words = nn.Linear(TEXT["hidden_size"], sum(NAMES))
        self.motion = nn.Linear(TEXT["hidden_size"], len(MOTIONS))
        self.deeds = nn.Linear(TEXT["hidden_size"], sum(DEEDS))

    def forward(self, batch: Batch, stage: Stage, priced_layers: list[int],
                price: float) -> tuple[Tensor, float | None]:
        """The loss, and the attention that the priced heads give to other tokens than the first.

        The attention is None if no layer is priced.
        """
        features = self.model.encode(batch.pixel_values)                            # (B,F*M,C)
        loss = name_loss(self.names, features, batch.names[:, :, :len(NAMES)], NAMES)
        if not stage.questions:
            return loss, None
        trace = Trace(weights_of=priced_layers)
        logits, targets = answer_logits(self.model, batch, features, trace)
        loss = loss + F.cross_entropy(logits, targets)
        loss = loss + self.loss_of_words(batch, trace)
        if stage.frames > 1:
            loss = loss + self.loss_of_motions(batch, trace)
            loss = loss + self.loss_of_deeds(batch, trace)
        if not priced_layers:
            return loss, None
        of_layers = []
        for l in priced_layers:
            to_first = trace[f"layers.{l}.weights"][:, PRICED_HEADS, 1:, 0]         # (B,heads,S-1)
            of_layers.append(to_first.mean())
        to_first = torch.stack(of_layers)
        # The logarithm has a large gradient even where nothing goes to the first token yet.
        loss = loss - price * to_first.log().sum()
        return loss, 1 - to_first.mean().item()

    def loss_of_words(self, batch: Batch, trace: Trace) -> Tensor:
        hidden = trace[f"layers.{NAMING_LAYER}.hidden"]
        return name_loss(self.words, hidden, batch.words[:, :, :len(NAMES)], NAMES)

    def loss_of_motions(self, batch: Batch, trace: Trace) -> Tensor:
        hidden = trace[f"layers.{NAMING_LAYER}.hidden"]                             # (B,S,C)
        is_image = batch.input_ids == self.model.config.image_token_id
        B, n_image_tokens, _ = batch.names.shape
        at_images = hidden[is_image].view(B, n_image_tokens, -1)
        return name_loss(self.motion, at_images, batch.names[:, :, len(NAMES):], [len(MOTIONS)])

    def loss_of_deeds(self, batch: Batch, trace: Trace) -> Tensor:
        hidden = trace[f"layers.{DEEDS_LAYER}.hidden"]
        return name_loss(self.deeds, hidden, batch.words[:, :, len(NAMES):], DEEDS)

    @torch.no_grad()
    def right_by_kind(self, processor: Processor, stage: Stage, device: str) -> dict[str, float]:
        """The share of right answers to each kind of question, on held-out clips."""
        if not stage.questions:
            return {}
        asked = Counter()
        right = Counter()
        for n in range(HELD_OUT):
            batch = draw_batch(processor, stage, f"held out {n}").to(device)
            is_wrong = self.wrong_answers(batch)
            for row, kinds in enumerate(batch.kinds):
                for question, kind in enumerate(kinds, start=1):
                    asked[kind] += 1
                    right[kind] += (row, question) not in is_wrong
        return {kind: right[kind] / asked[kind] for kind in sorted(asked)}

    def wrong_answers(self, batch: Batch) -> set[tuple[int, int]]:
        """Row and number of each question whose answer has a token that is not the likeliest."""
        features = self.model.encode(batch.pixel_values)
        logits, targets = answer_logits(self.model, batch, features, trace=None)
        rows, tokens = (batch.targets != NOT_ASKED).nonzero(as_tuple=True)
        is_wrong = logits.argmax(-1) != targets
        questions = batch.question[rows, tokens]
        return set(zip(rows[is_wrong].tolist(), questions[is_wrong].tolist()))


# ---- 7. A run, which can be interrupted after any step ------------------------------------------


@dataclass
class Progress:
    """How far a run is."""
    random_seed: int
    stage: int = 0
    step: int = 0                           # steps in this stage
    done: int = 0                           # steps in all stages
    paid: float = 1.0                       # attention of priced heads to others, when last priced
    right: dict[str, float] = field(default_factory=dict)   # last share of right answers, by kind

    @property
    def is_last_stage(self) -> bool:
        return self.stage == len(STAGES) - 1

    @property
    def learned(self) -> set[str]:
        return {kind for kind, share in self.right.items() if share >= LEARNED}


def make_optimizers(learner: Learner, at: Progress) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest. In the last stage AdamW for all.

    Muon moves all directions of a matrix equally far, even those with a weak gradient. The last
    stage has to turn the queries of whole heads into one direction, and Muon is slow at that.
    """
    matrices = []
    others = []
    for name, parameter in learner.named_parameters():
        if ".layers." in name and parameter.dim() == 2 and not at.is_last_stage:
            matrices.append(parameter)
        else:
            others.append(parameter)
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    if at.is_last_stage:
        return [adam]
    muon = torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.0,
                            adjust_lr_fn="match_rms_adamw")
    return [muon, adam]


def price_at(step: int, stage: Stage) -> float:
    """The price at a step of the last stage: full in its first half, and zero from 80 % on."""
    # If the price ends at 40 or at 60 %, the heads rest on the first token just as much. But then
    # no answer changes if that token is masked.
    return PRICE * min(1.0, max(0.0, (0.8 - step / stage.steps) / 0.3))


def rate_at(step: int, stage: Stage) -> float:
    """The share of the learning rates: it rises for 50 steps, then falls to zero in a line."""
    return stage.rate * min((step + 1) / 50, 1 - step / stage.steps)


class Training:
    """A learner, its optimizers, and how far they are.

    In the run's folder, state.pt is the state from which an interrupted run goes on, and log.txt is
    the log. The toy also writes before_last_stage.pt, the state in which its controls begin.
    """

    def __init__(self, folder: Path, run: Run, random_seed: int, device: str):
        """Raises: ValueError that names the file if a saved state cannot be used."""
        self.run = run
        self.device = device
        self.folder = folder / run.folder
        self.state = self.folder / "state.pt"
        self.before_last_stage = folder / "before_last_stage.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_settings(self.folder)
        self.processor = Processor.from_pretrained(self.folder)
        torch.manual_seed(random_seed)
        self.learner = Learner(read_config(self.folder)).to(device)
        self.at = Progress(random_seed)
        self.optimizers = make_optimizers(self.learner, self.at)

        if self.state.exists():
            self.restore(self.state)
        elif run != TOY:
            state_of_toy = folder / TOY.folder / "state.pt"
            if not self.before_last_stage.exists():
                raise ValueError(f"{self.before_last_stage} is missing, but the controls begin "
                                 f"with it; remove {state_of_toy} to train the toy again")
            self.restore(self.before_last_stage, f"it and {state_of_toy} to train the toy again")

    def save(self, path: Path) -> None:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        with written_whole(path) as half:
            torch.save({"learner": self.learner.state_dict(), "optimizers": optimizers,
                        **vars(self.at)}, half)

    def restore(self, path: Path, remove: str = "it to train from the beginning") -> None:
        """Go on from a saved state. remove: what a user should remove if it is damaged.

        Raises: ValueError if it is damaged, or has another seed.
        """
        random_seed = self.at.random_seed
        try:
            saved = torch.load(path, map_location=self.device)
            self.learner.load_state_dict(saved.pop("learner"))
            states = saved.pop("optimizers")
            self.at = Progress(**saved)
            self.optimizers = make_optimizers(self.learner, self.at)
            for optimizer, state in zip(self.optimizers, states, strict=True):
                optimizer.load_state_dict(state)
        except Exception as error:                      # a damaged file raises errors of any type
            raise ValueError(f"{path} cannot be read ({type(error).__name__}); remove "
                             f"{remove}") from None
        if self.at.random_seed != random_seed:
            raise ValueError(f"{path} is from a run with --seed {self.at.random_seed}, not "
                             f"{random_seed}; use another --folder")

    def steps(self) -> Iterator[float]:
        """Train to the end of the last stage. Yields the loss of each step."""
        while self.at.stage < len(STAGES):
            if self.at.is_last_stage and self.at.step == 0 and self.run == TOY:
                self.save(self.before_last_stage)
            stage = STAGES[self.at.stage]
            loss = self.step(stage)
            if self.at.step % SAVE_EVERY == 0 or self.at.step == stage.steps:
                self.take_stock(stage, loss)
            yield loss

    def step(self, stage: Stage) -> float:
        at = self.at
        if at.is_last_stage and self.run.seed:
            plant_seed(self.learner.model)
        batch = draw_batch(self.processor, stage, f"{at.random_seed} {at.done}", at.learned)
        loss, paid = self.learner(batch.to(self.device), stage, self.priced_layers(),
                                  price_at(at.step, stage))
        loss.backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * rate_at(at.step, stage)
            optimizer.step()
            optimizer.zero_grad()
        at.step += 1
        at.done += 1
        if paid is not None:
            at.paid = paid
        return loss.item()

    def priced_layers(self) -> list[int]:
        """The layers that pay the price at this step: a third of those after the seed, in turn. All
        of them would be slow, because each needs its attention weights."""
        if not self.at.is_last_stage or not self.run.price:
            return []
        return list(range(SEED_LAYER + 1 + self.at.step % 3, TEXT["num_hidden_layers"], 3))

    def take_stock(self, stage: Stage, loss: float) -> None:
        """Ask about held-out clips, write a line of the log, end the stage if it is due, and save.
        """
        at = self.at
        at.right = self.learner.right_by_kind(self.processor, stage, self.device)
        shares = "".join(f", {kind} {share:.2f}" for kind, share in at.right.items())
        with open(self.folder / "log.txt", "a") as log:
            log.write(f"step {at.done}, stage {at.stage}: loss {loss:.3f}, attention elsewhere "
                      f"{at.paid:.3f}{shares}\n")
        is_learned = stage.questions > 0 and at.learned == set(at.right)
        if at.step == stage.steps or (is_learned and not at.is_last_stage):
            at.stage += 1
            at.step = 0
            at.right = {}
            self.optimizers = make_optimizers(self.learner, at)
        self.save(self.state)

    def write_checkpoint(self) -> None:
        if self.run.seed:
            plant_seed(self.learner.model)
        tensors = {}
        for name, tensor in self.learner.model.state_dict().items():
            tensors[name] = tensor.to(torch.bfloat16)
        with written_whole(self.folder / "model.safetensors") as half:
            save_file(tensors, half, metadata={"format": "pt"})


def train(folder: Path, run: Run, random_seed: int, device: str = "cpu") -> None:
    """Run all stages, or go on where an earlier run in the same folder was interrupted.

    A control begins in the state in which the toy's last stage began, so train the toy first.
    Raises: ValueError that names the file if a saved state cannot be used.
    """
    training = Training(folder, run, random_seed, device)
    bar = progress(training.steps(), training.folder.name, initial=training.at.done)
    for loss in bar:
        bar.set_postfix_str(f"stage {training.at.stage}, loss {loss:.3f}")
    training.write_checkpoint()


def main() -> None:
    parser = Parser(
        prog="python -m minioutro.lab.train_toy",
        description="Train the bundled toy from scratch, then its two controls. A run that was "
        "interrupted goes on from its last saved step.")
    add = parser.add_argument
    add("--folder", type=not_empty, default="toy_run", help="where to train (default: %(default)s)")
    add("--seed", type=number(0, 10**9 - 1, int), default=0,
        help="seed of the weights and of the clips (default: %(default)s)")
    add("--threads", type=number(1, 999, int), default=1,
        help="number of CPU threads (default: %(default)s)")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu",
        help="where to train (default: %(default)s)")
    args = parser.parse_args()
    check_device(args.device)
    torch.set_num_threads(args.threads)
    folder = Path(args.folder)
    for run in (TOY, *CONTROLS):
        train(folder, run, args.seed, args.device)
    with written_whole(folder / "clip.mp4") as half:
        EXAMPLE.write(half)
    print(f"{folder}: trained. To measure it: python -m minioutro.lab.toy_page --folder {folder}")


if __name__ == "__main__":
    run_command(main, "train_toy.py",
                when_interrupted="the same command goes on from what is saved")
