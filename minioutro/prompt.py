"""Frames and a question -> pixel_values and input_ids, and token ids -> text.

The route is that of transformers' SmolVLM processor at the models' release: pixels by Pillow, the
prompt by the chat template, which is short enough to be written out here.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from minioutro import weights as checkpoint
from minioutro.video import Video, resize_longest_edge

START, END = "<|im_start|>", "<end_of_utterance>"
IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
SPECIAL = (START, END, IMAGE, FAKE, GLOBAL)

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


@dataclass
class Inputs:
    pixel_values: Tensor        # float32[1,F,3,size,size] in -1..1
    input_ids: Tensor           # int64[1,S]


class Processor:
    """The tokenizer and the settings of a checkpoint's preprocessing."""

    def __init__(self, tokenizer: Tokenizer, size: int, longest_edge: int, tokens_per_frame: int):
        self.tokenizer = tokenizer
        self.size = size                            # pixels on each side of the square frame
        self.longest_edge = longest_edge            # pixels, of the first of two resizes
        self.tokens_per_frame = tokens_per_frame    # M
        tokenizer.encode_special_tokens = True      # special tokens come from us, never from a text
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @classmethod
    def from_pretrained(cls, path_or_repo, revision: str | None = None) -> "Processor":
        """Read tokenizer.json, preprocessor_config.json and processor_config.json.

        Raises: ValueError that names a file that is missing or does not fit.
        """
        folder = checkpoint.find(path_or_repo, revision, checkpoint.PROCESSOR_FILES)
        pixels = checkpoint.read_json(folder / "preprocessor_config.json")
        prompt = checkpoint.read_json(folder / "processor_config.json")
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:                  # tokenizers raises nothing narrower
            raise ValueError(f"{path} is no tokenizer ({error}); fetch it again") from None
        for token in SPECIAL:
            if tokenizer.token_to_id(token) is None:
                raise ValueError(f"{path} has no token {token}; give that of a SmolVLM2 checkpoint")
        try:
            size = pixels["max_image_size"]["longest_edge"]
            longest_edge = pixels["video_sampling"]["video_size"]["longest_edge"]
            return cls(tokenizer, size, longest_edge, prompt["image_seq_len"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder}: preprocessor_config.json or processor_config.json lacks a "
                             f"setting ({error}); fetch them again") from None

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
