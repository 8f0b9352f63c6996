"""Find a checkpoint, read it strictly, and say what is wrong with it.

A checkpoint is a folder with config.json, generation_config.json (optional) and the weights, either
model.safetensors or several files named by model.safetensors.index.json. It lies on this machine or
on the Hugging Face hub, from where only the files that are needed are fetched, once.
"""

import json
import math
import os
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json",
               "model*.safetensors")
PROCESSOR_FILES = ("tokenizer.json", "preprocessor_config.json", "processor_config.json")
INDEX = "model.safetensors.index.json"

# What the code computes. A config that asks for another value of these is refused.
FIXED = {
    "top level": {"model_type": "smolvlm"},
    "text_config": {"model_type": "llama", "hidden_act": "silu", "attention_bias": False,
                    "mlp_bias": False, "rope_type": "default", "rope_interleaved": False,
                    "qk_layer_norms": False, "use_resampler": False},
    "vision_config": {"model_type": "smolvlm_vision", "hidden_act": "gelu_pytorch_tanh",
                      "num_channels": 3},
}
# Fields that SmolVLM's own code does not read, or that say nothing about what is computed here. Any
# other field is refused unless it is off (null, false, zero): it may change the mathematics. Last
# come two that count in another section, and what is left over from Idefics, SmolVLM's ancestor,
# whose perceiver_config repeats names of real fields.
IGNORED = """
    _name_or_path architectures transformers_version torch_dtype dtype use_cache initializer_range
    neftune_noise_alpha is_llama_config pretraining_tp attention_dropout bos_token_id eos_token_id
    pad_token_id _pad_token_id image_seq_len video_token_id transformers.js_config
    _flash_attn_2_enabled _attn_implementation_autoset chunk_size_feed_forward is_encoder_decoder
    output_hidden_states output_attentions return_dict problem_type id2label label2id
    vocab_size tie_word_embeddings
    perceiver_config pixel_shuffle_factor max_image_size size use_base_siglip
    use_reentrant_checkpointing""".split()


def find(path_or_repo, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder with the files: path_or_repo itself, or the hub's cache after fetching them.

    Without network a repository that was fetched before is taken from the cache.
    Raises: ValueError that says what is missing and what to try.
    """
    folder = Path(os.path.expanduser(path_or_repo))
    if folder.is_dir():
        if revision:
            raise ValueError(f"{path_or_repo} is a folder and has no revision {revision}; leave "
                             f"that out")
        return folder
    if folder.exists():
        raise ValueError(f"{path_or_repo} is a file; give the folder that holds config.json")

    # imported here: it takes longer to import than the rest of the module, and a folder needs none
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (GatedRepoError, HFValidationError, LocalEntryNotFoundError,
                                        RepositoryNotFoundError, RevisionNotFoundError)
    from huggingface_hub.utils import tqdm

    class TerminalBar(tqdm):
        """A progress bar that is silent where nobody watches, as in a log file or a pipe."""
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{"disable": None, **kwargs})

    name = f"{path_or_repo} at revision {revision}" if revision else str(path_or_repo)
    try:
        return Path(snapshot_download(str(path_or_repo), revision=revision, allow_patterns=patterns,
                                      tqdm_class=TerminalBar))
    except HFValidationError:
        raise ValueError(f"{path_or_repo} is neither a folder here nor the name of a repository "
                         f"(owner/name); check the path") from None
    except GatedRepoError:
        raise ValueError(f"{name} asks for a licence on the hub first; accept it on its page, then "
                         f"log in with `hf auth login`") from None
    except RevisionNotFoundError:
        raise ValueError(f"{path_or_repo} has no revision {revision}; leave it out to get the "
                         f"newest") from None
    except RepositoryNotFoundError:
        raise ValueError(f"{path_or_repo} is neither a folder here nor a public repository of the "
                         f"hub; check the name") from None
    except LocalEntryNotFoundError:
        raise ValueError(f"{name} is no folder here (check the path), is not in the cache, and "
                         f"the hub cannot be reached; connect once, or copy its files into a "
                         f"folder and give that") from None
    except OSError as error:
        raise ValueError(f"{name} could not be fetched ({error}); try again") from None


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}; give a checkpoint's folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object; fetch it again")
    return content


def read_config(folder: Path) -> dict:
    """config.json, with the defaults that depend on other fields filled in.

    Raises: ValueError for another model_type, or if text_config or vision_config is missing.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "smolvlm":
        raise ValueError(f"{folder / 'config.json'}: model_type {config.get('model_type')!r} is "
                         "not supported, only 'smolvlm'; give a SmolVLM2 checkpoint")
    for section in ("text_config", "vision_config"):
        if not isinstance(config.get(section), dict):
            raise ValueError(f"{folder / 'config.json'} has no section {section}; fetch it again")
    text = config["text_config"]
    # "rope_parameters" since transformers 5; before, rope_theta stood by itself
    if isinstance(text.get("rope_parameters"), dict):
        text.update(text.pop("rope_parameters"))
    heads = text.setdefault("num_attention_heads", 32)
    if text.get("num_key_value_heads") is None:
        text["num_key_value_heads"] = heads
    width = text.get("hidden_size", 4096)
    if text.get("head_dim") is None and fits(width, int) and fits(heads, int):
        text["head_dim"] = width // heads
    return config


def fits(value, field_type) -> bool:
    """Whether a value can be what a field asks for: a boolean, or a positive number."""
    if field_type is bool:
        return isinstance(value, bool)
    number = (int, float) if field_type is float else int
    return isinstance(value, number) and not isinstance(value, bool) and 0 < value < math.inf


def fill(config_class, section: dict, name: str, **parts):
    """Make a config dataclass of the fields that it has; parts are given, not read.

    Raises: ValueError for a field whose value is not implemented, or that is unknown and not off.
    """
    known = {field.name for field in fields(config_class)} - set(parts)
    for field, value in section.items():
        if field in FIXED[name] and value != FIXED[name][field]:
            raise ValueError(f"config.json, {name}: {field} = {value!r} is not implemented, only "
                             f"{FIXED[name][field]!r}")
        if value and field not in (*known, *parts, *FIXED[name], *IGNORED):
            raise ValueError(f"config.json, {name}: {field} = {value!r} is unknown and may change "
                             f"what the model computes; remove it if it does not")
    values = {field: value for field, value in section.items() if field in known}
    for field in fields(config_class):
        if field.name in values and not fits(values[field.name], field.type):
            kind = "boolean" if field.type is bool else "positive number"
            raise ValueError(f"config.json, {name}: {field.name} = {values[field.name]!r} must be "
                             f"a {kind}; correct it")
    return config_class(**values, **parts)


def check_multiples(config) -> None:
    """Raise ValueError if a size does not divide into the parts that the model cuts it into."""
    text, vision = config.text_config, config.vision_config
    for whole, part, what in (
            (text.num_attention_heads, text.num_key_value_heads, "heads by key-value heads"),
            (text.head_dim, 2, "head_dim by 2"),
            (vision.hidden_size, vision.num_attention_heads, "the encoder's width by its heads"),
            (vision.image_size // vision.patch_size, config.scale_factor, "patches by scale")):
        if whole < part or whole % part:
            raise ValueError(f"config.json: {whole} is no multiple of {part} ({what}); correct it")


def read_eos(folder: Path) -> tuple[int, ...]:
    """The token ids that end an answer, from generation_config.json; none without that file."""
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.exists() else None
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(token_id) is int for token_id in eos):
        raise ValueError(f"{path}: eos_token_id must be token ids, not {eos}; correct it")
    return tuple(eos)


def load_tensors(model: torch.nn.Module, folder: Path, device, dtype: torch.dtype) -> str:
    """Fill a model that was built on the meta device, and report in one line.

    The file's tensors must be exactly the model's, by name and shape; whether they are float32,
    float16 or bfloat16 there, they become dtype.
    Raises: ValueError with the first five missing, unexpected and mis-shaped names.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    where, shapes = locate(folder)
    ignored = [] if "lm_head.weight" in expected else ["lm_head.weight"]        # tied: never used
    ignored = [name for name in ignored if name in shapes]
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in expected and name not in ignored]
    misshaped = [f"{name} {shapes[name]} instead of {shape}" for name, shape in expected.items()
                 if shapes.get(name, shape) != shape]
    wrong = [f"{len(names)} {what}: {', '.join(names[:5])}" + ", ..." * (len(names) > 5)
             for what, names in (("missing", missing), ("unexpected", unexpected),
                                 ("mis-shaped", misshaped)) if names]
    if wrong:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(wrong)}; "
                         f"fetch the folder again, or correct the config")
    tensors, files = {}, {}
    for name in sorted(expected, key=lambda name: math.prod(expected[name]), reverse=True):
        # A file is mapped into memory, and what was read of it stays there until it is closed. So
        # after a conversion it is opened anew; the largest tensor, which is there twice for a
        # moment, comes first. One that needs no conversion is never copied: the mapping is kept.
        file = files.pop(where[name], None) or safe_open(where[name], "pt")
        stored = file.get_tensor(name)
        tensors[name] = stored.to(device, dtype)
        if tensors[name] is stored:
            files[where[name]] = file
    model.load_state_dict(tensors, strict=True, assign=True)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    return (f"{len(tensors)} tensors, {numbers:,} parameters as {str(dtype).split('.')[-1]}; "
            f"0 missing, 0 unexpected, ignored: {', '.join(ignored) or 'none'}")


def locate(folder: Path) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    """In which file each tensor of a checkpoint lies, and its shape; nothing else is read."""
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{folder / INDEX} has no weight_map; fetch it again")
        files = sorted({str(file) for file in index["weight_map"].values()})
        if any(Path(file).name != file for file in files):
            raise ValueError(f"{folder / INDEX} names files outside its folder; fetch it again")
    else:
        files = ["model.safetensors"]
    where, shapes = {}, {}
    for path in (folder / file for file in files):
        if not path.exists():
            raise ValueError(f"{path} is missing; fetch it again (only safetensors are read)")
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    if part.get_dtype() not in ("F32", "F16", "BF16"):
                        raise ValueError(f"{path}: {name} is {part.get_dtype()}; only float32, "
                                         f"float16 and bfloat16 are read; give another checkpoint")
                    where[name], shapes[name] = path, tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or cut off ({error}); fetch it again") from None
    return where, shapes


def check_device(device) -> None:
    """Raise ValueError if there is no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):      # the latter where torch was built without CUDA
        raise ValueError(f"device {device}: there is none here; leave it out to use the cpu"
                         ) from None


@contextmanager
def written_whole(path: Path):
    """A path to write to instead; what is there in the end is moved to `path`, or is removed."""
    half = path.with_name(f"half_{path.name}")
    try:
        yield half
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
