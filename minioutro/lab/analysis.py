"""The paper's questions about the attention sink, each a short function over a trace or a model.

There are no hooks here. A weight is replaced in a copy of the model, a key is edited in the open
cache, a mask is handed to the layers. Traces are those of the plain model unless a docstring says
otherwise. Shapes are named as in model.py. The blocks of tutorial.md print what these functions
find on the toy, and sink_report.py puts them together into four tables about any checkpoint.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minioutro import Cache, OutRo, Processor, Video, VideoLM
from minioutro.lab.shapes import DURATION, FPS, UNSEEN, Clip
from minioutro.model import causal_mask, find_sinks, open_sink_rows, repeat_heads
from minioutro.prompt import END
from minioutro.video import sample_indices

QUESTION = "What happens in this video?"            # its answer describes everything in a clip
FIRST_SEED = UNSEEN + 10_000                        # evaluate.py asks about clips of other seeds


# ---- Prompts with their right answers, and the loss of the answers ------------------------------


@dataclass
class Examples:
    """Prompts of equal length, and the tokens that follow them."""
    input_ids: Tensor           # int64[B,S], the prompts
    features: Tensor | None     # float[B,F*M,C], what model.encode makes of the frames, if any
    answer_ids: Tensor          # int64[B,A], padded to equal length
    is_scored: Tensor           # bool[B,n], which of the last n tokens of both_ids have a loss
    clips: tuple[Clip, ...] = ()

    @property
    def both_ids(self) -> Tensor:
        """Prompt and answer: int64[B,S+A]."""
        return torch.cat([self.input_ids, self.answer_ids], dim=1)


def video_of(clip: Clip) -> Video:
    """What `read_video` would read of a clip, without the losses of video compression."""
    total_frames = FPS * DURATION
    indices = sample_indices(total_frames, FPS, DURATION)
    frames = [clip.frame(i) for i in indices]
    seconds = [i / FPS for i in indices]
    return Video(frames, seconds, DURATION, total_frames)


def examples(model: VideoLM, processor: Processor, n: int, most: int = 3,
             noise: int | None = None) -> Examples:
    """n clips that the toy has never seen, all asked QUESTION, with their right answers.

    The clips have 1, 2, ... `most` shapes in turn. They are the same in every call. noise: as in
    `Clip`.
    """
    clips = [Clip(FIRST_SEED + i, 1 + i % most, noise) for i in range(n)]
    inputs = [processor(video_of(clip), QUESTION) for clip in clips]
    pixel_values = torch.cat([each.pixel_values for each in inputs])
    answers = [torch.tensor(processor.tokenize([f" {clip.description()}", END])) for clip in clips]
    answer_ids = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-1)
    return Examples(input_ids=torch.cat([each.input_ids for each in inputs]),
                    features=model.encode(pixel_values),
                    answer_ids=answer_ids.clamp(min=0),
                    is_scored=answer_ids >= 0,
                    clips=tuple(clips))


def logits_of(model: VideoLM, asked: Examples, outro: OutRo | None = None,
              masks: list[Tensor] | None = None,
              zero_keys: tuple[range, int, int] | None = None,
              cache: Cache | None = None) -> Tensor:
    """The logits before each scored token, float32[B,n,V]. At most one thing is changed:

    outro: the constants of OutRo, which works while the prompt is read.
    masks: of each layer a bool[S,S] or bool[B,S,S] over prompt and answer, instead of the causal
    one. zero_keys: (layers, position, n), see `zero_largest`. Everything up to this position is
    read with its keys as they are, and all later tokens with the edited keys.
    cache: an empty one, which you can look into afterwards. Not with masks.
    Raises: ValueError if two changes are asked for at once.
    """
    if sum(change is not None for change in (outro, masks, zero_keys)) > 1:
        raise ValueError("outro, masks and zero_keys are one change each; give one of them")
    if masks is not None:
        if cache is not None:
            raise ValueError("masks cover prompt and answer in one call; leave cache out")
        hidden = model.hidden_states(asked.both_ids, features=asked.features, masks=masks)
    else:
        cache = Cache() if cache is None else cache
        hidden = read_in_two_calls(model, asked, outro, zero_keys, cache)
    n_scored = asked.is_scored.shape[1]
    return model.head(hidden[:, -n_scored - 1:-1]).float()


def read_in_two_calls(model: VideoLM, asked: Examples, outro: OutRo | None,
                      zero_keys: tuple[range, int, int] | None, cache: Cache) -> Tensor:
    """Hidden states of prompt and answer, float[B,S+A,C], through a cache.

    OutRo takes the first call for the whole prompt, so that the answer needs a second one. With
    zero_keys the first call ends at the token whose keys are edited.
    """
    last = asked.input_ids.shape[1] - 1
    if zero_keys is not None:
        layers, last, n = zero_keys
    before, after = asked.both_ids.tensor_split([last + 1], dim=1)
    features_before, features_after = None, None
    if asked.features is not None:
        n_images = (before[0] == model.config.image_token_id).sum().item()
        features_before, features_after = asked.features.tensor_split([n_images], dim=1)

    hidden = model.hidden_states(before, features=features_before, outro=outro, cache=cache)
    if zero_keys is not None:
        zero_largest(cache, layers, last, n)
    rest = model.hidden_states(after, features=features_after, cache=cache)
    return torch.cat([hidden, rest], dim=1)


def zero_largest(cache: Cache, layers: range, position: int, n: int) -> None:
    """Set the n largest coordinates of a token's keys to zero, in these layers ("Zero-K")."""
    for l in layers:
        key = cache.keys(l)[:, :, position]                     # (B,G,D), a view of the cache
        largest = key.abs().topk(min(n, key.shape[-1])).indices
        key.scatter_(-1, largest, 0)


def token_losses(logits: Tensor, asked: Examples) -> Tensor:
    """-log p of each scored token, in nats: float[B,n], 0 for padding."""
    n_scored = asked.is_scored.shape[1]
    targets = asked.both_ids[:, -n_scored:, None]                               # (B,n,1)
    log_p = logits.log_softmax(-1).gather(-1, targets)[:, :, 0]                 # (B,n)
    return -log_p * asked.is_scored


def loss_of(model: VideoLM, asked: Examples, outro: OutRo | None = None, **how) -> Tensor:
    """The mean loss of the scored tokens, in nats a token: float[B]. how: as in `logits_of`."""
    losses = token_losses(logits_of(model, asked, outro, **how), asked)
    return losses.sum(1) / asked.is_scored.sum(1)


# ---- Q1: which tokens are sinks? ----------------------------------------------------------------


def attention_mass(weights: Tensor) -> Tensor:
    """How much attention each key draws, on average over the queries that may see it.

    weights: float[B,H,S,S], causal. Returns: float[B,H,S].
    Source: Gu et al., *When Attention Sink Emerges in Language Models* (2410.10781), alpha_k.
    """
    S = weights.shape[-1]
    n_queries = torch.arange(S, 0, -1, device=weights.device)       # S see key 0, one sees the last
    return weights.sum(-2) / n_queries


def sink_share(mass: Tensor, threshold: float = 0.3) -> Tensor:
    """The share of heads from which a token draws an attention mass above the threshold.

    mass: float[B,H,S] of `attention_mass`. Returns: float[B,S].
    Source: Sink_k of Gu et al. (2410.10781), with its threshold.
    """
    return (mass > threshold).float().mean(1)


def sink_dimensions(hidden: Tensor, n: int = 2) -> Tensor:
    """The n largest coordinates of the most massive token: float[B,S,C] -> int64[n].

    Source: ours. Kang et al., *See What You Are Told: Visual Attention Sink in Large Multimodal
    Models* (2503.03321), read a few coordinates off the first token, once for each model.
    """
    magnitude = hidden.abs().flatten(0, 1)                                      # (B*S,C)
    most_massive = magnitude.amax(-1).argmax()
    return magnitude[most_massive].topk(n).indices


def phi(hidden: Tensor, dimensions: Tensor) -> Tensor:
    """How much of a token lies in the sink dimensions. `detectors` compares it with a threshold.

    It is max |x[d]| over these dimensions d, divided by the root mean square of x. It is at most
    sqrt(C), if the whole length of x lies in one coordinate. So phi > 20 needs C > 400.
    hidden: float[B,S,C]; dimensions: int64[n]. Returns: float[B,S].
    Source: Kang et al. (2503.03321), where a token with phi > 20 is a sink.
    """
    largest = hidden[:, :, dimensions].abs().amax(-1)
    root_mean_square = (hidden.pow(2).mean(-1) + 1e-6).sqrt()
    return largest / root_mean_square


def detectors(hidden: Tensor, mass: Tensor, dimensions: Tensor) -> dict[str, Tensor]:
    """The sinks of a layer by the three definitions, the third with two thresholds: bool[B,S] each.

    hidden: float[B,S,C], the layer's input; mass: float[B,H,S] of `attention_mass`.
    Source: the rule of OutRo; ours that half of the heads must agree on the attention; Kang et al.
    (2503.03321) for "phi > 20", made for a model of width 4,096, where phi is at most 64. Ours is
    "dimensions", the same share of what phi can reach: 20/64 of sqrt(C).
    """
    rule = OutRo()
    score = phi(hidden, dimensions)
    scaled_threshold = 20 / 64 * math.sqrt(hidden.shape[-1])
    return {"activation": find_sinks(hidden, rule.abs_threshold, rule.median_multiple),
            "attention": sink_share(mass) >= 0.5,
            "dimensions": score > scaled_threshold,
            "phi > 20": score > 20}


def overlap(*found: Tensor) -> float:
    """Intersection over union of several sets of sinks, bool[B,S] each.

    These are the tokens that all call a sink, divided by the tokens that any calls one. It is 0
    where none finds one.
    """
    stacked = torch.stack(found)
    intersection = stacked.all(0).sum()
    union = stacked.any(0).sum()
    return (intersection / union.clamp(min=1)).item()


# ---- Q2: are the heads that attend to the sink useless? -----------------------------------------


def heads_by_sink_attention(trace: dict, layers, position: int) -> list[tuple[float, int, int]]:
    """(attention mass on the token at this position, layer, head) of every head, largest first.

    The trace holds the weights of these layers. The mass is the mean over its items.
    """
    heads = []
    for l in layers:
        mass = attention_mass(trace[f"layers.{l}.weights"])[:, :, position].mean(0)     # (H,)
        heads += [(m, l, h) for h, m in enumerate(mass.tolist())]
    return sorted(heads, reverse=True)


def with_zeros(model: VideoLM, name: str, index) -> VideoLM:
    """A copy of the model in which weight[index] is zero. It shares all other weights."""
    shared = {id(weight): weight for weight in model.parameters()}      # deepcopy takes these as is
    changed = copy.deepcopy(model, memo=shared)
    weight = model.get_parameter(name).clone()
    weight[index] = 0
    owner, _, last = name.rpartition(".")
    setattr(changed.get_submodule(owner), last, nn.Parameter(weight, requires_grad=False))
    return changed


def without_head(model: VideoLM, l: int, h: int) -> VideoLM:
    """The model without one head: the columns of o_proj, (C,H*D), that read its output are zero."""
    D = model.config.text_config.head_dim
    columns = slice(h * D, (h + 1) * D)
    name = f"model.text_model.layers.{l}.self_attn.o_proj.weight"
    return with_zeros(model, name, (slice(None), columns))


def without_row(model: VideoLM, l: int, d: int) -> VideoLM:
    """The model whose MLP of layer l adds nothing to coordinate d: row d of down_proj is zero."""
    return with_zeros(model, f"model.text_model.layers.{l}.mlp.down_proj.weight", d)


# ---- Q3: what is in the sink? -------------------------------------------------------------------


def value_split(weights: Tensor, v: Tensor, is_sink: Tensor) -> tuple[Tensor, Tensor]:
    """Split each output into what comes from the sinks and what comes from all other tokens.

    o_t = sum over sinks of a_ti v_i + sum over the others of a_ti v_i.
    weights: float[B,H,S,S]; v: float[B,G,S,D]; is_sink: bool[B,S].
    Returns: both terms, float[B,H,S,D] each.
    """
    v = repeat_heads(v, weights.shape[1])                                       # (B,H,S,D)
    of_sink = is_sink[:, None, :, None]
    from_sinks = weights @ v.masked_fill(~of_sink, 0)
    from_others = weights @ v.masked_fill(of_sink, 0)
    return from_sinks, from_others


def nop_or_broadcast(out: Tensor, v: Tensor, v_sink: Tensor) -> tuple[Tensor, Tensor]:
    """Does attending to the sink switch a head off (NOP), or does it spread the sink's value?

    out: float[B,H,S,D]; v: float[B,G,S,D]; v_sink: float[B,G,D].
    Returns: |v_sink| divided by the median |v|, float[B,G], which is near 0 for a NOP. And the
    share of the outputs' variance over the tokens that lies along v_sink, float[B,H]. It is 1/D for
    outputs that vary alike in all directions, and 0 for outputs that do not vary.
    Source: arXiv 2606.08105.
    """
    ratio = v_sink.norm(dim=-1) / v.norm(dim=-1).median(-1).values
    direction = repeat_heads(F.normalize(v_sink, dim=-1), out.shape[1])         # (B,H,D)
    deviation = out - out.mean(2, keepdim=True)
    along = deviation @ direction[..., None]                                    # (B,H,S,1)
    variance = deviation.pow(2).sum((-1, -2))
    share = along.pow(2).sum((-1, -2)) / variance.clamp(min=1e-30)
    return ratio, share


def output_by_own_value(out: Tensor, v: Tensor) -> Tensor:
    """How long each head's output is, divided by the length of the token's own value.

    It is exactly 1 for a token that attends to itself alone, as the first token must. A mean of
    many values that point in different directions is shorter.
    out: float[B,H,S,D]; v: float[B,G,S,D]. Returns: float[B,H,S].
    Source: ours, after Chen et al., *How Attention Sinks Emerge in Large Language Models*
    (2603.06591).
    """
    return out.norm(dim=-1) / repeat_heads(v, out.shape[1]).norm(dim=-1)


def singular_entropy(hidden: Tensor) -> Tensor:
    """Over how many directions the vectors of a layer are spread, from 0 to 1.

    Let s be the singular values of the matrix (S,C) of a prompt's vectors, and p = s^2 / sum s^2.
    The entropy -sum p log p is divided by its largest possible value, log min(S,C). At 0 all
    vectors lie along one line. At 1 no direction is preferred.
    hidden: float[B,S,C]. Returns: float[B].
    Source: Queipo-de-Llano et al., *Attention Sinks and Compression Valleys in LLMs are Two Sides
    of the Same Coin* (2510.06477). Ours: the division, so that widths can be compared.
    """
    square = torch.linalg.svdvals(hidden.float()).pow(2)                        # (B,min(S,C))
    p = square / square.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(p, p).sum(-1)                # 0 log 0 counts as 0
    return entropy / math.log(p.shape[-1])


def probe(states: Tensor, labels: list[str], n_train: int) -> float:
    """Fit a linear map to the first n_train states: how often is it right about the others?

    states: float[N,C]. The map is a ridge regression with one output for each label, and the
    largest output wins. If the states do not differ, its guess is always the most frequent label
    of the first n_train. Returns: a share, 0 to 1.
    """
    classes = sorted(set(labels))
    target = torch.tensor([[label == name for name in classes] for label in labels]).double()
    states = states.cpu().double()                                              # (N,C)
    train, train_target = states[:n_train], target[:n_train]
    mean, target_mean = train.mean(0), train_target.mean(0)
    least = 1e-6 * states.abs().mean()                  # a smaller deviation is a rounding error
    x = (states - mean) / train.std(0).clamp(min=least)

    fitted = x[:n_train]
    ridge = 0.1 * n_train * torch.eye(x.shape[1]).double()
    weight = torch.linalg.solve(fitted.T @ fitted + ridge, fitted.T @ (train_target - target_mean))
    guesses = (x[n_train:] @ weight + target_mean).argmax(-1)                   # (N - n_train,)
    is_right = guesses == target[n_train:].argmax(-1)
    return is_right.double().mean().item()


# ---- In which layer should the row be opened? ---------------------------------------------------


def moved_by_opening(model: VideoLM, input_ids: Tensor, features: Tensor | None,
                     token: int) -> list[float]:
    """How far the last token's logits move if this token's row is opened in one layer alone.

    input_ids: int64[1,S]; features: float[1,F*M,C]. Returns: for each layer, the largest change of
    a logit. The row is opened by a mask, so the token need not be a sink. Source: ours.
    """
    S = input_ids.shape[1]
    L = model.config.text_config.num_hidden_layers
    causal = causal_mask(S, S, input_ids.device)
    is_token = torch.arange(S, device=input_ids.device)[None] == token          # (1,S)
    opened = open_sink_rows(causal, is_token)                                   # (1,S,S)
    baseline = model.head(model.hidden_states(input_ids, features=features)[:, -1])
    moves = []
    for l in range(L):
        masks = [causal] * L
        masks[l] = opened
        hidden = model.hidden_states(input_ids, features=features, masks=masks)
        moves.append((model.head(hidden[:, -1]) - baseline).abs().max().item())
    return moves
