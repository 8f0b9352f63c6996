"""What is refused, and in which words: settings, sizes, tensors, devices.

A setting is refused in two cases. Either the code of transformers for SmolVLM, Llama and SigLIP
would read it and then compute something that is not implemented here, or its value makes no sense.
All other fields of a file are ignored.
"""

from bisect import bisect_right
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shown  # a value in an error message: cut if it is long or deep
from typing import NamedTuple

import torch

ENCODER, DECODER = "model.vision_model.", "model.text_model."
HEAD, TABLE = "lm_head.weight", f"{DECODER}embed_tokens.weight"

# ---- 1. Settings, each with the only value that is implemented. Null means the same. ------------

TEXT = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "rope_type": "default", "partial_rotary_factor": 1, "rope_interleaved": False,
        "qk_layer_norms": False, "use_resampler": False, "sliding_window": 0, "is_causal": True}
VISION = {"model_type": "smolvlm_vision", "hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
# Settings of generation that change even a greedy answer.
GREEDY = {"num_beams": 1, "repetition_penalty": 1, "encoder_repetition_penalty": 1,
          "guidance_scale": 1}
# Settings of the preprocessing that change pixels. resample 1 is Pillow's LANCZOS.
PIXELS = {"do_resize": True, "resample": 1, "do_rescale": True, "rescale_factor": 1 / 255,
          "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def check_fixed(where: str, section: dict, fixed: dict) -> None:
    """Raise ValueError for a field whose value is not the one that is implemented."""
    for field, implemented in fixed.items():
        value = section.get(field)
        if value is not None and value != implemented:
            raise ValueError(f"{where}: {field} = {shown(value)} is not implemented, only "
                             f"{implemented!r}; give another checkpoint")


def check_sections(path: Path, config: dict) -> None:
    """Raise ValueError if a config.json is not that of SmolVLM."""
    if config.get("model_type") != "smolvlm":
        raise ValueError(f"{path}: model_type = {shown(config.get('model_type'))} is not "
                         f"supported, only 'smolvlm'; give a SmolVLM2 checkpoint")
    for section in ("text_config", "vision_config"):
        if not isinstance(config.get(section), dict):
            raise ValueError(f"{path} has no section {section}; fetch it again")


def check_settings(config: dict) -> None:
    """Raise ValueError for a setting of config.json that is not implemented."""
    check_fixed("config.json, text_config", config["text_config"], TEXT)
    check_fixed("config.json, vision_config", config["vision_config"], VISION)
    check_layer_types("config.json, text_config", config["text_config"].get("layer_types"))


def check_layer_types(where: str, layer_types) -> None:
    """Raise ValueError if a layer attends to anything else than all earlier tokens."""
    kinds = layer_types if isinstance(layer_types, list) else [layer_types]
    if any(kind not in (None, "full_attention") for kind in kinds):
        raise ValueError(f"{where}: layer_types = {shown(layer_types)} is not implemented, only "
                         f"'full_attention'; give another checkpoint")


def check_number(where: str, field: str, value, kind: type, least: float, most: float) -> None:
    """Raise ValueError unless a value is of this kind, and a number lies within its limits.

    kind: bool, int or float
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool:
        fits, what = isinstance(value, bool), "true or false"
    elif kind is int:
        fits = is_number and isinstance(value, int) and least <= value <= most
        what = f"a whole number from {least} to {most}"
    else:
        fits, what = is_number and least <= value <= most, f"a number from {least} to {most}"
    if not fits:
        raise ValueError(f"{where}: {field} = {shown(value)} must be {what}; correct it")


def check_field(where: str, field: str, value, kind: type) -> None:
    """Raise ValueError for an absurd value of a field that the model uses."""
    if kind is float:
        check_number(where, field, value, kind, 1e-12, 10**12)
    else:
        check_number(where, field, value, kind, 1, 2**31 - 1)


# ---- 2. Sizes of config.json, compared with each other and with the weights ---------------------


def check_multiples(config) -> None:
    """Raise ValueError if a size does not divide into the parts that the model cuts it into."""
    text, vision = config.text_config, config.vision_config
    patches = vision.image_size // vision.patch_size
    for name, whole, part, reason in (
            ("num_attention_heads", text.num_attention_heads, text.num_key_value_heads,
             "num_key_value_heads"),
            ("head_dim", text.head_dim, 2, "rotary positions turn pairs of numbers"),
            ("hidden_size", vision.hidden_size, vision.num_attention_heads, "num_attention_heads"),
            ("image_size // patch_size", patches, config.scale_factor, "scale_factor")):
        if whole < part or whole % part:
            raise ValueError(f"config.json: {name} = {whole} is not a multiple of {part} "
                             f"({reason}); correct it")


class Size(NamedTuple):
    """A tensor's shape, and the fields of config.json that determine it."""
    section: str
    fields: tuple[str, ...]
    tensor: str
    shape: tuple[int, ...]


def sizes_of(config) -> list[Size]:
    """One tensor for each size in config.json. All layers are alike, so the first layer is enough.
    """
    text, vision = config.text_config, config.vision_config
    layer, vision_layer = f"{DECODER}layers.0.", f"{ENCODER}encoder.layers.0."
    patches = (vision.image_size // vision.patch_size)**2
    return [
        Size("text_config", ("vocab_size", "hidden_size"), f"{DECODER}embed_tokens",
             (text.vocab_size, text.hidden_size)),
        Size("text_config", ("intermediate_size",), f"{layer}mlp.gate_proj",
             (text.intermediate_size, text.hidden_size)),
        Size("text_config", ("num_attention_heads", "head_dim"), f"{layer}self_attn.q_proj",
             (text.num_attention_heads * text.head_dim, text.hidden_size)),
        Size("text_config", ("num_key_value_heads", "head_dim"), f"{layer}self_attn.k_proj",
             (text.num_key_value_heads * text.head_dim, text.hidden_size)),
        Size("vision_config", ("hidden_size", "patch_size"), f"{ENCODER}embeddings.patch_embedding",
             (vision.hidden_size, 3, vision.patch_size, vision.patch_size)),
        Size("vision_config", ("image_size", "patch_size"),
             f"{ENCODER}embeddings.position_embedding", (patches, vision.hidden_size)),
        Size("vision_config", ("intermediate_size",), f"{vision_layer}mlp.fc1",
             (vision.intermediate_size, vision.hidden_size)),
        Size("top level", ("scale_factor",), "model.connector.modality_projection.proj",
             (text.hidden_size, vision.hidden_size * config.scale_factor**2))]


def check_sizes(config, stored: dict) -> None:
    """Compare every size of config.json with the weights, before anything of that size is built.

    stored: tensors of the weights by name, with a `shape` each.
    Raises: ValueError with the fields, their values, and what the weights have instead.
    """
    for section, names, tensor, shape in sizes_of(config):
        weight = f"{tensor}.weight"
        found = stored[weight].shape if weight in stored else "no such tensor"
        if found != shape:
            values = getattr(config, section, config)
            asked = " and ".join(f"{name} = {getattr(values, name)}" for name in names)
            raise ValueError(f"config.json, {section}: with {asked} the model needs {weight} "
                             f"{shape}, but the weights have {found}; correct config.json, or "
                             f"fetch the weights again")
    for section, prefix in (("text_config", f"{DECODER}layers."),
                            ("vision_config", f"{ENCODER}encoder.layers.")):
        check_layers(section, getattr(config, section).num_hidden_layers, prefix, stored)
    vocab_size = config.text_config.vocab_size
    if config.image_token_id >= vocab_size:
        raise ValueError(f"config.json, top level: image_token_id = {config.image_token_id} is not "
                         f"one of the {vocab_size} tokens; correct it")


def check_layers(section: str, layers: int, prefix: str, stored: dict) -> None:
    """Raise ValueError unless the weights have this number of layers.

    prefix: how the names of the tensors of these layers begin
    """
    of_layers = [name.removeprefix(prefix) for name in stored if name.startswith(prefix)]
    found = len({name.split(".")[0] for name in of_layers})
    if layers != found:
        raise ValueError(f"config.json, {section}: num_hidden_layers = {layers}, but the weights "
                         f"have {found} layers; correct it, or fetch the weights again")


def check_tensors(folder: Path, expected: dict, stored: dict) -> None:
    """Raise ValueError unless the stored tensors are exactly the expected ones, by name and shape.

    expected: shapes by name. The message has the first five missing, unexpected and mis-shaped
    names. A stored copy of a tied head is allowed.
    """
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected and name != HEAD]
    misshaped = []
    for name, shape in expected.items():
        if name in stored and stored[name].shape != shape:
            misshaped.append(f"{name} {stored[name].shape} instead of {shape}")
    problems = []
    for what, names in (("missing", missing), ("unexpected", unexpected),
                        ("mis-shaped", misshaped)):
        if names:
            first = names[:5] if len(names) <= 5 else [*names[:5], "..."]
            problems.append(f"{len(names)} {what}: {', '.join(first)}")
    if problems:
        raise ValueError(f"the weights in {folder} do not fit its config.json: "
                         f"{'; '.join(problems)}; fetch the folder again, or correct the config")


def check_tied_head(folder: Path, head: torch.Tensor, table: torch.Tensor) -> None:
    """Raise ValueError unless a stored copy of a tied head equals the embedding table."""
    if not head.equal(table):
        raise ValueError(f"the weights in {folder} have a {HEAD} that differs from {TABLE}, but "
                         f"config.json says tie_word_embeddings = True; set it to false, or remove "
                         f"{HEAD}")


# ---- 3. The tokenizer's file --------------------------------------------------------------------

# Parts that a tokenizer may have. Parts of other kinds make the library panic on some texts.
NORMALIZERS = (None, "NFC", "NFD", "NFKC", "NFKD", "Lowercase")
TOKENIZER_PARTS = {"normalizer": NORMALIZERS, "decoder": ("ByteLevel",), "model": ("BPE",),
                   "pre_tokenizer": ("Digits", "ByteLevel", "Split")}
WORD_MARKS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def check_tokenizer(path: Path, saved: dict) -> None:
    """Raise ValueError if a tokenizer.json has a part that is not in the lists above."""
    for name, allowed in TOKENIZER_PARTS.items():
        for part in parts_of(saved.get(name)):
            kind = part.get("type", part) if isinstance(part, dict) else part
            if kind not in allowed:
                raise ValueError(f"{path}: {name} {shown(kind)} is not supported, only "
                                 f"{', '.join(map(str, allowed))}; take the file from a SmolVLM2 "
                                 f"checkpoint")
    for name in WORD_MARKS:
        if saved["model"].get(name):
            raise ValueError(f"{path}: {name} = {shown(saved['model'][name])} is not supported; "
                             f"take the file from a SmolVLM2 checkpoint")


def parts_of(value) -> list:
    """The parts of a Sequence in a tokenizer.json. A part that is not a Sequence stands alone."""
    if not isinstance(value, dict) or value.get("type") != "Sequence":
        return [value]
    parts = []
    for inner in value.values():
        if isinstance(inner, list):
            parts += inner
    return parts


# ---- 4. The hub, devices, and parts that must fit together --------------------------------------


def why_not_fetched(problem: Exception, repo: str, revision: str | None) -> str:
    """One sentence: what went wrong with the hub, and what to try."""
    from huggingface_hub import errors

    name = f"{repo} at revision {revision}" if revision else repo
    if isinstance(problem, errors.HFValidationError):
        return (f"{repo} is neither a folder here nor the name of a repository (owner/name); check "
                f"the path")
    if isinstance(problem, errors.GatedRepoError):
        return (f"{name} asks for a licence on the hub first; accept it on its page, then log in "
                f"with `hf auth login`")
    if isinstance(problem, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision}; leave the revision out to get the newest one"
    if isinstance(problem, errors.RepositoryNotFoundError):
        return (f"{repo} is neither a folder here nor a public repository of the hub; check the "
                f"name")
    cause = problem if problem.__cause__ is None else problem.__cause__
    first_line = f"{type(cause).__name__}: {str(cause).strip()}".split("\n")[0]
    return (f"{name} is not a folder here (check the path), is not in the cache, and cannot be "
            f"fetched from the hub ({first_line[:300]}); try again, or copy its files into a "
            f"folder and give the path of that folder")


def check_device(device) -> None:
    """Raise ValueError if this machine has no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):      # AssertionError if torch was built without CUDA
        raise ValueError(f"this machine has no device {device}; leave the device out to use the "
                         f"CPU") from None


def check_pair(model, processor) -> None:
    """Raise ValueError if processor and model do not fit together."""
    config, vision = model.config, model.config.vision_config
    per_frame = (vision.image_size // vision.patch_size // config.scale_factor)**2
    for what, ours, theirs in (
            ("frame size", processor.size, vision.image_size),
            ("number of tokens a frame", processor.tokens_per_frame, per_frame),
            ("id of <image>", processor.image_token_id, config.image_token_id)):
        if ours != theirs:
            raise ValueError(f"the {what} is {ours} in the processor's files, but {theirs} in "
                             f"config.json; take all files from one checkpoint")


def check_prompt(model, processor, video, question: str, input_ids: torch.Tensor) -> None:
    """Raise ValueError if a prompt, int64[1,S], has tokens that the model lacks, or is too long."""
    text = model.config.text_config
    largest = input_ids.max().item()
    if largest >= text.vocab_size:
        raise ValueError(f"tokenizer.json gives token id {largest}, but config.json has only "
                         f"{text.vocab_size} tokens; take all files from one checkpoint")
    length, frames = input_ids.shape[1], len(video.frames)
    context = text.max_position_embeddings
    if length <= context:
        return
    raise ValueError(f"the prompt has {length} tokens with {frames} frames, but the model's "
                     f"context holds {context}; "
                     f"{advice_on_length(processor, video, question, context)}")


def advice_on_length(processor, video, question: str, most: int) -> str:
    """What to do if the prompt is too long. most: the number of tokens that the model can take"""
    def length_with(n: int) -> int:
        part = replace(video, frames=video.frames[:n], seconds=video.seconds[:n])
        return len(processor.tokenize(processor.pieces(part, question)))
    fit = bisect_right(range(1, len(video.frames)), most, key=length_with)
    if fit:
        return f"use --frames {fit}, the largest number that fits"
    return "shorten the question, because not even one frame fits"
