"""A video file -> a few frames, evenly spread, and the time at which each is shown."""

import logging
import math
import os
import warnings
from bisect import bisect, bisect_left
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.sidedata.sidedata import SideDataContainer
from av.stream import Disposition
from PIL import Image, ImageOps, UnidentifiedImageError

# What is opened, by the libraries' names. Without such a list FFmpeg draws text files as pictures,
# and follows playlists to the files and networks that they name.
PICTURES = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "PNG", "TIFF", "WEBP")     # by Pillow
ANIMATIONS = ("AVIF", "GIF", "PNG", "WEBP")     # further frames of the others: pages, previews
STILLS = "ppm pgm pbm pam pfm dds dpx exr hdr j2k jpegls jpegxl pcx psd qoi sgi sunrast tiff"
CONTAINERS = ("mov matroska avi mpegts mpeg flv asf ogg mxf nut av1 avs2 avs3 cavsvideo dirac "
              "dnxhd dv flic gxf h261 h263 h264 hevc ivf jpegxl_anim m4v mjpeg mpegvideo nsv obu "
              "rm roq swf vc1 vvc wtv yuv4mpegpipe wav aac flac mp3")       # sound: to say so
FFMPEG_FORMATS = CONTAINERS.split() + [f"{name}_pipe" for name in STILLS.split()]
OPTIONS = {"format_whitelist": ",".join(FFMPEG_FORMATS), "protocol_whitelist": "file"}
logging.getLogger("PIL").addHandler(logging.NullHandler())      # else its errors are printed
MAX_PIXELS = 2 ** 26                            # of a video's frame, twice 8K; Pillow's is its own
MAX_SECONDS = 10 ** 8                           # three years; a clock that says more is broken


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
    Raises: ValueError if fps or max_frames is not positive, or is absurd.
    Source: the video sampling of SmolVLM's processor in transformers.
    Example: sample_indices(32, 10.0, 3.2) -> [0, 15, 31]
    """
    if not (0 < fps <= 10 ** 9 and 1 <= max_frames <= 10 ** 9):
        raise ValueError(f"fps {fps}, max_frames {max_frames}: both must be positive, at most 1e9")
    wanted = max(1, round(min(fps * duration, max_frames)))
    first, last = 0, total_frames - 1
    if duration - 2 > max_frames * fps:
        first, last = int(native_fps), min(int(total_frames - native_fps), last)
        if first >= last:
            first, last = 0, total_frames - 1
    wanted = min(wanted, last - first + 1)
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
               longest_edge: int | None = None, start: float | None = None,
               end: float | None = None) -> Video:
    """Sample a video, an animation or a picture; or its part from start up to end, in seconds.

    A part is sampled as if it were a file: its seconds, duration and total_frames are its own.
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
    for read_timeline, take in ((picture_timeline, take_pictures),
                                (packet_timeline, take_frames), (frame_timeline, take_frames)):
        pts, seconds, duration, keys = read_timeline(path)
        if duration > MAX_SECONDS:
            raise ValueError(f"{path} lasts {duration:.0f} s by its clock; convert it to mp4")
        if pts:
            first = bisect_left(seconds, start or 0.0)
            n = (len(pts) if end is None else bisect_left(seconds, end)) - first
            if n <= 0:
                raise ValueError(f"{path} lasts {duration:.1f} s and has no frame from start {start} "
                                 f"to end {end}; give others")
            duration = [*seconds, duration][first + n] - seconds[first]
            indices = sample_indices(n, n / duration, duration, fps, max_frames)
            indices = [first + i for i in indices]
            frames = take(path, indices, pts, keys, longest_edge)
            if len(frames) == len(indices):
                return Video(frames, [seconds[i] - seconds[first] for i in indices], duration, n)
    raise ValueError(f"{path}: no frame of it can be decoded; try to play it, or convert it to mp4")


# ---- pictures and animations ----


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Raises: UnidentifiedImageError if Pillow does not know it; ValueError if it is broken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")             # such as damaged metadata
        try:
            with Image.open(path, formats=PICTURES) as image:
                yield image
        except UnidentifiedImageError:
            raise
        except Exception as error:                  # its readers raise whatever they stumble over
            raise ValueError(f"{path} is a picture that cannot be read ({error}); save it again as "
                             f"png or jpg, or give another") from None


def picture_timeline(path: Path) -> tuple[list[int], list[float], float, list[int]]:
    """As packet_timeline, with the frames' numbers as pts; empty if the file is no picture."""
    starts = [0]                                    # in milliseconds
    try:
        with open_picture(path) as image:
            total = image.n_frames if image.format in ANIMATIONS else 1
            for index in range(total):
                image.seek(index)
                if total > 1:
                    image.load()                    # in some formats the duration is known then
                shown = image.info.get("duration") or 0
                # up to 10 ms stand for "not stated": 0.1 s, as in browsers and FFmpeg
                starts.append(starts[-1] + (shown if shown > 10 else 100))
    except UnidentifiedImageError:
        pass
    seconds = [start / 1000 for start in starts]
    return list(range(len(seconds) - 1)), seconds[:-1], seconds[-1], []


def take_pictures(path: Path, indices: list[int], pts: list[int], keys: list[int],
                  longest_edge: int | None) -> list[Image.Image]:
    """The frames with these indices, upright."""
    images = []
    with open_picture(path) as image:
        for index in indices:
            image.seek(index)
            frame = to_rgb(ImageOps.exif_transpose(image))
            images.append(resize_longest_edge(frame, longest_edge) if longest_edge else frame)
    return images


def to_rgb(image: Image.Image) -> Image.Image:
    """What is transparent is shown on white, as by SmolVLM's processor in transformers."""
    if image.mode.startswith("I;16"):               # grey up to 65535, which Pillow would clip
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel, and no word on which number is white")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image, white = image.convert("RGBA"), Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


# ---- videos ----


@contextmanager
def open_video(path: Path) -> Iterator[av.VideoStream]:
    """The default stream of video; the cover of an album is none."""
    try:
        # "file:", since FFmpeg reads some names as patterns or addresses
        with av.open(f"file:{path}", options=OPTIONS, metadata_errors="replace") as container:
            streams = [s for s in container.streams.video
                       if s.codec_context and not s.disposition & Disposition.attached_pic]
            if not streams:
                kinds = ", ".join(sorted({s.type for s in container.streams} - {"video"}))
                raise ValueError(f"{path} has no video stream that can be decoded, only "
                                 f"{kinds or 'a header'}; give a video")
            if any(s.disposition & Disposition.dependent for s in streams):
                raise ValueError(f"{path} is a picture in tiles (HEIC); save it as jpg or png")
            best = container.streams.best("video")
            stream = best if best in streams else streams[0]
            if stream.width * stream.height > MAX_PIXELS:
                size = f"{stream.width} x {stream.height}"
                raise ValueError(f"{path} has {size} pixels, too many for a video; scale it down")
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # headers may be wrong
            yield stream
    except av.FFmpegError as error:
        raise ValueError(f"{path} is not a video or picture that can be read ({error.strerror}); "
                         f"try to play it, or convert it to mp4") from None


def packets_of(stream: av.VideoStream) -> Iterator[av.Packet]:
    while True:
        try:
            return (yield from stream.container.demux(stream))
        except IndexError:          # PyAV 18.1: a packet of another stream, which begins only here
            pass


def demux(stream: av.VideoStream) -> Iterator[av.Packet]:
    """The packets of a stream, on one clock; a file that is cut off ends where it is cut.

    Where the clock steps back, another recording begins: it goes on from the last frame.
    """
    times, latest, decoded, shift = [], -math.inf, -math.inf, 0
    try:
        for packet in packets_of(stream):
            if packet.pts is not None:
                pts, dts = packet.pts, packet.pts if packet.dts is None else packet.dts
                # B-frames step back too, but are no keyframes. A file may call all its frames that:
                # then the decoding time still grows, up to the time at which the frame is shown.
                if packet.is_keyframe and pts < latest and not decoded < dts <= pts:
                    shift += latest - pts + median_step(times)
                    times, latest, decoded = [], -math.inf, -math.inf
                times.append(pts)
                latest, decoded = max(latest, pts), max(decoded, dts)
                if shift:
                    packet.pts += shift
                    packet.dts = None               # of the file's own clock, by which FFmpeg seeks
            yield packet
    except (av.FFmpegError, OverflowError):         # the latter: a time beyond 64 bits
        pass


def decode(stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """The frames of a stream in the order in which they are shown, without broken ones."""
    for packet in demux(stream):
        try:
            yield from packet.decode()
        except av.FFmpegError:
            continue


def packet_timeline(path: Path) -> tuple[list[int], list[float], float, list[int]]:
    """Of all frames that should be shown: pts and seconds, sorted; duration; keyframes to seek."""
    with open_video(path) as stream:
        packets = sorted((p.pts, p.duration, p.is_keyframe and p.dts is not None)
                         for p in demux(stream)
                         if p.size and not p.is_discard and p.pts is not None)
        keys = [i for i, (_, _, is_key) in enumerate(packets) if is_key]
        return *timeline([p[0] for p in packets], [p[1] for p in packets], stream), keys


def frame_timeline(path: Path) -> tuple[list[int | None], list[float], float, list[int]]:
    """The same for every frame that can be decoded; pts in the order in which they are shown."""
    with open_video(path) as stream:
        stream.thread_type = "AUTO"
        frames = [(frame.pts, frame.duration) for frame in decode(stream)]
        return *timeline([frame[0] for frame in frames], [frame[1] for frame in frames], stream), []


def timeline(pts: list, shown: list[int | None], stream: av.VideoStream):
    """Add seconds and duration to the pts of frames; shown: how long each is, by what it says."""
    unit, times = stream.time_base, sorted(p for p in pts if p is not None)
    if not times or len(times) < len(pts):      # without clock: count frames at the stated rate
        times, unit, shown = list(range(len(pts))), 1 / Fraction(stream.average_rate or 25), [1]
    seconds = [float((t - times[0]) * unit) for t in times]
    step, last = median_step(times), shown[-1] or 0
    if last < 1 or 2 * sorted(d or 0 for d in shown)[len(shown) // 2] < step:       # a wrong guess
        last = step
    return pts, seconds, float((times[-1] - times[0] + last) * unit) if times else 0.0


def median_step(times: list[int]) -> int:
    """From one time to the next; at least 1."""
    times = sorted(times)
    steps = sorted(later - earlier for earlier, later in zip(times, times[1:])) or [1]
    return max(1, steps[len(steps) // 2])


def take_frames(path: Path, indices: list[int], pts: list[int | None], keys: list[int],
                longest_edge: int | None) -> list[Image.Image]:
    """Decode the frames with these indices, upright, until one has not the pts that is stated."""
    keys = [0, *keys]
    starts = [keys[bisect(keys, wanted) - 1] for wanted in indices]     # the last keyframe up to it
    seeks = is_worth_seeking(indices, starts)
    images = []
    with open_video(path) as stream, ThreadPoolExecutor(1) as worker:
        stream.thread_type = "SLICE" if seeks else "AUTO"
        for frame in find_frames(stream, indices, starts if seeks else [0] * len(indices), pts):
            wait(images[:-3])                       # three at most are left to be scaled
            images.append(worker.submit(upright, frame, longest_edge))  # while decoding goes on
        images = [image.result() for image in images]
    if seeks and len(images) < len(indices):
        return take_frames(path, indices, pts, [], longest_edge)
    return images


def is_worth_seeking(indices: list[int], starts: list[int]) -> bool:
    """Whether most of a long video is passed over (4 and 1000 are ours): between seeks, threads
    that take a frame each fill and empty, and broken packets stay unseen."""
    needed = sum(wanted - start + 1 for wanted, start in zip(indices, starts))
    return 4 * needed + 1000 < indices[-1]


def find_frames(stream: av.VideoStream, indices: list[int], starts: list[int],
                pts: list[int | None]) -> Iterator[av.VideoFrame]:
    """The frames with these indices; passes over what lies before each one's start, a keyframe.

    Ends early where a frame has not its pts, or what should be a keyframe is none.
    """
    frames, index = decode(stream), -1              # index: of the last frame that was decoded
    for wanted, start in zip(indices, starts):
        if start > index + 1:
            try:
                stream.container.seek(pts[start], stream=stream)
            except av.FFmpegError:
                return
            frames, index = decode(stream), start - 1
        for frame in frames:
            index += 1
            if index == start > 0 and not frame.key_frame:
                return
            if index == wanted:
                break
        if index < wanted or frame.pts != pts[wanted]:
            return
        yield frame


def upright(frame: av.VideoFrame, longest_edge: int | None) -> Image.Image:
    """Mirrored and turned, by quarters, as the display matrix says: x' = ax + cy, y' = bx + dy."""
    image = frame.to_image()
    try:                # not frame.side_data, which keeps the frame until garbage is collected
        a, b, _, c, d = memoryview(SideDataContainer(frame)["DISPLAYMATRIX"]).cast("i")[:5]
    except (KeyError, ValueError):      # there is none; or EXIF beside it, at which PyAV 18.1 fails
        angle = math.radians(frame.rotation)        # counter-clockwise
        a, b, c, d = math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if abs(b) + abs(c) > abs(a) + abs(d):           # x and y change places
        image, a, d = image.transpose(Image.Transpose.TRANSPOSE), c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return resize_longest_edge(image, longest_edge) if longest_edge else image
