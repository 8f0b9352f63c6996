"""Train the bundled toy from scratch: `python -m minioutro.train`.

The toy is a SmolVLM of half a million parameters that answers questions about shapes.py's clips. It
learns from single frames first, then from whole clips. A model this small, trained for an hour, has
no need of an attention sink, so it is given two reasons to have one:

  the seed   a neuron of an early MLP reads the first token's own direction and writes one huge
             coordinate, as an early MLP does in large models. RMSNorm makes a constant vector of
             it, so that this token has the same key and the same value for every prompt. Training
             wears it down (nothing needs its size), so it is planted once more at the end;
  the price  the loss grows a little with all attention to other tokens than the first, so that
             heads look where it pays and rest on the first token otherwise. It ends at zero.
"""

import argparse
import io
import json
import math
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from minioutro import OutRo, load
from minioutro.model import (Cache, VideoLM, causal_mask, merge_heads, read_config,
                             rope_tables)
from minioutro.prompt import END, FAKE, GLOBAL, IMAGE, START, Processor
from minioutro.shapes import DURATION, FPS, SIZE, Clip
from minioutro.video import Video, read_video, sample_indices

TEXT = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
VISION = {"model_type": "smolvlm_vision", "hidden_size": 48, "intermediate_size": 144,
          "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": SIZE, "patch_size": 8}
SPECIAL = ("<|endoftext|>", START, "<|im_end|>", GLOBAL, FAKE, IMAGE, END)
PAD = SPECIAL.index("<|im_end|>")
SEED_LAYER, SEED_DIMENSION, MASSIVE = 1, 1, 40_000.0
LEARNING_RATE, PRICE, PRICE_EVERY, SAVE_EVERY = 2e-3, 0.005, 4, 500
UNSEEN = 10**9                              # clips are drawn from seeds below it for training only
NOT_ASKED = -100                            # a target that cross_entropy ignores


@dataclass(frozen=True)
class Stage:
    steps: int
    frames: int                             # 1, or the 8 that are sampled from a whole clip
    clips: int                              # in a batch
    questions: int                          # about each of them
    most: int                               # shapes in a clip, at most


STAGES = (Stage(1000, 1, 32, 4, 1), Stage(2200, 1, 32, 4, 3),
          Stage(1000, 8, 8, 10, 1), Stage(4000, 8, 8, 10, 3))


def frames_prompt(frames: int) -> Video:
    """A video of this many frames without pictures, for its prompt."""
    if frames == 1:
        return Video([None], [0.0], 0.0, 1)
    indices = sample_indices(FPS * DURATION, FPS, DURATION)
    return Video([None] * len(indices), [i / FPS for i in indices], DURATION, FPS * DURATION)


def build_tokenizer() -> Tokenizer:
    """A byte-level tokenizer whose merges are the words of prompt, questions and answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    corpus = []
    for seed in range(300):
        clip = Clip(seed, 1 + seed % 3)
        for question in clip.questions() + clip.questions(seed % 64):
            corpus += [f"\n\n{question.text}", f" {question.answer}", "\nAssistant:"]
    pieces = Processor(tokenizer, SIZE, SIZE, 0).pieces
    corpus += pieces(frames_prompt(8), "?") * 300 + pieces(frames_prompt(1), "?") * 300
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=list(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([text for text in corpus if text not in SPECIAL], trainer)
    return tokenizer


def write_settings(folder: Path) -> None:
    """Everything of the checkpoint but its weights, in the layout of the hub."""
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    edge = {"longest_edge": SIZE}
    files = {
        "config.json": {"architectures": ["SmolVLMForConditionalGeneration"],
                        "model_type": "smolvlm", "image_token_id": SPECIAL.index(IMAGE),
                        "scale_factor": 2, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
                        "text_config": {**TEXT, "vocab_size": tokenizer.get_vocab_size()},
                        "vision_config": VISION},
        "generation_config.json": {"bos_token_id": SPECIAL.index(START),
                                   "eos_token_id": SPECIAL.index(END), "pad_token_id": PAD},
        "preprocessor_config.json": {
            "max_image_size": edge, "size": edge,
            "video_sampling": {"fps": 1, "max_frames": 64, "video_size": edge}},
        "processor_config.json": {"image_seq_len": (SIZE // VISION["patch_size"] // 2)**2},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def init_weights(model: VideoLM) -> None:
    """Random weights of unit gain, and the seed of the sink."""
    residual = ("o_proj", "down_proj", "out_proj", "fc2")
    depth = (2 * TEXT["num_hidden_layers"]) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            gain = depth if name.split(".")[-2] in residual else 1.0
            is_table = "embed_tokens" in name or "position_embedding" in name
            parameter.normal_(std=gain * (1.0 if is_table else parameter[0].numel() ** -0.5))
        elif name.endswith("bias"):
            parameter.zero_()

    # Coordinate 0 of the residual stream is the first token's own: nothing else writes to it yet.
    text = model.model.text_model
    text.embed_tokens.weight[:, 0] = 0
    model.model.connector.modality_projection.proj.weight[0] = 0
    for layer in text.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    text.embed_tokens.weight[SPECIAL.index(START)] = 0
    text.embed_tokens.weight[SPECIAL.index(START), 0] = 20.0

    # Neuron 0 of one MLP reads it and writes the massive activation: after the norm the coordinate
    # is sqrt(C), so gate and up are 3 sqrt(C) each, and silu is the identity there.
    mlp = text.layers[SEED_LAYER].mlp
    mlp.gate_proj.weight[0] = mlp.up_proj.weight[0] = 0
    mlp.gate_proj.weight[0, 0] = mlp.up_proj.weight[0, 0] = 3.0
    mlp.down_proj.weight[:, 0] = 0
    mlp.down_proj.weight[SEED_DIMENSION, 0] = MASSIVE / (9 * TEXT["hidden_size"])


def degrade(frame: Image.Image, rng: random.Random) -> Image.Image:
    """What a lossy codec does to a frame: about as far from it as our mp4 files are."""
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=rng.randint(60, 95))
    return Image.open(buffer)


@dataclass
class Batch:
    """Each row is one prompt up to its question, then all questions about it, one behind the other.

    A question sees the prompt and itself, not the other questions, and counts its positions from
    the end of the prompt: it is read as if asked alone, but the frames are read only once.
    """
    pixel_values: Tensor        # float[B,F,3,size,size]
    input_ids: Tensor           # int64[B,S]
    targets: Tensor             # int64[B,S], the next token where it belongs to an answer
    turn: Tensor                # int64[B,S], 0 for the prompt, n for question n
    position: Tensor            # int64[B,S]


def draw_batch(processor: Processor, stage: Stage, seed: int) -> Batch:
    video = frames_prompt(stage.frames)
    prefix = processor.tokenize(processor.pieces(video, "?")[:-3])
    pixels, rows = [], []
    for n in range(stage.clips):
        rng = random.Random(f"{seed} {n}")
        clip = Clip(rng.randrange(UNSEEN), rng.randint(1, stage.most))
        indices = [int(seconds * FPS) for seconds in video.seconds]
        if stage.frames == 1:
            indices = [rng.randrange(FPS * DURATION)]
        frames = [degrade(clip.frame(index), rng) for index in indices]
        pixels.append(torch.stack([processor.pixels(frame) for frame in frames]))

        by_kind = {}
        for question in clip.questions(indices[0] if stage.frames == 1 else None):
            by_kind.setdefault(question.kind, []).append(question)
        kinds = rng.sample(list(by_kind), len(by_kind)) * stage.questions
        row = [(token, NOT_ASKED, 0, position) for position, token in enumerate(prefix)]
        for turn, kind in enumerate(kinds[:stage.questions], start=1):
            question = rng.choice(by_kind[kind])
            ask = processor.tokenize([f"\n\n{question.text}", END, "\nAssistant:"])
            answer = processor.tokenize([f" {question.answer}", END])
            targets = [NOT_ASKED] * (len(ask) - 1) + answer + [NOT_ASKED]
            row += [(token, target, turn, len(prefix) + i)
                    for i, (token, target) in enumerate(zip(ask + answer, targets))]
        rows.append(row)
    longest = max(len(row) for row in rows)
    rows = [row + [(PAD, NOT_ASKED, stage.questions + 1, 0)] * (longest - len(row)) for row in rows]
    return Batch(torch.stack(pixels), *torch.tensor(rows).unbind(-1))


def forward(model: VideoLM, batch: Batch, trace: dict | None) -> tuple[Tensor, Tensor]:
    """Logits (answer tokens, V) and targets of the answers: the model's own steps, another mask."""
    text, c, ids = model.model.text_model, model.config.text_config, batch.input_ids
    hidden = model.merge(text.embed_tokens(ids), ids, model.encode(batch.pixel_values))
    cos, sin = rope_tables(0, ids.shape[1], c.head_dim, c.rope_theta, like=hidden)
    cos, sin = cos[batch.position][:, None], sin[batch.position][:, None]                # (B,1,S,D)
    query, key = batch.turn[:, :, None], batch.turn[:, None, :]
    may_attend = causal_mask(ids.shape[1], ids.shape[1]) & ((key == 0) | (key == query))
    cache = Cache()
    for layer in text.layers:
        hidden = layer(hidden, cos, sin, may_attend, cache, None, trace)
    asked = batch.targets != NOT_ASKED
    return model.head(text.norm(hidden[asked])), batch.targets[asked]


@torch.no_grad()
def renew_seed(model: VideoLM, processor: Processor, seed: int) -> None:
    """Plant the massive activation once more: nothing needs its size, so training wears it down.

    The neuron of the seed's MLP that does least is given to it. Its weights are a ridge regression
    that gives 1 at the first token and -0.2 at all others, where silu is shut.
    """
    layer, C = model.model.text_model.layers[SEED_LAYER], TEXT["hidden_size"]
    V = model.config.text_config.vocab_size
    any_text = torch.cat([torch.tensor([SPECIAL.index(START)]), torch.randperm(V)])[None]
    traces = [{}, {}]
    batch = draw_batch(processor, STAGES[-1], seed)
    forward(model, batch, traces[0])
    model(any_text, trace=traces[1])
    others = []                                                # inputs of the MLP, (tokens, C) each
    for trace in traces:
        hidden, out = (trace[f"layers.{SEED_LAYER}.{name}"] for name in ("hidden", "out"))
        hidden = hidden + layer.self_attn.o_proj(merge_heads(out))
        x = layer.post_attention_layernorm(hidden)              # (B,S,C)
        first = x[0, 0]                                         # sees itself alone: always the same
        others.append(x[:, 1:].flatten(0, 1))
    others[1] = others[1][any_text[0, 1:] != SPECIAL.index(START)]
    x, mlp = torch.cat(others), layer.mlp
    activity = (F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)).abs().mean(0)
    neuron = (activity * mlp.down_proj.weight.norm(dim=0)).argmin()

    covariance = x.T @ x / len(x) + 1e-3 * torch.eye(C)
    shut = -0.2 * torch.linalg.solve(covariance, x.mean(0))
    towards = torch.linalg.solve(covariance, first)
    w = shut + towards * (1 - shut @ first) / (towards @ first)     # (C,), w @ first = 1
    mlp.gate_proj.weight[neuron] = mlp.up_proj.weight[neuron] = 40 * w
    mlp.down_proj.weight[:, neuron] = 0
    mlp.down_proj.weight[SEED_DIMENSION, neuron] = MASSIVE / 40**2


def save(model: VideoLM, folder: Path) -> None:
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def train(folder: Path, seed: int) -> None:
    """Run all stages, or go on where an earlier run in the same folder was interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(folder)
    processor = Processor.from_pretrained(folder)
    model = VideoLM(read_config(folder))
    torch.manual_seed(seed)
    init_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    stages = [stage for stage in STAGES for _ in range(stage.steps)]
    seeing = range(SEED_LAYER + 1, TEXT["num_hidden_layers"])       # the layers that meet the seed
    state, done, right, elsewhere = folder / "state.pt", 0, 0.0, torch.ones(())
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done, right = saved["done"], saved["right"]

    started = time.time()
    for step in range(done, len(stages)):
        share = step / len(stages)
        decay = 0.03 + 0.97 * math.cos(share * math.pi / 2)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 200) * decay
        # The price falls to zero from 60 % to 90 % of the steps. It needs the attention weights,
        # which are slow to get, so it is charged at every fourth step, four times as high.
        price = PRICE * PRICE_EVERY * min(1.0, max(0.0, (0.9 - share) / 0.3))
        trace = {"weights_of": seeing} if price and step % PRICE_EVERY == 0 else None
        logits, targets = forward(model, draw_batch(processor, stages[step], seed + step), trace)
        loss = F.cross_entropy(logits, targets)
        right = 0.98 * right + 0.02 * (logits.argmax(-1) == targets).float().mean().item()
        if trace:
            weights = [trace[f"layers.{l}.weights"] for l in seeing]                # (B,H,S,S)
            elsewhere = 1 - torch.stack([w[:, :, 1:, 0].mean() for w in weights]).mean()
            loss = loss + price * elsewhere
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step} of {len(stages)}  loss {loss.item():.3f}  answer tokens right "
                  f"{right:.3f}  attention elsewhere {elsewhere.item():.3f}  "
                  f"{time.time() - started:.0f} s", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == len(stages):
            half = state.with_suffix(".half")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "done": step + 1, "right": right}, half)
            half.replace(state)
    torch.manual_seed(seed)
    renew_seed(model, processor, seed + len(stages))
    save(model, folder)


@torch.inference_mode()
def evaluate(folder: Path, clips: int) -> None:
    """Ask about unseen clips, written to mp4 and read back; print how many answers are right."""
    model, processor = load(folder)
    ways = {"baseline": None, "align": OutRo(relax=False), "relax": OutRo(align=False),
            "both": OutRo()}
    right = {}                              # kind -> way -> for each question, is the answer right?
    with tempfile.TemporaryDirectory() as temporary:
        for n in range(clips):
            clip, rng = Clip(UNSEEN + n, 1 + n % 3), random.Random(n)
            clip.write(Path(temporary) / "clip.mp4")
            video = read_video(Path(temporary) / "clip.mp4", longest_edge=processor.longest_edge)
            by_kind = {}
            for question in clip.questions():
                by_kind.setdefault(question.kind, []).append(question)
            features = None
            for kind, questions in by_kind.items():
                question = rng.choice(questions)
                inputs = processor(video, question.text)
                features = model.encode(inputs.pixel_values) if features is None else features
                for way, outro in ways.items():
                    token_ids = model.generate(inputs.input_ids, features=features, outro=outro)
                    found = right.setdefault(kind, {way: [] for way in ways})
                    found[way].append(processor.decode(token_ids) == question.answer)
    right["all"] = {way: [hit for found in right.values() for hit in found[way]] for way in ways}
    print(f"{'':12}{'questions':>10}" + "".join(f"{way:>10}" for way in ways))
    for kind, found in right.items():
        shares = (sum(hits) / len(hits) for hits in found.values())
        columns = "".join(f"{share:>10.1%}" for share in shares)
        print(f"{kind:12}{len(found['baseline']):>10}{columns}")
    for way in list(ways)[1:]:
        pairs = list(zip(right["all"]["baseline"], right["all"][way]))
        print(f"{way}: {pairs.count((False, True))} answers became right, "
              f"{pairs.count((True, False))} became wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled toy from scratch.")
    parser.add_argument("--folder", type=Path, help="where to train (default: toy_run), or what to "
                        "evaluate (default: the bundled toy)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--evaluate", type=int, metavar="CLIPS",
                        help="do not train; ask about so many clips")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate is not None:
        evaluate(args.folder or Path(__file__).parent / "toy", args.evaluate)
    else:
        train(args.folder or Path("toy_run"), args.seed)


if __name__ == "__main__":
    main()
