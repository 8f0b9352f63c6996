"""Checkpoints as users have them: in one file or several, old or new, and broken in many ways."""

import json
from fnmatch import fnmatch
from reprlib import repr as shown

import huggingface_hub
import pytest
import torch
from helpers import FIXTURES, assert_close, writable_copy
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from minioutro import VideoLM, weights
from minioutro.model import read_config


@pytest.fixture
def folder(tmp_path):
    """A copy of dev_c that a test may spoil."""
    return writable_copy(FIXTURES / "dev_c", tmp_path / "dev_c")


def edit_config(folder, section, **values):
    """Set fields of a section of config.json. The section None is its top level, and the value ... deletes a field."""
    config = json.loads((folder / "config.json").read_text())
    target = config if section is None else config[section]
    target.update(values)
    for name in [name for name, value in values.items() if value is ...]:
        del target[name]
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def message(folder, **options) -> str:
    with pytest.raises(ValueError) as error:
        VideoLM.from_pretrained(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_loads_dev_c(source, golden):
    g = golden("dev_c")
    assert VideoLM.from_pretrained(source)(g.input_ids, g.pixels).equal(g.model(g.input_ids, g.pixels))


# ---- what is read ----


def test_sharded_weights(folder, golden):
    tensors, weight_map = load_file(folder / "model.safetensors"), {}
    for n in range(3):
        part = {name: tensor for i, (name, tensor) in enumerate(sorted(tensors.items())) if i % 3 == n}
        save_file(part, folder / f"model-0000{n + 1}-of-00003.safetensors")
        weight_map.update({name: f"model-0000{n + 1}-of-00003.safetensors" for name in part})
    (folder / "model.safetensors").unlink()
    (folder / weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_loads_dev_c(folder, golden)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in message(folder)


def test_one_file_before_stale_index(folder, golden):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "old.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "old.safetensors")}
    (folder / weights.INDEX).write_text(json.dumps(index))
    assert_loads_dev_c(folder, golden)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_dtypes(folder, stored, asked):
    original = load_file(folder / "model.safetensors")
    edit_tensors(folder, lambda tensors: tensors.update({n: t.to(stored) for n, t in tensors.items()}))
    model = VideoLM.from_pretrained(folder, dtype=asked)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == asked and tensor.equal(original[name].to(stored).to(asked)), name
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tied_head(tmp_path, golden):
    folder, g = writable_copy(FIXTURES / "dev_a", tmp_path / "dev_a"), golden("dev_a")
    assert "lm_head.weight" not in g.model.state_dict()
    assert g.model.load_report.endswith("ignored: none")
    table = load_file(folder / "model.safetensors")["model.text_model.embed_tokens.weight"]
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": table.clone()}))
    model = VideoLM.from_pretrained(folder)
    assert model.load_report.endswith("ignored: lm_head.weight")
    assert_close(model(g.input_ids, g.pixels), g.tensors["logits"])
    for head in (table + torch.eye(128, 48), table[:100].clone()):
        edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
        assert "lm_head.weight that differs from" in message(folder)


def test_other_fields_are_ignored(folder, golden):
    """Also fields that matter to other programs, such as settings of sampling, and fields that state what we do."""
    edit_config(folder, None, output_attentions=True, vocab_size=1, pad_token_id=2, temperature=0.5, invented=[1])
    edit_config(folder, "text_config", perceiver_config={"num_key_value_heads": 1}, attention_dropout=0.1,
                pretraining_tp=2, tie_word_embeddings=True, invented={"a": 1}, layer_types=["full_attention"] * 3,
                hidden_act=None, attention_bias=False, partial_rotary_factor=1.0, sliding_window=None)
    edit_config(folder, "vision_config", max_image_size={"longest_edge": 48}, use_base_siglip=True)
    settings = {"eos_token_id": 124, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 20,
                "repetition_penalty": 1.0, "num_beams": 1, "guidance_scale": None, "no_repeat_ngram_size": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert_loads_dev_c(folder, golden)


BASE = dict(hidden_size=768, num_attention_heads=12, image_size=512, patch_size=16)
HUB = {                                     # every size that the three configs state
    "256M": (dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                  num_key_value_heads=3), BASE, 4, 471, 256_484_928),
    "500M": (dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
                  num_key_value_heads=5), BASE, 4, 489, 507_482_304),
    "2.2B": (dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24),
             dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                  image_size=384, patch_size=14), 3, 657, 2_246_784_880)}


@pytest.mark.parametrize("size", HUB)
def test_hub_sizes(tmp_path, size):
    """The config of the 2.2B model leaves out both head counts. The others leave out sizes of the encoder."""
    text, vision, scale, n_tensors, n_parameters = HUB[size]
    text = {"model_type": "llama", "head_dim": 64, "vocab_size": 49280, "rms_norm_eps": 1e-5, **text}
    config = {"model_type": "smolvlm", "image_token_id": 49190, "scale_factor": scale,
              "tie_word_embeddings": False, "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = VideoLM(read_config(tmp_path))
    tensors = model.state_dict().values()
    assert (len(tensors), sum(tensor.numel() for tensor in tensors)) == (n_tensors, n_parameters)
    assert (model.config.vision_config.layer_norm_eps, model.config.text_config.rms_norm_eps) == (1e-6, 1e-5)


@pytest.mark.parametrize("theta, fields", [
    (10000, {}), (777, {"rope_parameters": {"rope_theta": 777.0, "rope_type": "default"}}),
    (10**12, {"rope_parameters": {"rope_theta": 10**12}}),
    (555, {"rope_parameters": ..., "rope_theta": 555, "rope_scaling": None}),
    (555, {"rope_parameters": ..., "rope_theta": 555, "rope_scaling": {"type": "default", "factor": 1.0}}),
    (556, {"rope_theta": 555, "rope_scaling": {"rope_type": "default", "rope_theta": 556}}),
    (555, {"rope_parameters": {"rope_theta": 777}, "rope_theta": 555, "rope_scaling": {"rope_type": "default"}})])
def test_rope_theta_spellings(folder, theta, fields):
    """rope_scaling wins over rope_parameters, as in transformers."""
    edit_config(folder, "text_config", **fields)
    assert read_config(folder).text_config.rope_theta == theta


@pytest.mark.parametrize("generation, text, top, expected", [
    ({"eos_token_id": [3, 124]}, 5, 6, (3, 124)), ({"eos_token_id": None}, 5, 6, ()), ({}, 5, 6, ()),
    (None, 5, ..., (5,)), (None, 5, None, (5,)), (None, [5, 7], ..., (5, 7)), (None, None, 6, (6,)),
    (None, 5, 6, (6,)), (None, ..., ..., ())])
def test_eos(folder, generation, text, top, expected):
    """The same ids as in transformers 5.23: from generation_config.json, or from config.json if that is missing."""
    edit_config(folder, "text_config", eos_token_id=text)
    edit_config(folder, None, eos_token_id=top)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert weights.read_eos(folder) == expected


@pytest.mark.parametrize("eos", ["</s>", True, [2, None], 2.0, [[2]]])
def test_senseless_eos(folder, eos):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert f"generation_config.json: eos_token_id must be token ids, not {eos!r}" in message(folder)


@pytest.mark.parametrize("setting, value", [
    ("repetition_penalty", 1.2), ("encoder_repetition_penalty", 0.9), ("num_beams", 4), ("guidance_scale", 1.5)])
def test_settings_that_change_greedy_answers(folder, setting, value):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 124, setting: value}))
    assert f"generation_config.json: {setting} = {value} is not implemented, only 1" in message(folder)


# ---- what is refused ----


@pytest.mark.parametrize("section, field, value", [
    (None, "model_type", "idefics3"), ("text_config", "model_type", "qwen2"), ("vision_config", "model_type", "siglip"),
    ("text_config", "hidden_act", "gelu"), ("vision_config", "hidden_act", "relu"),
    ("text_config", "attention_bias", True), ("text_config", "mlp_bias", True),
    ("text_config", "sliding_window", 512), ("text_config", "rope_interleaved", True),
    ("text_config", "qk_layer_norms", True), ("text_config", "use_resampler", True),
    ("text_config", "is_causal", False), ("text_config", "partial_rotary_factor", 0.5),
    ("text_config", "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
    ("vision_config", "num_channels", 1), (None, "image_token_id", "<image>"), (None, "scale_factor", None),
    ("text_config", "hidden_size", "48"), ("text_config", "hidden_size", -48), ("text_config", "hidden_size", [48]),
    ("text_config", "num_attention_heads", 6.0), ("text_config", "head_dim", True),
    ("text_config", "rms_norm_eps", -1.0), ("text_config", "rms_norm_eps", float("nan")),
    ("text_config", "max_position_embeddings", 2**70), ("vision_config", "patch_size", 0),
    (None, "tie_word_embeddings", 1), (None, "scale_factor", 10**4000), (None, "scale_factor", "x" * 10_000)])
def test_values_that_are_refused(folder, section, field, value):
    edit_config(folder, section, **{field: value})
    text = message(folder)
    assert "config.json" in text and f"{field} = {shown(value)} " in text and len(text) < 400


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope, says", [
    ("linear", "rope_type = 'linear' is not"), ({"rope_type": "yarn"}, "rope_type = 'yarn' is not"),
    ({"type": "yarn", "factor": 2.0}, "rope_type = 'yarn' is not"),
    ({"rope_type": "yarn", "type": "default"}, "rope_type = 'yarn' is not"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not"),
    ({"rope_theta": float("inf")}, "rope_theta = inf must be"), ({"rope_theta": None}, "rope_theta = None must be"),
    ({"rope_theta": 0}, "rope_theta = 0 must be"), ({"rope_theta": "10000"}, "rope_theta = '10000' must be")])
def test_positions_that_are_refused(folder, name, rope, says):
    edit_config(folder, "text_config", rope_parameters=...)
    edit_config(folder, "text_config", **{name: rope})
    assert says in message(folder)


@pytest.mark.parametrize("section, field, value, says", [
    ("text_config", "num_key_value_heads", 4, "num_attention_heads = 6 is not a multiple of 4"),
    ("text_config", "num_key_value_heads", 12, "num_attention_heads = 6 is not a multiple of 12"),
    ("text_config", "head_dim", 15, "head_dim = 15 is not a multiple of 2"),
    ("vision_config", "num_attention_heads", 5, "hidden_size = 32 is not a multiple of 5"),
    (None, "scale_factor", 4, "image_size // patch_size = 6 is not a multiple of 4"),
    ("vision_config", "patch_size", 49, "image_size // patch_size = 0 is not a multiple of 3"),
    (None, "image_token_id", 128, "image_token_id = 128 is not one of the 128 tokens"),
    (None, "vision_config", ..., "has no section vision_config"),
    (None, "text_config", [], "has no section text_config")])
def test_parts_that_do_not_fit_together(folder, section, field, value, says):
    edit_config(folder, section, **{field: value})
    assert says in message(folder)


@pytest.mark.parametrize("section, field, value, says", [
    ("text_config", "vocab_size", 129, "embed_tokens.weight (129, 48)"),
    ("text_config", "hidden_size", 96, "embed_tokens.weight (128, 96)"),
    ("text_config", "intermediate_size", 2**31 - 1, "gate_proj.weight (2147483647, 48)"),
    ("text_config", "num_attention_heads", 9, "q_proj.weight (144, 48)"),
    ("text_config", "num_key_value_heads", 6, "k_proj.weight (96, 48)"),
    ("text_config", "head_dim", 2**30, "q_proj.weight (6442450944, 48)"),
    ("text_config", "num_hidden_layers", 2**31 - 1, "have 3 layers"),
    ("vision_config", "num_hidden_layers", 1, "have 2 layers"),
    ("vision_config", "patch_size", 16, "patch_embedding.weight (32, 3, 16, 16)"),
    ("vision_config", "image_size", 96, "position_embedding.weight (144, 32)"),
    ("vision_config", "intermediate_size", 81, "fc1.weight (81, 32)"),
    (None, "scale_factor", 2, "proj.weight (48, 128)")])
def test_sizes_before_building(folder, monkeypatch, section, field, value, says):
    """A wrong size is reported before memory of that size is allocated."""
    monkeypatch.setattr(VideoLM, "__init__", lambda *_: pytest.fail("the model was built"))
    edit_config(folder, section, **{field: value})
    text = message(folder)
    assert text.startswith("config.json, ") and says in text and f"{field} = {value}" in text


def test_bad_index(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    for index, says in (({"weight_map": {"lm_head.weight": "../model.safetensors"}}, "names files outside its folder"),
                        ({}, "has no weight_map"), ({"weight_map": ["model.safetensors"]}, "has no weight_map")):
        (folder / weights.INDEX).write_text(json.dumps(index))
        assert says in message(folder)


def test_wrong_tensors_are_named(folder):
    """Of the 12 missing tensors, 4 in the decoder and 8 in the encoder, the message names the first five."""
    def spoil(tensors):
        for name in [name for name in tensors if "layers.1.self_attn" in name]:
            tensors[name.replace("self_attn", "attention")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].clone()
    edit_tensors(folder, spoil)
    text = message(folder)
    assert "12 missing: " in text and "12 unexpected: " in text and ", ...;" in text
    assert "1 mis-shaped: lm_head.weight (100, 48) instead of (128, 48)" in text
    assert text.count("layers.1.self_attn") == text.count("layers.1.attention") == 5


def test_missing_or_damaged_files(folder):
    path = folder / "model.safetensors"
    for content in (path.read_bytes()[:-100], b"\xff" * 4096):
        path.write_bytes(content)
        assert "model.safetensors is damaged or cut off" in message(folder)
    path.unlink()
    assert "model.safetensors is missing" in message(folder)
    path.mkdir()
    assert "model.safetensors is damaged or cut off" in message(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in message(folder)
    assert "is a file" in message(folder / "meta.json")
    assert "has no revision v1" in message(folder, revision="v1")
    assert "neither a folder here nor the name of a repository" in message("no/such/folder")


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("content, says", [
    (b"{", "cannot be read as JSON"), (b"\xff{}", "cannot be read as JSON"), (b"[1]", "holds a list, not an object"),
    (b'{"a": ' * 100_000, "cannot be read as JSON"), (b'{"a": ' + b"1" * 5000 + b"}", "cannot be read as JSON")])
def test_broken_json(folder, name, content, says):
    (folder / name).write_bytes(content)
    assert f"{name} {says}" in message(folder)


def test_quantised_weights(folder):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))
    assert "lm_head.weight has dtype I8" in message(folder)


# ---- the hub ----


def test_fetched_files(monkeypatch, tmp_path):
    hub = ["README.md", "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
           "model-00002-of-00002.safetensors", "model.safetensors.index.json", "onnx/model.onnx",
           "onnx/model.safetensors", "tokenizer.json", "vocab.json", "preprocessor_config.json",
           "video_preprocessor_config.json", "processor_config.json", "chat_template.json"]
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda repo, **options: asked.append((repo, options)) or str(tmp_path))
    assert weights.find_folder("owner/name", "v1", weights.MODEL_FILES) == tmp_path
    weights.find_folder("owner/name", None, weights.PROCESSOR_FILES)
    fetched = [[name for name in hub if any(fnmatch(name, p) for p in options["allow_patterns"])]
               for _, options in asked]
    assert fetched == [hub[1:6], ["tokenizer.json", *hub[-4:-1]]]
    assert [(repo, options["revision"]) for repo, options in asked] == [("owner/name", "v1"), ("owner/name", None)]
    assert asked[0][1]["tqdm_class"](total=3).disable                   # no progress bar without a terminal


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache, and a function that makes every attempt to fetch raise an error."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    original = huggingface_hub.snapshot_download

    def fail_with(error):
        def fetch(*args, local_files_only=False, **options):
            if not local_files_only:
                raise error
            return original(*args, local_files_only=True, **options)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return fail_with


def cached(folder):
    """Put dev_c into the cache, as the hub's library lays it out."""
    repository = folder / "hub" / "models--owner--name"
    writable_copy(FIXTURES / "dev_c", repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)


def http_error(kind, code):
    import httpx2
    request = httpx2.Request("GET", "https://hub/owner/name")
    return kind(f"{code}: no\n\nnot here", response=httpx2.Response(code, request=request))


def without_network():
    """The error of the hub's library, whose cause is the reason that matters."""
    error = errors.LocalEntryNotFoundError("we cannot find the files")
    error.__cause__ = ConnectionError("no route to host " + "x" * 1000)
    return error


@pytest.mark.parametrize("error, cause", [
    (ImportError("Using SOCKS proxy, but 'socksio' is not installed."), "ImportError: Using SOCKS proxy"),
    (json.JSONDecodeError("Expecting value", "<html>", 0), "JSONDecodeError: Expecting value"),
    (OSError(28, "No space left on device"), "No space left on device"),
    (without_network(), "ConnectionError: no route to host"),
    (http_error(errors.HfHubHTTPError, 503), "(HfHubHTTPError: 503: no);")])
def test_hub_failure_and_cache(hub, tmp_path, golden, error, cause):
    """If the hub cannot be reached, the cache is read. If the cache is empty, the message gives the reason."""
    hub(error)
    text = message("owner/name")
    assert "owner/name is not a folder here" in text and cause in text and len(text) < 600
    cached(tmp_path)
    assert_loads_dev_c("owner/name", golden)
    text = message("owner/name", revision="v2")
    assert text.startswith("owner/name at revision v2 is not a folder here") and cause in text


@pytest.mark.parametrize("kind, says", [
    (errors.GatedRepoError, "owner/name at revision v1 asks for a licence on the hub first"),
    (errors.RevisionNotFoundError, "owner/name has no revision v1; leave the revision out"),
    (errors.RepositoryNotFoundError, "owner/name is neither a folder here nor a public repository")])
def test_hub_refusals(hub, kind, says):
    hub(http_error(kind, 404))
    assert message("owner/name", revision="v1").startswith(says)
