"""Does OutRo help? The same questions to the plain model and to OutRo, compared in pairs.

The clips are the toy world's, from seeds that training never draws, written to mp4 and read back.
"""

import math
import random
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from minioutro.model import Cache, OutRo, Trace, VideoLM, causal_mask
from minioutro.prompt import END, IMAGE, Processor
from minioutro.shapes import HARD_NOISE, UNSEEN, Clip, Question
from minioutro.video import read_video

CLIPS, QUESTIONS, BATCH = 200, 10, 50       # clips, questions about each, prompts read at once
FAR = 16                                    # tokens between a query and the first token
OTHERS = 8                                  # text tokens that are masked to compare with the sink
BASELINE = {"baseline": None}
GAMMAS = (0.5, 1, 2, 3)
WAYS = {**BASELINE, "relax": OutRo(align=False),
        **{f"align {gamma:g}": OutRo(gamma=gamma, relax=False) for gamma in GAMMAS},
        **{f"both {gamma:g}": OutRo(gamma=gamma) for gamma in GAMMAS}}


@dataclass
class Item:
    """One question about one clip, ready to be answered."""
    question: Question
    input_ids: list[int]                    # the prompt, S
    answer_ids: list[int]                   # the right answer, the token that ends it included
    features: Tensor                        # float[F*M,C], the clip's image tokens


def draw_items(model: VideoLM, processor: Processor, clips: int,
               noise: int | None = None) -> list[Item]:
    """Questions about unseen clips, of each clip one of every kind first, then more of them."""
    items = []
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "clip.mp4"
        for n in tqdm(range(clips), desc="clips", disable=None):
            clip, rng = Clip(UNSEEN + n, 1 + n % 3, noise), random.Random(n)
            clip.write(path)
            video = read_video(path, longest_edge=processor.longest_edge)
            inputs = processor(video, "?")
            features = model.encode(inputs.pixel_values)[0]
            questions, seen = clip.questions(), Counter()
            rng.shuffle(questions)
            rank = {}                       # how many of its kind come before a question
            for question in questions:
                rank[question] = seen[question.kind]
                seen[question.kind] += 1
            for question in sorted(questions, key=rank.get)[:QUESTIONS]:
                prompt = processor.tokenize(processor.pieces(video, question.text))
                answer = processor.tokenize([f" {question.answer}", END])
                items.append(Item(question, prompt, answer, features))
    return items


def answered_rightly(model: VideoLM, items: list[Item], outro: OutRo | None) -> list[bool]:
    """Whether the greedy answer to each question is the right one, token by token.

    It is if each token of the right answer is the likeliest after those before it: two calls decide
    it, one that reads the prompt and one that reads the answer. Prompts of equal length are read
    together; each gets what it gets alone.
    """
    groups = defaultdict(list)
    for n, item in enumerate(items):
        groups[len(item.input_ids), len(item.answer_ids)].append(n)
    right = [False] * len(items)
    for group in groups.values():
        for start in range(0, len(group), BATCH):
            chosen = group[start:start + BATCH]
            prompts = torch.tensor([items[n].input_ids for n in chosen])                 # (B,S)
            answers = torch.tensor([items[n].answer_ids for n in chosen])
            features = torch.stack([items[n].features for n in chosen])
            cache = Cache()
            prompt = model.hidden_states(prompts, features=features, outro=outro, cache=cache)
            answer = model.hidden_states(answers[:, :-1], cache=cache)
            likeliest = model.head(torch.cat([prompt[:, -1:], answer], dim=1)).argmax(-1)
            for n, is_right in zip(chosen, (likeliest == answers).all(1).tolist()):
                right[n] = is_right
    return right


def sign_test(gained: int, lost: int) -> float:
    """Two-sided p value of so many gained and lost answers, if either were as likely (McNemar)."""
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def answers_table(model: VideoLM, items: list[Item], ways: dict) -> str:
    """Share of right answers by kind, without OutRo and with; then what OutRo changed, in pairs."""
    right = {way: answered_rightly(model, items, outro)
             for way, outro in tqdm(ways.items(), desc="ways to answer", disable=None)}
    shown = [way for way in ("baseline", "relax", "align 3", "both 3") if way in ways]
    kinds = {"all": range(len(items))}
    for n, item in enumerate(items):
        kinds[item.question.kind] = [*kinds.get(item.question.kind, []), n]
    lines = [f"{'kind':10}{'questions':>10}{'chance':>10}" + "".join(f"{w:>10}" for w in shown)]
    for kind, members in kinds.items():
        common = Counter((items[n].question.kind, items[n].question.answer) for n in members)
        best = {}                           # the commonest answer to each kind of question
        for (of_kind, _), count in common.items():
            best[of_kind] = max(best.get(of_kind, 0), count)
        columns = "".join(f"{sum(right[way][n] for n in members) / len(members):>10.1%}"
                          for way in shown)
        chance = sum(best.values()) / len(members)
        lines.append(f"{kind:10}{len(members):>10}{chance:>10.1%}{columns}")
    if len(ways) == 1:
        return "\n".join(lines)
    lines += ["", "OutRo, gamma     right  became right  became wrong       p"]
    for way in list(ways)[1:]:
        pairs = Counter(zip(right["baseline"], right[way]))
        gained, lost = pairs[False, True], pairs[True, False]
        lines.append(f"{way:14}{sum(right[way]) / len(items):>8.1%}{gained:>14}{lost:>14}"
                     f"{sign_test(gained, lost):>8.2g}")
    return "\n".join(lines)


def unchanged_without(model: VideoLM, item: Item, columns: list[int]) -> list[bool]:
    """Whether the baseline's answer stays when nobody may attend to a token, for each of these."""
    prompt, features = torch.tensor([item.input_ids]), item.features[None]
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


def find_first_sink(model: VideoLM, processor: Processor, items: list[Item]) -> Sinks:
    """`items` has a question of each clip."""
    n, c = len(items), model.config.text_config
    L, H, rng = c.num_hidden_layers, c.num_attention_heads, random.Random(0)
    image = processor.tokenizer.token_to_id(IMAGE)
    first, others, ratio = torch.zeros(L), torch.zeros(L), torch.zeros(L)
    far, last, full = torch.zeros(L, H), torch.zeros(L, H), torch.zeros(L, H)
    stays = []
    for item in tqdm(items, desc="sinks", disable=None):
        prompt, S = torch.tensor([item.input_ids]), len(item.input_ids)
        of_prompt = {}
        model(prompt, features=item.features[None], outro=OutRo(align=False, relax=False),
              trace=of_prompt)
        is_sink = torch.stack([of_prompt[f"layers.{l}.is_sink"][0] for l in range(L)])   # (L,S)
        first += is_sink[:, 0] / n
        others += is_sink[:, 1:].sum(1) / n
        ratio += torch.stack([of_prompt[f"layers.{l}.ratio"][0, 0] for l in range(L)]) / n

        of_answer = Trace(weights_of=range(L))
        ids = torch.tensor([item.input_ids + item.answer_ids[:-1]])
        model(ids, features=item.features[None], trace=of_answer)
        to_first = torch.stack([of_answer[f"layers.{l}.weights"][0, :, :, 0] for l in range(L)])
        far += to_first[:, :, FAR:].mean(-1) / n                                         # (L,H)
        full += (to_first[:, :, FAR:] > 0.95).float().mean(-1) / n
        last += to_first[:, :, S - 1:].mean(-1) / n

        images = [i for i, token in enumerate(item.input_ids) if token == image]
        texts = [i for i in range(1, images[-1]) if item.input_ids[i] != image]
        stays.append(unchanged_without(model, item, [0, *rng.sample(texts, OTHERS)]))
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


@torch.inference_mode()
def report(model: VideoLM, processor: Processor, clips: int = CLIPS, ways: dict = WAYS) -> str:
    """Answers, without OutRo and with it, and the sink, on so many unseen clips."""
    items = draw_items(model, processor, clips)
    return (f"{answers_table(model, items, ways)}\n\n"
            f"{sink_table(find_first_sink(model, processor, items[::QUESTIONS]))}")


@torch.inference_mode()
def hard_report(model: VideoLM, processor: Processor, clips: int = CLIPS) -> str:
    """Answers, without OutRo and with it, on the same clips with noise of HARD_NOISE."""
    return answers_table(model, draw_items(model, processor, clips, HARD_NOISE), WAYS)
