"""The paper's questions about the attention sink, each a short function over a trace or a model.

    python -m minioutro.analysis                                    of the toy and its clip
    python -m minioutro.analysis VIDEO "QUESTION" --model FOLDER    of any SmolVLM2 checkpoint

Nothing is hooked: a weight is replaced in a copy, a key is edited in the open cache, a mask is
handed to the layers. Traces are the plain model's unless a docstring says otherwise; shapes are
named as in model.py. What all this finds on the toy is printed by the blocks of tutorial.md.
"""

import argparse
import copy
import json
import math
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from minioutro import Cache, OutRo, Processor, Video, VideoLM, load, read_video
from minioutro.model import (attention, causal_mask, find_sinks, merge_heads, repeat_heads,
                             rope_tables, rotate, split_heads)
from minioutro.prompt import END
from minioutro.shapes import DURATION, FPS, UNSEEN, Clip
from minioutro.video import sample_indices
from minioutro.weights import HUB_MODEL, TOY, add_options, one_line_errors

QUESTION = "What happens in this video?"            # it asks for all that a clip shows
FIRST_SEED = UNSEEN + 10_000                        # so that evaluate.py's clips are others
UNSCORED = 16               # tokens at the head of a text, which are guessed from next to nothing
MARK = OutRo(relax=False, align=False)              # marks the sinks and changes nothing


@dataclass
class Examples:
    """Prompts of equal length, and what comes behind them."""
    input_ids: Tensor           # int64[B,S], the prompts
    features: Tensor | None     # float[B,F*M,C], what model.encode makes of the frames, if any
    answer_ids: Tensor          # int64[B,A], filled up to be equally long
    is_scored: Tensor           # bool[B,n], which of the last n tokens of both_ids losses are of
    clips: tuple[Clip, ...] = ()

    @property
    def both_ids(self) -> Tensor:
        return torch.cat([self.input_ids, self.answer_ids], dim=1)


def examples(model: VideoLM, processor: Processor, n: int, most: int = 3,
             noise: int | None = None) -> Examples:
    """n clips that the toy has never seen, of 1 to `most` shapes, all asked QUESTION, with their
    right answers. noise: see `Clip`."""
    clips = [Clip(FIRST_SEED + i, 1 + i % most, noise) for i in range(n)]
    indices = sample_indices(FPS * DURATION, FPS, DURATION)
    inputs, answers = [], []
    for clip in clips:
        video = Video([clip.frame(i) for i in indices], [i / FPS for i in indices], DURATION,
                      FPS * DURATION)
        inputs.append(processor(video, QUESTION))
        answers.append(torch.tensor(processor.tokenize([f" {clip.description()}", END])))
    answer_ids = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-1)
    return Examples(torch.cat([i.input_ids for i in inputs]),
                    model.encode(torch.cat([i.pixel_values for i in inputs])),
                    answer_ids.clamp(min=0), answer_ids >= 0, tuple(clips))


def logits_of(model: VideoLM, asked: Examples, outro: OutRo | None = None, masks=None,
              zero_keys=None, cache: Cache | None = None) -> Tensor:
    """The logits before each token that is scored, float32[B,n,V].

    The prompt is read by itself, since OutRo works on a prompt. masks: of each layer a bool[S,S] or
    bool[B,S,S], for prompt and answer in one call. zero_keys, "Zero-K": (layers, position, n); the
    prompt is read up to this token, the n largest coordinates of its keys are set to zero in these
    layers, and all later tokens meet the edited keys. cache: an empty one, to look into afterwards.
    """
    ids, n_scored = asked.both_ids, asked.is_scored.shape[1]
    if masks:
        hidden = model.hidden_states(ids, features=asked.features, masks=masks)
    else:
        cache = cache or Cache()
        layers, position, n = zero_keys or ((), asked.input_ids.shape[1] - 1, 0)
        one, two = ids.tensor_split([position + 1], dim=1)
        images = (one[0] == model.config.image_token_id).sum().item()
        of_one, of_two = (None, None) if asked.features is None else \
            asked.features.tensor_split([images], dim=1)
        hidden = model.hidden_states(one, features=of_one, outro=outro, cache=cache)
        for l in layers:
            key = cache.keys(l)[:, :, position]                                 # (B,G,D), a view
            key.scatter_(-1, key.abs().topk(min(n, key.shape[-1])).indices, 0)
        rest = model.hidden_states(two, features=of_two, cache=cache)
        hidden = torch.cat([hidden, rest], dim=1)
    return model.head(hidden[:, -n_scored - 1:-1]).float()


def token_losses(logits: Tensor, asked: Examples) -> Tensor:
    """-log p of each token that is scored, in nats: float[B,n], 0 where filled up."""
    log_p = logits.log_softmax(-1)                                              # (B,n,V)
    targets = asked.both_ids[:, -asked.is_scored.shape[1]:, None]               # (B,n,1)
    return -log_p.gather(-1, targets)[:, :, 0] * asked.is_scored


def loss_of(model: VideoLM, asked: Examples, outro: OutRo | None = None, **how) -> Tensor:
    """The loss of what is scored, nats a token: float[B]. how: what `logits_of` takes."""
    losses = token_losses(logits_of(model, asked, outro, **how), asked)
    return losses.sum(1) / asked.is_scored.sum(1)


# ---- Q1: which tokens are sinks? ----------------------------------------------------------------


def attention_mass(weights: Tensor) -> Tensor:
    """How much attention each key draws, on average over the queries that may see it.

    weights: float[B,H,S,S], causal. Returns: float[B,H,S]. Source: arXiv 2410.10781, alpha_k.
    """
    S = weights.shape[-1]
    return weights.sum(-2) / torch.arange(S, 0, -1, device=weights.device)


def sink_share(mass: Tensor, threshold: float = 0.3) -> Tensor:
    """Sink_k of arXiv 2410.10781: the share of heads whose attention_mass, float[B,H,S], is above
    0.3: float[B,S]."""
    return (mass > threshold).float().mean(1)


def sink_dimensions(hidden: Tensor, n: int = 2) -> Tensor:
    """The n coordinates of (B,S,C) that are largest in the token with the largest |h|: int64[n].
    Source: ours; arXiv 2503.03321 reads a few off the first token, once for each model."""
    magnitude = hidden.abs().flatten(0, 1)                                      # (B*S,C)
    return magnitude[magnitude.amax(-1).argmax()].topk(n).indices


def phi(hidden: Tensor, dimensions: Tensor) -> Tensor:
    """max |x[d]| over the sink dimensions by the root mean square of x: (B,S,C) -> float[B,S].

    One square is at most the sum of all C, so phi is at most sqrt(C): a threshold of 20 cannot be
    reached in a model less than 400 wide. Source: arXiv 2503.03321 (a sink has phi > 20).
    """
    return hidden[:, :, dimensions].abs().amax(-1) / (hidden.pow(2).mean(-1) + 1e-6).sqrt()


def detectors(hidden: Tensor, mass: Tensor, dimensions: Tensor) -> dict[str, Tensor]:
    """The sinks of a layer by each definition, bool[B,S], from its input and `attention_mass`.

    Ours: half of the heads must agree on the attention; and beside the fixed 20, made for a model
    of width 4,096 where phi is at most 64, its share of what phi can reach, 20/64 of sqrt(C).
    """
    score, rule = phi(hidden, dimensions), OutRo()
    return {"activation": find_sinks(hidden, rule.abs_threshold, rule.median_multiple),
            "attention": sink_share(mass) >= 0.5,
            "dimensions": score > 20 / 64 * math.sqrt(hidden.shape[-1]), "phi > 20": score > 20}


def overlap(*found: Tensor) -> float:
    """Tokens that all of these call a sink by tokens that any does; 0 where none finds one."""
    found = torch.stack(found)
    return (found.all(0).sum() / found.any(0).sum().clamp(min=1)).item()


# ---- Q2: are the heads that attend to the sink useless? -----------------------------------------


def heads_by_sink_attention(trace: dict, layers, position: int) -> list[tuple[float, int, int]]:
    """(attention mass on the sink, layer, head), most first."""
    mass = {l: attention_mass(trace[f"layers.{l}.weights"])[:, :, position].mean(0) for l in layers}
    return sorted(((m, l, h) for l in layers for h, m in enumerate(mass[l].tolist())), reverse=True)


def with_zeros(model: VideoLM, name: str, index) -> VideoLM:
    """A copy of the model with part of one weight zero; all others are shared, not copied."""
    changed = copy.deepcopy(model, memo={id(weight): weight for weight in model.parameters()})
    weight = model.get_parameter(name).clone()
    weight[index] = 0
    owner, _, last = name.rpartition(".")
    setattr(changed.get_submodule(owner), last, nn.Parameter(weight, requires_grad=False))
    return changed


def without_head(model: VideoLM, l: int, h: int) -> VideoLM:
    """The model without one head: the columns of o_proj, (C,H*D), that read its output are zero."""
    D, name = model.config.text_config.head_dim, f"model.text_model.layers.{l}.self_attn.o_proj"
    return with_zeros(model, f"{name}.weight", (slice(None), slice(h * D, (h + 1) * D)))


def without_row(model: VideoLM, l: int, d: int) -> VideoLM:
    """The model whose MLP of layer l adds nothing to coordinate d: a row of down_proj, (C,I)."""
    return with_zeros(model, f"model.text_model.layers.{l}.mlp.down_proj.weight", d)


# ---- Q3: what is in the sink? -------------------------------------------------------------------


def value_split(weights: Tensor, v: Tensor, is_sink: Tensor) -> tuple[Tensor, Tensor]:
    """o_t = sum over sinks of a_ti v_i + sum over the others: both terms, float[B,H,S,D]."""
    v, of_sink = repeat_heads(v, weights.shape[1]), is_sink[:, None, :, None]
    return weights @ v.masked_fill(~of_sink, 0), weights @ v.masked_fill(of_sink, 0)


def nop_or_broadcast(out: Tensor, v: Tensor, v_sink: Tensor) -> tuple[Tensor, Tensor]:
    """Does attending to the sink switch a head off (NOP), or does it spread the sink's value?

    out: float[B,H,S,D]; v: float[B,G,S,D]; v_sink: float[B,G,D].
    Returns: |v_sink| over the median |v|, float[B,G], which is near 0 for a NOP; and the share of
    the outputs' variance over the tokens that lies along v_sink, float[B,H], which is 1/D if all
    directions are alike, and 0 if all outputs are. Source: arXiv 2606.08105.
    """
    ratio = v_sink.norm(dim=-1) / v.norm(dim=-1).median(-1).values
    direction = repeat_heads(F.normalize(v_sink, dim=-1), out.shape[1])         # (B,H,D)
    deviation = out - out.mean(2, keepdim=True)
    along = deviation @ direction[..., None]                                    # (B,H,S,1)
    return ratio, along.pow(2).sum((-1, -2)) / deviation.pow(2).sum((-1, -2)).clamp(min=1e-30)


def probe(states: Tensor, labels: list[str], n_train: int) -> float:
    """How often a linear map, fitted to the first n_train examples, is right about the others.

    states: float[N,C]. A ridge regression to one column for each label; the largest column wins.
    States that do not differ leave it only the commonest label of the first n_train.
    """
    classes = sorted(set(labels))
    target = torch.tensor([[label == c for c in classes] for label in labels]).double()
    x = states.double()
    scale = x[:n_train].std(0).clamp(min=1e-6 * x.abs().mean())        # smaller ones are rounding
    x = (x - x[:n_train].mean(0)) / scale
    mean, fitted = target[:n_train].mean(0), x[:n_train]
    ridge = 0.1 * n_train * torch.eye(x.shape[1]).double()
    weight = torch.linalg.solve(fitted.T @ fitted + ridge, fitted.T @ (target[:n_train] - mean))
    guesses = (x[n_train:] @ weight + mean).argmax(-1).tolist()
    return sum(classes[g] == label for g, label in zip(guesses, labels[n_train:])) / len(guesses)


# ---- Further: the sink's query as a judge of image tokens ---------------------------------------


def image_token_masks(model: VideoLM, asked: Examples, scores: Tensor, l: int,
                      share: float = 0.2) -> list[Tensor]:
    """Masks for `loss_of` that hide all but the best image tokens of each frame after l.

    scores: float[B,S]; what they say about other tokens does not count. As many are kept of each
    frame, or a judge could lose by keeping few frames, whatever it thinks of tokens.
    """
    ids, vision = asked.both_ids, model.config.vision_config
    M = (vision.image_size // vision.patch_size // model.config.scale_factor)**2
    S, is_image = ids.shape[1], ids == model.config.image_token_id              # (B,S)
    scores = F.pad(scores, (0, S - scores.shape[1]))[is_image].view(len(ids), -1, M)    # (B,F,M)
    best = scores.topk(round(share * M), dim=-1).indices
    keep = ~is_image
    keep[is_image] = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True).flatten()
    causal = causal_mask(S, S)
    pruned = causal & keep[:, None, :] | torch.eye(S, dtype=torch.bool)         # each sees itself
    L = model.config.text_config.num_hidden_layers
    return [causal] * (l + 1) + [pruned] * (L - l - 1)


# ---- All of it at once, of any checkpoint: `python -m minioutro.analysis` -----------------------


def weights_by_head(model: VideoLM, trace: dict, cache: Cache, l: int):
    """Yield the attention weights of each head of layer l, float[B,1,S,S], from the layer's input
    and the cached keys. All of a layer would be gigabytes for a long prompt."""
    layer, hidden, c = model.model.text_model.layers[l], trace[f"layers.{l}.hidden"], model.config
    S, H, device = hidden.shape[1], layer.n_heads, hidden.device
    cos, sin = rope_tables(torch.arange(S, device=device)[None, None], c.text_config.head_dim,
                           c.text_config.rope_theta, like=hidden)
    q = rotate(split_heads(layer.self_attn.q_proj(layer.input_layernorm(hidden)), H), cos, sin)
    k, v = repeat_heads(cache.keys(l), H), repeat_heads(cache.values(l), H)
    for head in zip(*(x.split(1, dim=1) for x in (q, k, v))):                   # (B,1,S,D) each
        yield attention(*head, causal_mask(S, S, device))[1]


def sources(model: VideoLM, trace: dict, positions: list[int]) -> Tensor:
    """What the embedding, then the MLP of each layer but the last gives to these tokens of item 0:
    float[L,N,C]."""
    given = [trace["layers.0.hidden"][0, positions]]
    for l, layer in enumerate(model.model.text_model.layers[:-1]):
        out = merge_heads(trace[f"layers.{l}.out"])[0, positions]                       # (N,H*D)
        attended = trace[f"layers.{l}.hidden"][0, positions] + layer.self_attn.o_proj(out)
        given.append(trace[f"layers.{l + 1}.hidden"][0, positions] - attended)
    return torch.stack(given)


def without_token(asked: Examples, position: int, image_token_id: int) -> Examples:
    """The same, with one token of the prompts left out; all later ones move up."""
    keep = torch.arange(asked.input_ids.shape[1], device=asked.input_ids.device) != position
    features = asked.features
    if features is not None:
        features = features[:, keep[asked.input_ids[0] == image_token_id]]
    return replace(asked, input_ids=asked.input_ids[:, keep], features=features)


def describe(model: VideoLM, trace: dict, cache: Cache, sink: int, dimensions: Tensor) -> dict:
    """The first two tables of `analyse`, a row for each layer."""
    def spread(x: Tensor) -> list[float]:
        return [x.min().item(), x.median().item(), x.max().item()]

    C, L, who, holds = model.config.text_config.hidden_size, len(cache.k), [], []
    adds = [*sources(model, trace, [sink])[1:, 0, dimensions[0]].tolist(), None]
    for l in range(L):
        hidden, ratio = trace[f"layers.{l}.hidden"].float(), trace[f"layers.{l}.ratio"][0]
        heads = [(attention_mass(weights), weights[:, :, :, sink].clone())      # else all are kept
                 for weights in weights_by_head(model, trace, cache, l)]
        mass, to_sink = (torch.cat(x, dim=1).float() for x in zip(*heads))      # (1,H,S) both
        by = detectors(hidden, mass, dimensions)
        by["dimension"] = by["phi > 20" if C > 400 else "dimensions"]
        by = {name: by[name] for name in ("activation", "attention", "dimension")}
        marked = {name: is_sink[0].nonzero().flatten().tolist() for name, is_sink in by.items()}
        who.append({"layer": l, **marked,
                    "overlap": overlap(*by.values()), "heads": sink_share(mass)[0, sink].item(),
                    "ratio": ratio.max().item(), "of": ratio.argmax().item(), "MLP adds": adds[l]})
        k, v, out = (x.float() for x in (cache.keys(l), cache.values(l), trace[f"layers.{l}.out"]))
        k, v_sink = k.norm(dim=-1), v[:, :, sink]                               # (1,G,S), (1,G,D)
        size, along = nop_or_broadcast(out, v, v_sink)
        term = to_sink * repeat_heads(v_sink.norm(dim=-1), out.shape[1])[:, :, None]
        term = (term / out.norm(dim=-1))[:, :, sink:].median(-1).values         # (1,H)
        holds.append({"layer": l, "|k|": spread(k[:, :, sink] / k.median(-1).values),
                      "|v|": spread(size), "variance": spread(along), "term": spread(term),
                      "attention": spread(mass[:, :, sink])})
    return {"who": who, "holds": holds}


@torch.inference_mode()
def analyse(model: VideoLM, input_ids: Tensor, features: Tensor | None = None) -> dict:
    """The four tables of `python -m minioutro.analysis` about one prompt, or about a text.

    input_ids: int64[1,S]; features: float[1,F*M,C] of `encode`. With features, losses are those of
    the model's own greedy answer; without, of the text itself behind its first tokens and its sink.
    The sink is the token with the largest ratio among those that the rule marks, else among all.
    Compared with it are the ordinary tokens a quarter, a half and three quarters of the way to what
    is scored. Changes of the loss have their standard error over the tokens that are scored.
    Raises: ValueError for a text that is too short.
    """
    if features is not None:
        answer = model.generate(input_ids, features=features)
        answer_ids = torch.tensor([answer], device=input_ids.device)
    elif input_ids.shape[1] < UNSCORED + 2:
        raise ValueError(f"a text of {input_ids.shape[1]} tokens is too short; give a longer one")
    else:
        answer, input_ids, answer_ids = [], input_ids[:, :-1], input_ids[:, -1:]
    S, L, (trace, cache) = input_ids.shape[1], len(model.model.text_model.layers), ({}, Cache())
    model.hidden_states(input_ids, features=features, outro=MARK, cache=cache, trace=trace)
    ratio, is_sink = (torch.cat([trace[f"layers.{l}.{name}"] for l in range(L)])
                      for name in ("ratio", "is_sink"))                         # (L,S) both
    marked, ratio = is_sink.any().item(), ratio.nan_to_num()
    searched = ratio.masked_fill(~is_sink, 0) if marked else ratio[:max(1, L - MARK.skip_last)]
    at, sink = divmod(searched.argmax().item(), S)
    start = S if features is not None else max(UNSCORED, sink + 1)
    ordinary = [i for i in range(start) if i != sink and not is_sink[:, i].any()]
    tokens = [sink, *(ordinary[len(ordinary) * i // 4] for i in (1, 2, 3))]

    # Who writes the largest coordinate of each? The others' shall not be the sink's.
    hidden = trace[f"layers.{at}.hidden"][:, tokens]                            # (1,N,C)
    dimensions, magnitude = sink_dimensions(hidden[:, :1]), hidden[0].abs()
    found = {"marked": marked, "position": sink, "layer": at, "ratio": ratio[at, sink].item(),
             "activation": magnitude.amax(-1)[0].item(), "coordinate": dimensions[0].item()}
    magnitude[1:, dimensions[0]] = 0
    rows, given = magnitude.argmax(-1).tolist(), sources(model, trace, tokens)[:at + 1].abs()
    writers = [given[:, n, d].argmax().item() - 1 for n, d in enumerate(rows)]  # -1: the embedding
    found |= {"written by": writers[0], **describe(model, trace, cache, sink, dimensions)}
    del trace, cache                                                # gigabytes of a long prompt

    T = S + answer_ids.shape[1]
    scored = torch.ones(1, T - start, dtype=torch.bool, device=input_ids.device)
    asked = Examples(input_ids, features, answer_ids, scored)
    plain = logits_of(model, asked)                                             # (1,n,V)
    losses = token_losses(plain, asked)[0]                                      # (n,)

    def change(logits: Tensor) -> tuple[float, float]:
        difference = token_losses(logits, asked)[0] - losses
        error = difference.std(correction=0) / max(1, len(losses) - 1)**0.5
        return difference.mean().item(), error.item()

    cuts = {}
    for position, d, writer in tqdm([*zip(tokens, rows, writers)], desc="cuts", disable=None):
        mask, after = causal_mask(T, T, input_ids.device), Cache()
        mask[position + 1:, position] = False
        cut = {"column masked": change(logits_of(model, asked, masks=[mask] * L))}
        shorter = without_token(asked, position, model.config.image_token_id)
        cut["left out"] = change(logits_of(model, shorter, MARK, cache=after))
        marked_then = after.sinks.ever_sink[0].nonzero().flatten().tolist()
        cut["marked then"] = [i + (i >= position) for i in marked_then]
        cut["writing row silenced"] = None if writer < 0 else change(
            logits_of(without_row(model, writer, d), asked))
        for n in (1, 2, 8):
            zeroed = logits_of(model, asked, zero_keys=(range(L), position, n))
            cut[f"Zero-K, {n} of each key"] = change(zeroed)
        cuts[f"token {position}"] = cut
    without = [{"": way, **{token: cut[way] for token, cut in cuts.items()}} for way in cut]

    rule = MARK if marked else replace(MARK, abs_threshold=0.999 * found["activation"],
                                       median_multiple=0.999 * found["ratio"])
    outros, ways = [], [("relax", 0), *((w, g) for w in ("align", "both") for g in (0.5, 1, 3))]
    for way, gamma in tqdm(ways, desc="OutRo", disable=None):
        outro = replace(rule, relax=way != "align", align=way != "relax", gamma=gamma)
        logits = logits_of(model, asked, outro)
        p = (logits.argmax(-1) != plain.argmax(-1)).float().mean().item()
        outros.append({"": way, "gamma": gamma or None, "change": change(logits),
                       "largest move": (logits - plain).abs().max().item(),
                       "argmaxes": [p, (p * (1 - p) / len(losses))**0.5]})
    return {**found, "others": tokens[1:], "answer_ids": answer, "tokens": len(losses),
            "loss": losses.mean().item(), "without": without, "outro": outros,
            "width": model.config.text_config.hidden_size}


def table(rows: list[dict]) -> str:
    """Aligned columns, named by the keys: changes with their error, lists by their first three."""
    def cell(value) -> str:
        if isinstance(value, tuple):
            return "{:+.4f} ± {:.4f}".format(*value)
        if isinstance(value, list):
            more = f" +{len(value) - 3}" if len(value) > 3 else ""
            return " ".join(map(cell, value[:3])) + more or "-"
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
        return "-" if value is None else str(value)

    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
                     for first, *rest in lines)


def report(found: dict, texts: list[str], scored: str) -> str:
    """What `analyse` found, as text. texts: of each token; scored: what the losses are of."""
    sink, *others = (f"token {i} {texts[i]!r}" for i in (found["position"], *found["others"]))
    sink = f"The sink is {sink}" if found["marked"] else (
        f"The rule marks no token. The nearest, called the sink below, is {sink}")
    layer = found["written by"]
    writer = "the embedding" if layer < 0 else f"the MLP of layer {layer}"
    limit = "20" if found["width"] > 400 else (
        f"{20 / 64 * found['width']**0.5:.1f}: 20 cannot be reached below a width of 400")
    return f"""\
{sink}: {found['ratio']:,.0f} times the median in layer {found['layer']},
|h| {found['activation']:,.0f} in coordinate {found['coordinate']}, written by {writer}.

1. Who is a sink: positions that are marked by activation (OutRo's rule), by the attention of half
of the heads, and by dimension (phi > {limit}); their overlap; the share
of the heads that give the sink over 0.3; the largest ratio, of which position; what the MLP adds to
the sink's coordinate.
{table(found['who'])}

2. What it holds, least, median and most over the heads: |k| and |v| by the median token's, share of
the outputs' variance along its v, length of its term by the output's, attention to it.
{table(found['holds'])}

3. What happens without it, and without {', '.join(others)}:
change of the loss, {found['loss']:.4f} nats a token, over {found['tokens']} tokens of {scored}.
{table(found['without'])}

4. What OutRo does{'' if found['marked'] else ', its thresholds lowered to this token'}: change of \
the loss, largest move of a logit, argmaxes changed (share and error).
{table(found['outro'])}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minioutro.analysis", usage=argparse.SUPPRESS,       # an error is one line
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("video", nargs="?", help="a video, animation or picture (default: the bundled clip)")
    add("question", nargs="?", default=QUESTION, help="default: %(default)s")
    add_options(parser, of_outro=False)
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")   # not every terminal can show all
    with one_line_errors("analysis.py"), torch.inference_mode():
        if "" in (args.video, args.model):
            raise ValueError("the name of video or model is empty; give one, or leave it out")
        path = args.video or TOY / "clip.mp4"
        read_video(path, max_frames=1)      # a wrong file is told before a model is downloaded
        model, processor = load(args.model or (HUB_MODEL if args.video else TOY), None, args.device,
                                getattr(torch, args.dtype))
        video = read_video(path, processor.fps, args.frames or processor.max_frames,
                           processor.longest_edge)
        inputs = processor(video, args.question)
        features = model.encode(inputs.pixel_values.to(args.device))
        found = analyse(model, inputs.input_ids.to(args.device), features)
    answer = processor.decode(found["answer_ids"])
    if args.json:
        print(json.dumps({"video": str(path), "question": args.question, "answer": answer} | found))
    else:
        texts = [processor.token_text(token_id) for token_id in inputs.input_ids[0].tolist()]
        print(report(found, texts, f"its own answer, {answer!r}"))


if __name__ == "__main__":
    main()
