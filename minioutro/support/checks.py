"""What is refused, and in which words: settings, sizes, devices."""

from reprlib import repr as shown  # a value in an error message: cut if it is long or deep

import torch

ENCODER, DECODER = "model.vision_model.", "model.text_model."
IMAGE = "<image>"


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


def check_sizes(config, stored: dict) -> None:
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


def check_device(device) -> None:
    """Raise ValueError if there is no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):      # the latter where torch was built without CUDA
        raise ValueError(f"device {device}: there is none here; leave it out") from None


def check_pair(model, processor) -> None:
    """Raise ValueError if processor and model do not fit together."""
    config, vision = model.config, model.config.vision_config
    per_frame = (vision.image_size // vision.patch_size // config.scale_factor)**2
    for what, ours, theirs in (
            ("frame size", processor.size, vision.image_size),
            ("tokens a frame", processor.tokens_per_frame, per_frame),
            (f"id of {IMAGE}", processor.tokenizer.token_to_id(IMAGE), config.image_token_id)):
        if ours != theirs:
            raise ValueError(f"{what}: the processor's files say {ours}, config.json {theirs}; "
                             f"take all files from one checkpoint")
