"""Teach SmolLM2-135M to see: `python tests/by_hand/see.py FOLDER`, some hours of one core.

It is run by hand. CI does not call it. It needs the packages that real_decoder.py needs. The model
has three parts: the toy's encoder, which can see already, SmolLM2-135M, whose sink grew by itself,
and a connector between them. The weights of SmolLM2 are held. These parts learn:

  the connector   one matrix, which begins as random numbers;
  adapters        W + B A for the four matrices of each attention, of rank 8. B begins as zero, so
                  the decoder is SmolLM2 at first;
  new tokens      the embeddings of SmolVLM's special tokens. <end_of_utterance> begins as
                  <|im_end|>, the others as the mean of all embeddings;
  the encoder     at a lower rate.

Clips, questions and tasks are those of train_toy.py, and the prompts are those of the project. The
first stage asks about single frames, the second about clips, and the third about frames again,
because places are learned last. At each form and colour in the text
the model also names the shape that the word is about. The linear heads for that are thrown away in
the end.

FOLDER gets log.txt, state.pt and trained.safetensors, which is what learned, in bfloat16. The same
command goes on after an interruption. `--from FILE` begins with what another run has trained.

seeing.safetensors, beside this script, is the result of about this schedule. It did not begin from
nothing: `--from` gave it what a trial had trained for 940 steps, with a shorter prompt and with the
encoder held. Its first 60 steps were at other rates, and the second stage was planned for 260 steps
and ended after 200. All 750 steps together took two hours of one core. Section 8 of the tutorial
says what it answers rightly.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from by_hand import real_decoder  # noqa: E402
from by_hand.real_decoder import NEW_TOKENS  # noqa: E402

from minioutro import load  # noqa: E402
from minioutro.lab import train_toy  # noqa: E402
from minioutro.lab.train_toy import DEEDS, NAMES, Batch, Progress, Stage, name_loss  # noqa: E402
from minioutro.model import VideoLM  # noqa: E402
from minioutro.prompt import END, Processor  # noqa: E402
from minioutro.support.cli import run_command, written_whole  # noqa: E402
from minioutro.weights import TOY  # noqa: E402

CONNECTOR = "model.connector.modality_projection.proj.weight"
ENCODER = "model.vision_model."
NEW_ROWS = f"{real_decoder.DECODER}embed_tokens.new"
RANK = 8
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
NAMING_LAYER, DEEDS_LAYER = 15, 22          # whose inputs name what a word is about
FRAMES = Stage(steps=430, frames=1, clips=6, questions=10, rate=0.7, whole_prompt=True)
CLIPS = Stage(steps=200, frames=8, clips=4, questions=12, rate=0.3)
AGAIN = Stage(steps=120, frames=1, clips=8, questions=10, rate=0.4, whole_prompt=True)
STAGES = (FRAMES, CLIPS, AGAIN)
OTHERS = (FRAMES, FRAMES, CLIPS)            # every fourth step of each stage is of one of these
# Learning rates, by the beginning of the parameter's name.
RATES = {"model.model.vision_model": 3e-4, "model.model.connector": 2e-3,
         "model.model.text_model": 3e-3, "words": 3e-3, "deeds": 3e-3}
SHARE_OF_NAMES = 0.3                        # of the loss
SAVE_EVERY = 40                             # steps


def untrained(reader) -> dict[str, Tensor]:
    """What learns, before it does, by name as in `Learner.trained`; without adapters."""
    text = real_decoder.config_of(reader)["text_config"]
    H, G = text["num_attention_heads"], text["num_key_value_heads"]
    table = real_decoder.decoder_tensors(reader, H, G)[real_decoder.TABLE]
    im_end = real_decoder.read_tokenizer(reader).token_to_id(real_decoder.IM_END)
    new = table.mean(0).repeat(len(NEW_TOKENS), 1)
    new[NEW_TOKENS.index(END)] = table[im_end]

    toy = load_file(TOY / "model.safetensors")
    n_in = toy[CONNECTOR].shape[1]
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(table.shape[1], n_in, generator=generator)
    matrix *= 2 * table.std() / n_in**0.5               # image tokens about twice as long as words
    encoder = {name: tensor for name, tensor in toy.items() if name.startswith(ENCODER)}
    return {**encoder, CONNECTOR: matrix, NEW_ROWS: new}


class Adapter(nn.Module):
    """A linear layer W with an addition that learns, of low rank: x -> W x + B A x."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(RANK, linear.in_features) / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.a), self.b)


class Vocabulary(nn.Module):
    """An embedding table of which only the last rows, the new tokens, learn."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.register_buffer("old", table[:-len(NEW_TOKENS)].clone(), persistent=False)
        self.new = nn.Parameter(table[-len(NEW_TOKENS):].clone())

    @property
    def weight(self) -> Tensor:
        return torch.cat([self.old, self.new])

    def forward(self, input_ids: Tensor) -> Tensor:
        n_old = self.old.shape[0]
        old = F.embedding(input_ids.clamp(max=n_old - 1), self.old)
        new = F.embedding((input_ids - n_old).clamp(min=0), self.new)
        return torch.where(input_ids[:, :, None] < n_old, old, new)


class Learner(train_toy.Learner):
    """The model with its adapters, and two linear heads that name what a word is about.

    How held-out questions are asked is inherited from the toy's learner.
    """

    def __init__(self, model: VideoLM):
        nn.Module.__init__(self)
        self.model = model
        text = model.model.text_model
        C = model.config.text_config.hidden_size
        text.embed_tokens = Vocabulary(text.embed_tokens.weight)
        for layer in text.layers:
            for name in ADAPTED:
                setattr(layer.self_attn, name, Adapter(getattr(layer.self_attn, name)))
        model.model.vision_model.requires_grad_(True)
        model.model.connector.requires_grad_(True)
        self.words = nn.Linear(C, sum(NAMES))
        self.deeds = nn.Linear(C, sum(DEEDS))

    def trained(self) -> dict[str, Tensor]:
        """What learns of the model, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters()
                if parameter.requires_grad}

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of the answers, and that of the names."""
        trace = {}
        features = self.model.encode(batch.pixel_values)
        logits, targets = train_toy.answer_logits(self.model, batch, features, trace)
        names, deeds = batch.words.split([len(NAMES), len(DEEDS)], dim=-1)
        named = name_loss(self.words, normed(trace, NAMING_LAYER), names, NAMES)
        named = named + name_loss(self.deeds, normed(trace, DEEDS_LAYER), deeds, DEEDS)
        return F.cross_entropy(logits.float(), targets), named


def normed(trace: dict, l: int) -> Tensor:
    """The input of a layer, without its length, for the heads."""
    hidden = trace[f"layers.{l}.hidden"].float()
    return F.rms_norm(hidden, hidden.shape[-1:])


def optimizer_of(learner: Learner) -> torch.optim.Optimizer:
    groups = []
    for name, rate in RATES.items():
        parameters = [parameter for full_name, parameter in learner.named_parameters()
                      if full_name.startswith(name) and parameter.requires_grad]
        groups.append({"params": parameters, "lr": rate, "full_rate": rate})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)


def save(folder: Path, learner: Learner, optimizer: torch.optim.Optimizer, at: Progress) -> None:
    heads = {"words": learner.words.state_dict(), "deeds": learner.deeds.state_dict()}
    with written_whole(folder / "state.pt") as half:
        torch.save({"trained": learner.trained(), "heads": heads,
                    "optimizer": optimizer.state_dict(), "at": vars(at)}, half)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in learner.trained().items()}
    with written_whole(folder / "trained.safetensors") as half:
        save_file(tensors, half)


@torch.no_grad()
def put_back(learner: Learner, tensors: dict[str, Tensor]) -> None:
    """Give the learner what a run has trained. Raises: ValueError if it is of another kind."""
    own = learner.trained()
    if own.keys() != tensors.keys():
        raise ValueError(f"{len(own.keys() ^ tensors.keys())} tensors are not what this script "
                         f"trains; give another file")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def restore(folder: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> Progress:
    saved = torch.load(folder / "state.pt")
    put_back(learner, saved["trained"])
    learner.words.load_state_dict(saved["heads"]["words"])
    learner.deeds.load_state_dict(saved["heads"]["deeds"])
    optimizer.load_state_dict(saved["optimizer"])
    return Progress(**saved["at"])


def one_step(learner: Learner, optimizer: torch.optim.Optimizer, batch: Batch,
             share: float) -> tuple[float, float]:
    """One step at this share of the learning rates. Returns: the two losses."""
    with torch.autocast("cpu", torch.bfloat16):         # about twice as fast on a recent processor
        answers, named = learner(batch)
    (answers + SHARE_OF_NAMES * named).backward()
    nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = group["full_rate"] * share
    optimizer.step()
    optimizer.zero_grad()
    return answers.item(), named.item()


def begin(folder: Path, begin_with: Path | None) -> tuple[Learner, Processor]:
    """A learner that has learned nothing, or what another run has trained."""
    untrained_folder = folder / "untrained"
    if not (untrained_folder / "model.safetensors").exists():
        from gguf import GGUFReader
        reader = GGUFReader(real_decoder.find_gguf(None))
        real_decoder.write_seeing(reader, untrained_folder, untrained(reader))
    model, processor = load(untrained_folder)
    torch.manual_seed(0)
    learner = Learner(model)
    if begin_with:
        put_back(learner, load_file(begin_with))
    return learner, processor


def train(folder: Path, begin_with: Path | None) -> None:
    """Run all stages, or go on where an earlier run in the same folder was interrupted."""
    learner, processor = begin(folder, begin_with)
    optimizer = optimizer_of(learner)
    at = Progress(random_seed=0)
    if (folder / "state.pt").exists():
        at = restore(folder, learner, optimizer)
    begun = time.time()
    while at.stage < len(STAGES):
        stage = STAGES[at.stage]
        drawn = OTHERS[at.stage] if at.step % 4 == 0 else stage
        batch = train_toy.draw_batch(processor, drawn, f"{at.done}", at.learned)
        share = train_toy.rate_at(at.step, stage)
        answers, named = one_step(learner, optimizer, batch, share)
        at.step += 1
        at.done += 1
        print(f"step {at.done}, stage {at.stage}, {time.time() - begun:.0f} s: loss {answers:.3f}, "
              f"names {named:.2f}", flush=True)
        is_last = at.step == stage.steps
        if at.step % SAVE_EVERY == 0 or is_last:
            test(folder, learner, processor, at, answers)
            if is_last:
                at = replace(at, stage=at.stage + 1, step=0)
            save(folder, learner, optimizer, at)


def test(folder: Path, learner: Learner, processor: Processor, at: Progress, loss: float) -> None:
    """Ask held-out questions about frames and, after the first stage, about clips. Add to the log.

    A kind that both frames and clips have counts as right as in the worse of the two.
    """
    at.right = {}
    with open(folder / "log.txt", "a") as log:
        log.write(f"step {at.done}, stage {at.stage}: loss {loss:.3f}\n")
        for stage in (FRAMES, CLIPS)[:at.stage + 1]:
            found = learner.right_by_kind(processor, stage, "cpu")
            shares = ", ".join(f"{kind} {share:.2f}" for kind, share in found.items())
            log.write(f"    {stage.frames} frames: {shares}\n")
            for kind, share in found.items():
                at.right[kind] = min(share, at.right.get(kind, 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to train")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="begin_with",
                        help="a trained.safetensors to begin with")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    train(args.folder, args.begin_with)


if __name__ == "__main__":
    run_command(main, "see.py", "interrupted; the same command goes on from what is saved")
