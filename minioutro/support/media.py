"""What lies in real video files: containers, clocks, seeking, rotation, animations, still pictures.

Begin at `readings(path)`. A reading says when each frame of the file appears and how long the file
lasts, and it fetches frames by their indices, whole and upright:

    reading.seconds, reading.duration
    reading.frames([0, 13, 26]) -> an iterator of RGB images

There may be several readings of one file. The first takes the times of the frames from the file's
packets (a packet holds one compressed frame), without decoding any of them, which is fast. In a
damaged file, the frames may differ from what the packets announce. Then `frames` yields fewer
images than it was asked for, and the caller goes on to the next reading, which decodes the whole
file to see what is there.
"""

import logging
import math
import warnings
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import av
from av.sidedata.sidedata import SideDataContainer
from av.stream import Disposition
from PIL import Image, ImageOps, UnidentifiedImageError

# Only these formats are opened, by the names that the libraries give them. Without such a list
# FFmpeg draws text files as pictures, and it follows playlists to other files and to the network.
PICTURES = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "PNG", "TIFF", "WEBP")         # by Pillow
ANIMATIONS = ("AVIF", "GIF", "PNG", "WEBP")     # further frames of the others are pages
STILLS = "ppm pgm pbm pam pfm dds dpx exr hdr j2k jpegls jpegxl pcx psd qoi sgi sunrast tiff"
CONTAINERS = ("mov matroska avi mpegts mpeg flv asf ogg mxf nut av1 avs2 avs3 cavsvideo dirac "
              "dnxhd dv flic gxf h261 h263 h264 hevc ivf jpegxl_anim m4v mjpeg mpegvideo nsv obu "
              "rm roq swf vc1 vvc wtv yuv4mpegpipe")
SOUNDS = "wav aac flac mp3"                     # to say that there is only sound in the file
FFMPEG_FORMATS = (CONTAINERS.split() + SOUNDS.split()
                  + [f"{name}_pipe" for name in STILLS.split()])
FFMPEG_OPTIONS = {"format_whitelist": ",".join(FFMPEG_FORMATS), "protocol_whitelist": "file"}

MAX_PIXELS = 2 ** 26        # in a frame of a video: twice 8K. For pictures Pillow has its own limit
MAX_SECONDS = 10 ** 8       # three years. A clock that says more is broken
USUAL_FPS = 25              # assumed for a stream that states neither times nor a rate

# Pillow logs errors about damaged pictures. Python prints them unless there is a handler.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def readings(path: Path) -> Iterator["Pictures | Clip"]:
    """The ways to read a file, the fastest first. Take the first one whose frames all come.

    Raises: OSError if the file does not exist. ValueError that says why it cannot be read.
    """
    check_file(path)
    for read in (read_pictures, read_packets, read_decoded):
        reading = read(path)
        if reading.duration > MAX_SECONDS:
            raise ValueError(f"{path} claims to last {reading.duration:.0f} s, so its clock is "
                             f"broken; convert it to mp4")
        if reading.seconds:
            yield reading


def check_file(path: Path) -> None:
    """Raise OSError or ValueError unless this is a file with something in it."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give one video or picture")
    if not path.is_file():
        raise ValueError(f"{path} is a pipe or a device; save it as a file first")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; copy or download it again")


def in_background(function: Callable, items: Iterable) -> Iterator:
    """Apply a function to each item, in order, in a thread while the next item is fetched.

    At most one item waits, so that large items do not pile up in memory.
    """
    with ThreadPoolExecutor(1) as worker:
        running = None
        for item in items:
            if running is not None:
                yield running.result()
            running = worker.submit(function, item)
        if running is not None:
            yield running.result()


# ---- pictures and animations ----


@dataclass
class Pictures:
    """A reading of a still picture or an animation, with Pillow."""
    path: Path
    seconds: list[float]        # when each frame appears
    duration: float             # of the whole animation, in seconds

    def frames(self, indices: list[int]) -> Iterator[Image.Image]:
        """Whole upright images."""
        with open_picture(self.path) as image:
            hidden = hidden_frames(image)
            for index in indices:
                image.seek(hidden + index)
                yield to_rgb(ImageOps.exif_transpose(image))


def read_pictures(path: Path) -> Pictures:
    """The reading of a picture. It has no frames if Pillow does not know the file."""
    starts = [0]                                    # in milliseconds
    try:
        with open_picture(path) as image:
            total = image.n_frames if image.format in ANIMATIONS else 1
            for number in range(hidden_frames(image), total):
                image.seek(number)
                starts.append(starts[-1] + milliseconds_shown(image, total))
    except UnidentifiedImageError:
        pass
    seconds = [start / 1000 for start in starts]
    return Pictures(path, seconds[:-1], seconds[-1])


def milliseconds_shown(image: Image.Image, total: int) -> float:
    """How long the current frame of an animation is shown."""
    if total > 1:
        image.load()                                # some formats state the duration only then
    stated = image.info.get("duration")             # may be a string: a PNG can hold such a comment
    if not isinstance(stated, (int, float)) or stated <= 10:
        return 100      # browsers and FFmpeg read 10 ms or less as "not stated" and take 100 ms
    return stated


def hidden_frames(image: Image.Image) -> int:
    """How many of Pillow's frames come before the animation: 1 or 0.

    An animated PNG may begin with a picture that is not part of the animation, for programs that
    cannot show animations. Source: the PNG specification, section 4.9 (APNG).
    """
    # compared with True, because a comment in a PNG may have this name as well
    return 1 if image.info.get("default_image") is True else 0


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open a picture with Pillow.

    Raises: UnidentifiedImageError if Pillow does not know the format. ValueError if the file is
    broken.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")             # for example about damaged metadata
        try:
            with Image.open(path, formats=PICTURES) as image:
                if hidden_frames(image):
                    # Pillow draws the animation over this picture, so make it transparent.
                    image.paste(0, (0, 0, *image.size))
                yield image
        except UnidentifiedImageError:
            raise
        except Exception as error:                  # Pillow's readers raise errors of many kinds
            raise ValueError(f"{path} is a picture that cannot be read ({error}); save it again as "
                             f"png or jpg, or give another") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Draw what is transparent on white, as SmolVLM's processor in transformers does."""
    if image.mode.startswith("I;16"):               # 16-bit grey, which Pillow would clip at 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits per pixel and does not say which number is white")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    on_white = Image.new("RGB", image.size, "white")
    on_white.paste(image, mask=image)
    return on_white


# ---- videos ----


@dataclass
class Clip:
    """A reading of a video, with FFmpeg."""
    path: Path
    seconds: list[float]        # when each frame appears, counted from the first one
    duration: float             # of the whole video, in seconds
    pts: list[int | None]       # presentation time of each frame; None without a clock
    keyframes: list[int]        # indices of the frames at which decoding can begin, increasing

    def frames(self, indices: list[int]) -> Iterator[Image.Image]:
        """Whole upright images. Fewer than asked for, if the file differs from this reading."""
        found = 0
        if self.is_worth_seeking(indices):
            with open_video(self.path) as stream:
                stream.thread_type = "SLICE"    # threads per frame would restart at each seek
                for frame in self.seek(stream, indices):
                    found += 1
                    yield upright(frame)
        if found < len(indices):
            with open_video(self.path) as stream:
                stream.thread_type = "AUTO"
                for frame in self.pick(decode(stream), 0, indices[found:]):
                    yield upright(frame)

    def keyframe_before(self, index: int) -> int:
        """The index of the last keyframe at or before a frame. 0 if there is none."""
        earlier = bisect(self.keyframes, index)
        return self.keyframes[earlier - 1] if earlier else 0

    def is_worth_seeking(self, indices: list[int]) -> bool:
        """Whether seeking would skip most of a long video.

        Seeking has a price: frames are no longer decoded in parallel, and broken packets between
        the wanted frames go unnoticed. Source: the numbers 4 and 1000 are *ours*.
        """
        decoded = sum(index - self.keyframe_before(index) + 1 for index in indices)
        return 4 * decoded + 1000 < indices[-1]

    def seek(self, stream: av.VideoStream, indices: list[int]) -> Iterator[av.VideoFrame]:
        """The frames with these indices, each decoded from the last keyframe before it.

        Ends early if one of them is not found.
        """
        for keyframe, group in groupby(indices, self.keyframe_before):
            wanted = list(group)
            if keyframe > 0:
                try:
                    stream.container.seek(self.pts[keyframe], stream=stream)
                except av.FFmpegError:
                    return
            found = 0
            for frame in self.pick(decode(stream), keyframe, wanted):
                found += 1
                yield frame
            if found < len(wanted):
                return

    def pick(self, frames: Iterable[av.VideoFrame], first: int,
             indices: list[int]) -> Iterator[av.VideoFrame]:
        """Choose the frames with these indices. frames: consecutive ones, from index `first` on.

        Ends early if a frame does not have the expected pts, or if seeking did not end at a
        keyframe.
        """
        wanted = set(indices)
        for index, frame in enumerate(frames, start=first):
            if index == first > 0 and not frame.key_frame:
                return
            if index in wanted:
                if frame.pts != self.pts[index]:
                    return
                yield frame
            if index == indices[-1]:
                return


def read_packets(path: Path) -> Clip:
    """The reading of a video from what its packets say about the frames. Nothing is decoded."""
    with open_video(path) as stream:
        packets = [packet_facts(packet) for packet in demux(stream) if is_shown(packet)]
        packets.sort()
        pts = [packet_pts for packet_pts, _, _ in packets]
        durations = [duration for _, duration, _ in packets]
        keyframes = [i for i, (_, _, can_seek) in enumerate(packets) if can_seek]
        seconds, duration = timeline(pts, durations, stream)
    return Clip(path, seconds, duration, pts, keyframes)


def is_shown(packet: av.Packet) -> bool:
    """Whether a packet holds a frame that is shown at a known time."""
    return packet.size > 0 and not packet.is_discard and packet.pts is not None


def packet_facts(packet: av.Packet) -> tuple[int, int, bool]:
    """pts, duration (0 if the file does not state it), and whether one can seek to this packet."""
    duration = 0 if packet.duration is None else packet.duration
    return packet.pts, duration, packet.is_keyframe and packet.dts is not None


def read_decoded(path: Path) -> Clip:
    """The reading of a video by decoding all of its frames, in the order in which they come."""
    pts, durations = [], []
    with open_video(path) as stream:
        stream.thread_type = "AUTO"
        for frame in decode(stream):
            pts.append(frame.pts)
            durations.append(0 if frame.duration is None else frame.duration)
        seconds, duration = timeline(pts, durations, stream)
    return Clip(path, seconds, duration, pts, keyframes=[])


# ---- opening a video ----


@contextmanager
def open_video(path: Path) -> Iterator[av.VideoStream]:
    """The video stream that a player would show."""
    try:
        # "file:", because FFmpeg reads some names as patterns or addresses
        with av.open(f"file:{path}", options=FFMPEG_OPTIONS,
                     metadata_errors="replace") as container:
            stream = choose_stream(path, container)
            check_size(path, stream)
            # the decoder gets the same limit, because the size in the header may be wrong
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            yield stream
    except av.FFmpegError as error:
        raise ValueError(f"{path} is not a video or picture that can be read ({error.strerror}); "
                         f"try to play it, or convert it to mp4") from None


def choose_stream(path: Path, container) -> av.VideoStream:
    """The default video stream. The cover picture of an album does not count as a video."""
    streams = [stream for stream in container.streams.video
               if stream.codec_context and not stream.disposition & Disposition.attached_pic]
    if not streams:
        others = {stream.type for stream in container.streams} - {"video"}
        found = ", ".join(sorted(others)) if others else "a header"
        raise ValueError(f"{path} has no video stream that can be decoded, only {found}; give a "
                         f"video")
    if any(stream.disposition & Disposition.dependent for stream in streams):
        raise ValueError(f"{path} is a picture in tiles (HEIC); save it as jpg or png")
    best = container.streams.best("video")
    return best if best in streams else streams[0]


def check_size(path: Path, stream: av.VideoStream) -> None:
    if stream.width * stream.height > MAX_PIXELS:
        raise ValueError(f"{path} has {stream.width} x {stream.height} pixels, too many for a "
                         f"video; scale it down")


# ---- the clock ----


class Clock:
    """Joins the clocks of recordings that follow each other in one file.

    Where the presentation times (pts) step back, another recording begins. Its times are shifted,
    so that it begins after the last frame of the recording before it. dts are decoding times.
    """

    def __init__(self):
        self.shift = 0                  # is added to the pts of the current recording
        self.start_recording()

    def start_recording(self):
        self.times = []                 # all pts of this recording, as the file states them
        self.latest_pts = -math.inf
        self.latest_dts = -math.inf

    def steps_back(self, pts: int, dts: int, is_keyframe: bool) -> bool:
        """Whether a packet is the first of another recording.

        pts also decreases at B-frames, which are not keyframes. Some files mark every frame as a
        keyframe. In those files, dts still increases at a B-frame and is not above pts.
        """
        if not is_keyframe or pts >= self.latest_pts:
            return False
        in_order = self.latest_dts < dts <= pts
        return not in_order

    def correct(self, packet: av.Packet) -> None:
        """Move a packet to the common clock. Call it for every packet in the file's order."""
        pts = packet.pts
        dts = pts if packet.dts is None else packet.dts
        if self.steps_back(pts, dts, packet.is_keyframe):
            self.shift += self.latest_pts + median_step(self.times) - pts
            self.start_recording()
        self.times.append(pts)
        self.latest_pts = max(self.latest_pts, pts)
        self.latest_dts = max(self.latest_dts, dts)
        if self.shift:
            packet.pts += self.shift
            packet.dts = None           # FFmpeg seeks by dts, and on the file's own clock


def timeline(pts: list[int | None], durations: list[int],
             stream: av.VideoStream) -> tuple[list[float], float]:
    """When each frame of a stream appears, and how long the stream lasts, both in seconds.

    durations: how long each frame is shown, as the file states it. 0 if the file does not.
    """
    if not pts:
        return [], 0.0
    if None in pts:                     # there is no clock, so count the frames
        rate = stream.average_rate if stream.average_rate else USUAL_FPS
        unit = 1 / Fraction(rate)
        times = list(range(len(pts)))
        last_duration = 1
    else:
        unit = stream.time_base
        times = sorted(pts)
        last_duration = duration_of_last(times, durations)
    seconds = [float((time - times[0]) * unit) for time in times]
    return seconds, float((times[-1] - times[0] + last_duration) * unit)


def duration_of_last(times: list[int], durations: list[int]) -> int:
    """How long the last frame is shown: its own duration, or else the median step between frames.

    If the median duration is less than half of the median step, no duration is believed: they come
    from a guessed frame rate.
    """
    step = median_step(times)
    typical = sorted(durations)[len(durations) // 2]
    if durations[-1] < 1 or 2 * typical < step:
        return step
    return durations[-1]


def median_step(times: list[int]) -> int:
    """The median distance from one time to the next, at least 1."""
    times = sorted(times)
    steps = sorted(later - earlier for earlier, later in zip(times, times[1:]))
    if not steps:
        return 1
    return max(1, steps[len(steps) // 2])


# ---- packets and frames ----


def demux(stream: av.VideoStream) -> Iterator[av.Packet]:
    """The packets of a stream, on one clock. A damaged file ends where reading fails."""
    clock = Clock()
    try:
        for packet in packets_of(stream):
            if packet.pts is not None:
                clock.correct(packet)
            yield packet
    except (av.FFmpegError, OverflowError):         # OverflowError: a time does not fit in 64 bits
        pass


def packets_of(stream: av.VideoStream) -> Iterator[av.Packet]:
    """The packets of a stream as they lie in the file."""
    while True:
        try:
            yield from stream.container.demux(stream)
            return
        except IndexError:
            pass        # PyAV 18.1 raises it at a packet of a stream that begins late, so read on


def decode(stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """The frames of a stream, in the order in which they are shown. Broken frames are skipped."""
    for packet in demux(stream):
        try:
            yield from packet.decode()
        except av.FFmpegError:
            continue


# ---- rotation ----


def upright(frame: av.VideoFrame) -> Image.Image:
    """The image of a frame, turned by quarters and mirrored as its display matrix says."""
    image = frame.to_image()
    a, b, c, d = display_matrix(frame)
    if abs(b) + abs(c) > abs(a) + abs(d):           # x and y change places: x' = cy, y' = bx
        image = image.transpose(Image.Transpose.TRANSPOSE)
        mirrors_x, mirrors_y = c < 0, b < 0
    else:                                           # x' = ax, y' = dy
        mirrors_x, mirrors_y = a < 0, d < 0
    if mirrors_x:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if mirrors_y:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image


def display_matrix(frame: av.VideoFrame) -> tuple[float, float, float, float]:
    """a, b, c, d: a pixel at (x, y) is shown at x' = ax + cy, y' = bx + dy."""
    try:
        # not frame.side_data, which keeps the frame in memory until garbage is collected
        data = SideDataContainer(frame)["DISPLAYMATRIX"]
        a, b, _, c, d = memoryview(data).cast("i")[:5]
    except (KeyError, ValueError):
        # There is no matrix, or PyAV 18.1 fails because the frame has EXIF data as well.
        angle = math.radians(frame.rotation)        # counter-clockwise
        a, b, c, d = math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    return a, b, c, d
