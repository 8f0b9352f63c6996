"""Checkpoints as they are found: whole or in parts, old or new, and broken in every way."""

import json
import shutil
from fnmatch import fnmatch

import huggingface_hub
import pytest
import torch
from conftest import FIXTURES, assert_close
from safetensors.torch import load_file, save_file

from minioutro import VideoLM, weights
from minioutro.model import read_config


@pytest.fixture
def folder(tmp_path):
    """A copy of dev_c that a test may spoil."""
    return shutil.copytree(FIXTURES / "dev_c", tmp_path / "dev_c")


def edit_config(folder, section, **values):
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


# ---- what is read ----


def test_the_report_counts_what_is_in_the_file(folder):
    tensors = load_file(folder / "model.safetensors")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert VideoLM.from_pretrained(folder).load_report == \
        f"{len(tensors)} tensors, {numbers:,} parameters as float32; 0 missing, 0 unexpected, ignored: none"


def test_parts_with_an_index_equal_one_file(folder, golden):
    g = golden("dev_c")
    tensors, weight_map = load_file(folder / "model.safetensors"), {}
    for n in range(3):
        part = {name: tensor for i, (name, tensor) in enumerate(sorted(tensors.items())) if i % 3 == n}
        save_file(part, folder / f"model-0000{n + 1}-of-00003.safetensors")
        weight_map.update({name: f"model-0000{n + 1}-of-00003.safetensors" for name in part})
    (folder / "model.safetensors").unlink()
    (folder / weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert VideoLM.from_pretrained(folder)(g.input_ids, g.pixels).equal(g.model(g.input_ids, g.pixels))
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in message(folder)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_every_dtype_of_the_file_becomes_the_one_asked_for(folder, stored, asked):
    original = load_file(folder / "model.safetensors")
    edit_tensors(folder, lambda tensors: tensors.update({n: t.to(stored) for n, t in tensors.items()}))
    model = VideoLM.from_pretrained(folder, dtype=asked)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == asked and tensor.equal(original[name].to(stored).to(asked)), name
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_tied_head_is_the_embedding_table_and_a_stored_copy_is_ignored_by_name(tmp_path, golden):
    folder, g = shutil.copytree(FIXTURES / "dev_a", tmp_path / "dev_a"), golden("dev_a")
    assert "lm_head.weight" not in g.model.state_dict()
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(128, 48)}))
    model = VideoLM.from_pretrained(folder)
    assert model.load_report.endswith("ignored: lm_head.weight")
    assert_close(model(g.input_ids, g.pixels), g.tensors["logits"])


def test_defaults_and_decoys_of_the_hubs_config(folder):
    """The 2.2B model's config leaves out both head counts; perceiver_config holds decoys of theirs."""
    edit_config(folder, "text_config", num_attention_heads=..., num_key_value_heads=..., head_dim=...,
                rope_parameters=..., rope_theta=130000, hidden_size=2048,
                perceiver_config={"num_key_value_heads": 1, "tie_word_embeddings": True})
    edit_config(folder, "vision_config", num_hidden_layers=..., intermediate_size=..., patch_size=...,
                image_size=96)
    config = read_config(folder)
    text, vision = config.text_config, config.vision_config
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (32, 32, 64)
    assert text.rope_theta == 130000 and not config.tie_word_embeddings
    assert (vision.num_hidden_layers, vision.intermediate_size, vision.patch_size) == (12, 3072, 32)
    assert (vision.layer_norm_eps, text.rms_norm_eps) == (1e-6, 1e-5)


HUB = {                                     # what the three configs say; the rest is absent there
    "256M": (dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                  num_key_value_heads=3), dict(hidden_size=768, num_attention_heads=12, image_size=512,
                  patch_size=16), 4, 471, 256_484_928),
    "500M": (dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
                  num_key_value_heads=5), dict(hidden_size=768, num_attention_heads=12, image_size=512,
                  patch_size=16), 4, 489, 507_482_304),
    "2.2B": (dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24),
             dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                  image_size=384, patch_size=14), 3, 657, 2_246_784_880)}


@pytest.mark.parametrize("size", HUB)
def test_the_three_sizes_of_the_hub_have_as_many_tensors_and_parameters_as_their_files(tmp_path, size):
    text, vision, scale, n_tensors, n_parameters = HUB[size]
    text = {"model_type": "llama", "head_dim": 64, "vocab_size": 49280, "rms_norm_eps": 1e-5, **text}
    config = {"model_type": "smolvlm", "image_token_id": 49190, "scale_factor": scale,
              "tie_word_embeddings": False, "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = VideoLM(read_config(tmp_path))
    tensors = model.state_dict().values()
    assert (len(tensors), sum(tensor.numel() for tensor in tensors)) == (n_tensors, n_parameters)
    patches = model.config.vision_config.image_size // model.config.vision_config.patch_size
    assert (patches // scale)**2 == (81 if size == "2.2B" else 64)


def test_rope_theta_is_read_in_both_spellings(folder):
    assert read_config(folder).text_config.rope_theta == 10000.0
    edit_config(folder, "text_config", rope_parameters={"rope_theta": 777.0, "rope_type": "default"})
    assert read_config(folder).text_config.rope_theta == 777.0
    edit_config(folder, "text_config", rope_parameters=..., rope_theta=555, rope_scaling=None)
    assert read_config(folder).text_config.rope_theta == 555


def test_without_generation_config_nothing_ends_an_answer(folder):
    assert VideoLM.from_pretrained(folder).eos_token_ids == (124,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 124]}')
    assert VideoLM.from_pretrained(folder).eos_token_ids == (3, 124)
    (folder / "generation_config.json").unlink()
    assert VideoLM.from_pretrained(folder).eos_token_ids == ()


# ---- what is refused ----


@pytest.mark.parametrize("section, field, value", [
    (None, "model_type", "llava"), (None, "model_type", "idefics3"), ("text_config", "model_type", "qwen2"),
    ("text_config", "hidden_act", "gelu"), ("text_config", "attention_bias", True),
    ("text_config", "mlp_bias", True), ("text_config", "rope_scaling", {"type": "linear", "factor": 2}),
    ("text_config", "sliding_window", 512), ("text_config", "rope_interleaved", True),
    ("vision_config", "hidden_act", "relu"), ("vision_config", "num_channels", 1),
    ("text_config", "hidden_size", "48"), ("text_config", "hidden_size", -48),
    ("text_config", "num_hidden_layers", 0), ("text_config", "rms_norm_eps", -1.0),
    ("vision_config", "patch_size", 0), (None, "scale_factor", None),
    (None, "tie_word_embeddings", "no"),
    ("text_config", "rope_parameters", {"rope_theta": 1e4, "rope_type": "yarn"})])
def test_a_value_that_is_not_implemented_is_refused_by_field_and_value(folder, section, field, value):
    edit_config(folder, section, **{field: value})
    text = message(folder)
    if field == "rope_parameters":
        field, value = "rope_type", "yarn"
    assert field in text and repr(value) in text


@pytest.mark.parametrize("section, field, value", [
    ("text_config", "num_key_value_heads", 4), ("text_config", "head_dim", 15),
    ("vision_config", "num_attention_heads", 5), (None, "scale_factor", 4)])
def test_sizes_that_do_not_divide_are_refused(folder, section, field, value):
    edit_config(folder, section, **{field: value})
    assert "is no multiple of" in message(folder)


def test_an_index_cannot_lead_out_of_its_folder(folder):
    weight_map = {"lm_head.weight": "../dev_c/model.safetensors"}
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "outside its folder" in message(folder)


def test_a_revision_of_a_folder_and_an_eos_that_is_no_id_are_refused(folder):
    assert "has no revision v1" in message(folder, revision="v1")
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    assert "eos_token_id" in message(folder)


def test_what_is_missing_unexpected_and_mis_shaped_is_named(folder):
    def spoil(tensors):
        for name in [name for name in tensors if "layers.1.mlp" in name or "layers.1.self_attn" in name]:
            tensors[name.replace("layers.1", "layers.9")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].clone()
    edit_tensors(folder, spoil)
    text = message(folder)
    for part in ("19 missing: ", "19 unexpected: ", "layers.9.", ", ...;",
                 "1 mis-shaped: lm_head.weight (100, 48) instead of (128, 48)"):
        assert part in text, text
    assert text.count("layers.9.") == 5


def test_files_that_are_missing_cut_off_or_no_json(folder):
    cut = (folder / "model.safetensors").read_bytes()[:-100]
    (folder / "model.safetensors").write_bytes(cut)
    assert "model.safetensors is damaged or cut off" in message(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)
    assert "model.safetensors is damaged or cut off" in message(folder)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in message(folder)
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in message(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in message(folder)
    assert "is a file" in message(folder / "meta.json")


def test_a_quantised_checkpoint_is_refused(folder):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))
    assert "lm_head.weight is I8" in message(folder)


# ---- the hub ----


def test_only_the_files_that_are_needed_are_fetched(monkeypatch, tmp_path):
    hub = ["README.md", "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
           "model-00002-of-00002.safetensors", "model.safetensors.index.json", "onnx/model.onnx",
           "onnx/model.safetensors", "tokenizer.json", "vocab.json", "preprocessor_config.json",
           "processor_config.json", "chat_template.json"]
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda repo, **options: asked.append((repo, options)) or str(tmp_path))
    assert weights.find("owner/name", "v1", weights.MODEL_FILES) == tmp_path
    weights.find("owner/name", None, weights.PROCESSOR_FILES)
    fetched = [[name for name in hub if any(fnmatch(name, p) for p in options["allow_patterns"])]
               for _, options in asked]
    assert fetched == [hub[1:6], ["tokenizer.json", "preprocessor_config.json", "processor_config.json"]]
    assert [(repo, options["revision"]) for repo, options in asked] == [("owner/name", "v1"),
                                                                        ("owner/name", None)]


def test_a_repository_in_the_cache_is_used_without_network(monkeypatch, tmp_path, golden):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "cannot be reached" in message("owner/name")
    repository = tmp_path / "models--owner--name"
    shutil.copytree(FIXTURES / "dev_c", repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    g = golden("dev_c")
    assert VideoLM.from_pretrained("owner/name")(g.input_ids).equal(g.model(g.input_ids))
    assert "cannot be reached" in message("owner/name", revision="v2")
    assert "neither a folder here nor the name of a repository" in message("no/such/folder")
