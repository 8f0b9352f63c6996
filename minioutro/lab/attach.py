"""OutRo in a model that somebody else wrote: a decoder of transformers that is like Llama's.

    from minioutro.lab.attach import attach
    with attach(model, OutRo()) as seen:         # everything is put back at the end of the block
        output = model.generate(**inputs)
    print(seen.is_sink, seen.opened)             # by layer; empty where nothing was found

The method is the class `Sinks` of model.py. It needs two things of a foreign layer: its input before
the norm, which a forward pre-hook sees, and a place between the mask and o_proj. That place is where
transformers calls an attention function which the user may choose. The function gets query
(B,H,S,D), key and value (B,G,K,D) after rotary positions and cache, and a mask (B,1,S,K). It returns
(B,S,H,D).

As in model.py, the call that finds the cache empty brings the whole prompt. What follows on that
cache counts as generated, a second turn of a chat included. The way is *ours*: the release changes a
copy of one class. Nothing imports this file, which needs transformers.
"""

import itertools
import sys
import threading
import warnings
import weakref
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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

from minioutro.model import OutRo, Sinks

# The model types that the tests try, by the name in their config.
TRIED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_oss", "smolvlm", "qwen2_vl",
         "qwen2_5_vl", "qwen3_vl", "llava_onevision", "idefics3", "gemma3", "internvl",
         "qwen2_5_omni_thinker", "video_llama_3")
# Options of generate that read a prompt in pieces, or together with guesses at its answer.
NOT_WHOLE = ("prefill_chunk_size", "assistant_model", "prompt_lookup_num_tokens",
             "assistant_early_exit", "use_mtp", "custom_generate")
# An added mask forbids by a number of at most this: -65504 is the lowest of float16.
FORBIDDEN = -1e4
NUMBER = itertools.count()          # no name comes twice: torch.compile remembers what one meant


def refusal(name: str, why: str) -> ValueError:
    return ValueError(f"OutRo cannot be in {name}: {why}; minioutro/lab/README.md says which "
                      f"models were tried")


@dataclass
class Call:
    """What is known of one call of the decoder, from its first layer to its last."""
    sinks: Sinks                    # of the prompt that this call brings, or that is in its cache
    n_before: int                   # tokens in the cache; none: this call brings a prompt
    cache: Cache | None
    positions: Tensor | None        # int64[B,S], where the model counts in one dimension
    hidden: Tensor                  # float[B,S,C], the input of the layer that runs now
    rows_are_checked: bool = False

    @property
    def is_prompt(self) -> bool:
        return self.n_before == 0


class Seen:
    """Of the last prompt, by layer, where any was found: is_sink, opened, v_sink (as in a trace)."""

    def __init__(self, outro: OutRo, layers: nn.ModuleList, softmax_of):
        self.outro, self.n_layers, self.softmax_of = outro, len(layers), softmax_of
        self.layer_of = {module: l for l, layer in enumerate(layers) for module in layer.modules()}
        self.sinks: Sinks | None = None
        self.call: Call | None = None
        self.prompts = weakref.WeakKeyDictionary()      # cache -> Sinks of the prompt in it, ...
        self.keys = weakref.WeakKeyDictionary()         # ... and the sums of its keys, by layer
        self.lock = threading.Lock()                    # held by the thread that is in the decoder
        self.inside: int | None = None                  # that thread

    @property
    def is_sink(self) -> dict[int, Tensor]:
        """bool[B,S]."""
        found = self.sinks.is_sink if self.sinks else {}
        return {l: is_sink for l, is_sink in found.items() if is_sink.any()}

    @property
    def opened(self) -> dict[int, Tensor]:
        """bool[B,S]."""
        return dict(self.sinks.opened_in) if self.sinks else {}

    @property
    def v_sink(self) -> dict[int, Tensor]:
        """float[B,G,D]."""
        return {l: self.sinks.v_sink[l] for l in self.is_sink}

    # ---- the hooks: around the decoder, and before each layer ----

    @torch.compiler.disable
    def begin(self, decoder: nn.Module, args: tuple) -> None:
        """Before the decoder."""
        if decoder.training:
            raise ValueError("the model is in training mode, in which its layers may run twice; "
                             "call model.eval() first")
        if not self.lock.acquire(blocking=False):
            raise ValueError("another thread is inside of this model; OutRo can read one prompt "
                             "at a time, so let the calls wait for each other")
        self.inside = threading.get_ident()

    @torch.compiler.disable
    def end(self, *_) -> None:
        """After the decoder, also after an error."""
        if self.inside == threading.get_ident():        # not for a thread that was refused
            self.call = None
            self.inside = None
            self.lock.release()

    @torch.compiler.disable
    def enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before each layer: keep its input. Before the first: is it a prompt, or what follows?"""
        l = self.layer_of[layer]
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.dim() != 3:
            raise refusal(type(layer).__name__,
                          f"its input is {tuple(hidden.shape)}, not (B,S,C)")
        if l == 0:
            given = (*args, *kwargs.values())
            cache = next((x for x in given if isinstance(x, Cache)), None)     # its name may be any
            self.call = self.new_call(hidden, cache, kwargs.get("position_ids"))
        self.call.hidden = hidden
        if self.call.is_prompt and l == self.n_layers - 1:
            self.end_of_prompt()

    def new_call(self, hidden: Tensor, cache: Cache | None, positions: Tensor | None) -> Call:
        if positions is not None and positions.dim() != 2:
            positions = None                            # a grid in time, height and width
        n_before = 0 if cache is None else int(cache.get_seq_length())
        if n_before > 0:
            if cache not in self.prompts:
                raise ValueError("this cache holds no prompt that was read in this block, so that "
                                 "its sinks are not known; begin with an empty cache")
            return Call(self.prompts[cache], n_before, cache, positions, hidden)
        nobody = hidden.new_zeros(hidden.shape[:2], dtype=torch.bool)               # (B,S)
        self.sinks = Sinks(self.outro, self.n_layers, nobody)
        return Call(self.sinks, n_before, cache, positions, hidden)

    def end_of_prompt(self) -> None:
        sinks = self.sinks
        if self.call.cache is not None:
            self.prompts[self.call.cache] = sinks
        opens = [l for l in sinks.is_sink if l % sinks.relax_every == 0]
        if self.outro.relax and not opens:
            warnings.warn(f"no row can be opened: of the layers {sorted(sinks.is_sink)}, which "
                          f"have attention, none has its turn; give OutRo another relax_every")

    # ---- the attention function ----

    @torch.compiler.disable
    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
               attention_mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Steps 1 and 3; the model's own softmax(q k^T) v; steps 5 and 6."""
        softmax = self.softmax_of(module)
        if module not in self.layer_of:                 # another model with the same config
            return softmax(module, query, key, value, attention_mask, **kwargs)
        if attention_mask is None:
            raise refusal(type(module).__name__, "it gets no mask that says what is causal")
        l, call, S = self.layer_of[module], self.call, query.shape[2]
        if call.is_prompt:
            value_of_prompt = value[:, :, :S]           # a static cache is longer than the prompt
            if l in call.sinks.v_sink:
                raise refusal(type(module).__name__, "its layer attends twice")
            if l in call.sinks.searched:
                attention_mask = self.search(l, attention_mask)
        else:
            value_of_prompt = value                     # its sinks' value is known, and this unused
        self.check_rows(l, key, S)
        out, weights = softmax(module, query, key, value, attention_mask, **kwargs)
        aligned = call.sinks.align(l, out.transpose(1, 2), value_of_prompt)         # (B,H,S,D)
        return aligned.transpose(1, 2), weights

    def search(self, l: int, mask: Tensor) -> Tensor:
        """Steps 1 and 3. Returns: the mask, with the rows of new sinks opened."""
        call, device = self.call, mask.device
        sinks, hidden = call.sinks, call.hidden.to(device)      # the layer before may be elsewhere
        S = hidden.shape[1]
        allowed = mask if mask.dtype == torch.bool else mask == 0                   # (B,1,S,K)
        if mask.dtype != torch.bool and not (allowed | (mask <= FORBIDDEN)).all():
            raise ValueError("the mask has values between allowed (0) and forbidden, as a bias on "
                             "distances; OutRo cannot open rows in it")
        # Padding is what may not even attend to itself.
        is_token = allowed[:, 0, :, :S].diagonal(dim1=1, dim2=2).expand(hidden.shape[:2])
        check_positions(call.positions, is_token)

        sinks.ever_sink, sinks.opened = sinks.ever_sink.to(device), sinks.opened.to(device)
        sinks.find(l, hidden, is_token)
        may_attend = allowed[:, 0, :, :S].expand(len(hidden), S, S)
        opened = sinks.open_rows(l, may_attend)
        if opened is may_attend:
            return mask
        # Causality alone is taken away: padding stays closed, and so does what a window has left.
        later = torch.ones(S, S, dtype=torch.bool, device=device).triu(1)
        new = opened & ~may_attend & later & is_token[:, None, :]                   # (B,S,S)
        new = nn.functional.pad(new, (0, mask.shape[-1] - S))[:, None]              # (B,1,S,K)
        return mask | new if mask.dtype == torch.bool else mask.masked_fill(new, 0)

    def check_rows(self, l: int, key: Tensor, S: int) -> None:
        """Raise ValueError if the rows of a cache are no longer those that the prompt had.

        Compared are sums over the prompt's keys, in the first layer that still has all of them.
        Beams of one prompt have equal rows, and may change places.
        """
        call = self.call
        n_prompt = call.sinks.ever_sink.shape[1]
        if call.cache is None or call.rows_are_checked:
            return
        if key.shape[2] < call.n_before + S:            # a window no longer has the first of them
            return
        sums = key[:, :, :n_prompt].double().sum((1, 2, 3)).cpu()                   # (B,)
        if call.is_prompt:
            self.keys.setdefault(call.cache, {})[l] = sums
            return
        call.rows_are_checked = True
        before = self.keys[call.cache][l]
        if sums.shape != before.shape or not torch.allclose(sums, before, rtol=1e-6):
            raise ValueError("the rows of the cache were reordered or chosen from, and its sinks "
                             "are those of the rows before; read the prompts again")


def check_positions(positions: Tensor | None, is_token: Tensor) -> None:
    """Raise ValueError if several texts lie in one row, told apart by positions that step back."""
    if positions is None:
        return
    for row, real in zip(positions.expand(is_token.shape).to(is_token.device), is_token):
        if (row[real].diff() < 0).any():
            raise ValueError("the positions of a row step back, as where several texts are packed "
                             "into one; OutRo needs one prompt in each row")


def find_decoder(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    """The module that has the decoder's layers, and these. Raises: ValueError if there is none."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise refusal(name, "it is no model of transformers, but may hold one")
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or any("Cross" in type(m).__name__ for m in model.modules()):
        raise refusal(name, "it attends to a second sequence")
    if any(part.endswith("indexer") for part, _ in model.named_modules()):
        # transformers asks its indexer only if the attention is one of its own
        raise refusal(name, "each of its queries attends to a few chosen keys alone")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refusal(name, "some of its layers have no values of their own")
    if model.get_output_embeddings() is None:
        raise refusal(name, "it has no head; give the model around it, which generates")
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if getattr(module, "config", None) is config and isinstance(layers, nn.ModuleList):
            return module, layers
    raise refusal(name, "it has no decoder with a list of layers as Llama's")


def check_generation(configs: list[dict]) -> None:
    """Raise ValueError for an option of generate with which the method would not be itself."""
    for config in configs:
        for option in NOT_WHOLE:
            if config.get(option):
                raise ValueError(f"{option} does not read a prompt whole and alone, as OutRo must; "
                                 f"generate without it")
        if config.get("use_cache") is False:
            raise ValueError("use_cache=False makes each token a prompt; generate without it")


@contextmanager
def attach(model: PreTrainedModel, outro: OutRo, untested: bool = False):
    """For a `with` block, in which the model reads and generates with OutRo. Yields: `Seen`.

    untested: also take model types that no test of ours tries. Sampling, beams, padded batches and
    static caches work as ever. Raises: ValueError, here or in the block, that names the class,
    cache, mask or option with which the method would not be itself.
    """
    decoder, layers = find_decoder(model)
    kind = model.config.model_type
    if kind not in TRIED and not untested:
        raise refusal(type(model).__name__, f"its type {kind} was never tried (untested=True "
                                            f"takes it all the same)")
    name = f"outro-{next(NUMBER)}"
    before = decoder.config._attn_implementation
    if before.startswith("outro-"):
        raise ValueError(f"{type(model).__name__} has OutRo already; leave the other block first")

    def softmax_of(module):
        if before != "eager" and decoder._supports_sdpa:
            return ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sys.modules[type(module).__module__].eager_attention_forward

    plain_generate = getattr(model, "generate", None)

    def generate(*args, **kwargs):
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, GenerationConfig)]
        check_generation([*map(vars, (model.generation_config, *given)), kwargs])
        return plain_generate(*args, **kwargs)

    seen = Seen(outro, layers, softmax_of)
    with ExitStack() as undo:
        hooks = [decoder.register_forward_pre_hook(seen.begin),
                 decoder.register_forward_hook(seen.end, always_call=True)]
        hooks += [layer.register_forward_pre_hook(seen.enter, with_kwargs=True)
                  for layer in layers]
        for hook in hooks:
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
