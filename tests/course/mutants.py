"""Typical wrong solutions of the exercises, by what is wrong: each fails a test of its own exercise, with a sentence.

Two right ones are here as well: a cache without room to spare, and the function that model.py does not have.
"""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minioutro import model
from minioutro.lab.analysis import attention_mass
from minioutro.model import cosine, repeat_heads

WRONG = []          # (exercise, name in model.py, the wrong function or class, what is wrong)


def wrong(exercise: int, name: str, **solutions):
    WRONG.extend((exercise, name, solution, what) for what, solution in solutions.items())


# ---- exercise 1 ----


def squares(x, scale, *order):
    """Patches (B, Y, dy, X, dx, Cv), put into another order and joined."""
    B, P, Cv = x.shape
    n = int(P**0.5)
    x = x.view(B, n // scale, scale, n // scale, scale, Cv)
    return x.permute(order).reshape(B, P // scale**2, Cv * scale**2)


def a_loop_over_squares(x, scale):
    B, P, Cv = x.shape
    n = int(P**0.5)
    rows = x.view(B, n, n, Cv).split(scale, dim=1)
    return torch.stack([square.flatten(1) for row in rows for square in row.split(scale, dim=2)], dim=1)


wrong(1, "pixel_shuffle", a_loop_over_squares=a_loop_over_squares,
      patches_in_a_line_instead_of_squares=lambda x, scale: squares(x, scale, 0, 1, 2, 3, 4, 5),
      columns_of_a_square_first=lambda x, scale: squares(x, scale, 0, 1, 3, 4, 2, 5),
      tokens_column_by_column=lambda x, scale: squares(x, scale, 0, 3, 1, 2, 4, 5),
      channels_outside=lambda x, scale: squares(x, scale, 0, 1, 3, 5, 2, 4))


# ---- exercise 2 ----


def norm(formula):
    """An RMSNorm with another formula: (x as float32, weight, eps) -> the result."""
    class RMSNorm(model.RMSNorm):
        def forward(self, x):
            return formula(x.float(), self.weight, self.eps).to(x.dtype)
    return RMSNorm


class SquaredInHalfPrecision(model.RMSNorm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


wrong(2, "RMSNorm",
      the_mean_is_subtracted=norm(lambda x, weight, eps: weight * F.layer_norm(x, x.shape[-1:], eps=eps)),
      eps_outside_the_root=norm(lambda x, weight, eps: weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps)),
      one_mean_for_all_tokens=norm(lambda x, weight, eps: weight * x * torch.rsqrt(x.pow(2).mean() + eps)),
      without_the_weight=norm(lambda x, weight, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)),
      squared_in_half_precision=SquaredInHalfPrecision)


def quarter_turn(x):
    left, right = x.chunk(2, dim=-1)
    return torch.cat([-right, left], dim=-1)


wrong(2, "rotate",
      neighbours_as_pairs=lambda x, cos, sin:
          x * cos + torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2) * sin,
      clockwise=lambda x, cos, sin: x * cos - quarter_turn(x) * sin,
      angles_of_one_position_table_alone=lambda x, cos, sin: x * cos[None, None] + quarter_turn(x) * sin[None, None],
      positions_of_the_first_item_for_all=lambda x, cos, sin:
          x * cos.view(-1, *x.shape[2:])[0] + quarter_turn(x) * sin.view(-1, *x.shape[2:])[0])


# ---- exercise 3 ----


def ones(Q, K):
    return torch.ones(Q, K, dtype=torch.bool)


wrong(3, "causal_mask",
      counted_from_the_upper_left=lambda Q, K, device=None: ones(Q, K).tril(),
      one_key_too_many=lambda Q, K, device=None: ones(Q, K).tril(K - Q + 1),
      true_where_it_is_forbidden=lambda Q, K, device=None: ones(Q, K).triu(K - Q + 1),
      zero_and_minus_infinity=lambda Q, K, device=None: torch.full((Q, K), float("-inf")).triu(K - Q + 1))


wrong(3, "open_sink_rows",
      columns_instead_of_rows=lambda may_attend, is_sink: may_attend | is_sink[:, None, :],
      all_rows_of_an_item_with_a_sink=lambda may_attend, is_sink: may_attend | is_sink.any(1)[:, None, None],
      the_sinks_of_the_first_item_for_all=lambda may_attend, is_sink:
          may_attend | is_sink[:1, :, None].expand(len(is_sink), -1, -1))


# ---- exercise 4 ----


def in_turn(x, H):
    return x.repeat(1, H // x.shape[1], *[1] * (x.dim() - 2))


def for_all_heads(may_attend):
    return may_attend if may_attend.dim() == 2 else may_attend[:, None]


def softmax_attention(q, k, v, allowed, scale=0.5, dim=-1, forbidden=float("-inf"), repeat=repeat_heads):
    k, v = repeat(k, q.shape[1]), repeat(v, q.shape[1])
    scores = (q @ k.transpose(-1, -2) / q.shape[-1]**scale).masked_fill(~allowed, forbidden)
    weights = scores.softmax(dim)
    return weights @ v, weights


def attention_with(**changes):
    return lambda q, k, v, may_attend: softmax_attention(q, k, v, for_all_heads(may_attend), **changes)


def masked_after_the_softmax(q, k, v, may_attend):
    _, weights = softmax_attention(q, k, v, torch.ones_like(for_all_heads(may_attend)))
    weights = weights * for_all_heads(may_attend)
    return weights @ repeat_heads(v, q.shape[1]), weights


def the_mean_weights_of_all_heads_returned(q, k, v, may_attend):
    out, weights = softmax_attention(q, k, v, for_all_heads(may_attend))
    return out, weights.mean(1, keepdim=True).expand_as(weights)


def exponentials_less_the_largest_score_of_all(q, k, v, may_attend):
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = (q @ k.mT / q.shape[-1]**0.5).masked_fill(~for_all_heads(may_attend), float("-inf"))
    weights = (scores - scores.max()).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ v, weights


imported = F.scaled_dot_product_attention           # before a test could replace it


def scaled_dot_product_attention_called(q, k, v, may_attend):
    _, weights = softmax_attention(q, k, v, for_all_heads(may_attend))
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return imported(q, k, v, for_all_heads(may_attend)), weights


wrong(4, "repeat_heads", heads_repeated_in_turn=in_turn)
wrong(4, "attention",
      values_of_the_wrong_head=attention_with(repeat=in_turn),
      scores_not_scaled=attention_with(scale=0),
      a_forbidden_score_is_minus_1000=attention_with(forbidden=-1000.0),
      softmax_over_the_queries=attention_with(dim=-2),
      mask_inverted=lambda q, k, v, may_attend: softmax_attention(q, k, v, ~for_all_heads(may_attend)),
      the_mask_not_given_to_all_heads=softmax_attention,
      the_mask_of_the_first_item_for_all=lambda q, k, v, may_attend:
          softmax_attention(q, k, v, may_attend if may_attend.dim() == 2 else may_attend[0]),
      masked_after_the_softmax=masked_after_the_softmax,
      the_mean_weights_of_all_heads_returned=the_mean_weights_of_all_heads_returned,
      exponentials_less_the_largest_score_of_all=exponentials_less_the_largest_score_of_all,
      scaled_dot_product_attention_called=scaled_dot_product_attention_called)


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


class LengthMovedByEachLayer(Cache):
    def extend(self, layer, k, v):
        result = super().extend(layer, k, v)
        self.length += k.shape[2]
        return result


class TheOldestForgottenFrom512On(Cache):
    def extend(self, layer, k, v):
        k, v = super().extend(layer, k, v)
        return k[:, :, -512:], v[:, :, -512:]


class KeysWithThoseJustAdded(Cache):
    def keys(self, layer):
        return self.k[layer]


class ACopyThatNoEditChanges(Cache):
    def keys(self, layer):
        return super().keys(layer).clone()


class ABufferOfFloat32(Cache):
    def extend(self, layer, k, v):
        return super().extend(layer, k.float(), v.float())


class ABufferForOneItem(Cache):
    def extend(self, layer, k, v):
        return super().extend(layer, k[:1], v[:1])


for solution in (LengthMovedByEachLayer, TheOldestForgottenFrom512On, KeysWithThoseJustAdded, ACopyThatNoEditChanges,
                 ABufferOfFloat32, ABufferForOneItem):
    wrong(5, "Cache", **{solution.__name__: solution})


# ---- exercise 6 ----


def find_with(largest=lambda h: h.abs().amax(-1), middle=lambda h: h.abs().flatten(1).median(1, keepdim=True).values,
              enough=torch.ge):
    """find_sinks with one of its parts changed; `middle` is (B,1) or (B,S)."""
    def find_sinks(hidden, abs_threshold, median_multiple):
        x = largest(hidden)
        return (x >= abs_threshold) & enough(x, median_multiple * middle(hidden))
    return find_sinks


wrong(6, "activation_ratio",
      mean_of_the_two_middle_values=lambda hidden:
          (hidden.abs().amax(-1), hidden.abs().flatten(1).quantile(0.5, dim=1, keepdim=True)),
      median_of_medians=lambda hidden:
          (hidden.abs().amax(-1), hidden.abs().median(1).values.median(1, keepdim=True).values))
wrong(6, "find_sinks",
      greater_instead_of_at_least=find_with(enough=torch.gt),
      median_of_the_token=find_with(middle=lambda h: h.abs().median(dim=-1).values),
      median_of_the_batch=find_with(middle=lambda h: h.abs().median()),
      mean_instead_of_median=find_with(middle=lambda h: h.abs().mean(dim=(1, 2))[:, None]),
      the_absolute_threshold_alone=find_with(enough=lambda largest, threshold: True),
      signs_kept=find_with(largest=lambda h: h.amax(-1)),
      length_instead_of_largest_coordinate=find_with(largest=lambda h: h.norm(dim=-1)),
      written_into_the_hidden_states=find_with(largest=lambda h: h.abs_().amax(-1)))


# ---- exercise 7 ----


def looks_like_a_sink(weights, v):
    """A right one: most heads give it a third or more, and 16 queries say so."""
    n_queries = torch.arange(weights.shape[-1], 0, -1)
    given = weights.sum(-2) / n_queries
    return ((given > 1 / 3).float().mean(1) > 0.5) & (n_queries >= 16)


wrong(7, "looks_like_a_sink",
      the_first_token_always=lambda weights, v: (torch.arange(weights.shape[-1]) == 0).expand(len(weights), -1),
      average_over_queries_that_cannot_see_it=lambda weights, v: weights.mean(-2).mean(1) > 1 / 3,
      one_query_is_enough=lambda weights, v: weights.amax(-2).mean(1) > 1 / 2,
      attention_mass_called=lambda weights, v: attention_mass(weights).mean(1) > 1 / 3,
      judged_by_the_last_query_alone=lambda weights, v: weights[:, :, -1].mean(1) > 1 / 3,
      the_first_item_for_all=lambda weights, v: looks_like_a_sink(weights[:1], v).expand(len(weights), -1))


# ---- exercise 8 ----


def sum_of(v, chosen):
    return v.masked_fill(~chosen[:, None, :, None], 0).sum(2)


def mean_of(v, chosen):
    return sum_of(v, chosen) / chosen.sum(1).clamp(min=1)[:, None, None]


wrong(8, "sink_value",
      a_loop_over_items=lambda v, is_sink: torch.cat([mean_of(v[b:b + 1], is_sink[b:b + 1]) for b in range(len(v))]),
      mean_over_all_tokens=lambda v, is_sink: sum_of(v, is_sink) / v.shape[2],
      sum_instead_of_mean_value=sum_of,
      nan_without_sinks=lambda v, is_sink: sum_of(v, is_sink) / is_sink.sum(1)[:, None, None],
      only_the_first_sink=lambda v, is_sink: mean_of(v, is_sink & (is_sink.cumsum(1) == 1)))


def align_with(gate=lambda c, temperature: torch.tanh(c.relu() / temperature), who_stays=lambda ever_sink: ever_sink,
               power=2, restore=True, repeat=repeat_heads, dtype=torch.float32):
    """align_with_sink with one of its parts changed."""
    def align_with_sink(out, v_sink, ever_sink, gamma, temperature):
        o, v = out.to(dtype or out.dtype), repeat(v_sink, out.shape[1]).to(dtype or out.dtype)
        g = gate(cosine(o, v), temperature)[..., None].to(o.dtype)
        v = v[:, :, None]
        p = (o * v).sum(-1, keepdim=True) / (v.norm(dim=-1, keepdim=True)**power + 1e-8) * v
        turned = o + g * gamma * p
        if restore:
            turned = turned * o.norm(dim=-1, keepdim=True) / (turned.norm(dim=-1, keepdim=True) + 1e-8)
        turns = (v_sink != 0).any(-1).any(-1)[:, None] & ~who_stays(ever_sink)
        return torch.where(turns[:, None, :, None], turned.to(out.dtype), out)
    return align_with_sink


wrong(8, "align_with_sink",
      length_not_restored=align_with(restore=False),
      gate_without_relu=align_with(lambda c, temperature: torch.tanh(c.abs() / temperature)),
      gate_without_tanh=align_with(lambda c, temperature: c.relu() / temperature),
      projection_over_the_length_not_its_square=align_with(power=1),
      towards_the_value_of_another_head=align_with(repeat=in_turn),
      sinks_turned_too=align_with(who_stays=torch.zeros_like),
      the_sinks_of_the_first_item_left_alone_in_all=align_with(who_stays=lambda ever_sink: ever_sink[:1]),
      computed_in_half_precision=align_with(dtype=None))


# ---- exercise 10: the method, with one line changed ----


def sinks_with(old, new):
    source = inspect.getsource(model.Sinks)
    assert source.count(old) == 1, old
    namespace = dict(vars(model))
    exec(source.replace(old, new), namespace)
    return namespace["Sinks"]


NOBODY = "torch.zeros_like(out[:, 0, :, 0], dtype=torch.bool)"
OWN_SINKS = f"self.is_sink[l][:, :1] if out.shape[2] == 1 else {NOBODY}"        # as in the published code
for what, old, new in (
        ("the_published_slip", NOBODY, OWN_SINKS),
        ("new_tokens_looked_up_among_all_sinks", NOBODY, "self.ever_sink[:, :out.shape[2]]"),
        ("new_tokens_searched", "l not in self.searched or l in self.v_sink", "l not in self.searched"),
        ("the_last_layers_searched", "l not in self.searched or l in self.v_sink", "l in self.v_sink"),
        ("the_rule_of_outro_ignored", "is_sink = self.outro.find(hidden)\n",
         "is_sink = find_sinks(hidden, 100, 1000)\n"),
        ("sinks_of_earlier_layers_forgotten", "self.ever_sink = self.ever_sink | is_sink", "self.ever_sink = is_sink"),
        ("ever_sink_only_if_aligned", "self.ever_sink = self.ever_sink | is_sink",
         "self.ever_sink = self.ever_sink | (is_sink & self.outro.align)"),
        ("sinks_of_earlier_layers_turned_again", "left_alone = self.ever_sink ", "left_alone = self.is_sink[l] "),
        ("rows_opened_more_than_once", "self.is_sink[l] & ~self.opened", "self.is_sink[l]"),
        ("rows_of_sinks_of_other_layers_opened", "self.is_sink[l] & ~self.opened", "self.ever_sink & ~self.opened"),
        ("rows_opened_in_every_layer", "l % self.relax_every == 0", "True"),
        ("relaxation_cannot_be_switched_off", "not self.outro.relax or ", ""),
        ("alignment_cannot_be_switched_off", "if not self.outro.align:", "if False:"),
        ("the_value_of_another_layer", "align_with_sink(out, self.v_sink[l]",
         "align_with_sink(out, self.v_sink[max(self.v_sink)]"),
        ("a_value_only_if_aligned", "if is_prompt:\n            self.v_sink[l] =",
         "if is_prompt and self.outro.align:\n            self.v_sink[l] ="),
        ("the_value_of_all_tokens_so_far", "is_prompt = l not in self.v_sink", "is_prompt = True"),
        ("joined_in_place", "self.ever_sink = self.ever_sink | is_sink", "self.ever_sink |= is_sink"),
        ("a_row_opened_in_one_item_closes_that_of_others", "self.is_sink[l] & ~self.opened",
         "self.is_sink[l] & ~self.opened.any(0)"),
        ("a_copy_of_the_mask_where_no_row_opens", "if not new_sinks.any():\n            return may_attend",
         "if not new_sinks.any():\n            return may_attend.clone()"),
        ("a_call_as_long_as_the_prompt_searched", "l not in self.searched or l in self.v_sink",
         "l not in self.searched or hidden.shape[1] != self.ever_sink.shape[1]"),
        ("the_first_item_for_all", "sink_value(v, self.is_sink[l])",
         "sink_value(v, self.is_sink[l][:1].expand(len(v), -1))")):
    wrong(10, "Sinks", **{what: sinks_with(old, new)})
