"""OutRo in a model that somebody else wrote: a decoder of the transformers library, if it is like Llama's.

    from minioutro.attach import attach
    with attach(model, OutRo()) as seen:         # everything is put back at the end of the block
        output = model.generate(**inputs)
    print(seen.is_sink, seen.opened)             # by layer; empty where nothing was found

The steps are those of model.py, by the same functions. They need two things of a foreign layer: its
input before the norm, which a forward pre-hook sees, and a place between the mask and o_proj, which
is where transformers calls a function of the user's choice. That function gets query (B,H,S,D), key
and value (B,G,K,D) after rotary positions and cache, and an additive mask (B,1,S,K); it returns
(B,S,H,D). Only the decoder is given it: the encoder of images keeps its own attention.

As in model.py, the call that finds the cache empty brings the whole prompt; what follows on that
cache, a second turn of a chat included, counts as generated. This is all *ours*: the release has a
copy of one class, which needs FlashAttention. Nothing imports this file, which needs transformers.
"""

import itertools
import sys
import warnings
import weakref
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import (AttentionInterface, AttentionMaskInterface, Cache, GenerationConfig,
                          PreTrainedModel)
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minioutro.model import OutRo, align_with_sink, find_sinks, sink_value

# Options of generate that read the prompt in pieces, or together with guesses at the answer.
NOT_WHOLE = ("prefill_chunk_size", "assistant_model", "prompt_lookup_num_tokens",
             "assistant_early_exit", "use_mtp", "custom_generate")
NUMBER = itertools.count()              # no name comes twice: torch.compile remembers what one meant


class Seen:
    """What the last prompt gave, by layer: is_sink and opened, bool[B,S], and v_sink, float[B,G,D].

    Layers without a sink, or without a row that was opened, are left out. The methods are called by
    transformers.
    """

    def __init__(self, outro: OutRo, layers: nn.ModuleList, softmax_of):
        self.is_sink, self.opened, self.v_sink = {}, {}, {}
        self.outro, self.n_layers, self.softmax_of = outro, len(layers), softmax_of
        self.layer_of = {module: l for l, layer in enumerate(layers) for module in layer.modules()}
        self.prompts = weakref.WeakKeyDictionary()             # cache -> v_sink of the prompt in it
        self.searched = set()

    def opens_rows(self, l: int) -> bool:
        return l % (self.outro.relax_every or max(1, self.n_layers // 7)) == 0

    @torch.compiler.disable
    def enter(self, layer: nn.Module, args: tuple, kwargs: dict):
        """Before a decoder layer: keep its input, and tell a prompt from what follows it."""
        l, cache = self.layer_of[layer], None
        self.hidden = args[0] if args else kwargs["hidden_states"]
        for argument in (*args, *kwargs.values()):             # its name differs between classes
            cache = argument if isinstance(argument, Cache) else cache
        if l == 0:
            self.is_prompt = cache is None or int(cache.get_seq_length()) == 0
            if self.is_prompt:
                self.is_sink, self.opened, self.v_sink = {}, {}, {}
            elif cache not in self.prompts:
                raise ValueError("this cache holds no prompt that was read to its end in this block, "
                                 "so its sinks are not known; begin with an empty cache")
            self.v_sink_now = self.v_sink if self.is_prompt else self.prompts[cache]
        if self.is_prompt and l == self.n_layers - 1:
            if cache is not None:
                self.prompts[cache] = self.v_sink
            if self.outro.relax and not any(map(self.opens_rows, self.searched)):
                warnings.warn(f"no row can be opened: the layers with attention, {self.searched or 'none'}, "
                              f"are not those that open rows; give OutRo another relax_every")

    @torch.compiler.disable
    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
               attention_mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Steps 1 and 3, softmax(q k^T) v by the model's own function, and steps 5 and 6."""
        l, (B, H, S, D) = self.layer_of.get(module, self.n_layers), query.shape
        touched = l < self.n_layers - self.outro.skip_last
        if attention_mask is None:
            raise ValueError(f"{type(module).__name__} gets no mask, so nothing says what is causal; "
                             f"OutRo cannot be in this model")
        if touched and self.is_prompt:
            attention_mask = self.search(l, value, attention_mask, S)
        out, weights = self.softmax_of(module)(module, query, key, value, attention_mask, **kwargs)
        v_sink = self.v_sink_now.get(l) if touched and self.outro.align else None
        if v_sink is not None:
            if len(v_sink) != B:
                raise ValueError(f"the prompts were {len(v_sink)}, and this call continues {B}; "
                                 f"repeat or drop prompts before they are read")
            ever_sink = torch.zeros(B, S, dtype=torch.bool, device=out.device)
            if self.is_prompt:
                ever_sink = in_any(self.is_sink, ever_sink)
            out = align_with_sink(out.transpose(1, 2), v_sink, ever_sink, self.outro.gamma,
                                  self.outro.temperature).transpose(1, 2)
        return out, weights

    def search(self, l: int, value: Tensor, mask: Tensor, S: int) -> Tensor:
        """Steps 1, 3 and 5 for a prompt. Returns: the mask, the rows of new sinks opened."""
        hidden = self.hidden.to(value.device)          # the layer before may lie on another device
        if hidden.dim() != 3 or hidden.shape[1] != S or value.shape[2] < S:
            raise ValueError(f"layer {l} has the input {tuple(hidden.shape)}, {S} queries and "
                             f"{value.shape[2]} values, which is no self-attention of (B,S,C); OutRo "
                             f"cannot be in this model")
        self.searched.add(l)
        may_attend = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        # Padding is what may not even attend to itself. A static cache has more keys than tokens.
        is_token = may_attend[:, 0, :, :S].diagonal(dim1=1, dim2=2).expand(hidden.shape[:2])
        is_sink = torch.zeros_like(is_token)
        for b, real in enumerate(is_token):                    # padding would change the median
            is_sink[b, real] = find_sinks(hidden[b, real][None], self.outro.abs_threshold,
                                          self.outro.median_multiple)[0]
        if not is_sink.any():
            return mask
        self.is_sink[l], self.v_sink[l] = is_sink, sink_value(value[:, :, :S], is_sink)
        new = is_sink & ~in_any(self.opened, is_sink)
        if not (self.outro.relax and self.opens_rows(l) and new.any()):
            return mask
        self.opened[l] = new
        later = torch.ones_like(mask[0, 0], dtype=torch.bool).triu(1)                  # (S,K)
        keys = nn.functional.pad(is_token, (0, mask.shape[-1] - S))                    # (B,S) -> (B,K)
        rows = (new[:, :, None] & later & keys[:, None])[:, None]                      # (B,1,S,K)
        return mask | rows if mask.dtype == torch.bool else mask.masked_fill(rows, 0)


def in_any(found: dict[int, Tensor], like: Tensor) -> Tensor:
    """The tokens that are in any of these layers: bool[B,S], on the device of `like`."""
    return sum((tokens.to(like.device) for tokens in found.values()), torch.zeros_like(like))


def find_decoder(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    """The module that has the decoder layers, and these. ValueError, by its class, if it has none."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"attach takes a model of transformers, not {name}; give the one inside it")
    config = model.config.get_text_config(decoder=True)
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if getattr(module, "config", None) is config and isinstance(layers, nn.ModuleList):
            layers = layers[:config.num_hidden_layers]
            crossed = any("Cross" in type(inner).__name__ for inner in layers.modules())
            if model.config.is_encoder_decoder or crossed:
                raise ValueError(f"{name} attends to a second sequence; OutRo cannot be in this model")
            if getattr(config, "num_kv_shared_layers", 0):
                raise ValueError(f"{name} has layers without values of their own; OutRo cannot be in "
                                 f"this model")
            return module, layers
    raise ValueError(f"{name} has no decoder with a list of layers as Llama's; OutRo cannot be in "
                     f"this model")


def check_generate(settings: GenerationConfig, args: tuple, kwargs: dict):
    """ValueError for arguments of generate with which a prompt is not read whole, once."""
    given = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, GenerationConfig)]
    asked = {name: value for config in (settings, *given) for name, value in vars(config).items()
             if value is not None} | kwargs
    for name in NOT_WHOLE:
        if asked.get(name):
            raise ValueError(f"generate with {name} does not read the prompt whole and alone, as OutRo "
                             f"must; leave it out")
    if asked.get("use_cache") is False:
        raise ValueError("generate with use_cache=False reads every token as a new prompt; leave it out")


@contextmanager
def attach(model: PreTrainedModel, outro: OutRo):
    """For the block of a `with`, the model reads its prompts and generates with OutRo.

    Sampling, beams, padded batches, static caches: as ever. Yields: `Seen`. Raises: ValueError, here
    or in the block, that names the class or the option with which the method would not be what it is.
    """
    decoder, layers = find_decoder(model)
    before, name = decoder.config._attn_implementation, f"outro-{next(NUMBER)}"
    if before.startswith("outro-"):
        raise ValueError(f"{type(model).__name__} has OutRo already; leave that block first")

    def softmax_of(module):
        if before != "eager" and decoder._supports_sdpa:
            return ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sys.modules[type(module).__module__].eager_attention_forward

    plain_generate = getattr(model, "generate", None)

    def generate(*args, **kwargs):
        check_generate(model.generation_config, args, kwargs)
        return plain_generate(*args, **kwargs)

    seen = Seen(outro, layers, softmax_of)
    with ExitStack() as undo:
        undo.callback(vars(seen).pop, "hidden", None)
        for layer in layers:
            hook = layer.register_forward_pre_hook(seen.enter, with_kwargs=True)
            undo.callback(hook.remove)
        # A name without a mask of its own gets None, and every token would see every other.
        for interface, function in ((AttentionInterface, seen.attend), (AttentionMaskInterface, eager_mask)):
            interface.register(name, function)
            undo.callback(interface._global_mapping.pop, name)
        undo.callback(decoder.set_attn_implementation, before)
        decoder.set_attn_implementation(name)
        if decoder.config._attn_implementation != name:
            raise ValueError(f"{type(model).__name__} has attention that cannot be chosen; OutRo cannot "
                             f"be in this model")
        if plain_generate is not None:
            undo.enter_context(patch.object(model, "generate", generate))
            # Without a cache every step would be a prompt, and what is compiled runs no hook of ours.
            for setting in ("use_cache", "disable_compile"):
                undo.enter_context(patch.object(model.generation_config, setting, True))
        yield seen
