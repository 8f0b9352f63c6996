"""Compute the golden values of tests/fixtures again, with transformers and the code of the paper's authors.

    pip install -r tests/with_transformers/requirements.txt
    PYTHONPATH=. python tests/with_transformers/write_fixtures.py [--release PATH] [--into FOLDER]

PATH is a checkout of github.com/kaistmm/OutRo at commit 2bee38c. Without it dev_late, dev_natural and
decode.json stay as they are. Checkpoints, token ids, pixels and questions are read from the fixtures.
The values are computed from these. Run this script by hand, above all after a new toy was trained.
"""

import argparse
import importlib.util
import json
import re
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, SmolVLMForConditionalGeneration
from transformers.image_utils import PILImageResampling
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.video_utils import VideoMetadata

from minioutro import Processor, read_video

FIXTURES = Path(__file__).parent.parent / "fixtures"
TOY = FIXTURES.parent.parent / "minioutro" / "toy"
PLAIN, OUTRO = ("dev_a", "dev_c"), ("dev_late", "dev_natural")
# Golden name -> the module of transformers' model that has it as output. {} is the number of a layer.
OUTPUTS = {"vision.embeddings": "model.vision_model.embeddings",
           "vision.layer.{}": "model.vision_model.encoder.layers.{}",
           "vision.features": "model.vision_model.post_layernorm", "projected": "model.connector",
           "text.layer.{}": "model.text_model.layers.{}", "text.norm": "model.text_model.norm"}
INPUTS = {"pixel_shuffled": "model.connector.modality_projection",
          "text.inputs_embeds": "model.text_model.layers.0"}


def load(folder):
    return SmolVLMForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()


def first(x):
    return x[0] if isinstance(x, tuple) else x


# ---- transformers alone ----


def plain(folder) -> tuple[dict, list[int]]:
    """Golden tensors of dev_a or dev_c, and the greedy answer's ids."""
    model, given = load(folder), load_file(folder / "golden.safetensors")
    tensors = {name: given[name] for name in ("input_ids", "pixel_values", "text_only.input_ids")}
    modules = dict(model.named_modules())
    wanted = {name.format(i): (modules[path.format(i)], False) for name, path in OUTPUTS.items()
              for i in range(9) if path.format(i) in modules}
    wanted |= {name: (modules[path], True) for name, path in INPUTS.items()}
    with ExitStack() as hooks:
        for name, (module, is_input) in wanted.items():
            def keep(module, args, kwargs, output, name=name, is_input=is_input):
                tensors[name] = first(args or kwargs.get("hidden_states")) if is_input else first(output)
            hooks.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        inputs = {name: tensors[name] for name in ("input_ids", "pixel_values")}
        tensors["logits"] = model(**inputs).logits
    tensors["text_only.logits"] = model(input_ids=tensors["text_only.input_ids"]).logits
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=12, use_cache=True, output_logits=True,
                            return_dict_in_generate=True)
    tensors["generated_ids"] = answer.sequences[:, inputs["input_ids"].shape[1]:]
    tensors["generated_logits"] = torch.stack(answer.logits, dim=1)
    return tensors, tensors["generated_ids"][0].tolist()


def toy(last=24) -> dict:
    """The toy on its clip: logits of the prompt's last positions, a few KB, and the answer."""
    model, processor = load(TOY), Processor.from_pretrained(TOY)
    video = read_video(TOY / "clip.mp4", longest_edge=processor.longest_edge)
    inputs = vars(processor(video, "What happens in this video?"))
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    return {"logits": model(**inputs).logits[:, -last:], "answer": answer[:, inputs["input_ids"].shape[1]:]}


def prompts() -> list[dict]:
    """Frames and text for videos whose numbers are given. Only parts of the processor are called, because
    the whole one needs torchvision."""
    cases = json.loads((FIXTURES / "prompts.json").read_text())
    tokens = SimpleNamespace(image_seq_len=64, image_token="<image>", global_image_token="<global-img>",
                             fake_image_token="<fake_token_around_image>")
    for case in cases:
        metadata = VideoMetadata(total_num_frames=case["total_num_frames"], fps=case["fps"],
                                 duration=case["duration"])
        indices = SmolVLMVideoProcessor.sample_frames(None, metadata, num_frames=64, fps=1.0)
        metadata.frames_indices = indices
        case["indices"] = indices.tolist()
        case["timestamps"] = [f"{int(s // 60):02d}:{int(s % 60):02d}" for s in metadata.timestamps]
        video = processing_smolvlm.SmolVLMProcessor.replace_video_token(
            tokens, {"pixel_values": torch.empty(1, len(indices), 0), "video_metadata": [metadata]}, 0)
        content = [{"type": "video"}, {"type": "text", "text": case["question"]}]
        (text,), _ = render_jinja_template(
            [[{"role": "user", "content": content}]], add_generation_prompt=True,
            chat_template=processing_smolvlm.DEFAULT_CHAT_TEMPLATE)
        case["prompt"] = re.sub("(<image>){64}", "<image>*64", text.replace("<video>", video))
    return cases


def pixels() -> dict:
    """Pixels of the given frames as at the models' release: Pillow, to the longest edge, then to the square."""
    tensors = load_file(FIXTURES / "pixels.safetensors")
    process = SmolVLMImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False,
        resample=PILImageResampling.LANCZOS, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for name in [name for name in tensors if name.endswith(".frames_uint8_nhwc")]:
        frames = [frame.permute(2, 0, 1).numpy() for frame in tensors[name]]
        found = process([frames], return_tensors="pt", input_data_format="channels_first").pixel_values[0]
        tensors[name.replace("frames_uint8_nhwc", "pil_lanczos_32_then_32")] = found
    return tensors


# ---- transformers' Llama with the published controller in its attention ----


@contextmanager
def release_in(model, release, meta, relax=True, align=True):
    """Call the controller where the published class does. Yields: controller, hidden and opened by layer."""
    spec = importlib.util.spec_from_file_location("outro", Path(release) / "model" / "outro.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    c, layers = model.config.text_config, model.model.text_model.layers
    controller = module.OutroController(
        num_layers=meta["L"], end_layer=meta["L"] - 2, med_mul=meta["median_multiple"],
        abs_thr=meta["abs_threshold"], num_heads=c.num_attention_heads, num_kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim, gamma=meta["gamma"], temp=meta["temperature"], enable_relu_tanh=align)
    hidden, opened = {}, {}
    if not relax:
        controller.applied_sinks.update(range(10_000))                  # as if all rows had been opened

    def before(layer, args):
        l = layer.self_attn.layer_idx
        hidden.setdefault(l, args[0])
        controller.cache_sink_indices(l, args[0])

    def attention(module, query, key, value, attention_mask, **kwargs):
        l, applied = module.layer_idx, set(controller.applied_sinks)
        if query.shape[2] > 1:
            controller.cache_v_proj_sink(l, value)
            controller.compute_delta_v(l, query, key, value)
        out, weights = eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
        out = controller.apply_outro(l, out.flatten(2)).view_as(out)
        opened.setdefault(l, controller.applied_sinks - applied)
        return out, weights

    AttentionInterface.register("release", attention)
    AttentionMaskInterface.register("release", eager_mask)
    model.set_attn_implementation({"text_config": "release"})
    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    try:
        yield controller, hidden, opened
    finally:
        model.set_attn_implementation({"text_config": "eager"})
        for hook in hooks:
            hook.remove()


def greedy(model, inputs, after_prompt=lambda: None, n=24) -> tuple[list[int], list]:
    """n greedy ids, also after eos, and how far apart the two largest logits were, in standard deviations."""
    cache, ids, gaps = DynamicCache(), [], []
    logits = model(**inputs, past_key_values=cache, use_cache=True).logits[0, -1]
    after_prompt()
    while True:
        ids.append(logits.argmax().item())
        top = logits.topk(2).values
        gaps.append(((top[0] - top[1]) / logits.std()).item())
        if len(ids) == n:
            return ids, gaps
        logits = model(torch.tensor([ids[-1:]]), past_key_values=cache, use_cache=True).logits[0, -1]


def with_release(folder, release) -> tuple[dict, dict]:
    """Golden tensors of dev_late or dev_natural, and its entry of decode.json."""
    model, given = load(folder), load_file(folder / "golden.safetensors")
    meta = json.loads((folder / "meta.json").read_text())
    inputs = {name: given[name] for name in ("input_ids", "pixel_values")}
    L, S = meta["L"], inputs["input_ids"].shape[1]
    tensors = {**inputs, "logits_off": model(**inputs).logits}
    with release_in(model, release, meta) as (controller, _, opened):
        tensors["logits_on"] = model(**inputs).logits
        for name, found in (("is_sink", controller.sink_indices_cache), ("is_relaxed", opened)):
            tensors[name] = torch.tensor([[i in found.get(l, ()) for i in range(S)] for l in range(L)])
    with release_in(model, release, meta, relax=False):
        tensors["logits.align_only"] = model(**inputs).logits
    with release_in(model, release, meta, align=False) as (_, hidden, _):
        tensors["logits.relax_only"] = model(**inputs).logits
    tensors |= {f"hidden.{l}": state for l, state in hidden.items()}

    decoded = {}
    decoded["off"], gaps = greedy(model, inputs)
    for name in ("ids", "no_decode_alignment"):
        with release_in(model, release, meta) as (controller, _, _):
            # "ids" forgets only the sinks' positions, so that no generated token is taken for a sink.
            forget = controller.sink_indices_cache.clear if name == "ids" else controller.reset_runtime
            decoded[name], more = greedy(model, inputs, forget)
            gaps += more
    return tensors, {**decoded, "min_gap_over_std": min(gaps)}


# ---- writing ----


def save(tensors, path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", type=Path, help="checkout of the published code, for the OutRo cases")
    parser.add_argument("--into", type=Path, default=FIXTURES, help="where to write (%(default)s)")
    a = parser.parse_args()
    torch.set_num_threads(1)                    # threads add in another order, which changes the sums
    made_by = {"transformers": transformers.__version__, "torch": torch.__version__}
    for case in (*PLAIN, *(OUTRO if a.release else ())):
        (a.into / case).mkdir(parents=True, exist_ok=True)
        meta = json.loads((FIXTURES / case / "meta.json").read_text())
        if case in PLAIN:
            tensors, meta["generated_ids"] = plain(FIXTURES / case)
        else:
            tensors, decoded = with_release(FIXTURES / case, a.release)
            path = a.into / "decode.json"
            all_decoded = json.loads((path if path.exists() else FIXTURES / "decode.json").read_text())
            path.write_text(json.dumps({**all_decoded, case: decoded}))
        save(tensors, a.into / case / "golden.safetensors")
        (a.into / case / "meta.json").write_text(json.dumps({**meta, **made_by}, indent=1) + "\n")
    save(toy(), a.into / "toy.safetensors")
    save(pixels(), a.into / "pixels.safetensors")
    (a.into / "prompts.json").write_text(json.dumps(prompts(), indent=0))


if __name__ == "__main__":
    main()
