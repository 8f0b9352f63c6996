"""minioutro: SmolVLM2 and OutRo. Read model.py first, then prompt.py, video.py and weights.py."""

import torch

from minioutro.model import Cache, OutRo, Trace, VideoLM
from minioutro.prompt import Processor
from minioutro.support.checks import check_device, check_pair
from minioutro.video import Video, read_video

__all__ = ["Cache", "OutRo", "Processor", "Trace", "Video", "VideoLM", "load", "read_video"]


def load(path_or_repo, revision: str | None = None, device: str = "cpu",
         dtype: torch.dtype = torch.float32) -> tuple[VideoLM, Processor]:
    """The model and the processor of a checkpoint: a folder, or a repository of the hub.

    Raises: ValueError or OSError that says what is wrong with one of them, or with the pair.
    """
    check_device(device)            # before anything is fetched
    model = VideoLM.from_pretrained(path_or_repo, revision, device, dtype)
    processor = Processor.from_pretrained(path_or_repo, revision)
    check_pair(model, processor)
    return model, processor
