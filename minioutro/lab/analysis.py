"""The paper's questions about the attention sink, each a short function over a trace or a model.

Nothing is hooked: a weight is replaced in a copy, a key is edited in the open cache, a mask is
handed to the layers. Traces are the plain model's unless a docstring says otherwise; shapes are
named as in model.py. What all this finds on the toy is printed by the blocks of tutorial.md.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minioutro import Cache, OutRo, Processor, Video, VideoLM
from minioutro.lab.shapes import DURATION, FPS, UNSEEN, Clip
from minioutro.model import causal_mask, find_sinks, repeat_heads
from minioutro.prompt import END
from minioutro.video import sample_indices

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
