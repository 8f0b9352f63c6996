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
from minioutro.shapes import UNSEEN, Clip, Question
from minioutro.video import read_video

CLIPS, QUESTIONS, BATCH = 200, 10, 50       # clips, questions about each, prompts read at once
FAR = 16                                    # tokens between a query and the first token
OTHERS = 8                                  # text tokens that are masked to compare with the sink
BASELINE = {"baseline": None}
WAYS = {**BASELINE, "relax": OutRo(align=False), "align 3": OutRo(relax=False),
        **{f"both {gamma:g}": OutRo(gamma=gamma) for gamma in (0.5, 1, 2, 3)}}


@dataclass
class Item:
    """One question about one clip, ready to be answered."""
    question: Question
    input_ids: list[int]                    # the prompt, S
    answer_ids: list[int]                   # the right answer, the token that ends it included
    features: Tensor                        # float[F*M,C], the clip's image tokens


def draw_items(model: VideoLM, processor: Processor, clips: int) -> list[Item]:
    """Questions about unseen clips, of each clip one of every kind first, then more of them."""
    items = []
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "clip.mp4"
        for n in tqdm(range(clips), desc="clips", disable=None):
            clip, rng = Clip(UNSEEN + n, 1 + n % 3), random.Random(n)
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


def sink_table(model: VideoLM, processor: Processor, items: list[Item]) -> str:
    """What makes the first token a sink, by layer and head; `items` has a question of each clip."""
    n, c = len(items), model.config.text_config
    L, H, rng = c.num_hidden_layers, c.num_attention_heads, random.Random(0)
    image = processor.tokenizer.token_to_id(IMAGE)
    first, others, ratio = torch.zeros(L), torch.zeros(L), torch.zeros(L)
    far, last = torch.zeros(L, H), torch.zeros(L, H)
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
        last += to_first[:, :, S - 1:].mean(-1) / n

        images = [i for i, token in enumerate(item.input_ids) if token == image]
        texts = [i for i in range(1, images[-1]) if item.input_ids[i] != image]
        stays.append(unchanged_without(model, item, [0, *rng.sample(texts, OTHERS)]))

    lines = [f"{'layer':7}{'token 0 a sink':>15}{'other sinks':>13}{'ratio':>9}"
             f"{'   attention to token 0, by head':{3 + 5 * H}}   {'of answer tokens'}"]
    for l in range(L):
        heads, answers = (" ".join(f"{share:.2f}" for share in x[l].tolist()) for x in (far, last))
        lines.append(f"{l:<7}{first[l]:>15.0%}{others[l]:>13.2f}{ratio[l]:>9,.0f}   "
                     f"{heads:32}{answers}")
    marked = [l for l in range(L) if first[l] > 0.999]
    if marked:
        lines += ["", f"of the {H * len(marked)} heads of the layers where token 0 is always a "
                  f"sink, {(far[marked] >= 0.3).sum()} give it 0.3 of their attention or more,",
                  f"and {(last[marked] < 0.9).sum()} give it less than 0.9 on answer tokens"]
    changed = 1 - torch.tensor(stays).float()                                            # (n,9)
    lines += ["", f"of {n} answers, {changed[:, 0].sum():.0f} change when token 0 is masked; "
              f"{changed[:, 1:].sum() / OTHERS:.1f} do, on average,",
              "when another text token of the frame lines is"]
    return "\n".join(lines)


@torch.inference_mode()
def report(model: VideoLM, processor: Processor, clips: int = CLIPS, ways: dict = WAYS) -> str:
    """Answers, without OutRo and with it, and the sink, on so many unseen clips."""
    items = draw_items(model, processor, clips)
    return (f"{answers_table(model, items, ways)}\n\n"
            f"{sink_table(model, processor, items[::QUESTIONS])}")
