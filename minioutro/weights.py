"""Find a checkpoint, read it strictly, and say what is wrong with it.

A checkpoint is a folder with config.json, generation_config.json (optional) and the weights, either
model.safetensors or several files named by model.safetensors.index.json. It lies on this machine or
on the Hugging Face hub, from where only the files that are needed are fetched, once.

Nothing in these files is trusted: a setting that would change what is computed is used or refused
by name, and every size in config.json is compared with the weights before anything is built.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import fields
from math import prod
from pathlib import Path
from reprlib import repr as shown           # a value in an error message: cut if it is long or deep
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

TOY = Path(__file__).parent / "toy"
HUB_MODEL = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json",
               "model*.safetensors")
PROCESSOR_FILES = ("tokenizer.json", "preprocessor_config.json", "video_preprocessor_config.json",
                   "processor_config.json")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")      # of the stored tensors, as safetensors calls them
ENCODER, DECODER = "model.vision_model.", "model.text_model."

# What the code computes. Another value of these is refused, unless it is null.
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1, "encoder_repetition_penalty": 1,
           "guidance_scale": 1}
FIXED = {
    "top level": {"model_type": "smolvlm", **NEUTRAL},
    "text_config": {"model_type": "llama", "hidden_act": "silu", "rope_type": "default",
                    "partial_rotary_factor": 1, **NEUTRAL},
    "vision_config": {"model_type": "smolvlm_vision", "hidden_act": "gelu_pytorch_tanh",
                      "num_channels": 3, **NEUTRAL},
}
# The other generation settings with which transformers gives another than the greedy answer. They
# are refused unless they are off (null, false, zero, empty).
CHANGING = """
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids sequence_bias min_length
    min_new_tokens forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens watermarking_config stop_strings token_healing
    penalty_alpha dola_layers constraints force_words_ids""".split()
# Fields of config.json that SmolVLM's own code does not read, or that say nothing about what is
# computed here. Any other field is refused unless it is off: it may change the mathematics. Last
# come settings of sampling and beam search, two fields that count in another section, and what is
# left over from Idefics, SmolVLM's ancestor, whose perceiver_config repeats names of real fields.
IGNORED = """
    _name_or_path architectures transformers_version torch_dtype dtype use_cache initializer_range
    neftune_noise_alpha is_llama_config pretraining_tp attention_dropout bos_token_id eos_token_id
    pad_token_id _pad_token_id image_seq_len video_token_id transformers.js_config
    _flash_attn_2_enabled _attn_implementation_autoset chunk_size_feed_forward is_encoder_decoder
    output_hidden_states output_attentions return_dict problem_type id2label label2id
    do_sample temperature top_k top_p typical_p max_length length_penalty num_beam_groups
    num_return_sequences vocab_size tie_word_embeddings perceiver_config pixel_shuffle_factor
    max_image_size size use_base_siglip use_reentrant_checkpointing""".split()


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
    from huggingface_hub.errors import (GatedRepoError, HFValidationError, RepositoryNotFoundError,
                                        RevisionNotFoundError)
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


def read_json_lines(path: Path, text: str) -> list:
    """The values of a JSON text, or of its lines. Raises: ValueError with the line that is none."""
    is_one = text.lstrip()[:1] == "[" or text.split("\n")[0].strip() == "{"
    values = []
    for n, line in enumerate([text] if is_one else text.split("\n"), start=1):
        try:
            values += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            n = getattr(error, "lineno", n) if is_one else n
            raise ValueError(f"{path}: line {n} is no JSON ({error}); correct it") from None
    return values


def read_rows(path: Path) -> list[dict]:
    """The objects of a csv file, of a JSON list or of JSON lines; one object is a list of one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if path.suffix.lower() == ".parquet":
        raise ValueError(f"{path} is no text; convert it, for one with pandas: read_parquet(...)."
                         f"to_json(..., orient='records', lines=True)")
    try:
        if path.suffix.lower() == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file, restkey="further"))
        rows = read_json_lines(path, path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}); give another file") from None
    rows = rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds {shown(rows)}, not objects; give another file")
    return rows


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


def check_number(where: str, field: str, value, kind: type, least: float, most: float) -> None:
    """Raise ValueError unless a value is a boolean, or a number of this kind within its limits."""
    if kind is bool:
        fits, what = isinstance(value, bool), "true or false"
    else:
        kinds = (int, float) if kind is float else int
        fits = isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most
        what = f"a {'whole ' * (kind is int)}number from {least} to {most}"
    if not fits:
        raise ValueError(f"{where}: {field} = {shown(value)} must be {what}; correct it")


def check_fields(where: str, section: dict, fixed: dict, known) -> None:
    """Raise ValueError for a field that asks for something else than what is computed.

    fixed: field -> the value that is implemented; known: other fields that may have any value.
    """
    for field, value in section.items():
        if field in fixed and value not in (None, fixed[field]):
            raise ValueError(f"{where}: {field} = {shown(value)} is not implemented, only "
                             f"{fixed[field]!r}; give another checkpoint")
        if value and field not in fixed and field not in known:
            raise ValueError(f"{where}: {field} = {shown(value)} is not implemented and may change "
                             f"what is computed; remove it if it does not")


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


def check_multiples(config) -> None:
    """Raise ValueError if a size does not divide into the parts that the model cuts it into."""
    text, vision = config.text_config, config.vision_config
    for name, whole, part, of in (
            ("num_attention_heads", text.num_attention_heads, text.num_key_value_heads,
             "num_key_value_heads"),
            ("head_dim", text.head_dim, 2, "positions turn pairs"),
            ("hidden_size", vision.hidden_size, vision.num_attention_heads, "num_attention_heads"),
            ("image_size // patch_size", vision.image_size // vision.patch_size,
             config.scale_factor, "scale_factor")):
        if whole < part or whole % part:
            raise ValueError(f"config.json: {name} = {whole} is no multiple of {part} ({of}); "
                             f"correct it")


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


def check_sizes(config, stored: dict[str, Stored]) -> None:
    """Compare every size of config.json with the weights, before anything of that size is built.

    Raises: ValueError with the fields, their values, and what the weights have instead.
    """
    text, vision = config.text_config, config.vision_config
    V, C, Cv, D, patch = (text.vocab_size, text.hidden_size, vision.hidden_size, text.head_dim,
                          vision.patch_size)
    layer, encoder = f"{DECODER}layers.0", f"{ENCODER}encoder.layers.0"
    for where, names, tensor, shape in (
            ("text_config", "vocab_size hidden_size", f"{DECODER}embed_tokens", (V, C)),
            ("text_config", "intermediate_size", f"{layer}.mlp.gate_proj",
             (text.intermediate_size, C)),
            ("text_config", "num_attention_heads head_dim", f"{layer}.self_attn.q_proj",
             (text.num_attention_heads * D, C)),
            ("text_config", "num_key_value_heads head_dim", f"{layer}.self_attn.k_proj",
             (text.num_key_value_heads * D, C)),
            ("vision_config", "hidden_size patch_size", f"{ENCODER}embeddings.patch_embedding",
             (Cv, 3, patch, patch)),
            ("vision_config", "image_size patch_size", f"{ENCODER}embeddings.position_embedding",
             ((vision.image_size // patch)**2, Cv)),
            ("vision_config", "intermediate_size", f"{encoder}.mlp.fc1",
             (vision.intermediate_size, Cv)),
            ("top level", "scale_factor", "model.connector.modality_projection.proj",
             (C, Cv * config.scale_factor**2))):
        there = stored[f"{tensor}.weight"].shape if f"{tensor}.weight" in stored else "none"
        if there != shape:
            section = getattr(config, where, config)
            values = ", ".join(f"{name} = {getattr(section, name)}" for name in names.split())
            raise ValueError(f"config.json, {where}: {values} ask for {tensor}.weight {shape}, but "
                             f"the weights have {there}; correct it, or fetch the weights again")
    for where, prefix in (("text_config", f"{DECODER}layers."),
                          ("vision_config", f"{ENCODER}encoder.layers.")):
        layers = getattr(config, where).num_hidden_layers
        found = len({name.removeprefix(prefix).split(".")[0] for name in stored
                     if name.startswith(prefix)})
        if layers != found:
            raise ValueError(f"config.json, {where}: num_hidden_layers = {layers}, but the weights "
                             f"have {found} layers; correct it, or fetch the weights again")
    if config.image_token_id >= V:
        raise ValueError(f"config.json, top level: image_token_id = {config.image_token_id} is "
                         f"none of {V} tokens; correct it")


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


# ---- What the commands share: devices, files, options, errors ----


def check_device(device) -> None:
    """Raise ValueError if there is no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):      # the latter where torch was built without CUDA
        raise ValueError(f"device {device}: there is none here; leave it out") from None


def writable_folder(name: str, folder) -> Path:
    """A folder that need not exist yet. Raises: ValueError if it cannot be written to."""
    folder = Path(os.path.expanduser(folder))
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryDirectory(dir=nearest).cleanup()          # the only sure way to know
    except OSError:
        raise ValueError(f"{name}: {nearest} is no folder that can be written to; give "
                         f"another") from None
    return folder


@contextmanager
def written_whole(path: Path):
    """A path to write to instead; what is there in the end is moved to `path`, or is removed."""
    half = path.with_name(f".{path.stem}.half{path.suffix}")
    try:
        yield half
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def numbers(least: float, most: float, kind: type = float):
    """For argparse: what reads a number from `least` to `most`."""
    def number(text: str):
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text[:20]!r} is not from {least} to {most}")
        return value
    return number


def add_options(parser: argparse.ArgumentParser, of_outro: bool = True) -> None:
    """The options of run.py that other commands share; those of the method only if wanted."""
    add, count, strength = parser.add_argument, numbers(1, 10**9 - 1, int), numbers(0, 1e12)
    add("--model", metavar="DIR_OR_REPO", help="folder of a checkpoint, or repository of the hub "
        f"(default: {HUB_MODEL}; for the toy's own clips the bundled toy)")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="default: %(default)s")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of weights and activations (default: %(default)s)")
    add("--frames", type=count, metavar="N", help="at most (default: the checkpoint's, mostly 64)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    if not of_outro:
        return
    add("--revision", help="branch, tag or commit of the repository (default: the newest)")
    add("--fps", type=numbers(1e-9, 1e9), metavar="F",
        help="frames a second (default: the checkpoint's, mostly 1)")
    add("--max-new-tokens", type=count, default=64, metavar="N", help="default: %(default)s")
    add("--temperature", type=strength, default=0.1, metavar="T",
        help="of the alignment's gate (default: %(default)s)")
    add("--median-multiple", type=strength, default=1000.0, metavar="M",
        help="a sink has an activation of at least M times the median (default: %(default)s)")
    add("--abs-threshold", type=strength, default=100.0, metavar="A",
        help="and of at least A (default: %(default)s)")
    add("--figures", metavar="DIR", help="write pictures into this folder")


@contextmanager
def one_line_errors(name: str):
    """End the program as run.py does: by one line and code 2 for an error of the user's."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())             # what would steer a terminal is escaped
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        print(f"{name}: {line}", file=sys.stderr)
        sys.exit(2)
