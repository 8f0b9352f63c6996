"""Find a checkpoint, read it strictly, and say what is wrong with it.

A checkpoint is a folder with config.json, generation_config.json (optional) and the weights, either
model.safetensors or several files named by model.safetensors.index.json. It lies on this machine or
on the Hugging Face hub, from where only the files that are needed are fetched, once.

Nothing in these files is trusted: a setting that would change what is computed is used or refused
by name, and every size in config.json is compared with the weights before anything is built.
"""

import json
import os
from dataclasses import fields
from math import prod
from pathlib import Path
from reprlib import repr as shown  # a value in an error message: cut if it is long or deep
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from minioutro.support.checks import (
    CHANGING,
    DECODER,
    FIXED,
    IGNORED,
    NEUTRAL,
    check_fields,
    check_number,
)

TOY = Path(__file__).parent / "toy"
HUB_MODEL = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json",
               "model*.safetensors")
PROCESSOR_FILES = ("tokenizer.json", "preprocessor_config.json", "video_preprocessor_config.json",
                   "processor_config.json")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")      # of the stored tensors, as safetensors calls them


def find(path_or_repo, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder with the files: path_or_repo itself, or the hub's cache after fetching them.

    A repository that cannot be fetched, but was before, is taken from the cache.
    Raises: ValueError that says what is missing and what to try.
    """
    folder = Path(os.path.expanduser(path_or_repo))
    if folder.is_dir():
        if revision:
            raise ValueError(f"{folder} is a folder and has no revision {revision}; leave that out")
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; give the folder that holds config.json")

    # imported here: it takes longer to import than the rest of the module, and a folder needs none
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import logging, tqdm

    class TerminalBar(tqdm):
        """A progress bar that is silent where nobody watches, as in a log file or a pipe."""
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{"disable": None, **kwargs})

    logging.set_verbosity_error()           # not each of its retries: what failed is told below
    problem = None
    for options in ({}, {"local_files_only": True}):
        try:
            return Path(snapshot_download(str(path_or_repo), revision=revision, **options,
                                          allow_patterns=patterns, tqdm_class=TerminalBar))
        except Exception as error:          # nothing narrower: proxies, addresses, servers and
            problem = problem or error      # hotel networks make it raise errors of many kinds
    cause = problem.__cause__ or problem
    cause = f"{type(cause).__name__}: {str(cause).strip()}".split("\n")[0][:300]
    name = f"{path_or_repo} at revision {revision}" if revision else path_or_repo
    sentences = {
        HFValidationError: f"{path_or_repo} is neither a folder here nor the name of a repository "
                           f"(owner/name); check the path",
        GatedRepoError: f"{name} asks for a licence on the hub first; accept it on its page, then "
                        f"log in with `hf auth login`",
        RevisionNotFoundError: f"{path_or_repo} has no revision {revision}; leave it out to get "
                               f"the newest",
        RepositoryNotFoundError: f"{path_or_repo} is neither a folder here nor a public repository "
                                 f"of the hub; check the name",
        Exception: f"{name} is no folder here (check the path), is not in the cache, and cannot be "
                   f"fetched from the hub ({cause}); try again, or copy its files into a folder "
                   f"and give that"}
    raise ValueError(next(text for kind, text in sentences.items() if isinstance(problem, kind)))


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}; give a checkpoint's folder") from None
    except (ValueError, RecursionError) as error:   # no JSON, no UTF-8, too many digits or brackets
        raise ValueError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object; fetch it again")
    return content


def read_sections(folder: Path) -> dict:
    """config.json as it was written before transformers 5.

    Raises: ValueError for another model_type, or if text_config or vision_config is missing.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "smolvlm":
        raise ValueError(f"{folder / 'config.json'}: model_type = "
                         f"{shown(config.get('model_type'))} is not supported, only 'smolvlm'; "
                         f"give a SmolVLM2 checkpoint")
    for section in ("text_config", "vision_config"):
        if not isinstance(config.get(section), dict):
            raise ValueError(f"{folder / 'config.json'} has no section {section}; fetch it again")
    text = config["text_config"]
    # "rope_parameters" since transformers 5; before, rope_theta stood beside "rope_scaling"
    rope = text.pop("rope_scaling", None) or text.pop("rope_parameters", None) or {}
    rope = rope if isinstance(rope, dict) else {"type": rope}
    text["rope_type"] = rope.get("rope_type", rope.get("type"))
    text.update({field: rope[field] for field in ("rope_theta", "partial_rotary_factor")
                 if field in rope})
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds):
        del text["layer_types"]
    return config


def fill(config_class, section: dict, name: str, **parts):
    """Make a config dataclass of the fields that it has; parts are given, not read.

    Raises: ValueError for a value that makes no sense or is not implemented.
    """
    where, known = f"config.json, {name}", [field.name for field in fields(config_class)]
    check_fields(where, section, FIXED[name], [*known, *IGNORED])
    values = {}
    for field in fields(config_class):
        value = section.get(field.name, field.default)
        if field.name not in parts and value is not field.default:
            kind = field.type if field.type in (bool, float) else int
            limits = (1e-12, 10**12) if kind is float else (1, 2**31 - 1)
            check_number(where, field.name, value, kind, *limits)
            values[field.name] = value
    return config_class(**values, **parts)


def read_eos(folder: Path) -> tuple[int, ...]:
    """The token ids that end an answer.

    They are in generation_config.json; a folder without that file has them in config.json, at the
    top or in text_config. Source: GenerationConfig.from_model_config of transformers 5.23.
    Raises: ValueError for a generation setting that asks for another answer than the greedy one.
    """
    path = folder / "generation_config.json"
    if path.exists():
        settings = read_json(path)
        check_fields(str(path), settings, NEUTRAL, settings.keys() - set(CHANGING))
        eos = settings.get("eos_token_id")
    else:
        path = folder / "config.json"
        config = read_sections(folder)
        eos = config.get("eos_token_id")
        eos = config["text_config"].get("eos_token_id") if eos is None else eos
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(token_id) is int for token_id in eos):
        raise ValueError(f"{path}: eos_token_id must be token ids, not {shown(eos)}; correct it")
    return tuple(eos)


class Stored(NamedTuple):
    """Where a tensor of a checkpoint lies, and its shape."""
    file: Path
    shape: tuple[int, ...]


def read_headers(folder: Path) -> dict[str, Stored]:
    """What the weights' files hold, by name of the tensor; no tensor is read.

    model.safetensors goes before an index, as in transformers: the index may be an older one's.
    """
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        files = [WEIGHTS]
    else:
        index = read_json(folder / INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{folder / INDEX} has no weight_map; fetch it again")
        files = sorted({str(file) for file in index["weight_map"].values()})
        if any(Path(file).name != file for file in files):
            raise ValueError(f"{folder / INDEX} names files outside its folder; fetch it again")
    stored = {}
    for path in (folder / file for file in files):
        if not path.exists():
            raise ValueError(f"{path} is missing; fetch it again (only safetensors are read)")
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise ValueError(f"{path}: {name} is {part.get_dtype()}; only "
                                         f"{', '.join(DTYPES)} are read; give another checkpoint")
                    stored[name] = Stored(path, tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or cut off ({error}); fetch it again") from None
    return stored


def load_tensors(model: torch.nn.Module, folder: Path, stored: dict[str, Stored], device,
                 dtype: torch.dtype) -> str:
    """Fill a model that was built on the meta device, and report in one line.

    The stored tensors must be exactly the model's, by name and shape; of whatever dtype they are,
    they become dtype. A stored copy of a tied head is no tensor of the model's, but must be equal.
    Raises: ValueError with the first five missing, unexpected and mis-shaped names.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    table, head = f"{DECODER}embed_tokens.weight", "lm_head.weight"
    ignored = [head] if head in stored and head not in expected else []                     # tied
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected and name not in ignored]
    misshaped = [f"{name} {stored[name].shape} instead of {shape}" for name, shape
                 in expected.items() if name in stored and stored[name].shape != shape]
    wrong = [f"{len(names)} {what}: {', '.join(names[:5])}" + ", ..." * (len(names) > 5)
             for what, names in (("missing", missing), ("unexpected", unexpected),
                                 ("mis-shaped", misshaped)) if names]
    if wrong:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(wrong)}; "
                         f"fetch the folder again, or correct the config")
    tensors, files = {}, {}

    def read(name: str) -> torch.Tensor:
        # A file is mapped into memory, and what was read of it stays there until it is closed. So
        # after a conversion it is opened anew. A tensor that needs no conversion is never copied:
        # the mapping is kept.
        path = stored[name].file
        file = files.pop(path, None) or safe_open(path, "pt")
        tensor = file.get_tensor(name)
        converted = tensor.to(device, dtype)
        if converted is tensor:
            files[path] = file
        return converted

    # the largest tensor, which is there twice for a moment, comes first
    for name in sorted(expected, key=lambda name: prod(expected[name]), reverse=True):
        tensors[name] = read(name)
    if ignored and not read(head).equal(tensors[table]):
        raise ValueError(f"the weights in {folder} have a {head} that differs from {table}, but "
                         f"config.json says tie_word_embeddings = True; set it to false, or remove "
                         f"{head}")
    model.load_state_dict(tensors, strict=True, assign=True)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    return (f"{len(tensors)} tensors, {numbers:,} parameters as {str(dtype).split('.')[-1]}; "
            f"0 missing, 0 unexpected, ignored: {', '.join(ignored) or 'none'}")
