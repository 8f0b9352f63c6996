"""A small video language model (SmolVLM2), its attention sink, and what OutRo does with that sink.

An attention sink is a token, mostly the first one, that draws far more attention than its meaning
explains. OutRo ("On the Nature of Attention Sink that Shapes Decoding Strategy in MLLMs", in its
second version "... in Omni-LLMs", arXiv 2603.14337) uses the sink while the prompt is read. It
needs no training, no second pass and no attention weights. Its six steps:

  1. find the sinks      tokens with one huge coordinate                         find_sinks
  2. build the mask      each token may attend to itself and to all before it    causal_mask
  3. open the sink rows  each sink may attend to the whole prompt, in one layer  open_sink_rows
  4. attend              softmax(q k^T / sqrt(D)) v                              attention
  5. sink value          the mean value vector of the layer's sinks              sink_value
  6. align               turn the outputs of all other tokens towards it         align_with_sink

Steps 2 and 4 belong to every decoder. The other four are the class `Sinks`, which a layer calls in
three places. The whole machine, and where the steps are:

    pixel_values (B,F,3,size,size)                     input_ids (B,S)
          |                                                  |
    VisionEncoder   P patches a frame                  embed_tokens
          |         (B*F,P,Cv)                               |
    Connector       M image tokens a frame                   |
          |         (B,F*M,C)                                |
          +----- merge: an image token's embedding  ---------+
                 is replaced by a projected frame vector
                                 |
                       hidden (B,S,C)        2. causal_mask, built once for all layers
                                 |
      DecoderLayer l   +---------+-----------------------------------------------+
      L times          |  sinks.find         1. find the sinks of this layer     |
                       |  sinks.open_rows    3. open their rows of the mask      |
                       |  norm, Attention:   q, k, v; rotate q, k; cache k, v    |
                       |                     4. attend                           |
                       |    sinks.align      5. sink value   6. align            |
                       |                     o_proj, + hidden                    |
                       |  norm, MLP,         + hidden                            |
                       +---------+-----------------------------------------------+
                                 |
                       norm, lm_head -> logits (B,S,V) -> the next token

OutRo may open rows only in layers l that are multiples of max(1, L // 7), and leaves the last
`skip_last` layers alone. The mask is a boolean tensor, to be read and edited. Where nobody has
edited it, the fused kernel of step 4 gets is_causal=True instead: faster, and the same result.

Apart from OutRo this is SmolVLM2, which differs from a plain Llama in three things:
  - a SigLIP encoder turns a frame into P patch vectors; a pixel shuffle folds scale_factor^2 of
    them into one and one linear layer projects it: M image tokens a frame;
  - in the prompt each image token's embedding is replaced by one projected vector, in time order;
  - image tokens are causal like all others, and positions count 0, 1, 2, ... over everything.

Sources are tagged: *paper* (the abstracts of its two versions), *release* (the published code,
github.com/kaistmm/OutRo at commit 2bee38c: file and function), *ours* (a choice, with its reason).
The architecture is that of SmolVLM2 in transformers; attributes are named as the checkpoint's keys.

Shapes, here, in the tests and in every comment:
  B batch            F frames           P patches a frame    M image tokens a frame
  S tokens of a call: the prompt, or those that follow it    Q query positions, K key positions
  H query heads      G key-value heads  D head size          C hidden size (Cv in the encoder)
  N sinks            V vocabulary       L layers, l one of them, 0-based

An empty dict given as `trace`, or a `Trace`, receives by name:
  vision.features (B*F,P,Cv), if frames are encoded    logits (B,S,V)
  projected (B,F*M,C), what calls take as `features`
  layers.l.hidden (B,S,C) the input of layer l         layers.l.ratio (B,S) max |h| over median |h|
  layers.l.is_sink (B,S)                               layers.l.relaxed (B,S) opened at this layer
  layers.l.v_sink (B,G,D)                              layers.l.out, .aligned (B,H,S,D)
  layers.l.cosine, .cosine_aligned (B,H,S) of out and aligned with v_sink
and, only for the layers in `weights_of` of a Trace:
  layers.l.weights (B,H,Q,K) probabilities             layers.l.may_attend (Q,K) or (B,Q,K)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minioutro.weights import (MODEL_FILES, fill, find_folder, load_tensors, read_eos, read_headers,
                               read_sections)

# ---- 1. Configuration: the fields of config.json that change the mathematics, with its names ----
# A field that is absent from the file takes the default that transformers gives it.


@dataclass(frozen=True)
class VisionConfig:
    hidden_size: int = 1152
    intermediate_size: int = 3072        # width of the MLP
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    image_size: int = 224                # pixels on each side of the square frame
    patch_size: int = 32                 # pixels on each side of a patch
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class TextConfig:
    hidden_size: int = 4096                      # C
    intermediate_size: int = 11008               # width of the MLP
    num_hidden_layers: int = 32                  # L
    num_attention_heads: int = 32                # H
    num_key_value_heads: int | None = None       # G; None: read_config fills in H
    head_dim: int | None = None                  # D; None: read_config fills in C / H
    vocab_size: int = 32000                      # V
    max_position_embeddings: int = 2048          # the context: the most tokens in prompt and answer
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0                  # pair i turns by theta^(-2i/D) radians a position


@dataclass(frozen=True)
class Config:
    vision_config: VisionConfig
    text_config: TextConfig
    image_token_id: int = 128257
    scale_factor: int = 2                        # pixel shuffle: M = P / scale_factor^2
    tie_word_embeddings: bool = False            # True: the output head is the embedding table


def read_config(folder) -> Config:
    """The config.json of a folder. Raises: ValueError for a value that is not implemented."""
    raw = read_sections(folder)
    vision = fill(VisionConfig, raw["vision_config"], "vision_config")
    text = fill(TextConfig, raw["text_config"], "text_config")
    H = text.num_attention_heads
    if text.num_key_value_heads is None:
        text = replace(text, num_key_value_heads=H)
    if text.head_dim is None:
        text = replace(text, head_dim=text.hidden_size // H)
    return fill(Config, raw, "top level", vision_config=vision, text_config=text)


@dataclass(frozen=True)
class OutRo:
    """The constants of the method. Raises: ValueError for impossible ones.

    Another detector is one line, such as OutRo(rule=lambda hidden: hidden.norm(dim=-1) > 500). A
    rule sees hidden states alone. What needs attention weights is an analysis and not a rule: the
    weights of a layer exist only after its sinks have been found.
    Source: release, model/outro.py and, for skip_last, model/modeling_qwen2_5_omni.py; the two
    switches, relax_every and rule are *ours*, for experiments.
    """
    abs_threshold: float = 100.0         # a sink has some |h| of at least this ...
    median_multiple: float = 1000.0      # ... and of at least this many times the median |h|
    relax: bool = True                   # step 3 on
    align: bool = True                   # step 6 on
    gamma: float = 3.0                   # strength of the alignment; 0 is none
    temperature: float = 0.1             # cosines well above it open the gate of step 6 fully
    relax_every: int | None = None       # step 3 in multiples of this layer; None: max(1, L // 7)
    skip_last: int = 2                   # the number of layers at the end that are left alone
    rule: Callable[[Tensor], Tensor] | None = None     # float[B,S,C] -> bool[B,S]; None: find_sinks

    def __post_init__(self):
        for name in ("abs_threshold", "median_multiple", "gamma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, not {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a positive number, not {self.temperature}")
        every = 1 if self.relax_every is None else self.relax_every
        for name, value, least in (("relax_every", every, 1), ("skip_last", self.skip_last, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number from {least} on, not {value}")

    def find(self, hidden: Tensor) -> Tensor:
        """The tokens that the rule calls sinks: float[B,S,C] -> bool[B,S]."""
        if self.rule is not None:
            return self.rule(hidden)
        return find_sinks(hidden, self.abs_threshold, self.median_multiple)


# ---- 2. SigLIP: a frame -> P patch vectors ------------------------------------------------------


class VisionEmbeddings(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        n = c.image_size // c.patch_size                # patches on each side: P = n * n
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, stride=c.patch_size)
        # nn.Embedding(n * n, Cv) would draw random values first, which costs a second of imports
        self.position_embedding = nn.Embedding.from_pretrained(
            torch.empty(n * n, c.hidden_size), freeze=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding(pixels)                             # (B,3,size,size) -> (B,Cv,n,n)
        x = x.flatten(2).transpose(1, 2)                           # (B,Cv,n,n) -> (B,P,Cv), by rows
        return x + self.position_embedding.weight                  # position p is the p-th patch


class VisionLayer(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.n_heads = c.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(c.hidden_size, c.hidden_size)
                                        for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c.hidden_size, c.intermediate_size),
                                  "fc2": nn.Linear(c.intermediate_size, c.hidden_size)})

    def forward(self, x: Tensor) -> Tensor:                         # float[B,P,Cv] -> the same
        attn = self.self_attn
        y = self.layer_norm1(x)
        q = split_heads(attn.q_proj(y), self.n_heads)                        # (B,P,Cv) -> (B,H,P,D)
        k = split_heads(attn.k_proj(y), self.n_heads)
        v = split_heads(attn.v_proj(y), self.n_heads)
        out = F.scaled_dot_product_attention(q, k, v)                # all patches see each other
        x = x + attn.out_proj(merge_heads(out))
        y = F.gelu(self.mlp.fc1(self.layer_norm2(x)), approximate="tanh")
        return x + self.mlp.fc2(y)


class VisionEncoder(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.encoder = nn.ModuleDict({
            "layers": nn.ModuleList(VisionLayer(c) for _ in range(c.num_hidden_layers))})
        self.post_layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """float[B,3,size,size] -> float[B,P,Cv]."""
        x = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


# ---- 3. Connector: P patch vectors -> M image tokens of the decoder's width ---------------------


def pixel_shuffle(x: Tensor, scale: int) -> Tensor:
    """Fold each scale x scale square of neighbouring patches into one vector.

    x: float[B,P,Cv], patches row by row. Returns: float[B, P/scale^2, Cv*scale^2].
    """
    B, P, Cv = x.shape
    n = math.isqrt(P)
    x = x.view(B, n // scale, scale, n // scale, scale, Cv)     # (B, Y, dy, X, dx, Cv)
    x = x.transpose(2, 3)                                       # (B, Y, X, dy, dx, Cv)
    return x.reshape(B, P // scale**2, Cv * scale**2)


class Connector(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.scale, C = c.scale_factor, c.text_config.hidden_size
        n_in = c.vision_config.hidden_size * c.scale_factor**2
        self.modality_projection = nn.ModuleDict({"proj": nn.Linear(n_in, C, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.modality_projection.proj(pixel_shuffle(x, self.scale))     # (B,P,Cv) -> (B,M,C)


# ---- 4. Pieces of the decoder: heads, norm, positions -------------------------------------------


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    B, S, _ = x.shape
    return x.view(B, S, n_heads, -1).transpose(1, 2)            # (B,S,H*D) -> (B,H,S,D)


def merge_heads(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)                       # (B,H,S,D) -> (B,S,H*D)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:                         # float[...,C] -> the same
        h = x.float()                            # in float32: 256^2 is too large for float16
        h = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rope_tables(positions: Tensor, D: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """positions: int64[...] -> cosine and sine of their angles, float[...,D] each, as `like`."""
    frequencies = theta ** -(torch.arange(0, D, 2, device=like.device).float() / D)       # (D/2,)
    angles = (positions[..., None].float() * frequencies).tile(2)      # radians, for either half
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x: float[B,H,S,D].

    Pair i of a head is (x[i], x[i + D/2]), the split halves of the Hugging Face checkpoints. The
    original Llama pairs neighbours, (x[2i], x[2i+1]). Its weights are the same up to a permutation
    of the rows of q_proj and k_proj. The wrong convention looks almost right for ten tokens.
    """
    left, right = x.chunk(2, dim=-1)                            # (B,H,S,D) -> two (B,H,S,D/2)
    # x cos + (-right, left) sin, in one step
    return torch.addcmul(x * cos, torch.cat([-right, left], dim=-1), sin)


# ---- 5. Masks: one polarity everywhere, True = this query may attend to that key ----------------


def causal_mask(n_query: int, n_key: int, device=None) -> Tensor:
    """The causal mask of the last n_query of n_key positions: bool[Q,K].

    The triangle counts from the lower right corner, so that with a cache (Q < K) new tokens see all
    that came before:

        Q = K = 4        Q = 2, K = 4      the sink at 1 opened (open_sink_rows)
        ■ · · ·                            ■ · · ·
        ■ ■ · ·                            ■ ■ ■ ■
        ■ ■ ■ ·          ■ ■ ■ ·           ■ ■ ■ ·
        ■ ■ ■ ■          ■ ■ ■ ■           ■ ■ ■ ■

    Every row has a True, as the softmax needs it.
    """
    assert 0 < n_query <= n_key, f"{n_query} queries are not the last of {n_key} positions"
    return torch.ones(n_query, n_key, dtype=torch.bool, device=device).tril(n_key - n_query)


def open_sink_rows(may_attend: Tensor, is_sink: Tensor) -> Tensor:
    """Let each of these sinks attend to the whole prompt, later tokens included; other rows stay.

    may_attend: bool[S,S] or bool[B,S,S]; is_sink: bool[B,S]. Returns: bool[B,S,S].
    Keys and values are not changed: the others meet the richer sink in the next layer.
    Source: paper (attend beyond the causal constraint); release, model/outro.py, where these rows
    are computed a second time without a mask.
    """
    assert may_attend.shape[-2:] == (is_sink.shape[1],) * 2, (may_attend.shape, is_sink.shape)
    return may_attend | is_sink[:, :, None]                     # (S,S) | (B,S,1) -> (B,S,S)


def show_mask(may_attend: Tensor, labels: list[str] | None = None) -> str:
    """A mask as text, one row a line, ■ where the query may attend. Labels stand beside their rows.

    Example: show_mask(causal_mask(2, 3), ["", "new"]) -> "■ ■ ·\\n■ ■ ■   <- new"
    """
    rows = [" ".join("■" if allowed else "·" for allowed in row) for row in may_attend.tolist()]
    return "\n".join(row + (f"   <- {label}" if label else "")
                     for row, label in zip(rows, labels or [""] * len(rows), strict=True))


# ---- 6. The method, as functions: tensors in, tensors out ---------------------------------------


def activation_ratio(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The two numbers that the rule for sinks compares.

    hidden: float[B,S,C]. Returns: the largest |h| of each token, float[B,S], and the median |h| of
    all tokens and coordinates of the item, float[B,1] (the lower of the two middle values).
    """
    magnitude = hidden.abs().float()
    return magnitude.amax(-1), torch.stack([item.median() for item in magnitude])[:, None]


def find_sinks(hidden: Tensor, abs_threshold: float, median_multiple: float) -> Tensor:
    """A token is a sink if one of its coordinates is massive, by itself and against its prompt.

    hidden: float[B,S,C], the input of a decoder layer before its norm. Returns: bool[B,S].
    Source: release, model/outro.py; the rule of "Massive Activations in LLMs" (arXiv 2402.17762).
    The release searches batch item 0 and uses its sinks for all; each item has its own here.
    """
    assert hidden.dim() == 3, f"hidden states are (B,S,C), not {tuple(hidden.shape)}"
    is_sink = hidden.abs().amax(-1) >= abs_threshold
    if is_sink.any():       # skip the slow median if no token passes the absolute threshold
        largest, median = activation_ratio(hidden)
        is_sink = is_sink & (largest >= median_multiple * median)
    return is_sink


def repeat_heads(x: Tensor, H: int) -> Tensor:
    """(B,G,...) -> (B,H,...): key-value head j serves the H/G query heads from j*H/G on."""
    return x.repeat_interleave(H // x.shape[1], dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor, may_attend: Tensor) -> tuple[Tensor, Tensor]:
    """Attention written out, to be read and for its weights; `fused_attention` equals it.

    q: float[B,H,Q,D]; k, v: float[B,G,K,D]; may_attend: bool[Q,K] or bool[B,Q,K].
    Returns: out float[B,H,Q,D] and weights float[B,H,Q,K], probabilities that sum to 1 over K.
    """
    B, H, Q, D = q.shape
    k, v = repeat_heads(k, H), repeat_heads(v, H)                       # (B,G,K,D) -> (B,H,K,D)
    scores = q @ k.transpose(-1, -2) / D**0.5                           # (B,H,Q,K)
    scores = scores.masked_fill(~may_attend.unsqueeze(-3), -math.inf)   # one mask for all heads
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v, weights


def fused_attention(q: Tensor, k: Tensor, v: Tensor, may_attend: Tensor,
                    is_causal: bool = False) -> Tensor:
    """`attention` without its weights: one call, which need not hold all (Q,K) scores at once.

    Shapes as there. is_causal says that may_attend is `causal_mask(Q, K)`, which is faster.
    Returns: float[B,H,Q,D].
    """
    B, H, Q, D = q.shape
    mask = may_attend if may_attend.dim() == 2 else may_attend[:, None]     # (Q,K) or (B,1,Q,K)
    if Q == 1:
        # Decoding. The H/G heads that share a key-value head become its H/G queries, so that k and
        # v are read only once.
        q = q.reshape(B, k.shape[1], -1, D)                             # (B,H,1,D) -> (B,G,H/G,D)
    else:
        k, v = repeat_heads(k, H), repeat_heads(v, H)                   # (B,G,K,D) -> (B,H,K,D)
    # With is_causal=True a kernel skips the forbidden half. Not on MPS, where it attended to
    # forbidden keys in half precision.
    kernel_masks = is_causal and Q == k.shape[2] and q.device.type != "mps"
    sees_all = is_causal and Q == 1                 # the newest token may attend to every key
    if kernel_masks or sees_all:
        mask = None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kernel_masks)
    return out.reshape(B, H, Q, D)              # not view: kernels differ in the layout they return


def sink_value(v: Tensor, is_sink: Tensor) -> Tensor:
    """The mean value vector of an item's sinks, for each key-value head.

    v: float[B,G,S,D]; is_sink: bool[B,S]. Returns: float[B,G,D], zeros for an item without sinks.
    Source: paper (the sink's value acts as a shared bias); release, model/outro.py.
    """
    assert (v.shape[0], v.shape[2]) == is_sink.shape, (v.shape, is_sink.shape)
    of_sinks = v.masked_fill(~is_sink[:, None, :, None], 0)     # (B,G,S,D), zero but at the sinks
    n_sinks = is_sink.sum(1).clamp(min=1)                       # (B,)
    return of_sinks.sum(2) / n_sinks[:, None, None]


def cosine(out: Tensor, v_sink: Tensor) -> Tensor:
    """Of each head's output with its sink value: (B,H,S,D), (B,G,D) -> float32[B,H,S]."""
    v = repeat_heads(v_sink, out.shape[1])[:, :, None]                            # (B,H,1,D)
    return F.cosine_similarity(out.float(), v.float(), dim=-1, eps=1e-12)


def align_with_sink(out: Tensor, v_sink: Tensor, ever_sink: Tensor, gamma: float,
                    temperature: float) -> Tensor:
    """Turn each head's output o towards the sink's value v, in the plane of the two, keeping |o|.

        c = cos(o, v)     g = tanh(relu(c) / temperature)     p = (<o, v> / (|v|^2 + 1e-8)) v
        t = o + g * gamma * p, then scaled to the length of o: o' = t * |o| / (|t| + 1e-8)

    With gamma 3, an angle of 80 degrees to v becomes 56, and one of 45 becomes 14. An angle of 90
    degrees or more stays as it is.
    out: float[B,H,S,D], before o_proj; v_sink: float[B,G,D]; ever_sink: bool[B,S], tokens that were
    a sink at this or an earlier layer and are left alone, as are items whose v_sink is zero.
    Returns: float[B,H,S,D]. Computed in float32: 1e-8 is zero in float16.
    Source: paper (align non-sink tokens with the sink); release, model/outro.py.
    """
    assert ever_sink.shape == (out.shape[0], out.shape[2]), (out.shape, ever_sink.shape)
    o, v = out.float(), repeat_heads(v_sink, out.shape[1]).float().unsqueeze(2)   # v: (B,H,1,D)
    o_norm, v_norm = o.norm(dim=-1, keepdim=True), v.norm(dim=-1, keepdim=True)
    dot = o @ v.mT                                                                # (B,H,S,1)
    c = dot / (o_norm.clamp(min=1e-12) * v_norm.clamp(min=1e-12))
    g = torch.tanh(c.relu() / temperature)
    push = g * gamma * dot / (v_norm**2 + 1e-8)             # (B,H,S,1), how many v are added to o
    stays = ever_sink | (v_sink == 0).flatten(1).all(1, keepdim=True)             # (B,S)
    stays = stays[:, None, :, None]                                               # (B,1,S,1)
    turned = torch.addcmul(o, push.masked_fill(stays, 0), v)                      # o + push * v
    scale = o_norm / (turned.norm(dim=-1, keepdim=True) + 1e-8)
    # Tokens that are left alone are returned unchanged, bit for bit: o + 0 v, times 1.
    return (turned * scale.masked_fill(stays, 1)).to(out.dtype)


# ---- 7. The method at work on one prompt --------------------------------------------------------


class Sinks:
    """OutRo at work on one prompt: `find` and `open_rows` before a layer attends, `align` after it.

    It is made when a prompt begins, filled layer by layer while the prompt is read, and then fixed.
    Tokens that follow the prompt are never searched and open no row. They are aligned with what the
    prompt has left here. `l in v_sink` says that layer l has read the prompt.
    """

    def __init__(self, outro: OutRo, n_layers: int, nobody: Tensor):
        """nobody: bool[B,S], False for each token of the prompt."""
        self.outro = outro
        self.searched = range(n_layers - outro.skip_last)           # the layers that are touched
        self.relax_every = outro.relax_every or max(1, n_layers // 7)
        self.ever_sink = nobody                     # bool[B,S], a sink in any layer so far
        self.opened = nobody                        # bool[B,S], row opened in any layer so far
        self.is_sink: dict[int, Tensor] = {}        # of each searched layer, bool[B,S]
        self.opened_in: dict[int, Tensor] = {}      # of each layer that opened rows, bool[B,S]
        self.v_sink: dict[int, Tensor] = {}         # of each searched layer, float[B,G,D]

    def find(self, l: int, hidden: Tensor, is_token: Tensor | None = None) -> None:
        """Step 1: search layer l of the prompt for sinks.

        hidden: float[B,S,C], the input of the layer. is_token: bool[B,S], False for padding, which
        would change the median; None where there is no padding (lab/attach.py has some).
        """
        if l not in self.searched or l in self.v_sink:
            return
        if is_token is None:
            is_sink = self.outro.find(hidden)
        else:
            is_sink = torch.zeros_like(is_token)
            for b, real in enumerate(is_token):                     # each item without its padding
                is_sink[b, real] = self.outro.find(hidden[b, real][None])[0]
        assert is_sink.shape == hidden.shape[:2] and is_sink.dtype == torch.bool, (
            f"a rule gives bool[B,S] = {tuple(hidden.shape[:2])}, not {is_sink.dtype} "
            f"{tuple(is_sink.shape)}")
        self.is_sink[l] = is_sink
        self.ever_sink = self.ever_sink | is_sink

    def open_rows(self, l: int, may_attend: Tensor) -> Tensor:
        """Step 3: open the rows of the sinks of layer l whose rows no earlier layer has opened.

        may_attend: bool[S,S] or bool[B,S,S]. Returns: bool[B,S,S]; or may_attend itself, if no row
        is opened here: in most layers, and for tokens that follow the prompt.
        """
        is_its_turn = l % self.relax_every == 0
        if not self.outro.relax or not is_its_turn or l not in self.is_sink:
            return may_attend
        new_sinks = self.is_sink[l] & ~self.opened
        if not new_sinks.any():
            return may_attend
        self.opened_in[l] = new_sinks
        self.opened = self.opened | new_sinks
        return open_sink_rows(may_attend, new_sinks)

    def align(self, l: int, out: Tensor, v: Tensor) -> Tensor:
        """Steps 5 and 6: turn the outputs of layer l towards the value of the prompt's sinks.

        out: float[B,H,S,D], of the prompt or of tokens that follow it; v: float[B,G,K,D], values of
        all tokens so far. Returns: float[B,H,S,D].
        Source: release, model/outro.py; *ours*, that all tokens after the prompt are aligned. The
        release looks up the index of a new token among the prompt's sinks: in a call with one new
        token, a layer whose own sinks include position 0 aligns nothing.
        """
        if l not in self.is_sink:                                   # one of the last layers
            return out
        is_prompt = l not in self.v_sink
        if is_prompt:
            self.v_sink[l] = sink_value(v, self.is_sink[l])                         # step 5
        if not self.outro.align:
            return out
        if is_prompt:
            left_alone = self.ever_sink                     # a sink in this or an earlier layer
        else:
            left_alone = torch.zeros_like(out[:, 0, :, 0], dtype=torch.bool)      # (B,S), nobody
        return align_with_sink(out, self.v_sink[l], left_alone, self.outro.gamma,
                               self.outro.temperature)                              # step 6


# ---- 8. What outlives a layer: the cache and the trace ------------------------------------------


@dataclass
class Cache:
    """Keys and values of all tokens so far. The first call, at length 0, brings the prompt."""
    k: list[Tensor] = field(default_factory=list)   # of each layer, float[B,G,K + spare room,D]
    v: list[Tensor] = field(default_factory=list)
    length: int = 0                                 # K, tokens that went through all layers
    # None: OutRo is off. Set it to None after the prompt to switch OutRo off for the answer.
    sinks: Sinks | None = None

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the S new positions of a layer; `length` moves when all layers have theirs.

        k, v: float[B,G,S,D]. Returns: the first `length` and these, float[B,G,length + S,D].
        """
        if self.length == 0:
            del self.k[layer:], self.v[layer:]              # what an interrupted prompt has left
            self.k.append(k)
            self.v.append(v)
            return k, v
        end = self.length + k.shape[2]
        if end > self.k[layer].shape[2]:
            more = (0, 0, 0, k.shape[2] + 256)                      # positions, with room to spare
            self.k[layer] = F.pad(self.k[layer], more)
            self.v[layer] = F.pad(self.v[layer], more)
        self.k[layer][:, :, self.length:end] = k
        self.v[layer][:, :, self.length:end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def keys(self, layer: int) -> Tensor:
        """Rotated keys of the first `length` tokens, float[B,G,K,D]: a view, to read or to edit."""
        return self.k[layer][:, :, :self.length]

    def values(self, layer: int) -> Tensor:
        """The values likewise."""
        return self.v[layer][:, :, :self.length]


class Trace(dict):
    """A trace that also keeps the attention weights of some layers. A plain {} keeps none.

    Its size in bytes, in float32: 4 L B S (C + 2 H D + 2 H) for a prompt, 4 B S V for its logits,
    4 B F P Cv for its frames, and 4 B H S^2 for each layer in weights_of.
    """
    def __init__(self, weights_of=()):
        super().__init__()
        self.weights_of = weights_of                # layers, 0-based


def record(trace: dict, l: int, **tensors: Tensor) -> None:
    """File tensors of layer l under the names at the top of this file."""
    trace.update({f"layers.{l}.{name}": tensor for name, tensor in tensors.items()})


def record_sinks(trace: dict, l: int, hidden: Tensor, cache: Cache) -> None:
    """File what OutRo found and did in layer l, after its attention has filed `out` and `aligned`.

    hidden: float[B,S,C], the layer's input. What OutRo did not do is filed as False or zero.
    """
    nobody = hidden.new_zeros(hidden.shape[:2], dtype=torch.bool)                     # (B,S)
    is_sink, relaxed = nobody, nobody
    v_sink = torch.zeros_like(cache.v[l][:, :, 0])                                    # (B,G,D)
    if cache.sinks:
        v_sink = cache.sinks.v_sink.get(l, v_sink)
        if cache.length == 0:                                   # later tokens are not searched
            is_sink = cache.sinks.is_sink.get(l, nobody)
            relaxed = cache.sinks.opened_in.get(l, nobody)
    largest, median = activation_ratio(hidden)
    out, aligned = trace[f"layers.{l}.out"], trace[f"layers.{l}.aligned"]
    record(trace, l, hidden=hidden, ratio=largest / median, is_sink=is_sink, relaxed=relaxed,
           v_sink=v_sink, cosine=cosine(out, v_sink), cosine_aligned=cosine(aligned, v_sink))


# ---- 9. The decoder layer: a plain Llama, and the three places where it asks OutRo ---------------


class Attention(nn.Module):
    def __init__(self, c: TextConfig, index: int):
        super().__init__()
        C, D, H, G = c.hidden_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads
        self.index, self.n_heads, self.n_kv_heads = index, H, G
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, G * D, bias=False)
        self.v_proj = nn.Linear(C, G * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, may_attend: Tensor, is_causal: bool,
                cache: Cache, trace: dict | None) -> Tensor:
        """x: float[B,S,C], normed. Returns: float[B,S,C]. The rest: see `DecoderLayer.forward`."""
        l, sinks = self.index, cache.sinks
        q = rotate(split_heads(self.q_proj(x), self.n_heads), cos, sin)       # (B,S,C) -> (B,H,S,D)
        k = rotate(split_heads(self.k_proj(x), self.n_kv_heads), cos, sin)    # (B,S,C) -> (B,G,S,D)
        v = split_heads(self.v_proj(x), self.n_kv_heads)                      # (B,S,C) -> (B,G,S,D)
        k, v = cache.extend(l, k, v)                                            # -> (B,G,K,D)

        if isinstance(trace, Trace) and l in trace.weights_of:
            out, weights = attention(q, k, v, may_attend)                       # step 4
            record(trace, l, weights=weights, may_attend=may_attend)
        else:
            out = fused_attention(q, k, v, may_attend, is_causal)               # step 4, (B,H,S,D)

        aligned = out
        if sinks:
            aligned = sinks.align(l, out, v)                                    # steps 5 and 6
        if trace is not None:
            record(trace, l, out=out, aligned=aligned)
        return self.o_proj(merge_heads(aligned))


class MLP(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:                         # float[B,S,C] -> the same
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, c: TextConfig, index: int):
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, index)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, may_attend: Tensor,
                is_causal: bool, cache: Cache, trace: dict | None) -> Tensor:
        """One layer of Llama. Without `cache.sinks` it is plain.

        hidden: float[B,S,C], a prompt if the cache is empty, else the tokens that follow it.
        cos, sin: float[B or 1,1,S,D] of the tokens' positions; the 1 is for the heads. may_attend:
        bool[S,K] or bool[B,S,K]; is_causal says that it is the plain causal mask.
        Returns: float[B,S,C], the input of the next layer. Changes: the cache, which gets keys and
        values; cache.sinks, which remembers what was found and opened; the trace.
        """
        l, sinks = self.index, cache.sinks
        if sinks:
            sinks.find(l, hidden)                                               # step 1
            closed = may_attend                                                 # of step 2
            may_attend = sinks.open_rows(l, closed)                             # step 3
            is_causal = is_causal and may_attend is closed                      # nothing was opened
        x = self.input_layernorm(hidden)
        attended = hidden + self.self_attn(x, cos, sin, may_attend, is_causal, cache, trace)
        if trace is not None:
            record_sinks(trace, l, hidden, cache)
        return attended + self.mlp(self.post_attention_layernorm(attended))


# ---- 10. The whole model ------------------------------------------------------------------------


class VideoLM(nn.Module):
    """SmolVLM2: frames and token ids -> logits. Its attribute tree is the checkpoint's key tree."""

    def __init__(self, config: Config, eos_token_ids: tuple[int, ...] = ()):
        super().__init__()
        text, L = config.text_config, config.text_config.num_hidden_layers
        self.config, self.eos_token_ids = config, eos_token_ids
        self.load_report = "not loaded: the weights have no values yet"
        self.model = nn.ModuleDict({
            "vision_model": VisionEncoder(config.vision_config),
            "connector": Connector(config),
            "text_model": nn.ModuleDict({
                "embed_tokens": nn.Embedding.from_pretrained(
                    torch.empty(text.vocab_size, text.hidden_size), freeze=False),
                "layers": nn.ModuleList(DecoderLayer(text, l) for l in range(L)),
                "norm": RMSNorm(text.hidden_size, text.rms_norm_eps)})})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    def encode(self, pixel_values: Tensor, trace: dict | None = None) -> Tensor:
        """Encoder, pixel shuffle and projector, one frame after another to save memory.

        pixel_values: float[B,F,3,size,size] in -1..1.
        Returns: float[B,F*M,C], the image tokens of all frames in order.
        Raises: ValueError if the frames are not of the size that the encoder's positions are for.
        """
        size = self.config.vision_config.image_size
        if pixel_values.dim() != 5 or pixel_values.shape[2:] != (3, size, size):
            raise ValueError(f"pixel_values must be (B,F,3,{size},{size}) for this model, "
                             f"not {tuple(pixel_values.shape)}")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be numbers from -1 to 1, not {pixel_values.dtype}")
        vision, connector = self.model.vision_model, self.model.connector
        pixel_values = pixel_values.to(connector.modality_projection.proj.weight.dtype)
        patches = []
        image_tokens = []
        for frame in pixel_values.unbind(1):                               # (B,3,size,size)
            x = vision(frame)                                              # (B,P,Cv)
            image_tokens.append(connector(x))                              # (B,M,C)
            if trace is not None:              # keep them only when tracing, because they are large
                patches.append(x)
        if trace is not None:
            trace["vision.features"] = torch.stack(patches, dim=1).flatten(0, 1)
        return torch.cat(image_tokens, dim=1)

    def merge(self, hidden: Tensor, input_ids: Tensor, features: Tensor) -> Tensor:
        """Replace the embedding of each image token, in order, by a projected vector: (B,S,C)."""
        is_image = input_ids == self.config.image_token_id                              # (B,S)
        counts, (B, _, C) = is_image.sum(1).tolist(), hidden.shape
        if any(features.shape != (B, count, C) for count in counts):
            raise ValueError(f"the prompts have {counts} image tokens of size {C}, the videos give "
                             f"{tuple(features.shape)} features; the two must match")
        return hidden.masked_scatter(is_image[:, :, None], features.to(hidden.dtype))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None, features: Tensor | None,
              trace: dict | None) -> Tensor:
        """The input of the first layer: float[B,S,C], image tokens merged in."""
        if pixel_values is not None and features is not None:
            raise ValueError("give pixel_values or features, not both")
        hidden = self.model.text_model.embed_tokens(input_ids)
        if pixel_values is not None:
            features = self.encode(pixel_values, trace)
        if features is None:
            return hidden
        if trace is not None:
            trace["projected"] = features
        return self.merge(hidden, input_ids, features)

    def check(self, input_ids: Tensor, outro: OutRo | None, cache: Cache, trace: dict | None):
        """Raise ValueError for arguments that would give wrong numbers, or fail deep inside."""
        text = self.config.text_config
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must be (B,S), S from 1 on, not {tuple(input_ids.shape)}")
        for token_id in (input_ids.min().item(), input_ids.max().item()):
            if not 0 <= token_id < text.vocab_size:
                raise ValueError(f"input_ids has {token_id}, and this model's tokens are 0 to "
                                 f"{text.vocab_size - 1}")
        K, most = cache.length + input_ids.shape[1], text.max_position_embeddings
        if K > most:
            raise ValueError(f"{K} tokens do not fit into the model's context of {most}; use fewer "
                             f"frames or a shorter question")
        if trace:
            raise ValueError("trace must be empty; give each call its own")
        kept = cache.k[0] if cache.length else input_ids                # an empty cache always fits
        if (len(kept), kept.device) != (len(input_ids), input_ids.device):
            raise ValueError(f"input_ids has B = {len(input_ids)} on {input_ids.device}, and the "
                             f"cache {len(kept)} on {kept.device}; begin with an empty cache")
        read_with = cache.sinks.outro if cache.sinks else None
        if cache.length and outro not in (None, read_with):
            raise ValueError(f"outro is {outro}, and the prompt in the cache was read with "
                             f"{read_with}; leave it out after the prompt")

    def hidden_states(self, input_ids: Tensor, pixel_values: Tensor | None = None,
                      features: Tensor | None = None, outro: OutRo | None = None,
                      cache: Cache | None = None, trace: dict | None = None,
                      masks: list[Tensor] | None = None,
                      positions: Tensor | None = None) -> Tensor:
        """`forward` without the output head: float[B,S,C], normed, ready for `head`.

        For experiments, masks: a list of L masks, one a layer, bool[S,K] or bool[B,S,K], instead of
        the causal one; positions: int64[B,S], where they do not count 0, 1, 2, ... over all tokens.
        """
        c, text = self.config.text_config, self.model.text_model
        cache = Cache() if cache is None else cache
        self.check(input_ids, outro, cache, trace)
        start, S = cache.length, input_ids.shape[1]
        if start == 0:                                                          # a prompt begins
            nobody = torch.zeros_like(input_ids, dtype=torch.bool)
            cache.sinks = Sinks(outro, c.num_hidden_layers, nobody) if outro else None

        hidden = self.embed(input_ids, pixel_values, features, trace)                   # (B,S,C)
        if positions is None:
            positions = torch.arange(start, start + S, device=hidden.device)[None]      # (1,S)
        cos, sin = rope_tables(positions[:, None], c.head_dim, c.rope_theta, like=hidden)
        is_causal = masks is None
        if is_causal:                                       # step 2, for all layers
            masks = [causal_mask(S, start + S, hidden.device)] * c.num_hidden_layers
        for layer, may_attend in zip(text.layers, masks, strict=True):
            hidden = layer(hidden, cos, sin, may_attend, is_causal, cache, trace)
        cache.length = start + S
        return text.norm(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states -> logits: (B,S,C) -> (B,S,V)."""
        tied = self.config.tie_word_embeddings
        table = self.model.text_model.embed_tokens if tied else self.lm_head
        return F.linear(hidden, table.weight)

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None,
                features: Tensor | None = None, outro: OutRo | None = None,
                cache: Cache | None = None, trace: dict | None = None) -> Tensor:
        """Logits of the next token at every position.

        input_ids: int64[B,S], prompts of equal length; with a filled cache only the new tokens.
        pixel_values: float[B,F,3,size,size] in -1..1; or features: float[B,F*M,C] from `encode`,
        where several runs share a video. With neither, an image token is a token like any other.
        outro: the constants, None for the baseline. cache: extended by these tokens. A call with an
        empty one brings the whole prompt, and outro for all that follow. trace: an empty dict.
        Returns: float[B,S,V]. Raises: ValueError that names an argument which does not fit.
        """
        hidden = self.hidden_states(input_ids, pixel_values, features, outro, cache, trace)
        logits = self.head(hidden)
        if trace is not None:
            trace["logits"] = logits
        return logits

    # ---- 11. Generation -------------------------------------------------------------------------

    @torch.inference_mode()
    def stream(self, input_ids: Tensor, pixel_values: Tensor | None = None,
               features: Tensor | None = None, max_new_tokens: int = 64,
               outro: OutRo | None = None, trace: dict | None = None):
        """Yield the greedy answer's token ids one by one, eos included, then stop.

        One prompt, int64[1,S]. The trace is filled while the prompt is read, with the logits of its
        last position only, float[1,1,V]. The answer also ends where the model's context does.
        Raises: ValueError as `forward`, at the first token; if the logits are not finite, at any.
        """
        if input_ids.shape[0] != 1:
            raise ValueError(f"stream answers one prompt at a time, not {input_ids.shape[0]}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        cache = Cache()
        hidden = self.hidden_states(input_ids, pixel_values, features, outro, cache, trace)
        # + 1, because the last token of an answer is not fed back
        room = self.config.text_config.max_position_embeddings - input_ids.shape[1] + 1
        limit = min(max_new_tokens, room)
        for n in range(1, limit + 1):
            logits = self.head(hidden[:, -1:])                                          # (1,1,V)
            if not logits.isfinite().all():
                raise ValueError(f"the model computes no finite numbers as {str(logits.dtype)[6:]};"
                                 f" try another dtype, or a smaller gamma if you raised it")
            if trace is not None and n == 1:
                trace["logits"] = logits
            token = logits.argmax(-1)                                                   # (1,1)
            token_id = token.item()
            yield token_id
            if token_id in self.eos_token_ids or n == limit:
                return
            hidden = self.hidden_states(token, cache=cache)                             # (1,1,C)

    def generate(self, *args, **kwargs) -> list[int]:
        """The token ids that `stream` yields for the same arguments, in a list."""
        return list(self.stream(*args, **kwargs))

    # ---- 12. Loading ----------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path_or_repo, revision: str | None = None, device: str = "cpu",
                        dtype: torch.dtype = torch.float32) -> "VideoLM":
        """A model from a folder or from a repository of the Hugging Face hub.

        `load_report` says in one line what was loaded. The parameters ask for no gradient.
        Raises: ValueError or OSError that names the file and what is wrong with it.
        """
        folder = find_folder(path_or_repo, revision, MODEL_FILES)
        config = read_config(folder)
        stored = read_headers(folder, config)
        with torch.device("meta"):                     # only shapes: the tensors come from the file
            model = cls(config, read_eos(folder))
        model.load_report = load_tensors(model, folder, stored, device, dtype)
        return model.eval().requires_grad_(False)
