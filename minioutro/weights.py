"""A folder or a repository -> the config, and the tensors.

A checkpoint is a folder with config.json, generation_config.json (optional) and the weights, either
model.safetensors or several files named by model.safetensors.index.json. It lies on this machine or
on the Hugging Face hub. From the hub only the files that are needed are fetched, and only once.

These files are not trusted (support/checks.py). A setting that is not implemented is refused with
an error that names it. Sizes of tensors in config.json are compared with the weights before
anything is built. Other numbers, such as eps and theta, cannot be compared with the weights. They
only have to lie within wide limits.
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

from minioutro.support import checks

TOY = Path(__file__).parent / "toy"
HUB_MODEL = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json",
               "model*.safetensors")
PROCESSOR_FILES = ("tokenizer.json", "preprocessor_config.json", "video_preprocessor_config.json",
                   "processor_config.json")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")      # of the stored tensors, as safetensors calls them

# ---- 1. Find the folder -------------------------------------------------------------------------


def find_folder(path_or_repo, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder with the files: path_or_repo itself, or the hub's cache after fetching them.

    Raises: ValueError that says what is missing and what to try.
    """
    folder = Path(os.path.expanduser(path_or_repo))
    if folder.is_dir():
        if revision:
            raise ValueError(f"{folder} is a folder, which has no revision {revision}; leave the "
                             f"revision out")
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; give the folder that holds config.json")
    return fetch(str(path_or_repo), revision, patterns)


def fetch(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Fetch files from the hub. If that fails, use the files that an earlier call has fetched."""
    # imported here because it is slow to import, and a local folder does not need it
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging, tqdm

    class TerminalBar(tqdm):
        """A progress bar that is silent where nobody watches, as in a log file or a pipe."""
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{"disable": None, **kwargs})

    logging.set_verbosity_error()       # do not report each retry: the error below says it all
    options = {"revision": revision, "allow_patterns": patterns, "tqdm_class": TerminalBar}
    try:
        return Path(snapshot_download(repo, **options))
    except Exception as error:          # any type, because a proxy, a wrong address and a server
        problem = error                 # raise errors of different types
    try:
        return Path(snapshot_download(repo, local_files_only=True, **options))
    except Exception:
        raise ValueError(checks.why_not_fetched(problem, repo, revision)) from None


# ---- 2. Read the config -------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """The object of a JSON file. Raises: ValueError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}; give the folder of a "
                         f"checkpoint") from None
    except (ValueError, RecursionError) as error:   # not JSON, not UTF-8, or too many brackets
        raise ValueError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object; fetch it again")
    return content


def read_sections(folder: Path) -> dict:
    """config.json, with rope_type and rope_theta as fields of text_config (see read_positions).

    Raises: ValueError for a setting that is not implemented, or if a section is missing.
    """
    path = folder / "config.json"
    config = read_json(path)
    checks.check_sections(path, config)
    config["text_config"] |= read_positions(config["text_config"])
    checks.check_settings(config)
    return config


def read_positions(text: dict) -> dict:
    """The settings of the rotary positions, as fields of text_config.

    Since transformers 5 they are in rope_parameters. Before, rope_theta was a field of text_config,
    like rope_scaling. If a file has both, rope_scaling is used, as in transformers.
    """
    rope = text.get("rope_parameters")
    if text.get("rope_scaling"):
        rope = text["rope_scaling"]
    if not rope:
        return {}
    if not isinstance(rope, dict):
        return {"rope_type": rope}
    found = {"rope_type": rope.get("rope_type", rope.get("type"))}
    for field in ("rope_theta", "partial_rotary_factor"):
        if field in rope:
            found[field] = rope[field]
    return found


def fill(config_class, section: dict, name: str, **parts):
    """Make a config dataclass from a section's fields. parts: fields that are passed in instead.

    A field that is absent keeps its default. Fields that the dataclass lacks are ignored.
    Raises: ValueError for a value that makes no sense.
    """
    values = {}
    for field in fields(config_class):
        if field.name in parts or field.name not in section:
            continue
        value = section[field.name]
        if value is None and field.default is None:
            continue
        kind = field.type if field.type in (bool, float) else int
        checks.check_field(f"config.json, {name}", field.name, value, kind)
        values[field.name] = value
    return config_class(**values, **parts)


def read_eos(folder: Path) -> tuple[int, ...]:
    """The token ids that end an answer.

    They are in generation_config.json. A folder without that file has them in config.json, at the
    top or in text_config. All settings of sampling are ignored, because answers are greedy.
    Source: GenerationConfig.from_model_config of transformers 5.23.
    Raises: ValueError for a setting that would change even a greedy answer.
    """
    path = folder / "generation_config.json"
    if path.exists():
        sections = [read_json(path)]
    else:
        path = folder / "config.json"
        config = read_sections(folder)
        sections = [config, config["text_config"]]
    for section in sections:
        checks.check_fixed(str(path), section, checks.GREEDY)
    found = [section.get("eos_token_id") for section in sections]
    eos = next((value for value in found if value is not None), [])
    token_ids = eos if isinstance(eos, list) else [eos]
    if not all(type(token_id) is int for token_id in token_ids):
        raise ValueError(f"{path}: eos_token_id must be token ids, not {shown(eos)}; correct it")
    return tuple(token_ids)


# ---- 3. Read the tensors ------------------------------------------------------------------------


class Stored(NamedTuple):
    """Where a tensor of a checkpoint lies, and its shape."""
    file: Path
    shape: tuple[int, ...]


def read_headers(folder: Path, config) -> dict[str, Stored]:
    """Where each tensor lies and its shape, by its name. No tensor is read.

    Raises: ValueError if a file is missing or damaged, or if sizes in the config do not fit.
    """
    checks.check_multiples(config)
    stored = {}
    for path in weight_files(folder):
        stored |= read_header(path)
    checks.check_sizes(config, stored)
    return stored


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or else the files that an index names.

    If both exist, model.safetensors is read, as in transformers, because the index may be older.
    """
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    index = read_json(folder / INDEX)
    if not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{folder / INDEX} has no weight_map; fetch it again")
    names = sorted({str(name) for name in index["weight_map"].values()})
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{folder / INDEX} names files outside its folder; fetch it again")
    return [folder / name for name in names]


def read_header(path: Path) -> dict[str, Stored]:
    if not path.exists():
        raise ValueError(f"{path} is missing; fetch it again (only safetensors are read)")
    stored = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in DTYPES:
                    raise ValueError(f"{path}: {name} has dtype {tensor.get_dtype()}, only "
                                     f"{', '.join(DTYPES)} are read; give another checkpoint")
                stored[name] = Stored(path, tuple(tensor.get_shape()))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); fetch it again") from None
    return stored


def load_tensors(model: torch.nn.Module, folder: Path, stored: dict[str, Stored], device,
                 dtype: torch.dtype) -> str:
    """Fill a model that was built on the meta device, and report in one line.

    The stored tensors must be exactly the model's, by name and shape. They are converted to dtype.
    A stored copy of a tied head is ignored, but it must equal the embedding table.
    """
    checks.check_device(device)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    checks.check_tensors(folder, expected, stored)
    tensors, open_files = {}, {}
    # Largest first, because a tensor is in memory twice while it is converted.
    for name in sorted(expected, key=lambda name: prod(expected[name]), reverse=True):
        tensors[name] = read_tensor(name, stored, open_files, device, dtype)
    ignored = "none"
    if checks.HEAD in stored and checks.HEAD not in expected:
        ignored = checks.HEAD
        head = read_tensor(ignored, stored, open_files, device, dtype)
        checks.check_tied_head(folder, head, tensors[checks.TABLE])
    model.load_state_dict(tensors, strict=True, assign=True)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return (f"{len(tensors)} tensors, {parameters:,} parameters as {str(dtype).split('.')[-1]}; "
            f"0 missing, 0 unexpected, ignored: {ignored}")


def read_tensor(name: str, stored: dict[str, Stored], open_files: dict, device,
                dtype: torch.dtype) -> torch.Tensor:
    """Read a tensor from its file and convert it. open_files is kept from call to call.

    A file is mapped into memory, and what was read of it stays in memory until the file is closed.
    A tensor that needs no conversion is not copied: it is a part of the mapping. A converted tensor
    is a copy, so the file can be closed, which frees the memory of the original.
    """
    path = stored[name].file
    if path not in open_files:
        open_files[path] = safe_open(path, "pt")
    tensor = open_files[path].get_tensor(name)
    converted = tensor.to(device, dtype)
    if converted is not tensor:
        del open_files[path]
    return converted
