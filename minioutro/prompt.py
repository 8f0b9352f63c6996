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

from minioutro.support.checks import PIXELS, check_fixed, check_number, check_tokenizer
from minioutro.video import Video, resize_longest_edge
from minioutro.weights import PROCESSOR_FILES, find_folder, read_json

START, END = "<|im_start|>", "<end_of_utterance>"
IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
SPECIAL = (START, END, IMAGE, FAKE, GLOBAL)

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_words(n: int) -> str:
    """A number in English, as the models read it in training: 21 -> "twenty-one".

    Raises: ValueError if n is 1,000 or more.
    """
    if n >= 1000:
        raise ValueError(f"a prompt holds at most 999 frames, not {n}; use fewer frames")
    if n < 20:
        return ONES[n]
    if n < 100:
        tens, ones = TENS[n // 10 - 2], n % 10
        return f"{tens}-{ONES[ones]}" if ones else tens
    hundreds, rest = f"{ONES[n // 100]} hundred", n % 100
    return f"{hundreds} and {number_words(rest)}" if rest else hundreds


def read_settings(folder: Path) -> dict:
    """The arguments of Processor, by name, as a checkpoint's files state them.

    Settings that do not change a video are ignored, for example those of tiles.
    Raises: ValueError that names the file, the setting and its value, if the value makes no sense
    or asks for pixels that are not implemented.
    """
    path = folder / "processor_config.json"
    processor = read_json(path)
    where, settings = read_preprocessing(folder, processor)
    check_fixed(where, settings, PIXELS)
    if "video_sampling" in settings:
        fps, max_frames = "video_sampling.fps", "video_sampling.max_frames"
        edge = "video_sampling.video_size.longest_edge"
    else:
        fps, max_frames, edge = "fps", "num_frames", "size.longest_edge"
    square = "max_image_size.longest_edge"
    most = 4096             # pixels on a side: SmolVLM's own code never makes a larger image
    return {"tokens_per_frame": read_number(str(path), processor, "image_seq_len", int, 1, 4096),
            "size": read_number(where, settings, square, int, 1, most),
            "longest_edge": read_number(where, settings, edge, int, 1, most),
            "fps": read_number(where, settings, fps, float, 0.001, 1000),
            "max_frames": read_number(where, settings, max_frames, int, 1, 999)}


def read_preprocessing(folder: Path, processor: dict) -> tuple[str, dict]:
    """The settings of the preprocessing. Returns: where they stand, for messages, and the settings.

    Since transformers 5 they are a section of processor_config.json. Before, they were a file of
    their own. A checkpoint that has no settings for videos uses those for images.
    """
    if "video_processor" in processor:
        where = f"{folder / 'processor_config.json'}, video_processor"
        settings = processor["video_processor"]
        if not isinstance(settings, dict):
            raise ValueError(f"{where} is {shown(settings)}, not an object; fetch it again")
        return where, settings
    path = folder / "video_preprocessor_config.json"
    if not path.exists():
        path = folder / "preprocessor_config.json"
    return str(path), read_json(path)


def read_number(where: str, settings: dict, setting: str, kind: type, least: float, most: float):
    """The number at a path of keys, for example "size.longest_edge"."""
    value = settings
    for key in setting.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    check_number(where, setting, value, kind, least, most)
    return value


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file. Raises: ValueError if it is not of SmolVLM2's kind."""
    check_tokenizer(path, read_json(path))
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:                  # tokenizers raises a plain Exception
        raise ValueError(f"{path} is not a tokenizer ({str(error)[:200]}); fetch it "
                         f"again") from None
    for token in SPECIAL:
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{path} has no token {token}; take it from a SmolVLM2 checkpoint")
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
        self.fps = fps                              # frames per second, to pass to read_video
        self.max_frames = max_frames                # the most frames, to pass to read_video
        self.image_token_id = tokenizer.token_to_id(IMAGE)
        tokenizer.encode_special_tokens = True      # "<image>" in a question is text, not an image
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @classmethod
    def from_pretrained(cls, path_or_repo, revision: str | None = None) -> "Processor":
        """Read tokenizer.json, processor_config.json and the settings of the preprocessing.

        Raises: ValueError that names a file that is missing, or a setting that does not fit.
        """
        folder = find_folder(path_or_repo, revision, PROCESSOR_FILES)
        return cls(read_tokenizer(folder / "tokenizer.json"), **read_settings(folder))

    def pieces(self, video: Video, question: str) -> list[str]:
        """The prompt in pieces: each special token, and each text between two of them."""
        if not question.strip():
            raise ValueError("the question is empty; ask something about the video")
        try:
            question.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("the question is not valid UTF-8 text; type it without special "
                             "characters, or in another terminal") from None
        frames = number_words(len(video.frames))
        duration = timedelta(seconds=int(video.duration))
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
        """Token ids of a prompt in pieces. A special token inside a longer piece counts as text."""
        ids = []
        for piece in pieces:
            if piece in SPECIAL:
                ids.append(self.tokenizer.token_to_id(piece))
            else:
                ids += self.tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    def pixels(self, frame: Image.Image) -> Tensor:
        """One frame, squeezed into a square: float32[3,size,size] in -1..1."""
        frame = resize_longest_edge(frame.convert("RGB"), self.longest_edge)
        frame = frame.resize((self.size, self.size), Image.Resampling.LANCZOS)
        x = torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8)
        x = x.view(self.size, self.size, 3).permute(2, 0, 1)
        return (x * (1 / 255) - 0.5) / 0.5

    def __call__(self, video: Video, question: str) -> Inputs:
        """The inputs of the model for one question. Raises: ValueError for an empty question."""
        input_ids = torch.tensor([self.tokenize(self.pieces(video, question))])             # (1,S)
        frames = torch.stack([self.pixels(frame) for frame in video.frames])
        return Inputs(frames[None], input_ids)

    def decode(self, token_ids: list[int]) -> str:
        """Token ids of an answer -> its text, without special tokens and surrounding spaces."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()

    def token_text(self, token_id: int) -> str:
        """The text of one token, to show it. A special token is shown by its name."""
        return self.tokenizer.decode([token_id], skip_special_tokens=False)
