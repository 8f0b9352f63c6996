"""The exercises of minioutro's tutorial: replace each `raise` with your own lines.

    cp tests/course/starter.py my_module.py                              your copy
    python -m pytest tests/course --impl my_module.py -m exercise_4      tests one exercise
    python tests/course/grade.py my_module.py                            grades all of them

The tutorial's text and this module say all that you need. An exercise may need an earlier one. You can use your own
solution, or import ours from minioutro.model. If you import ours, delete the stub here, because it would hide the
import. An import costs the points of its own exercise, and of no other. Answers in words go to the end of this file.

Shapes, here, in the tests and in every comment:
  B batch            F frames           P patches a frame    M image tokens a frame
  S tokens of a call: the prompt, or those that follow it    Q query positions, K key positions
  H query heads      G key-value heads  D head size          C hidden size (Cv in the encoder)
  N sinks            V vocabulary       L layers, l one of them, 0-based
"""

import math  # noqa: F401, for you to use
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: F401
from torch import Tensor, nn

from minioutro.model import OutRo, cosine  # noqa: F401

# ---- Exercise 1: Pixel shuffle (5 points) ----


def pixel_shuffle(x: Tensor, scale: int) -> Tensor:
    """Fold each scale x scale square of neighbouring patches into one vector.

    x: float[B,P,Cv], patches row by row. Returns: float[B, P/scale^2, Cv*scale^2].
    """
    raise NotImplementedError("not written yet: exercise 1")


# ---- Exercise 2: Norm and positions (5 points) ----


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:                         # float[...,C] -> the same
        raise NotImplementedError("not written yet: exercise 2")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x: float[B,H,S,D].

    Pair i of a head is (x[i], x[i + D/2]), the split halves of the Hugging Face checkpoints. The
    original Llama pairs neighbours, (x[2i], x[2i+1]). Its weights are the same up to a permutation
    of the rows of q_proj and k_proj. The wrong convention looks almost right for ten tokens.
    """
    raise NotImplementedError("not written yet: exercise 2")


# ---- Exercise 3: The masks (5 points) ----


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
    raise NotImplementedError("not written yet: exercise 3")


def open_sink_rows(may_attend: Tensor, is_sink: Tensor) -> Tensor:
    """Let each of these sinks attend to the whole prompt, later tokens included; other rows stay.

    may_attend: bool[S,S] or bool[B,S,S]; is_sink: bool[B,S]. Returns: bool[B,S,S].
    Keys and values are not changed: the others meet the richer sink in the next layer.
    Source: paper (attend beyond the causal constraint); release, model/outro.py, where these rows
    are computed a second time without a mask.
    """
    raise NotImplementedError("not written yet: exercise 3")


# ---- Exercise 4: Grouped-query attention (10 points) ----


def repeat_heads(x: Tensor, H: int) -> Tensor:
    """(B,G,...) -> (B,H,...): key-value head j serves the H/G query heads from j*H/G on."""
    raise NotImplementedError("not written yet: exercise 4")


def attention(q: Tensor, k: Tensor, v: Tensor, may_attend: Tensor) -> tuple[Tensor, Tensor]:
    """Attention written out, to be read and for its weights; `fused_attention` equals it.

    q: float[B,H,Q,D]; k, v: float[B,G,K,D]; may_attend: bool[Q,K] or bool[B,Q,K].
    Returns: out float[B,H,Q,D] and weights float[B,H,Q,K], probabilities that sum to 1 over K.
    """
    raise NotImplementedError("not written yet: exercise 4")


# ---- Exercise 5: The cache (10 points) ----


@dataclass
class Cache:
    """Keys and values of all tokens so far. The first call, at length 0, brings the prompt."""
    k: list[Tensor] = field(default_factory=list)   # of each layer, float[B,G,.,D], K or longer
    v: list[Tensor] = field(default_factory=list)
    length: int = 0                                 # K, tokens that went through all layers
    # None: OutRo is off. Set it to None after the prompt to switch OutRo off for the answer.
    sinks: "Sinks | None" = None

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the S new positions of a layer; `length` moves when all layers have theirs.

        k, v: float[B,G,S,D]. Returns: the first `length` and these, float[B,G,length + S,D].
        """
        raise NotImplementedError("not written yet: exercise 5")

    def keys(self, layer: int) -> Tensor:
        """Rotated keys of the first `length` tokens, float[B,G,K,D]: a view, to read or to edit."""
        raise NotImplementedError("not written yet: exercise 5")

    def values(self, layer: int) -> Tensor:
        """The values likewise."""
        raise NotImplementedError("not written yet: exercise 5")


# ---- Exercise 6: Find the sinks (5 points) ----


def activation_ratio(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The two numbers that the rule for sinks compares.

    hidden: float[B,S,C]. Returns: the largest |h| of each token, float[B,S], and the median |h| of
    all tokens and coordinates of the item, float[B,1] (the lower of the two middle values).
    """
    raise NotImplementedError("not written yet: exercise 6")


def find_sinks(hidden: Tensor, abs_threshold: float, median_multiple: float) -> Tensor:
    """A token is a sink if one of its coordinates is massive, by itself and against its prompt.

    hidden: float[B,S,C], the input of a decoder layer before its norm. Returns: bool[B,S].
    Source: release, model/outro.py; the rule of "Massive Activations in LLMs" (arXiv 2402.17762).
    The release searches batch item 0 and uses its sinks for all; each item has its own here.
    """
    raise NotImplementedError("not written yet: exercise 6")


# ---- Exercise 7: Does it look like a sink to you? (10 points) ----


def looks_like_a_sink(weights: Tensor, v: Tensor) -> Tensor:
    """Which tokens does one layer treat as a sink? Judged by its attention, not by its hidden states.

    weights: float[B,H,S,S], causal; v: float[B,G,S,D], the values, which you may ignore. Returns: bool[B,S].
    Only clear cases are tested. For each head, average the attention that a token gets over the queries that may see
    it. If that average is above 0.6 in every head, the token is a sink. If it is below 0.1 in every head, it is not.
    In between, you decide. Tokens that fewer than 16 queries may see are not tested.
    """
    raise NotImplementedError("not written yet: exercise 7")


# ---- Exercise 8: Alignment (10 points) ----


def sink_value(v: Tensor, is_sink: Tensor) -> Tensor:
    """The mean value vector of an item's sinks, for each key-value head.

    v: float[B,G,S,D]; is_sink: bool[B,S]. Returns: float[B,G,D], zeros for an item without sinks.
    Source: paper (the sink's value acts as a shared bias); release, model/outro.py.
    """
    raise NotImplementedError("not written yet: exercise 8")


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
    raise NotImplementedError("not written yet: exercise 8")


# ---- Exercise 10: The method (20 points) ----


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
        raise NotImplementedError("not written yet: exercise 10")

    def open_rows(self, l: int, may_attend: Tensor) -> Tensor:
        """Step 3: open the rows of the sinks of layer l whose rows no earlier layer has opened.

        may_attend: bool[S,S] or bool[B,S,S]. Returns: bool[B,S,S]; or may_attend itself, if no row
        is opened here: in most layers, and for tokens that follow the prompt.
        """
        raise NotImplementedError("not written yet: exercise 10")

    def align(self, l: int, out: Tensor, v: Tensor) -> Tensor:
        """Steps 5 and 6: turn the outputs of layer l towards the value of the prompt's sinks.

        out: float[B,H,S,D], of the prompt or of tokens that follow it; v: float[B,G,K,D], values of
        all tokens so far. Returns: float[B,H,S,D].
        Source: release, model/outro.py; *ours*, that all tokens after the prompt are aligned. The
        release looks up the index of a new token among the prompt's sinks: in a call with one new
        token, a layer whose own sinks include position 0 aligns nothing.
        """
        raise NotImplementedError("not written yet: exercise 10")


# ---- In words: a person reads this, and your tables or code below each line, without ''' in them ----

IN_WORDS = r'''
Exercise 7: Does it look like a sink to you? (5 points)
Table, by trace and layer: tokens that the rule finds, tokens that mine finds:
Where the two differ. If they never do: at which threshold mine would begin to differ:
The loss without these tokens, by themselves and together, with its errors:
The rule answers "...?", mine answers "...?", and the loss shows it by ...:

Exercise 9: A row opened in the last layer (5 points)
Prediction. Hand this line in, or commit it, BEFORE you measure:
Measured:
What in the layer explains it:

Exercise 10: The method (5 points)
The published code, one new token: in which layers is it turned:
My code: in which layers is that token turned, and in which each of two new tokens at once:
Why the two differ, and why a new token is not a sink:

Exercise 11: A few answers more (5 points)
(a)
(b)
(c)

Exercise 12: Predict, then measure (10 points)
Prediction. Hand this in, or commit it, BEFORE you measure. I expect that ..., because ...:
The opposite would be ...:
What is measured, and against what:
The control, the same measurement with only ... removed:
On the first 40 clips, mean difference ± standard error of question and control:
Then, unchanged, on the other 40, and whether the two agree:
These numbers allow me to say that ...:
They do not allow me to say that ..., because ...:
'''
