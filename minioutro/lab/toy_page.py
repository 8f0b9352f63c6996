"""Measure a toy and write its page: `python -m minioutro.lab.toy_page`."""

import argparse
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from minioutro import OutRo, Processor, Trace, VideoLM, load, read_video
from minioutro.lab.compare import summarise, table_of_differences
from minioutro.lab.evaluate import ask, variants_of
from minioutro.lab.questions import OF_A_CLIP, Record, toy_questions
from minioutro.lab.shapes import HARD_NOISE
from minioutro.lab.train_toy import BUNDLED, CONTROLS
from minioutro.model import causal_mask
from minioutro.prompt import IMAGE
from minioutro.support.cli import one_line_errors, written_whole

ASKED, GAMMAS = 2000, [0.5, 1.0, 2.0, 3.0]  # questions for the page, and of OutRo
BY_KIND = ["baseline", "relax", "align 3", "both 3"]        # shown for each kind of question
FAR = 16                                    # tokens between a query and the first token
OTHERS = 8                                  # text tokens that are masked to compare with the sink


def unchanged_without(model: VideoLM, prompt: Tensor, features: Tensor,
                      columns: list[int]) -> list[bool]:
    """Whether the baseline's answer stays when nobody may attend to a token, for each of these."""
    answer = torch.tensor([model.generate(prompt, features=features)])
    ids, B = torch.cat([prompt, answer[:, :-1]], dim=1), len(columns)
    may_attend = causal_mask(ids.shape[1], ids.shape[1]).repeat(B, 1, 1)                 # (B,S,S)
    for b, column in enumerate(columns):
        may_attend[b, column + 1:, column] = False                  # but the token sees itself
    hidden = model.hidden_states(ids.repeat(B, 1), features=features.repeat(B, 1, 1),
                                 masks=[may_attend] * model.config.text_config.num_hidden_layers)
    likeliest = model.head(hidden[:, -answer.shape[1]:]).argmax(-1)
    return (likeliest == answer).all(1).tolist()


@dataclass
class Sinks:
    """What makes the first token a sink: means over prompts, by layer and head."""
    first: Tensor               # float[L], how often the first token is marked
    others: Tensor              # float[L], how many others are
    ratio: Tensor               # float[L], of the first token's largest coordinate to the median
    far: Tensor                 # float[L,H], attention to it, of queries FAR tokens away or more
    last: Tensor                # float[L,H], of those that answer
    full: Tensor                # float[L,H], the share of the former that give it more than 0.95
    changed: Tensor             # bool[n,1+OTHERS], answers that change without it, or another token

    @property
    def marked(self) -> list[int]:
        """The layers where the first token is a sink in every prompt."""
        return [l for l, share in enumerate(self.first) if share > 0.999]

    @property
    def contrast(self) -> list[bool]:
        """Has each marked layer a head that rests, above 0.7, and one that works, below 0.3?"""
        return [(heads.max() > 0.7 and heads.min() < 0.3).item() for heads in self.far[self.marked]]


def find_first_sink(model: VideoLM, processor: Processor, records: list[Record],
                    folder: Path) -> Sinks:
    """`records` has a question of each clip."""
    n, c = len(records), model.config.text_config
    L, H, rng = c.num_hidden_layers, c.num_attention_heads, random.Random(0)
    image = processor.tokenizer.token_to_id(IMAGE)
    first, others, ratio = torch.zeros(L), torch.zeros(L), torch.zeros(L)
    far, last, full = torch.zeros(L, H), torch.zeros(L, H), torch.zeros(L, H)
    stays = []
    for record in tqdm(records, desc="sinks", disable=None):
        inputs = processor(read_video(folder / record.video), record.question)
        prompt, features = inputs.input_ids, model.encode(inputs.pixel_values)
        of_prompt = {}
        model(prompt, features=features, outro=OutRo(align=False, relax=False), trace=of_prompt)
        is_sink = torch.stack([of_prompt[f"layers.{l}.is_sink"][0] for l in range(L)])   # (L,S)
        first += is_sink[:, 0] / n
        others += is_sink[:, 1:].sum(1) / n
        ratio += torch.stack([of_prompt[f"layers.{l}.ratio"][0, 0] for l in range(L)]) / n

        of_answer, answer = Trace(weights_of=range(L)), processor.tokenize([f" {record.answer}"])
        model(torch.cat([prompt, torch.tensor([answer])], dim=1), features=features,
              trace=of_answer)
        to_first = torch.stack([of_answer[f"layers.{l}.weights"][0, :, :, 0] for l in range(L)])
        far += to_first[:, :, FAR:].mean(-1) / n                                         # (L,H)
        full += (to_first[:, :, FAR:] > 0.95).float().mean(-1) / n
        last += to_first[:, :, prompt.shape[1] - 1:].mean(-1) / n

        ids = prompt[0].tolist()
        texts = [i for i in range(1, len(ids)) if ids[i] != image and image in ids[i:]]
        stays.append(unchanged_without(model, prompt, features, [0, *rng.sample(texts, OTHERS)]))
    return Sinks(first, others, ratio, far, last, full, ~torch.tensor(stays))


def sink_table(s: Sinks) -> str:
    """A row for each layer, and what follows from them."""
    n, (L, H) = len(s.changed), s.far.shape
    lines = [f"{'layer':7}{'token 0 a sink':>15}{'other sinks':>13}{'ratio':>9}"
             f"{'   attention to token 0, by head':{3 + 5 * H}}   {'of answer tokens'}"]
    for l in range(L):
        heads, answers = (" ".join(f"{share:.2f}" for share in x[l].tolist())
                          for x in (s.far, s.last))
        lines.append(f"{l:<7}{s.first[l]:>15.0%}{s.others[l]:>13.2f}{s.ratio[l]:>9,.0f}   "
                     f"{heads:32}{answers}")
    if s.marked:
        lines += ["", f"of the {len(s.marked)} layers where token 0 is always a sink, "
                  f"{sum(s.contrast)} have a head that gives it more than 0.7 of its attention",
                  f"and one that gives it less than 0.3; {s.full[s.marked].mean():.0%} of their "
                  f"(head, token) pairs give it more than 0.95"]
    lines += ["", f"of {n} answers, {s.changed[:, 0].sum()} change when token 0 is masked; "
              f"{s.changed[:, 1:].sum() / OTHERS:.1f} do, on average,",
              "when another text token of the frame lines is"]
    return "\n".join(lines)


def in_a_line(found: dict, hard: dict, s: Sinks) -> str:
    """What a run of the recipe came to, as in the page's table of runs; hard: of clips with noise.
    """
    def share(variants: dict) -> float:
        return variants["baseline"]["right"] / variants["baseline"]["n"]
    if not s.marked:
        return "token 0 is always a sink in no layer"
    far, (changed, *others) = s.far[s.marked], s.changed.sum(0).tolist()
    return (f"{share(found['variants']):8.1%}{min(map(share, found['tasks'].values())):8.1%}"
            f"{share(hard['variants']):8.1%}{f'{s.marked[0]} to {s.marked[-1]}':>8}"
            f"{s.others.max():8.2f}{far.amax(1).min():8.2f}{far.amin(1).max():8.2f}"
            f"{s.full[s.marked].mean():8.0%}{changed:8}{sum(others) / OTHERS:8.1f}")


@torch.inference_mode()
def report(model: VideoLM, processor: Processor,
           variants: str = "baseline,relax,align,both") -> Iterator[str]:
    """Yield what it answers about unseen clips, and its sink; the former of clips with noise; and
    a line of the table of runs."""
    measured = []
    for noise in (None, HARD_NOISE):
        records, clips = toy_questions(ASKED, noise=noise)
        with tempfile.TemporaryDirectory() as folder:
            answers = ask(model, processor, records, variants_of(variants, GAMMAS), Path(folder),
                          clips)
            found = summarise(list(tqdm(answers, disable=None)))
            if noise is None:
                sinks = find_first_sink(model, processor, records[::OF_A_CLIP], Path(folder))
        measured.append(found)
        by_kind = {kind: {name: of_kind[name] for name in BY_KIND if name in of_kind}
                   for kind, of_kind in found["tasks"].items()}
        text = table_of_differences({**found, "tasks": by_kind})
        yield f"{text.rstrip()}\n\n{sink_table(sinks)}" if noise is None else text
    yield in_a_line(*measured, sinks)


def write_readme(folder: Path) -> None:
    """The bundled page with new figures: of the toy, of its hard clips, and of its controls. The
    table of runs, the third block, stays: its other lines are those of other folders."""
    page = (BUNDLED / "README.md").read_text(encoding="utf-8").split("```")
    ordinary, hard, _ = report(*load(folder))
    controls = [next(report(*load(folder / run.folder), variants="baseline")) for run in CONTROLS]
    page[1::2] = [f"\n{ordinary}\n", f"\n{hard}\n", page[5],
                  *(f"\n{control}\n" for control in controls)]
    with written_whole(folder / "README.md") as half:
        half.write_text("```".join(page), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minioutro.lab.toy_page", usage=argparse.SUPPRESS,      # an error is one line
        description=f"Ask a toy {ASKED} questions, and print the figures of its page.")
    parser.add_argument("--folder", default=BUNDLED, help="default: the bundled toy")
    parser.add_argument("--threads", type=int, help="default: all")
    args = parser.parse_args()
    with one_line_errors("toy_page.py"):
        if args.threads:
            torch.set_num_threads(args.threads)
        for block in report(*load(args.folder)):
            print(block, end="\n\n")


if __name__ == "__main__":
    main()
