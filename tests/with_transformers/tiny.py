"""Models of transformers, tiny and with random weights, and prompts for them, with images or a video.

In each model, tokens with the id PLANTED get a massive activation after layer 2, as in trained models.
"""

import torch
import transformers
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig

# 15 layers: rows are opened in layers 0, 2, 4, ...
TEXT = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=15, num_attention_heads=6,
            num_key_value_heads=2, vocab_size=128, max_position_embeddings=256, head_dim=8, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, initializer_range=0.1, tie_word_embeddings=False)
PAD, PLANTED, IMAGE, VIDEO, START, END = 0, 7, 120, 121, 122, 123
PLANTED_AFTER = 2                  # the layer whose output is changed


def pixels(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


def grow(layer, args, output):
    """A forward hook that makes PLANTED massive. Only its embedding has a large coordinate 0."""
    hidden = output[0] if isinstance(output, tuple) else output
    hidden[..., 0] = torch.where(hidden[..., 0].abs() > 6, 20_000.0, hidden[..., 0])


class Tiny:
    """A model, its decoder's layers, and `media`: the tokens of an image or a video before each text."""

    def __init__(self, config, model, media=(), types=None, **given):
        torch.manual_seed(3)
        self.model = getattr(transformers, model)(config).eval().requires_grad_(False)
        self.layers = next(m.layers for m in self.model.modules() if hasattr(m, "embed_tokens"))
        self.layers[PLANTED_AFTER].register_forward_hook(grow)
        table = self.model.get_input_embeddings().weight
        table[:, 0], table[PLANTED, 0] = 0, 12
        self.media, self.types, self.given = list(media), types, given

    def prompt(self, *texts):
        """Arguments of a call: texts of unequal length, the same media before each, padded on the left."""
        rows = [[text[0], *self.media, *text[1:]] for text in texts]
        S = max(map(len, rows))
        ids = torch.tensor([[PAD] * (S - len(row)) + row for row in rows])
        inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
        for name, value in self.given.items():
            shades = [1 - b / 4 for b in range(len(texts))] if value.is_floating_point() else []
            inputs[name] = torch.cat([value * shade for shade in shades] or [value] * len(texts))
        if self.types:
            inputs[self.types] = 1 * (ids == IMAGE) + 2 * (ids == VIDEO)
        return inputs


def text(name, **more):
    return Tiny(getattr(transformers, f"{name}Config")(**{**TEXT, **more}), f"{name}ForCausalLM")


def composed(name, media, given, vision=(), text=(), types=None, **more):
    """A model with two layers of its own encoder, and with its own decoder or the one that `text` names."""
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, **dict(text)}, vision_config={**VISION, **dict(vision)},
        tie_word_embeddings=False, image_token_id=IMAGE, video_token_id=VIDEO, **more)
    return Tiny(config, f"{name}ForConditionalGeneration", media, types, **given)


def qwen(name, vision, frames=None):
    """With an image, or a video of `frames` frames. A token is 2 x 2 patches of 4 x 4 pixels, in 2 frames."""
    T = (frames or 2) // 2
    token, of_pixels, of_grid = (VIDEO, "pixel_values_videos", "video_grid_thw") if frames else \
        (IMAGE, "pixel_values", "image_grid_thw")
    return composed(name, [START, *[token] * (4 * T), END],
                    {of_pixels: pixels(16 * T, 2 * 3 * 4 * 4), of_grid: torch.tensor([[T, 4, 4]])},
                    {**QWEN, **vision}, {"rope_parameters": MROPE}, types="mm_token_type_ids",
                    vision_start_token_id=START, vision_end_token_id=END)


def omni():
    """The part of Qwen2.5-Omni that reads and answers, without sound."""
    config = Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, "rope_parameters": MROPE}, vision_config={**VISION, **QWEN, **QWEN25},
        audio_config=dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16,
                          output_dim=48),
        image_token_index=IMAGE, video_token_index=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END, audio_start_token_id=124, audio_end_token_id=125, audio_token_index=126)
    return Tiny(config, "Qwen2_5OmniThinkerForConditionalGeneration", [START, *[VIDEO] * 8, END],
                pixel_values_videos=pixels(32, 2 * 3 * 4 * 4), video_grid_thw=torch.tensor([[2, 4, 4]]),
                video_second_per_grid=torch.tensor([1.0]))


def llava(media, **given):
    return composed("LlavaOnevision", media, given, SIGLIP, dict(model_type="qwen2"),
                    image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=[[16, 16]])


VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
              patch_size=4)
SIGLIP = dict(model_type="siglip_vision_model", vision_use_head=False)
QWEN = dict(depth=2, num_heads=2)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN25 = dict(out_hidden_size=48, fullatt_block_indexes=[1], window_size=16)
WINDOW = dict(sliding_window=6)
TINY = {
    "Llama": lambda: text("Llama"),
    "Qwen2": lambda: text("Qwen2"),
    "Qwen3": lambda: text("Qwen3"),
    "Mistral": lambda: text("Mistral", **WINDOW),
    "Gemma 2": lambda: text("Gemma2", **WINDOW, query_pre_attn_scalar=8),
    "gpt-oss": lambda: text("GptOss", **WINDOW, num_local_experts=4, num_experts_per_tok=2),
    "Qwen2-VL": lambda: qwen("Qwen2VL", dict(embed_dim=16, hidden_size=48)),
    "Qwen2.5-VL": lambda: qwen("Qwen2_5_VL", QWEN25),
    "Qwen2.5-VL, a video": lambda: qwen("Qwen2_5_VL", QWEN25, frames=4),
    "Qwen3-VL": lambda: qwen("Qwen3VL", dict(out_hidden_size=48, num_position_embeddings=16,
                                             deepstack_visual_indexes=[0])),
    "LLaVA-OneVision": lambda: llava([IMAGE] * 36, pixel_values=pixels(1, 2, 3, 16, 16),
                                     image_sizes=torch.tensor([[16, 16]])),
    "LLaVA-OneVision, a video": lambda: llava([VIDEO] * 9, pixel_values_videos=pixels(1, 2, 3, 16, 16)),
    "Idefics3": lambda: composed("Idefics3", [IMAGE] * 4, dict(pixel_values=pixels(1, 1, 3, 16, 16)),
                                 text=dict(model_type="llama")),
    "Gemma 3": lambda: composed("Gemma3", [START, *[IMAGE] * 4, END], dict(pixel_values=pixels(1, 3, 16, 16)),
                                SIGLIP, dict(**WINDOW, query_pre_attn_scalar=8), "token_type_ids",
                                mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=START,
                                eoi_token_index=END),
    "InternVL": lambda: composed("InternVL", [IMAGE] * 4, dict(pixel_values=pixels(1, 3, 16, 16)),
                                 text=dict(model_type="qwen2"), image_seq_length=4),
    "Qwen2.5-Omni, a video": omni,
    "VideoLLaMA3": lambda: composed("VideoLlama3", [VIDEO] * 4, dict(
        pixel_values_videos=pixels(16, 3 * 4 * 4), video_grid_thw=torch.tensor([[1, 4, 4]]),
        video_merge_sizes=torch.tensor([2]), video_compression_mask=torch.ones(4, dtype=torch.bool)),
        text=dict(model_type="qwen2")),
}
