"""Typical wrong solutions of the exercises: each fails a test of its own exercise. Of what model.py
does not have, a right one, too.

They are graded like a student's, so none calls the model's function of its own exercise.
"""

import ast
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from exercises import MODEL
from starter import node_named

from minioutro import model
from minioutro.model import cosine, repeat_heads

WRONG = []          # (exercise, name in model.py, the wrong function or class, what is wrong)


def wrong(exercise: int, name: str):
    def register(function):
        WRONG.append((exercise, name, function, function.__name__))
        return function
    return register


# ---- exercise 1 ----


@wrong(1, "pixel_shuffle")
def patches_in_a_line_instead_of_squares(x, scale):
    B, P, Cv = x.shape
    return x.reshape(B, P // scale**2, Cv * scale**2)


def squares(x, scale):
    B, P, Cv = x.shape
    n = int(P**0.5)
    return x.view(B, n // scale, scale, n // scale, scale, Cv)      # (B, Y, dy, X, dx, Cv)


@wrong(1, "pixel_shuffle")
def columns_of_a_square_first(x, scale):
    return squares(x, scale).permute(0, 1, 3, 4, 2, 5).flatten(1, 2).flatten(2)


@wrong(1, "pixel_shuffle")
def tokens_column_by_column(x, scale):
    return squares(x, scale).permute(0, 3, 1, 2, 4, 5).flatten(1, 2).flatten(2)


@wrong(1, "pixel_shuffle")
def channels_outside(x, scale):
    return squares(x, scale).permute(0, 1, 3, 5, 2, 4).flatten(1, 2).flatten(2)


# ---- exercise 2 ----


@wrong(2, "RMSNorm")
class TheMeanIsSubtracted(model.RMSNorm):
    def forward(self, x):
        return self.weight * F.layer_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


@wrong(2, "RMSNorm")
class EpsOutsideTheRoot(model.RMSNorm):
    def forward(self, x):
        h = x.float()
        return self.weight * (h / (h.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)).to(x.dtype)


@wrong(2, "RMSNorm")
class SumInsteadOfMean(model.RMSNorm):
    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


@wrong(2, "RMSNorm")
class OneMeanForAllTokens(model.RMSNorm):
    def forward(self, x):
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean() + self.eps)).to(x.dtype)


@wrong(2, "RMSNorm")
class SquaredInHalfPrecision(model.RMSNorm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


@wrong(2, "RMSNorm")
class WithoutTheWeight(model.RMSNorm):
    def forward(self, x):
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@wrong(2, "rotate")
def neighbours_as_pairs(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


@wrong(2, "rotate")
def clockwise(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([right, -left], dim=-1) * sin


@wrong(2, "rotate")
def cosine_and_sine_exchanged(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return x * sin + torch.cat([-right, left], dim=-1) * cos


@wrong(2, "rotate")
def halves_not_exchanged(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-left, right], dim=-1) * sin


# ---- exercise 3 ----


@wrong(3, "causal_mask")
def counted_from_the_upper_left(n_query, n_key, device=None):
    return torch.ones(n_query, n_key, dtype=torch.bool).tril()


@wrong(3, "causal_mask")
def one_key_too_few(n_query, n_key, device=None):
    return torch.ones(n_query, n_key, dtype=torch.bool).tril(n_key - n_query - 1)


@wrong(3, "causal_mask")
def one_key_too_many(n_query, n_key, device=None):
    return torch.ones(n_query, n_key, dtype=torch.bool).tril(n_key - n_query + 1)


@wrong(3, "causal_mask")
def true_where_it_is_forbidden(n_query, n_key, device=None):
    return torch.ones(n_query, n_key, dtype=torch.bool).triu(n_key - n_query + 1)


@wrong(3, "causal_mask")
def the_future_instead_of_the_past(n_query, n_key, device=None):
    return torch.ones(n_query, n_key, dtype=torch.bool).triu(n_key - n_query)


@wrong(3, "causal_mask")
def zero_and_minus_infinity(n_query, n_key, device=None):
    return torch.full((n_query, n_key), float("-inf")).triu(n_key - n_query + 1)


@wrong(3, "open_sink_rows")
def columns_instead_of_rows(may_attend, is_sink):
    return may_attend | is_sink[:, None, :]


@wrong(3, "open_sink_rows")
def the_rows_of_all_others(may_attend, is_sink):
    return may_attend | ~is_sink[:, :, None]


@wrong(3, "open_sink_rows")
def all_rows_of_an_item_with_a_sink(may_attend, is_sink):
    return may_attend | is_sink.any(1)[:, None, None]


@wrong(3, "open_sink_rows")
def only_the_rows_of_sinks_remain(may_attend, is_sink):
    return may_attend & is_sink[:, :, None]


@wrong(3, "open_sink_rows")
def the_sinks_of_the_first_item_for_all(may_attend, is_sink):
    return may_attend | is_sink[:1, :, None].expand(len(is_sink), -1, -1)


@wrong(3, "open_sink_rows")
def written_into_the_mask_of_the_caller(may_attend, is_sink):
    if may_attend.dim() == 2:
        may_attend = may_attend[None].repeat(len(is_sink), 1, 1)
    may_attend[is_sink] = True
    return may_attend


# ---- exercise 4 ----


@wrong(4, "repeat_heads")
def heads_repeated_in_turn(x, H):
    return x.repeat(1, H // x.shape[1], *[1] * (x.dim() - 2))


def neighbours(x, H):
    return x.repeat_interleave(H // x.shape[1], dim=1)


def softmax_attention(q, k, v, may_attend, scale=0.5, dim=-1, forbidden=float("-inf"),
                      repeat=neighbours):
    k, v = repeat(k, q.shape[1]), repeat(v, q.shape[1])
    allowed = may_attend if may_attend.dim() == 2 else may_attend[:, None]
    scores = (q @ k.transpose(-1, -2) / q.shape[-1]**scale).masked_fill(~allowed, forbidden)
    weights = scores.softmax(dim)
    return weights @ v, weights


@wrong(4, "attention")
def values_of_the_wrong_head(q, k, v, may_attend):
    return softmax_attention(q, k, v, may_attend, repeat=heads_repeated_in_turn)


@wrong(4, "attention")
def scores_not_scaled(q, k, v, may_attend):
    return softmax_attention(q, k, v, may_attend, scale=0)


@wrong(4, "attention")
def scaled_by_the_head_size_without_root(q, k, v, may_attend):
    return softmax_attention(q, k, v, may_attend, scale=1)


@wrong(4, "attention")
def mask_inverted(q, k, v, may_attend):
    return softmax_attention(q, k, v, ~may_attend)


@wrong(4, "attention")
def forbidden_scores_are_zero(q, k, v, may_attend):
    return softmax_attention(q, k, v, may_attend, forbidden=0.0)


@wrong(4, "attention")
def softmax_over_the_queries(q, k, v, may_attend):
    return softmax_attention(q, k, v, may_attend, dim=-2)


@wrong(4, "attention")
def masked_behind_the_softmax(q, k, v, may_attend):
    allowed = may_attend if may_attend.dim() == 2 else may_attend[:, None]
    _, weights = softmax_attention(q, k, v, torch.ones_like(may_attend))
    weights = weights * allowed
    return weights @ neighbours(v, q.shape[1]), weights


@wrong(4, "attention")
def the_mask_of_the_first_item_for_all(q, k, v, may_attend):
    return softmax_attention(q, k, v, may_attend if may_attend.dim() == 2 else may_attend[0])


# ---- exercise 5 ----


@dataclass
class Cache(model.Cache):
    """A right one, without room to spare."""

    def extend(self, layer, k, v):
        if layer == len(self.k):
            self.k.append(k)
            self.v.append(v)
        else:
            self.k[layer] = torch.cat([self.k[layer][:, :, :self.length], k], dim=2)
            self.v[layer] = torch.cat([self.v[layer][:, :, :self.length], v], dim=2)
        return self.k[layer], self.v[layer]

    def keys(self, layer):
        return self.k[layer][:, :, :self.length]

    def values(self, layer):
        return self.v[layer][:, :, :self.length]


@wrong(5, "Cache")
class OnlyTheNewOnesReturned(Cache):
    def extend(self, layer, k, v):
        super().extend(layer, k, v)
        return k, v


@wrong(5, "Cache")
class LengthMovedByEachLayer(Cache):
    def extend(self, layer, k, v):
        result = super().extend(layer, k, v)
        self.length += k.shape[2]
        return result


@wrong(5, "Cache")
class OneBufferForAllLayers(Cache):
    def extend(self, layer, k, v):
        return super().extend(0, k, v)


@wrong(5, "Cache")
class NewTokensInFrontOfTheOthers(Cache):
    def extend(self, layer, k, v):
        if layer < len(self.k):
            k, v = torch.cat([k, self.k[layer]], dim=2), torch.cat([v, self.v[layer]], dim=2)
            self.k[layer], self.v[layer] = k, v
            return k, v
        return super().extend(layer, k, v)


@wrong(5, "Cache")
class OnlyOneOfTwoNewTokensKept(Cache):
    def extend(self, layer, k, v):
        n = 1 if layer < len(self.k) else k.shape[2]
        return super().extend(layer, k[:, :, -n:], v[:, :, -n:])


@wrong(5, "Cache")
class TheOldestForgottenFrom512On(Cache):
    def extend(self, layer, k, v):
        k, v = super().extend(layer, k, v)
        return k[:, :, -512:], v[:, :, -512:]


@wrong(5, "Cache")
class ValuesForKeys(Cache):
    def keys(self, layer):
        return self.v[layer][:, :, :self.length]


@wrong(5, "Cache")
class KeysOfTokensThatAreNotThroughAllLayers(Cache):
    def extend(self, layer, k, v):
        k, v = super().extend(layer, k, v)
        self.k[layer] = F.pad(k, (0, 0, 0, 256))                # room to spare
        return k, v

    def keys(self, layer):
        return self.k[layer]


@wrong(5, "Cache")
class ACopyThatNoEditChanges(Cache):
    def keys(self, layer):
        return super().keys(layer).clone()


# ---- exercise 6 ----


def two_numbers(hidden):
    magnitude = hidden.abs()
    return magnitude.amax(-1), magnitude.flatten(1).median(1, keepdim=True).values


@wrong(6, "activation_ratio")
def mean_of_the_two_middle_values(hidden):
    magnitude = hidden.abs()
    return magnitude.amax(-1), magnitude.flatten(1).quantile(0.5, dim=1, keepdim=True)


@wrong(6, "find_sinks")
def greater_instead_of_at_least(hidden, abs_threshold, median_multiple):
    largest, median = two_numbers(hidden)
    return (largest > abs_threshold) & (largest > median_multiple * median)


@wrong(6, "find_sinks")
def median_of_the_token(hidden, abs_threshold, median_multiple):
    largest, _ = two_numbers(hidden)
    median = hidden.abs().median(dim=-1).values
    return (largest >= abs_threshold) & (largest >= median_multiple * median)


@wrong(6, "find_sinks")
def median_of_the_batch(hidden, abs_threshold, median_multiple):
    largest, _ = two_numbers(hidden)
    return (largest >= abs_threshold) & (largest >= median_multiple * hidden.abs().median())


@wrong(6, "find_sinks")
def mean_instead_of_median(hidden, abs_threshold, median_multiple):
    largest, _ = two_numbers(hidden)
    mean = hidden.abs().mean(dim=(1, 2), keepdim=True)[:, 0]
    return (largest >= abs_threshold) & (largest >= median_multiple * mean)


@wrong(6, "find_sinks")
def either_instead_of_both(hidden, abs_threshold, median_multiple):
    largest, median = two_numbers(hidden)
    return (largest >= abs_threshold) | (largest >= median_multiple * median)


@wrong(6, "find_sinks")
def signs_kept(hidden, abs_threshold, median_multiple):
    _, median = two_numbers(hidden)
    largest = hidden.amax(-1)
    return (largest >= abs_threshold) & (largest >= median_multiple * median)


@wrong(6, "find_sinks")
def length_instead_of_largest_coordinate(hidden, abs_threshold, median_multiple):
    _, median = two_numbers(hidden)
    length = hidden.norm(dim=-1)
    return (length >= abs_threshold) & (length >= median_multiple * median)


@wrong(6, "find_sinks")
def written_into_the_hidden_states(hidden, abs_threshold, median_multiple):
    largest, median = two_numbers(hidden.abs_())
    return (largest >= abs_threshold) & (largest >= median_multiple * median)


# ---- exercise 7 ----


def given_to_each(weights):
    """The mean weight of each key over the queries that may see it, (B,H,S)."""
    return weights.sum(-2) / torch.arange(weights.shape[-1], 0, -1)


def looks_like_a_sink(weights, v):
    """A right one: most heads give it a third or more, and 16 queries say so."""
    enough = torch.arange(weights.shape[-1], 0, -1) >= 16
    return ((given_to_each(weights) > 1 / 3).float().mean(1) > 0.5) & enough


@wrong(7, "looks_like_a_sink")
def the_first_token_always(weights, v):
    return (torch.arange(weights.shape[-1]) == 0).expand(len(weights), -1)


@wrong(7, "looks_like_a_sink")
def whoever_draws_most(weights, v):
    given = given_to_each(weights).mean(1)
    return given == given.amax(-1, keepdim=True)


@wrong(7, "looks_like_a_sink")
def average_over_queries_that_cannot_see_it(weights, v):
    return weights.mean(-2).mean(1) > 1 / 3


@wrong(7, "looks_like_a_sink")
def average_over_its_own_row(weights, v):
    return weights.mean(-1).mean(1) > 1 / 3


@wrong(7, "looks_like_a_sink")
def one_query_is_enough(weights, v):
    return weights.amax(-2).mean(1) > 1 / 2


@wrong(7, "looks_like_a_sink")
def average_over_the_batch(weights, v):
    return (given_to_each(weights).mean((0, 1)) > 1 / 3).expand(len(weights), -1)


@wrong(7, "looks_like_a_sink")
def a_value_that_is_small(weights, v):
    length = v.norm(dim=-1).mean(1)
    return length < 0.5 * length.median(-1, keepdim=True).values


# ---- exercise 8 ----


def mean_of(v, chosen):
    of_chosen = v.masked_fill(~chosen[:, None, :, None], 0).sum(2)
    return of_chosen / chosen.sum(1).clamp(min=1)[:, None, None]


@wrong(8, "sink_value")
def mean_over_all_tokens(v, is_sink):
    return v.masked_fill(~is_sink[:, None, :, None], 0).mean(2)


@wrong(8, "sink_value")
def sum_instead_of_mean_value(v, is_sink):
    return v.masked_fill(~is_sink[:, None, :, None], 0).sum(2)


@wrong(8, "sink_value")
def nan_without_sinks(v, is_sink):
    return v.masked_fill(~is_sink[:, None, :, None], 0).sum(2) / is_sink.sum(1)[:, None, None]


@wrong(8, "sink_value")
def one_value_for_all_heads(v, is_sink):
    return mean_of(v, is_sink).mean(1, keepdim=True).expand(-1, v.shape[1], -1)


@wrong(8, "sink_value")
def only_the_first_sink(v, is_sink):
    return mean_of(v, is_sink & (is_sink.cumsum(1) == 1))


@wrong(8, "sink_value")
def the_mean_of_the_others(v, is_sink):
    return mean_of(v, ~is_sink)


def turn(out, v_sink, ever_sink, gamma, gate, power=2, restore=True, repeat=repeat_heads):
    """align_with_sink with a gate (B,H,S) of one's own, |v|^power in p, and |o| restored or not."""
    v = repeat(v_sink, out.shape[1])[:, :, None].float()
    o = out.float()
    p = (o * v).sum(-1, keepdim=True) / (v.norm(dim=-1, keepdim=True)**power + 1e-8) * v
    turned = o + gate[..., None] * gamma * p
    if restore:
        turned = turned * o.norm(dim=-1, keepdim=True) / (turned.norm(dim=-1, keepdim=True) + 1e-8)
    turns = (v_sink != 0).any(-1).any(-1)[:, None] & ~ever_sink
    return torch.where(turns[:, None, :, None], turned.to(out.dtype), out)


def usual_gate(out, v_sink, temperature):
    return torch.tanh(cosine(out, v_sink).relu() / temperature)


@wrong(8, "align_with_sink")
def length_not_restored(out, v_sink, ever_sink, gamma, temperature):
    return turn(out, v_sink, ever_sink, gamma, usual_gate(out, v_sink, temperature), restore=False)


@wrong(8, "align_with_sink")
def gate_without_relu(out, v_sink, ever_sink, gamma, temperature):
    return turn(out, v_sink, ever_sink, gamma, torch.tanh(cosine(out, v_sink).abs() / temperature))


@wrong(8, "align_with_sink")
def gate_without_tanh(out, v_sink, ever_sink, gamma, temperature):
    return turn(out, v_sink, ever_sink, gamma, cosine(out, v_sink).relu() / temperature)


@wrong(8, "align_with_sink")
def gate_always_open(out, v_sink, ever_sink, gamma, temperature):
    return turn(out, v_sink, ever_sink, gamma, torch.ones_like(cosine(out, v_sink)))


@wrong(8, "align_with_sink")
def multiplied_by_the_temperature(out, v_sink, ever_sink, gamma, temperature):
    return turn(out, v_sink, ever_sink, gamma, torch.tanh(cosine(out, v_sink).relu() * temperature))


@wrong(8, "align_with_sink")
def projection_over_the_length_not_its_square(out, v_sink, ever_sink, gamma, temperature):
    return turn(out, v_sink, ever_sink, gamma, usual_gate(out, v_sink, temperature), power=1)


@wrong(8, "align_with_sink")
def towards_the_value_of_another_head(out, v_sink, ever_sink, gamma, temperature):
    shuffled = heads_repeated_in_turn(v_sink, out.shape[1])
    gate = usual_gate(out, shuffled, temperature)
    return turn(out, v_sink, ever_sink, gamma, gate, repeat=heads_repeated_in_turn)


@wrong(8, "align_with_sink")
def sinks_turned_too(out, v_sink, ever_sink, gamma, temperature):
    return turn(out, v_sink, torch.zeros_like(ever_sink), gamma, usual_gate(out, v_sink,
                temperature))


@wrong(8, "align_with_sink")
def only_sinks_turned(out, v_sink, ever_sink, gamma, temperature):
    return turn(out, v_sink, ~ever_sink, gamma, usual_gate(out, v_sink, temperature))


@wrong(8, "align_with_sink")
def computed_in_half_precision(out, v_sink, ever_sink, gamma, temperature):
    v = repeat_heads(v_sink, out.shape[1])[:, :, None]
    p = (out * v).sum(-1, keepdim=True) / (v.pow(2).sum(-1, keepdim=True) + 1e-8) * v
    turned = out + usual_gate(out, v_sink, temperature)[..., None].to(out.dtype) * gamma * p
    turned = turned * out.norm(dim=-1, keepdim=True) / (turned.norm(dim=-1, keepdim=True) + 1e-8)
    return torch.where(ever_sink[:, None, :, None], out, turned)


# ---- exercise 10: the layer, with one line changed ----


def layer_with(old, new):
    source = MODEL.read_text(encoding="utf-8")
    node = node_named(ast.parse(source), "DecoderLayer")
    text = "\n".join(source.splitlines()[node.lineno - 1:node.end_lineno])
    assert text.count(old) == 1, old
    namespace = dict(vars(model))
    exec(text.replace(old, new), namespace)
    return namespace["DecoderLayer"]


WHO = "cache.sinks.ever_sink if is_prompt else none"
SLIP = "cache.sinks.ever_sink[:, :S]"               # as in the published code
for what, old, new in (
        ("the_published_slip", WHO, SLIP),
        ("the_prompt_told_by_its_length", WHO, "cache.sinks.ever_sink[:, :S] if S > 1 else none"),
        ("the_end_of_the_prompt_looked_up", WHO, "cache.sinks.ever_sink[:, -S:]"),
        ("generated_tokens_left_alone", WHO, "cache.sinks.ever_sink if is_prompt else ~none"),
        ("sinks_of_the_prompt_turned_too", WHO, "none"),
        ("sinks_of_earlier_layers_turned_again", WHO, "is_sink if is_prompt else none"),
        ("rows_opened_more_than_once", "opened = is_sink & ~cache.sinks.opened", "opened = is_sink"),
        ("rows_opened_in_every_layer", "l % (outro.relax_every or max(1, L // 7)) == 0", "True"),
        ("relax_every_ignored", "outro.relax_every or max(1, L // 7)", "max(1, L // 7)"),
        ("relaxation_cannot_be_switched_off", "outro.relax and", ""),
        ("alignment_cannot_be_switched_off", "touched and outro.align", "touched"),
        ("the_mask_is_not_opened", "open_sink_rows(may_attend, opened), False", "may_attend, False"),
        ("the_value_of_opened_sinks_alone", "sink_value(v, is_sink)", "sink_value(v, opened)"),
        ("the_value_of_another_layer", "align_with_sink(out, cache.sinks.v_sink[l]",
         "align_with_sink(out, cache.sinks.v_sink[-1 - l]"),
        ("the_first_item_for_all", "sink_value(v, is_sink)", "sink_value(v, is_sink[:1].expand(B, S))")):
    WRONG.append((10, "DecoderLayer", layer_with(old, new), what))
