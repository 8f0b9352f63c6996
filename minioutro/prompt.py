"""Frames and a question -> pixel_values and input_ids, and token ids -> text.

The route is that of transformers' SmolVLM processor at the models' release: pixels by Pillow, the
prompt by the chat template, which is short enough to be written out here.
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from reprlib import repr as shown

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from minioutro import weights as checkpoint
from minioutro.support.checks import check_fields, check_number
from minioutro.video import Video, resize_longest_edge

START, END = "<|im_start|>", "<end_of_utterance>"
IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
SPECIAL = (START, END, IMAGE, FAKE, GLOBAL)

# Settings of the preprocessing of which one value is implemented; resample 1 is Pillow's LANCZOS.
FIXED = {"do_resize": True, "resample": 1, "do_rescale": True, "rescale_factor": 1 / 255,
         "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
# Settings that are read below, and those of tiles, batches and types, which change nothing here:
# a video's frames are squashed to a square one by one, also where do_image_splitting is true.
KNOWN = """
    max_image_size video_sampling size fps num_frames
    do_image_splitting do_pad do_convert_rgb do_sample_frames default_to_square crop_size
    return_metadata return_row_col_info data_format input_data_format return_tensors
    processor_class image_processor_type video_processor_type feature_extractor_type auto_map
    model_input_names _valid_processor_keys""".split()
LARGEST = 4096          # pixels on a side; SmolVLM's own code resizes to no more
# What a tokenizer may be made of. Parts of other kinds make the library panic on some texts.
TOKENIZER = {"normalizer": (None, "NFC", "NFD", "NFKC", "NFKD", "Lowercase"),
             "pre_tokenizer": ("Digits", "ByteLevel", "Split"),
             "decoder": ("ByteLevel",), "model": ("BPE",)}

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_words(n: int) -> str:
    """A number in English, as the models read it in training: 21 -> "twenty-one".

    Raises: ValueError from 1,000 on.
    """
    if n >= 1000:
        raise ValueError(f"{n} frames: a prompt holds at most 999; use fewer")
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" and {number_words(n % 100)}" if n % 100 else "")


def read_settings(folder: Path) -> dict:
    """What a checkpoint's files say about Processor's arguments, by name.

    The preprocessing is a section of processor_config.json since transformers 5, and a file of its
    own before. Where a release of the models has no settings for videos, it uses those for images.
    Raises: ValueError with file, setting and value, where one makes no sense or is not implemented.
    """
    path = folder / "processor_config.json"
    where, settings = str(path), checkpoint.read_json(path)

    def number(setting: str, kind: type, least: float, most: float):
        value = settings
        for key in setting.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        check_number(where, setting, value, kind, least, most)
        return value

    tokens_per_frame = number("image_seq_len", int, 1, 4096)
    if "video_processor" in settings:
        where, settings = f"{path}, video_processor", settings["video_processor"]
        if not isinstance(settings, dict):
            raise ValueError(f"{where} is {shown(settings)}, not an object; fetch it again")
    else:
        path = folder / "video_preprocessor_config.json"
        path = path if path.exists() else folder / "preprocessor_config.json"
        where, settings = str(path), checkpoint.read_json(path)
    check_fields(where, settings, FIXED, KNOWN)
    edge, fps, frames = "size", "fps", "num_frames"
    if "video_sampling" in settings:
        edge, fps, frames = (f"video_sampling.{key}" for key in ("video_size", "fps", "max_frames"))
    return {"tokens_per_frame": tokens_per_frame,
            "size": number("max_image_size.longest_edge", int, 1, LARGEST),
            "longest_edge": number(f"{edge}.longest_edge", int, 1, LARGEST),
            "fps": number(fps, float, 0.001, 1000), "max_frames": number(frames, int, 1, 999)}


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file. Raises: ValueError if it is none, or has parts of another kind."""
    saved = checkpoint.read_json(path)
    for name, kinds in TOKENIZER.items():
        parts = [saved.get(name)]
        if isinstance(parts[0], dict) and parts[0].get("type") == "Sequence":
            parts = [part for value in parts[0].values() if isinstance(value, list)
                     for part in value]
        for part in parts:
            kind = part.get("type", part) if isinstance(part, dict) else part
            if kind not in kinds:
                raise ValueError(f"{path}: {name} {shown(kind)} is not supported, only "
                                 f"{', '.join(map(str, kinds))}; give a SmolVLM2 checkpoint's")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if saved["model"].get(name):
            raise ValueError(f"{path}: {name} = {shown(saved['model'][name])} is not supported; "
                             f"give a SmolVLM2 checkpoint's")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:                  # tokenizers raises nothing narrower
        raise ValueError(f"{path} is no tokenizer ({str(error)[:200]}); fetch it again") from None
    for token in SPECIAL:
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{path} has no token {token}; give a SmolVLM2 checkpoint's")
    return tokenizer


@dataclass
class Inputs:
    pixel_values: Tensor        # float32[1,F,3,size,size] in -1..1
    input_ids: Tensor           # int64[1,S]


class Processor:
    """The tokenizer and the settings of a checkpoint's preprocessing."""

    def __init__(self, tokenizer: Tokenizer, size: int, longest_edge: int, tokens_per_frame: int,
                 fps: float = 1.0, max_frames: int = 64):
        self.tokenizer = tokenizer
        self.size = size                            # pixels on each side of the square frame
        self.longest_edge = longest_edge            # pixels, of the first of two resizes
        self.tokens_per_frame = tokens_per_frame    # M
        self.fps = fps                              # frames a second, and the most of a video, that
        self.max_frames = max_frames                # the checkpoint asks for; its caller samples
        tokenizer.encode_special_tokens = True      # special tokens come from us, never from a text
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @classmethod
    def from_pretrained(cls, path_or_repo, revision: str | None = None) -> "Processor":
        """Read tokenizer.json, processor_config.json and the settings of the preprocessing.

        Raises: ValueError that names a file that is missing, or a setting that does not fit.
        """
        folder = checkpoint.find(path_or_repo, revision, checkpoint.PROCESSOR_FILES)
        return cls(read_tokenizer(folder / "tokenizer.json"), **read_settings(folder))

    def pieces(self, video: Video, question: str) -> list[str]:
        """The prompt, cut where a special token begins or ends; only special tokens stand alone."""
        if not question.strip():
            raise ValueError("the question is empty; ask something about the video")
        try:
            question.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("the question is not valid UTF-8 text; type it without special "
                             "characters, or in another terminal") from None
        frames, duration = number_words(len(video.frames)), timedelta(seconds=int(video.duration))
        text = (f"User: You are provided the following series of {frames} frames from a {duration} "
                f"[H:MM:SS] video.\n")
        pieces = [START]
        for seconds in video.seconds:
            text += f"\nFrame from {int(seconds // 60):02d}:{int(seconds % 60):02d}:"
            pieces += [text, FAKE, GLOBAL, *[IMAGE] * self.tokens_per_frame, FAKE]
            text = ""
        return pieces + [f"\n\n{question}", END, "\nAssistant:"]

    def prompt(self, video: Video, question: str) -> str:
        """The prompt as one text. Raises: ValueError for an empty question."""
        return "".join(self.pieces(video, question))

    def tokenize(self, pieces: list[str]) -> list[int]:
        """Token ids of a prompt in pieces. A text that looks like a special token stays text."""
        ids = []
        for piece in pieces:
            if piece in SPECIAL:
                ids.append(self.tokenizer.token_to_id(piece))
            else:
                ids += self.tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    def pixels(self, frame: Image.Image) -> Tensor:
        """One frame -> float32[3,size,size] in -1..1; its sides are squashed to a square."""
        frame = resize_longest_edge(frame.convert("RGB"), self.longest_edge)
        frame = frame.resize((self.size, self.size), Image.Resampling.LANCZOS)
        x = torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8)
        x = x.view(self.size, self.size, 3).permute(2, 0, 1)
        return (x * (1 / 255) - 0.5) / 0.5

    def __call__(self, video: Video, question: str) -> Inputs:
        """Raises: ValueError for an empty question."""
        ids = self.tokenize(self.pieces(video, question))
        return Inputs(torch.stack([self.pixels(frame) for frame in video.frames])[None],
                      torch.tensor([ids]))

    def decode(self, token_ids: list[int]) -> str:
        """Token ids of an answer -> its text, without special tokens and surrounding spaces."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()

    def token_text(self, token_id: int) -> str:
        """What one token stands for, special or not, for showing it."""
        return self.tokenizer.decode([token_id], skip_special_tokens=False)
