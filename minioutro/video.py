"""A video file -> a few frames, evenly spread, and the time at which each is shown."""

import math
import os
from bisect import bisect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image


@dataclass
class Video:
    frames: list[Image.Image]       # RGB, upright
    seconds: list[float]            # when each is shown, from the start of the video
    duration: float                 # of the whole video, in seconds
    total_frames: int               # in the whole video


def sample_indices(total_frames: int, native_fps: float, duration: float, fps: float = 1.0,
                   max_frames: int = 64) -> list[int]:
    """The frames that the model is shown: fps of them a second, at most max_frames, evenly spread.

    The first and the last frame are among them; where not every second fits, the first and the last
    second of the video are left out, which are often titles.
    Raises: ValueError if fps or max_frames is not positive.
    Source: the video sampling of SmolVLM's processor in transformers.
    Example: sample_indices(32, 10.0, 3.2) -> [0, 15, 31]
    """
    if not 0 < fps < math.inf or max_frames < 1:
        raise ValueError(f"fps {fps} and max_frames {max_frames}: both must be positive numbers")
    wanted = max(1, round(min(fps * duration, max_frames)))
    first, last = 0, total_frames - 1
    if duration - 2 > max_frames * fps:
        first, last = int(native_fps), min(int(total_frames - native_fps), last)
        if first >= last:
            first, last = 0, total_frames - 1
    if wanted == 1:
        return [first]
    step = (last - first) / (wanted - 1)            # in this order, rounding is that of np.linspace
    return sorted({int(i * step + first) for i in range(wanted - 1)} | {last})


def resize_longest_edge(image: Image.Image, longest_edge: int) -> Image.Image:
    """Scale to this longest edge, in pixels; the other follows and is made even.

    Source: the resize of SmolVLM's processor at the models' release. A second call changes nothing.
    """
    w, h = image.size
    scale = longest_edge / (w / h) if w >= h else longest_edge * (w / h)
    shorter = max(1, int(scale) + int(scale) % 2)
    size = (longest_edge, shorter) if w >= h else (shorter, longest_edge)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def read_video(path, fps: float = 1.0, max_frames: int = 64,
               longest_edge: int | None = None) -> Video:
    """Sample a video, an animation or a picture.

    With longest_edge each frame is scaled as soon as it is decoded, so that a long video never lies
    in memory whole. Which frames there are is first read from the packets, without decoding; most
    of a long video is then passed over. If a frame appears that was not expected (a broken packet,
    a wrong time), nothing is passed over, or all are decoded to see.
    Raises: OSError if there is no such file; ValueError that says why it gives no frames.
    """
    path = Path(os.path.expanduser(path))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give one video or picture")
    if not path.is_file():
        raise ValueError(f"{path} is a pipe or a device; save it as a file first")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; copy or download it again")
    for read_timeline in (packet_timeline, frame_timeline):
        pts, seconds, duration, keys = read_timeline(path)
        if pts:
            indices = sample_indices(len(pts), len(pts) / duration, duration, fps, max_frames)
            frames = take(path, indices, pts, keys, longest_edge)
            if len(frames) == len(indices):
                return Video(frames, [seconds[i] for i in indices], duration, len(pts))
    raise ValueError(f"{path}: no frame of it can be decoded; try to play it, or convert it to mp4")


@contextmanager
def open_video(path: Path) -> Iterator[av.VideoStream]:
    """The first stream of video that is not the cover of an album."""
    try:
        # as an open file: FFmpeg reads some names as patterns or addresses
        with path.open("rb") as file, av.open(file, metadata_errors="replace") as container:
            streams = [s for s in container.streams.video
                       if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                kinds = ", ".join(sorted({s.type for s in container.streams} - {"video"}))
                raise ValueError(f"{path} has no video stream, only {kinds or 'a header'}; "
                                 f"give a video")
            yield streams[0]
    except av.FFmpegError as error:
        raise ValueError(f"{path} is not a video that can be read ({error.strerror}); try to play "
                         f"it, or convert it to mp4") from None


def demux(stream: av.VideoStream) -> Iterator[av.Packet]:
    """The packets of a stream; a file that is cut off ends where it is cut."""
    try:
        yield from stream.container.demux(stream)
    except av.FFmpegError:
        return


def decode(stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """The frames of a stream in the order in which they are shown, without broken ones."""
    for packet in demux(stream):
        try:
            yield from packet.decode()
        except av.FFmpegError:
            continue


def packet_timeline(path: Path) -> tuple[list[int], list[float], float, list[int]]:
    """Of all frames that should be shown: pts and seconds, both sorted; the duration; keyframes."""
    with open_video(path) as stream:
        packets = sorted((p.pts, p.duration, p.is_keyframe) for p in demux(stream)
                         if p.size and not p.is_discard and p.pts is not None)
        keys = [i for i, (_, _, is_key) in enumerate(packets) if is_key]
        return *timeline([p[0] for p in packets], packets[-1][1] if packets else 0, stream), keys


def frame_timeline(path: Path) -> tuple[list[int | None], list[float], float, list[int]]:
    """The same for every frame that can be decoded; pts in the order in which they are shown."""
    with open_video(path) as stream:
        stream.thread_type = "AUTO"
        frames = [(frame.pts, frame.duration) for frame in decode(stream)]
        return *timeline([pts for pts, _ in frames], frames[-1][1] if frames else 0, stream), []


def timeline(pts: list, last: int | None, stream: av.VideoStream):
    """Add seconds and duration to the pts of frames; last is how long the last one is shown."""
    unit = stream.time_base
    times = sorted(p for p in pts if p is not None)
    if len(times) < len(pts):                   # without clock: count frames at the stated rate
        times, unit, last = list(range(len(pts))), 1 / Fraction(stream.average_rate or 25), 1
    steps = sorted(b - a for a, b in zip(times, times[1:]))
    last = last or (steps[len(steps) // 2] if steps else 0) or 1
    seconds = [float((t - times[0]) * unit) for t in times]
    return pts, seconds, float((times[-1] - times[0] + last) * unit) if times else 0.0


def take(path: Path, indices: list[int], pts: list[int | None], keys: list[int],
         longest_edge: int | None) -> list[Image.Image]:
    """Decode the frames with these indices, upright, until one has not the pts that is stated."""
    starts = [[0, *keys][bisect(keys, wanted)] for wanted in indices]   # the last keyframe up to it
    needed = sum(wanted - start + 1 for wanted, start in zip(indices, starts))
    # Between seeks, threads that take a frame each only fill and empty, and broken packets stay
    # unseen: worth it only where most of a long video is passed over (4 and 1000 are ours).
    seeks = 4 * needed + 1000 < indices[-1]
    images = []
    with open_video(path) as stream, ThreadPoolExecutor(1) as worker:
        stream.thread_type = "SLICE" if seeks else "AUTO"
        frames, index = decode(stream), -1                              # index of the last frame
        for wanted, start in zip(indices, starts):
            if seeks and start > index + 1:
                try:
                    stream.container.seek(pts[start], stream=stream)
                except av.FFmpegError:
                    break
                frames, index = decode(stream), start - 1
            for index, frame in enumerate(frames, start=index + 1):
                wrong_key = seeks and index == start and not frame.key_frame
                if index == wanted or wrong_key:
                    break
            if index != wanted or wrong_key or frame.pts != pts[index]:
                break
            wait(images[:-3])                                           # three at most are left
            images.append(worker.submit(upright, frame, longest_edge))  # while decoding goes on
        images = [image.result() for image in images]
    if seeks and len(images) < len(indices):
        return take(path, indices, pts, [], longest_edge)
    return images


def upright(frame: av.VideoFrame, longest_edge: int | None) -> Image.Image:
    image = frame.to_image()
    if frame.rotation % 90 == 0:                # degrees; a damaged header may hold any number
        image = image.rotate(frame.rotation, expand=True)
    return resize_longest_edge(image, longest_edge) if longest_edge else image
