"""OutRo in a model that somebody else wrote: a decoder of transformers that is like Llama's.

    from minioutro.lab.attach import attach
    with attach(model, OutRo()) as seen:         # everything is put back at the end of the block
        output = model.generate(**inputs)
    print(seen.is_sink, seen.opened)             # by layer. Empty if nothing was found

The method is the class `Sinks` of model.py. It needs two things from a layer of another model. The
first is the layer's input before the norm, which a forward pre-hook sees. The second is a place
between the mask and o_proj. There, transformers calls an attention function that a user may choose.
The function gets query (B,H,S,D), key and value (B,G,K,D), after rotary positions and cache, and a
mask (B,1,S,K). It returns (B,S,H,D).

As in model.py, a call with an empty cache brings the whole prompt. All later calls with that cache
count as generated, also a second turn of a chat. This way of attaching is *ours*: the release
changes a copy of one class. Nothing imports this file, because it needs transformers.
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

# The model types that the tests try, by the model_type in their config.
TRIED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_oss", "smolvlm", "qwen2_vl",
         "qwen2_5_vl", "qwen3_vl", "llava_onevision", "idefics3", "gemma3", "internvl",
         "qwen2_5_omni_thinker", "video_llama_3")
# Options of generate that read a prompt in pieces, or together with guesses of its answer.
NOT_WHOLE = ("prefill_chunk_size", "assistant_model", "prompt_lookup_num_tokens",
             "assistant_early_exit", "use_mtp", "custom_generate")
# A mask that is added to the scores forbids a key with a value of at most this. The lowest value of
# float16 is -65504.
FORBIDDEN = -1e4
NUMBER = itertools.count()          # a new name each time, because torch.compile caches by name


def refusal(name: str, why: str) -> ValueError:
    return ValueError(f"OutRo cannot be in {name}: {why}; minioutro/lab/README.md says which "
                      f"models were tried")


@dataclass
class Call:
    """The state of one call of the decoder, from its first layer to its last."""
    sinks: Sinks                    # of the prompt that this call brings, or that is in its cache
    n_before: int                   # tokens in the cache. 0: this call brings a prompt
    cache: Cache | None
    positions: Tensor | None        # int64[B,S]. None if the model counts in several dimensions
    hidden: Tensor                  # float[B,S,C], the input of the layer that runs now
    rows_are_checked: bool = False

    @property
    def is_prompt(self) -> bool:
        return self.n_before == 0


class Seen:
    """What was found in the last prompt: is_sink, opened and v_sink, as in a trace.

    Each is a dict by layer. Layers in which nothing was found are left out.
    """

    def __init__(self, outro: OutRo, layers: nn.ModuleList, softmax_of):
        self.outro, self.n_layers, self.softmax_of = outro, len(layers), softmax_of
        self.layer_of = {module: l for l, layer in enumerate(layers) for module in layer.modules()}
        self.sinks: Sinks | None = None
        self.call: Call | None = None
        self.prompts = weakref.WeakKeyDictionary()      # cache -> Sinks of the prompt in it, ...
        self.keys = weakref.WeakKeyDictionary()         # ... and the sums of its keys, by layer
        self.lock = threading.Lock()                    # held while a thread is in the decoder
        self.inside: int | None = None                  # the id of that thread

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
        """Called before the decoder runs."""
        if decoder.training:
            raise ValueError("the model is in training mode, in which its layers may run twice; "
                             "call model.eval() first")
        if not self.lock.acquire(blocking=False):
            raise ValueError("another thread is inside this model, and OutRo can read only one "
                             "prompt at a time; let the calls wait for each other")
        self.inside = threading.get_ident()

    @torch.compiler.disable
    def end(self, *_) -> None:
        """Called after the decoder has run, also after an error."""
        if self.inside == threading.get_ident():        # a thread that was refused changes nothing
            self.call = None
            self.inside = None
            self.lock.release()

    @torch.compiler.disable
    def enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Called before each layer: keep its input. Before the first layer, begin a new Call."""
        l = self.layer_of[layer]
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.dim() != 3:
            raise refusal(type(layer).__name__,
                          f"its input is {tuple(hidden.shape)}, not (B,S,C)")
        if l == 0:
            given = (*args, *kwargs.values())
            # found by its type, because models give it different names
            cache = next((x for x in given if isinstance(x, Cache)), None)
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
                raise ValueError("the prompt in this cache was not read in this block, so its "
                                 "sinks are not known; begin with an empty cache")
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
            warnings.warn(f"no row can be opened, because none of the layers with attention, "
                          f"{sorted(sinks.is_sink)}, is a multiple of relax_every = "
                          f"{sinks.relax_every}; give OutRo another relax_every")

    # ---- the attention function ----

    @torch.compiler.disable
    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
               attention_mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Steps 1 and 3, then the model's own softmax(q k^T) v, then steps 5 and 6."""
        softmax = self.softmax_of(module)
        if module not in self.layer_of:                 # another model with the same config
            return softmax(module, query, key, value, attention_mask, **kwargs)
        if attention_mask is None:
            raise refusal(type(module).__name__, "it gets no mask, so OutRo cannot open rows in it")
        l, call, S = self.layer_of[module], self.call, query.shape[2]
        if call.is_prompt:
            value_of_prompt = value[:, :, :S]           # a static cache is longer than the prompt
            if l in call.sinks.v_sink:
                raise refusal(type(module).__name__, "its layer attends twice")
            if l in call.sinks.searched:
                attention_mask = self.search(l, attention_mask)
        else:
            value_of_prompt = value                     # not used: the sinks' value is known
        self.check_rows(l, key, S)
        out, weights = softmax(module, query, key, value, attention_mask, **kwargs)
        aligned = call.sinks.align(l, out.transpose(1, 2), value_of_prompt)         # (B,H,S,D)
        return aligned.transpose(1, 2), weights

    def search(self, l: int, mask: Tensor) -> Tensor:
        """Steps 1 and 3. Returns: the mask, with the rows of new sinks opened."""
        call, device = self.call, mask.device
        sinks, hidden = call.sinks, call.hidden.to(device)      # layers may be on several devices
        S = hidden.shape[1]
        allowed = mask if mask.dtype == torch.bool else mask == 0                   # (B,1,S,K)
        if mask.dtype != torch.bool and not (allowed | (mask <= FORBIDDEN)).all():
            raise ValueError("the mask has values between allowed (0) and forbidden, for example a "
                             "bias on distances, so OutRo cannot open rows in it; use a model "
                             "without such a mask")
        # A token that may not even attend to itself is padding.
        is_token = allowed[:, 0, :, :S].diagonal(dim1=1, dim2=2).expand(hidden.shape[:2])
        check_positions(call.positions, is_token)

        sinks.ever_sink, sinks.opened = sinks.ever_sink.to(device), sinks.opened.to(device)
        sinks.find(l, hidden, is_token)
        may_attend = allowed[:, 0, :, :S].expand(len(hidden), S, S)
        opened = sinks.open_rows(l, may_attend)
        if opened is may_attend:
            return mask
        # Open only what causality forbids. Padding stays closed, and so do keys before a window.
        later = torch.ones(S, S, dtype=torch.bool, device=device).triu(1)
        new = opened & ~may_attend & later & is_token[:, None, :]                   # (B,S,S)
        new = nn.functional.pad(new, (0, mask.shape[-1] - S))[:, None]              # (B,1,S,K)
        return mask | new if mask.dtype == torch.bool else mask.masked_fill(new, 0)

    def check_rows(self, l: int, key: Tensor, S: int) -> None:
        """Raise ValueError if the rows of a cache are no longer those that the prompt had.

        It compares sums over the prompt's keys, in the first layer that still has all of them.
        Beams of one prompt have equal rows, so they may change places.
        """
        call = self.call
        n_prompt = call.sinks.ever_sink.shape[1]
        if call.cache is None or call.rows_are_checked:
            return
        if key.shape[2] < call.n_before + S:            # a window has dropped the first keys
            return
        sums = key[:, :, :n_prompt].double().sum((1, 2, 3)).cpu()                   # (B,)
        if call.is_prompt:
            self.keys.setdefault(call.cache, {})[l] = sums
            return
        call.rows_are_checked = True
        before = self.keys[call.cache][l]
        if sums.shape != before.shape or not torch.allclose(sums, before, rtol=1e-6):
            raise ValueError("the rows of the cache were reordered or selected, so its sinks "
                             "belong to other rows; read the prompts again")


def check_positions(positions: Tensor | None, is_token: Tensor) -> None:
    """Raise ValueError if several texts are packed into one row: then its positions step back."""
    if positions is None:
        return
    for row, real in zip(positions.expand(is_token.shape).to(is_token.device), is_token):
        if (row[real].diff() < 0).any():
            raise ValueError("the positions of a row step back, as if several texts were packed "
                             "into it; give OutRo one prompt in each row")


def find_decoder(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    """The module that has the decoder's layers, and the layers. Raises: ValueError if it has none.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise refusal(name, "it is not a model of transformers, but may contain one")
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or any("Cross" in type(m).__name__ for m in model.modules()):
        raise refusal(name, "it attends to a second sequence")
    if any(part.endswith("indexer") for part, _ in model.named_modules()):
        # transformers calls the indexer only if the attention function is one of its own
        raise refusal(name, "each of its queries attends only to a few chosen keys")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refusal(name, "some of its layers have no values of their own")
    if model.get_output_embeddings() is None:
        raise refusal(name, "it has no head, so give the model around it, which generates")
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if getattr(module, "config", None) is config and isinstance(layers, nn.ModuleList):
            return module, layers
    raise refusal(name, "it has no decoder with a list of layers like Llama's")


def check_generation(configs: list[dict]) -> None:
    """Raise ValueError for an option of generate that does not read a prompt in a single call."""
    for config in configs:
        for option in NOT_WHOLE:
            if config.get(option):
                raise ValueError(f"OutRo needs the whole prompt in one call, which {option} does "
                                 f"not give; generate without it")
        if config.get("use_cache") is False:
            raise ValueError("use_cache=False makes a new prompt of each token; generate without "
                             "it")


@contextmanager
def attach(model: PreTrainedModel, outro: OutRo, untested: bool = False):
    """For a `with` block, in which the model reads and generates with OutRo. Yields: `Seen`.

    untested: also take model types that our tests do not try. Sampling, beams, padded batches and
    static caches work as usual.
    Raises: ValueError, here or in the block, that names the class, cache, mask or option with which
    the method cannot be computed correctly.
    """
    decoder, layers = find_decoder(model)
    kind = model.config.model_type
    if kind not in TRIED and not untested:
        raise refusal(type(model).__name__, f"its type {kind} was never tried (untested=True "
                                            f"takes it nevertheless)")
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
        AttentionMaskInterface.register(name, eager_mask)      # else there would be no mask at all
        for interface in (AttentionInterface, AttentionMaskInterface):
            undo.callback(interface._global_mapping.pop, name)
        undo.callback(decoder.set_attn_implementation, before)
        decoder.set_attn_implementation(name)                  # the image encoder keeps its own
        if decoder.config._attn_implementation != name:
            raise refusal(type(model).__name__, "its attention function cannot be chosen")
        if plain_generate is not None:
            undo.enter_context(patch.object(model, "generate", generate))
            undo.enter_context(patch.multiple(model.generation_config, use_cache=True,
                                              disable_compile=True))
        yield seen
