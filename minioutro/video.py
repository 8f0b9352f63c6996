"""A video file -> a few frames, evenly spread, and the time at which each is shown.

minioutro/support/media.py deals with the files. It says when each frame of a file appears, and it
fetches frames by their numbers. This module chooses the numbers and scales the frames.
"""

import math
import os
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minioutro.support import media


@dataclass
class Video:
    frames: list[Image.Image]       # RGB, upright
    seconds: list[float]            # when each of them appears, from the start of the video
    duration: float                 # of the whole video, in seconds
    total_frames: int               # in the whole video


def sample_indices(total_frames: int, native_fps: float, duration: float, fps: float = 1.0,
                   max_frames: int = 64) -> list[int]:
    """Choose the frames that the model sees: fps of them per second, at most max_frames.

    The chosen numbers are evenly spread, and the first and the last frame are among them. If the
    video is longer than max_frames / fps by more than two seconds, its first and its last second
    are left out, because they often show titles.

    The frames are spread evenly by number, not by time. So the chosen frames of a recording with a
    variable frame rate are not evenly spread in time.

    Raises: ValueError if fps or max_frames is not positive, or is above 1e9.
    Source: the video sampling of SmolVLM's processor in transformers.
    Example: sample_indices(32, 10.0, 3.2) -> [0, 15, 31]
    """
    if not (0 < fps <= 10 ** 9 and 1 <= max_frames <= 10 ** 9):
        raise ValueError(f"fps and max_frames must be positive and at most 1e9, not {fps} and "
                         f"{max_frames}")
    first, last = 0, total_frames - 1
    if duration - 2 > max_frames * fps:
        after_titles = int(native_fps)
        before_titles = min(int(total_frames - native_fps), last)
        if after_titles < before_titles:
            first, last = after_titles, before_titles

    wanted = max(1, round(min(fps * duration, max_frames)))
    wanted = min(wanted, last - first + 1)
    if wanted == 1:
        return [first]
    step = (last - first) / (wanted - 1)
    # np.linspace multiplies first and then adds, so this order gives the same rounding
    return [int(i * step + first) for i in range(wanted - 1)] + [last]


def resize_longest_edge(image: Image.Image, longest_edge: int) -> Image.Image:
    """Scale an image so that its longer side has longest_edge pixels.

    The shorter side follows in proportion, is cut to an integer and then made even. An image that
    already has this size is returned as it is.

    Source: the resize of SmolVLM's processor at the models' release.
    Example: 100 x 60 pixels to a longest edge of 32 -> 32 x 20, because 19.2 is cut to 19
    """
    width, height = image.size
    aspect = width / height
    if width >= height:
        size = (longest_edge, even(longest_edge / aspect))
    else:
        size = (even(longest_edge * aspect), longest_edge)
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.LANCZOS)


def even(length: float) -> int:
    """Cut a length to an integer, and add one pixel if it is odd. At least 1."""
    pixels = int(length)
    return max(1, pixels + pixels % 2)


def indices_shown(seconds: list[float], start: float, end: float) -> range:
    """The indices of the frames that are on the screen at some time from start up to end.

    A frame is on the screen from its own time to the time of the next one.
    seconds: when each frame appears, in increasing order from 0.0 on
    Example: indices_shown([0.0, 5.0, 10.0, 15.0], 7.0, 10.0) -> range(1, 2)
    """
    on_screen = bisect_right(seconds, start) - 1
    first = bisect_left(seconds, seconds[on_screen])        # several frames may have the same time
    return range(first, bisect_left(seconds, end))


def read_video(path, fps: float = 1.0, max_frames: int = 64, longest_edge: int | None = None,
               start: float | None = None, end: float | None = None) -> Video:
    """Sample a video, an animation or a picture. start and end, in seconds, choose a part of it.

    A part is sampled as if it were a file of its own: seconds, duration and total_frames are those
    of the part. It begins with the frame that is on the screen at start, as in a player.

    Each frame is scaled to longest_edge as soon as it is decoded, so that a long video never has to
    fit into memory at full size.

    Raises: OSError if the file does not exist. ValueError that says why it gives no frames.
    """
    path = Path(os.path.expanduser(path))
    part_start = 0.0 if start is None else max(0.0, start)
    part_end = math.inf if end is None else end

    def scale(frame: Image.Image) -> Image.Image:
        return frame if longest_edge is None else resize_longest_edge(frame, longest_edge)

    for reading in media.readings(path):
        duration = min(part_end, reading.duration) - part_start
        if not duration > 0:                                # written so that NaN is refused
            raise ValueError(f"{path} lasts {reading.duration:.1f} s, so nothing is shown from "
                             f"start {start} to end {end}; choose a part inside the video")
        shown = indices_shown(reading.seconds, part_start, part_end)
        native_fps = len(shown) / duration
        sampled = sample_indices(len(shown), native_fps, duration, fps, max_frames)
        indices = [shown[i] for i in sampled]
        frames = list(media.in_background(scale, reading.frames(indices)))
        if len(frames) == len(indices):
            seconds = [max(0.0, reading.seconds[i] - part_start) for i in indices]
            return Video(frames, seconds, duration, len(shown))
    raise ValueError(f"no frame of {path} can be decoded; try to play it, or convert it to mp4")
