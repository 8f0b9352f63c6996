"""OutRo in a model that somebody else wrote: any decoder of transformers that is like Llama's.

    from minioutro.lab.attach import attach
    with attach(model, OutRo()) as seen:         # everything is put back at the end of the block
        output = model.generate(**inputs)
    print(seen.is_sink, seen.opened)             # by layer; empty where nothing was found

The steps are those of model.py, by the same functions. They need two things of a foreign layer: its
input before the norm, which a forward pre-hook sees, and a place between the mask and o_proj, which
is where transformers calls an attention function that the user may choose. It gets query (B,H,S,D),
key and value (B,G,K,D) after rotary positions and cache, a mask (B,1,S,K); it returns (B,S,H,D).

As in model.py, the call that finds the cache empty brings the whole prompt; what follows on that
cache, a second turn of a chat included, counts as generated. The way is *ours*: the release changes
a copy of one class. Nothing imports this file, which needs transformers.
"""

import itertools
import sys
import warnings
import weakref
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minioutro.model import OutRo, align_with_sink, find_sinks, sink_value

# Options of generate that read a prompt in pieces, or together with guesses at its answer.
NOT_WHOLE = ("prefill_chunk_size", "assistant_model", "prompt_lookup_num_tokens",
             "assistant_early_exit", "use_mtp", "custom_generate")
NUMBER = itertools.count()          # no name comes twice: torch.compile remembers what one meant


def refusal(name: str, why: str) -> ValueError:
    return ValueError(f"OutRo cannot be in {name}: {why}; the README says which models were tried")


class Seen:
    """Of the last prompt, by layer, if any: is_sink, opened bool[B,S], v_sink float[B,G,D]."""

    def __init__(self, outro: OutRo, layers: nn.ModuleList, softmax_of):
        self.is_sink, self.opened, self.v_sink = {}, {}, {}
        self.outro, self.n_layers, self.softmax_of = outro, len(layers), softmax_of
        self.layer_of = {module: l for l, layer in enumerate(layers) for module in layer.modules()}
        self.read = weakref.WeakKeyDictionary()                # cache -> v_sink of the prompt in it
        self.searched = set()

    def opens_rows(self, l: int) -> bool:
        return l % (self.outro.relax_every or max(1, self.n_layers // 7)) == 0

    @torch.compiler.disable
    def enter(self, layer: nn.Module, args: tuple, kwargs: dict):
        """Before each layer: keep its input. Before the first: is it a prompt, or what follows?"""
        l, given = self.layer_of[layer], (*args, *kwargs.values())
        cache = next((x for x in given if isinstance(x, Cache)), None)     # its name may be any
        self.hidden = args[0] if args else kwargs["hidden_states"]
        if self.hidden.dim() != 3:
            raise refusal(type(layer).__name__,
                          f"its input is {tuple(self.hidden.shape)}, not (B,S,C)")
        if l == 0:
            self.is_prompt = cache is None or int(cache.get_seq_length()) == 0
            if self.is_prompt:
                self.is_sink, self.opened, self.v_sink = {}, {}, {}
            elif cache not in self.read:
                raise ValueError("this cache holds no prompt that was read in this block, so that "
                                 "its sinks are not known; begin with an empty cache")
            self.v_sink_now = self.v_sink if self.is_prompt else self.read[cache]
        if self.is_prompt and l == self.n_layers - 1:
            if cache is not None:
                self.read[cache] = self.v_sink
            if self.outro.relax and not any(map(self.opens_rows, self.searched)):
                warnings.warn(f"no row can be opened: of the layers {sorted(self.searched)}, which "
                              f"have attention, none has its turn; give OutRo another relax_every")

    @torch.compiler.disable
    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
               attention_mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Steps 1, 3 and 5; the model's own softmax(q k^T) v; step 6."""
        B, _, S, _ = query.shape
        l = self.layer_of.get(module, self.n_layers)     # there may be another model of this config
        touched = l < self.n_layers - self.outro.skip_last
        if attention_mask is None:
            raise refusal(type(module).__name__, "it gets no mask that says what is causal")
        if touched and self.is_prompt:
            attention_mask = self.search(l, value, attention_mask, S)
        out, weights = self.softmax_of(module)(module, query, key, value, attention_mask, **kwargs)
        if touched and self.outro.align and l in self.v_sink_now:
            ever_sink = torch.zeros(B, S, dtype=torch.bool, device=out.device)
            if self.is_prompt:
                ever_sink = in_any(self.is_sink, ever_sink)
            out = align_with_sink(out.transpose(1, 2), self.v_sink_now[l], ever_sink,
                                  self.outro.gamma, self.outro.temperature).transpose(1, 2)
        return out, weights

    def search(self, l: int, value: Tensor, mask: Tensor, S: int) -> Tensor:
        """Steps 1, 3 and 5 in a prompt. Returns: the mask, with the rows of new sinks opened."""
        hidden = self.hidden.to(value.device)            # the layer before may be on another device
        self.searched.add(l)
        may_attend = mask if mask.dtype == torch.bool else mask == 0
        # Padding is what may not even attend to itself. A static cache has more keys than tokens.
        is_token = may_attend[:, 0, :, :S].diagonal(dim1=1, dim2=2).expand(hidden.shape[:2])
        is_sink = torch.zeros_like(is_token)
        for b, real in enumerate(is_token):              # else padding would change the median
            is_sink[b, real] = find_sinks(hidden[b, real][None], self.outro.abs_threshold,
                                          self.outro.median_multiple)[0]
        if not is_sink.any():
            return mask
        self.is_sink[l], self.v_sink[l] = is_sink, sink_value(value[:, :, :S], is_sink)
        new = is_sink & ~in_any(self.opened, is_sink)
        if not (self.outro.relax and self.opens_rows(l) and new.any()):
            return mask
        self.opened[l] = new
        # Causality alone is taken away: padding stays closed, and so does what a window has left.
        later = torch.ones_like(mask[0, 0], dtype=torch.bool).triu(1)                       # (S,K)
        is_key = nn.functional.pad(is_token, (0, mask.shape[-1] - S))                       # (B,K)
        rows = (new[:, :, None] & later & is_key[:, None])[:, None]                     # (B,1,S,K)
        return mask | rows if mask.dtype == torch.bool else mask.masked_fill(rows, 0)


def in_any(found: dict[int, Tensor], like: Tensor) -> Tensor:
    """The tokens that are in any of these layers: bool[B,S], on the device of `like`."""
    return sum((tokens.to(like.device) for tokens in found.values()), torch.zeros_like(like))


def find_decoder(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    """The module that has the decoder's layers, and these."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise refusal(name, "it is no model of transformers, but may hold one")
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or any("Cross" in type(m).__name__ for m in model.modules()):
        raise refusal(name, "it attends to a second sequence")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refusal(name, "some of its layers have no values of their own")
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if getattr(module, "config", None) is config and isinstance(layers, nn.ModuleList):
            return module, layers
    raise refusal(name, "it has no decoder with a list of layers as Llama's")


@contextmanager
def attach(model: PreTrainedModel, outro: OutRo):
    """For a `with` block, in which the model reads and generates with OutRo. Yields: `Seen`.

    Sampling, beams, padded batches and static caches work as ever. Raises: ValueError, here or in
    the block, that names the class, cache or option with which the method would not be itself.
    """
    (decoder, layers), name = find_decoder(model), f"outro-{next(NUMBER)}"
    before, plain_generate = decoder.config._attn_implementation, getattr(model, "generate", None)
    if before.startswith("outro-"):
        raise ValueError(f"{type(model).__name__} has OutRo already; leave the other block first")

    def softmax_of(module):
        if before != "eager" and decoder._supports_sdpa:
            return ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sys.modules[type(module).__module__].eager_attention_forward

    def generate(*args, **kwargs):
        configs = [x for x in (*args, *kwargs.values()) if isinstance(x, GenerationConfig)]
        for config in (*map(vars, (model.generation_config, *configs)), kwargs):
            for option in NOT_WHOLE:
                if config.get(option):
                    raise ValueError(f"{option} does not read a prompt whole and alone, as OutRo "
                                     f"must; generate without it")
            if config.get("use_cache") is False:
                raise ValueError("use_cache=False makes each token a prompt; generate without it")
        return plain_generate(*args, **kwargs)

    seen = Seen(outro, layers, softmax_of)
    with ExitStack() as undo:
        undo.callback(vars(seen).pop, "hidden", None)
        for layer in layers:
            hook = layer.register_forward_pre_hook(seen.enter, with_kwargs=True)
            undo.callback(hook.remove)
        AttentionInterface.register(name, seen.attend)
        AttentionMaskInterface.register(name, eager_mask)      # without, all would see all
        for interface in (AttentionInterface, AttentionMaskInterface):
            undo.callback(interface._global_mapping.pop, name)
        undo.callback(decoder.set_attn_implementation, before)
        decoder.set_attn_implementation(name)                  # not that of the image encoder
        if decoder.config._attn_implementation != name:
            raise refusal(type(model).__name__, "its attention is no function that can be chosen")
        if plain_generate is not None:
            undo.enter_context(patch.object(model, "generate", generate))
            undo.enter_context(patch.multiple(model.generation_config, use_cache=True,
                                              disable_compile=True))
        yield seen
