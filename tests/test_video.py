"""Which frames of a video are shown, and when. The tests make all videos and pictures, also the broken ones."""

import io
import os
import wave
from fractions import Fraction
from types import SimpleNamespace

import av
import pytest
from av.stream import Disposition
from PIL import Image, PngImagePlugin

from minioutro import read_video
from minioutro.support import media
from minioutro.video import resize_longest_edge, sample_indices


def picture(n, size=(48, 32)):
    """Frame n: its brightness is its number, and its left edge is red."""
    image = Image.new("RGB", size, (n, n, n))
    image.paste((255, 0, 0), (0, 0, 8, size[1]))
    return image


def number(image):
    """The number of a frame, read from its middle."""
    return image.getpixel((image.width // 2, image.height // 2))[1]


def write(path, n=40, fps=10, pts=None, codec="libx264", muxer=None, brightness=lambda k: 6 * k,
          all_keys=False, matrix=None, draw=picture, title="", **options):
    """Write a video of n frames, the k-th with brightness 6 k.

    pts: in hundredths of a second. all_keys: mark every frame as a keyframe. matrix: the display matrix.
    """
    with av.open(str(path), "w", options=muxer) as file:
        file.metadata["title"] = title
        stream = file.add_stream(codec, rate=fps, options={"crf": "5", **options})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 100)
        stream.set_display_matrix(matrix)
        for k in range(n):
            frame = av.VideoFrame.from_image(draw(brightness(k)))
            frame.pts, frame.time_base = pts[k] if pts else 100 * k // fps, Fraction(1, 100)
            for packet in stream.encode(frame):
                packet.is_keyframe |= all_keys
                file.mux(packet)
        file.mux(stream.encode())
    return path


def animate(path, images, **options):
    """Write an animated picture."""
    images[0].save(path, save_all=True, append_images=images[1:], **options)
    return path


def encode(image, kind, **options):
    """The bytes of a picture file."""
    image.save(data := io.BytesIO(), kind, **options)
    return data.getvalue()


def mux(path, *streams, width=48, height=32):
    """Write packets without an encoder. streams: a codec, a disposition and packets for each."""
    with av.open(str(path), "w") as file:
        opened = [file.add_mux_stream(codec, rate=10, width=width, height=height) for codec, _, _ in streams]
        for stream, (_, disposition, _) in zip(opened, streams):
            stream.disposition = disposition
        for stream, (_, _, packets) in zip(opened, streams):
            for k, data in enumerate(packets):
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 10), k, k
                packet.is_keyframe = True
                file.mux(packet)
    return path


def assert_shows(video, indices, seconds):
    assert [round(number(frame) / 6) for frame in video.frames] == indices
    assert video.seconds == pytest.approx(seconds, abs=1e-3)


def refused(path) -> str:
    """The error message of a file, which is one line and names the file."""
    with pytest.raises((ValueError, OSError)) as error:
        read_video(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


# ---- which frames ----


def test_sampling_by_hand():
    """4 s at 10 fps: 4 frames, the first and the last among them: 0, 13, 26, 39.

    120 s at 25 fps are longer than 64 frames at 1 fps, so the first and the last second are left out. Where nothing
    would remain, none is left out: of 3 frames in 2.5 s, frame 1 is both the first and the last that would remain.
    122 / 14 * 7 is 61, but in floating point and in this order it is 60.999...
    """
    assert sample_indices(40, 10.0, 4.0) == [0, 13, 26, 39]
    assert sample_indices(1, 25.0, 0.04) == [0]
    long = sample_indices(3000, 25.0, 120.0)
    assert (len(long), long[0], long[-1]) == (64, 25, 2975)
    assert sample_indices(5, 10.0, 0.5, fps=10 ** 9, max_frames=10 ** 9) == [0, 1, 2, 3, 4]
    assert sample_indices(100, 10.0, 10.0, max_frames=1) == [10]
    assert sample_indices(100, 10.0, 10.0, max_frames=2, fps=4.0) == [0, 99]        # 8 s are not more than 8
    assert sample_indices(101, 10.0, 10.1, max_frames=2, fps=4.0) == [10, 91]
    assert sample_indices(3, 1.2, 2.5, fps=0.1, max_frames=1) == [0]
    assert sample_indices(10, 25.0, 100.0, max_frames=4) == [0, 3, 6, 9]            # the header is wrong
    assert sample_indices(123, 123 / 15, 15.0)[7] == 60                             # NumPy also cuts 60.999... to 60


@pytest.mark.parametrize("wrong", [dict(fps=0), dict(fps=float("inf")), dict(fps=float("nan")), dict(fps=10 ** 400),
                                   dict(max_frames=0), dict(max_frames=10 ** 9 + 1)])
def test_sampling_refuses_nonsense(wrong):
    with pytest.raises(ValueError, match="positive"):
        sample_indices(10, 10.0, 1.0, **wrong)


def test_plain_video(tmp_path):
    video = read_video(write(tmp_path / "a.mp4"))
    assert_shows(video, [0, 13, 26, 39], [0.0, 1.3, 2.6, 3.9])
    assert (video.duration, video.total_frames) == (pytest.approx(4.0), 40)
    assert video.frames[0].size == (48, 32) and video.frames[0].mode == "RGB"
    assert_shows(read_video(tmp_path / "a.mp4", fps=0.5), [0, 39], [0.0, 3.9])
    assert_shows(read_video(tmp_path / "a.mp4", max_frames=3), [0, 19, 39], [0.0, 1.9, 3.9])


def test_variable_rate_is_sampled_by_number(tmp_path):
    """20 frames every 0.1 s, then 20 every 0.3 s: 8 s, of which 8 frames are shown. They are spread evenly by number.

    Times count from the first frame, which is at 3 s of the file's clock.
    """
    pts = [300 + 10 * k if k < 20 else 500 + 30 * (k - 20) for k in range(40)]
    video = read_video(write(tmp_path / "a.mkv", pts=pts))
    indices = [0, 5, 11, 16, 22, 27, 33, 39]
    assert_shows(video, indices, [pts[i] / 100 - 3 for i in indices])
    assert video.duration == pytest.approx(8.0, abs=0.31)           # the last step is not in the file


# ---- parts ----


@pytest.mark.parametrize("name", ["a.mkv", "a.gif"])
def test_part_is_sampled_as_a_file(tmp_path, name):
    """From 1.3 s up to 3.3 s of 4 s: 20 frames, 13 to 32. Two of them are shown, with the part's own times."""
    if name == "a.gif":
        animate(tmp_path / name, [picture(6 * k) for k in range(40)], duration=100)
    else:
        write(tmp_path / name)
    part = read_video(tmp_path / name, start=1.3, end=3.3)
    assert_shows(part, [13, 32], [0.0, 1.9])
    assert (part.duration, part.total_frames) == (pytest.approx(2.0), 20)
    assert_shows(read_video(tmp_path / name, end=2.0, max_frames=3), [0, 19], [0.0, 1.9])
    assert_shows(read_video(tmp_path / name, start=-1.0, end=99.0), [0, 13, 26, 39], [0.0, 1.3, 2.6, 3.9])
    for start, end in ((4.0, None), (3.0, 1.0), (-2.0, -1.0), (None, 0.0), (None, float("nan"))):
        with pytest.raises(ValueError, match=f"{name} lasts 4.0 s.* from start {start} to end {end}"):
            read_video(tmp_path / name, start=start, end=end)


def test_part_begins_on_the_screen(tmp_path):
    """There are 4 frames of 5 s each. A part begins with the frame that is on the screen then."""
    path = write(tmp_path / "a.mkv", n=4, pts=[0, 500, 1000, 1500])
    for start, end, index in ((2, 4, 0), (12, 14, 2), (5, 5.001, 1), (4.999, 5, 0), (19.99, 99, 3)):
        part = read_video(path, start=start, end=end)
        assert_shows(part, [index], [0.0])
        assert part.duration == pytest.approx(min(end, 20) - start) and part.total_frames == 1
    part = read_video(path, start=7, end=11, fps=9)                 # from the middle of frame 1 into frame 2
    assert_shows(part, [1, 2], [0.0, 3.0])
    assert (part.duration, part.total_frames) == (4.0, 2)


def test_edit_list_cuts_frames_away(tmp_path):
    """The first ten frames lie before time 0 and are in the file only to be decoded."""
    write(tmp_path / "a.mp4", pts=[10 * k - 100 for k in range(40)],
          muxer={"use_editlist": "1", "avoid_negative_ts": "disabled"})
    video = read_video(tmp_path / "a.mp4")
    assert video.total_frames == 30
    assert_shows(video, [10, 24, 39], [0.0, 1.4, 2.9])


@pytest.mark.parametrize("name, codec, options", [
    ("a.mp4", "libx264", {"bf": "3"}), ("a.mkv", "libx264", {"bf": "3", "all_keys": True}),
    ("a.avi", "mpeg4", {"bf": "2", "qscale": "2"})])
def test_b_frames_are_shown_in_order(tmp_path, name, codec, options):
    """The packets of B-frames come after those of later frames. An avi does not state when B-frames are shown."""
    video = read_video(write(tmp_path / name, codec=codec, **options))
    assert [round(number(frame) / 6) for frame in video.frames] == [0, 13, 26, 39]
    assert video.duration == pytest.approx(4.0, abs=0.2)


# ---- long videos ----


@pytest.fixture
def decoded(monkeypatch):
    """A list with the number of frames that were decoded, for each time that decoding began."""
    decode, counts = media.decode, []

    def counting(stream):
        counts.append(0)
        for frame in decode(stream):
            counts[-1] += 1
            yield frame
    monkeypatch.setattr(media, "decode", counting)
    return counts


def long_video(path, **options):
    """52 s with a keyframe every 10 frames. The brightness counts to 40 and starts again."""
    return write(path, n=1300, fps=25, brightness=lambda k: 6 * (k % 40), g="10", preset="ultrafast", **options)


def assert_shows_three_frames(video):
    """The frame at 1 s, the one in the middle, and the one a second before the end: 25, 650 and 1275."""
    assert_shows(video, [25 % 40, 650 % 40, 1275 % 40], [1.0, 26.0, 51.0])


@pytest.mark.parametrize("name, options", [("a.mkv", {}), ("a.mp4", {"bf": "3", "x264-params": "open-gop=1"})])
def test_long_video_is_not_decoded_whole(tmp_path, decoded, name, options):
    """Each frame is decoded from the keyframe before it. The same holds for a late part, frames 1250 to 1299."""
    assert_shows_three_frames(read_video(long_video(tmp_path / name, **options), max_frames=3))
    assert 3 <= sum(decoded) < 100
    decoded.clear()
    assert_shows(read_video(tmp_path / name, start=50.0), [1250 % 40, 1299 % 40], [0.0, 1.96])
    assert 2 <= sum(decoded) < 100


@pytest.mark.parametrize("name, options", [
    ("a.ts", {"bf": "3"}), ("a.mp4", {"codec": "mpeg4", "qscale": "2", "all_keys": True})])
def test_seeking_that_fails(tmp_path, decoded, name, options):
    """In a transport stream, seeking ends after the keyframe. In the other file, all frames are marked as keyframes.
    Then all frames up to the last one are decoded."""
    assert_shows_three_frames(read_video(long_video(tmp_path / name, **options), max_frames=3))
    assert decoded[-1] == 1276


# ---- size, rotation and colour ----


def test_frames_are_scaled(tmp_path):
    write(tmp_path / "a.mp4", n=10)
    whole, small = (read_video(tmp_path / "a.mp4", longest_edge=edge) for edge in (None, 30))
    assert small.frames[0].size == (30, 20)
    for frame, scaled in zip(whole.frames, small.frames):
        assert scaled.tobytes() == resize_longest_edge(frame, 30).tobytes()


@pytest.mark.parametrize("size, expected", [((80, 60), (32, 24)), ((60, 81), (24, 32)), ((97, 33), (32, 10)),
                                            ((100, 60), (32, 20)), ((10, 5), (32, 16)), ((900, 20), (32, 1))])
def test_shorter_side_is_even(size, expected):
    """100 x 60 to 32: int(32 / 1.67) = 19, which is odd, so 20. A second call changes nothing."""
    once = resize_longest_edge(Image.new("RGB", size), 32)
    assert once.size == expected
    assert expected[1] == 1 or resize_longest_edge(once, 32) is once


def cornered(_=None):
    """A green picture with a blue corner at its top left, and a red one below it."""
    image = Image.new("RGB", (48, 32), "green")
    image.paste("blue", (0, 0, 24, 16))
    image.paste("red", (0, 16, 24, 32))
    return image


def corners(image):
    """The colours of the corners, by their first letters: the upper left, upper right, lower left, lower right."""
    right, bottom = image.width - 7, image.height - 7
    pixels = [image.getpixel(place) for place in ((6, 6), (right, 6), (6, bottom), (right, bottom))]
    return "".join("RGB"[pixel.index(max(pixel))] for pixel in pixels)


# EXIF's orientation: the display matrix that means the same (where right and down are shown), and the corners
VIEWS = {1: ((1, 0, 0, 1), "BGRG"), 2: ((-1, 0, 0, 1), "GBGR"), 3: ((-1, 0, 0, -1), "GRGB"), 4: ((1, 0, 0, -1), "RGBG"),
         5: ((0, 1, 1, 0), "BRGG"), 6: ((0, 1, -1, 0), "RBGG"), 7: ((0, -1, -1, 0), "GGRB"), 8: ((0, -1, 1, 0), "GGBR")}


@pytest.mark.parametrize("matrix, seen", [
    *VIEWS.values(), ((0, 0, 0, 0), "BGRG"), ((0.9, 0.3, -0.3, 0.9), "BGRG"), ((-0.3, 0.9, -0.9, -0.3), "RBGG"),
    ((0.7, 0.7, -0.7, 0.7), "BGRG"), ((-0.9, 0.4, -0.4, -0.9), "GRGB")])
def test_videos_are_upright(tmp_path, matrix, seen):
    """Odd angles are turned to the nearest quarter. A matrix of zeros is found in damaged files."""
    a, b, c, d = (round(65536 * entry) for entry in matrix)
    video = read_video(write(tmp_path / "a.mp4", n=1, matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30], draw=cornered))
    assert corners(video.frames[0]) == seen


@pytest.mark.parametrize("orientation", VIEWS)
def test_exif_orientation(tmp_path, orientation):
    """Of pictures. For the frames of a video, PyAV states the quarter turn, but not whether it is mirrored."""
    exif = Image.Exif()
    exif[0x112] = orientation
    seen = VIEWS[orientation][1]
    cornered().save(tmp_path / "a.png", exif=exif)
    assert corners(read_video(tmp_path / "a.png").frames[0]) == seen
    if orientation in (1, 3, 6, 8):
        data = encode(cornered(), "JPEG", exif=exif, quality=95)
        video = read_video(mux(tmp_path / "a.mkv", ("mjpeg", Disposition.default, 3 * [data])))
        assert corners(video.frames[0]) == seen


def test_16_bit_grey(tmp_path):
    """The upper 8 bits are kept. 32 bits are refused, because nothing says which number is white."""
    values = [256 * (k % 256) + 255 - k // 8 for k in range(48 * 32)]
    data = b"".join(value.to_bytes(2, "little") for value in values)
    Image.frombytes("I;16", (48, 32), data).save(tmp_path / "a.png")
    frame = read_video(tmp_path / "a.png").frames[0]
    assert list(frame.get_flattened_data()) == [3 * (value // 256,) for value in values]
    Image.new("F", (48, 32)).save(tmp_path / "a.tiff")
    assert "32 bits" in refused(tmp_path / "a.tiff")


@pytest.mark.parametrize("name", ("a.png", "a.webp", "a.gif"))
def test_transparent_is_white(tmp_path, name):
    image = Image.new("RGBA", (48, 32), (90, 90, 90, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 32))
    image.paste((0, 0, 0, 51), (40, 0, 48, 32))             # a fifth of black, which a GIF cannot hold
    image.save(tmp_path / name, lossless=True)
    frame = read_video(tmp_path / name).frames[0]
    assert frame.getpixel((2, 2)) == (255, 255, 255) and frame.getpixel((20, 2)) == (90, 90, 90)
    assert frame.getpixel((45, 2)) == (204, 204, 204) or name == "a.gif"


# ---- pictures and animations ----


@pytest.mark.parametrize("name", ["a.png", "a.ppm", "a.jp2", "a.qoi", "a.sgi"])
def test_picture_is_one_frame(tmp_path, name):
    """Pillow reads some formats, and FFmpeg reads the others."""
    picture(90).save(tmp_path / name)
    video = read_video(tmp_path / name)
    assert (len(video.frames), video.seconds, video.total_frames) == (1, [0.0], 1)
    assert number(video.frames[0]) == 90


@pytest.mark.parametrize("name, options", [("a.gif", {}), ("a.png", {}), ("a.webp", {"lossless": True}),
                                           ("a.avif", {"quality": 100})])
def test_animation_is_a_video(tmp_path, name, options):
    animate(tmp_path / name, [picture(n) for n in (0, 60, 120)], duration=[500, 2000, 500], **options)
    video = read_video(tmp_path / name)
    assert video.seconds == [0.0, 0.5, 2.5] and video.duration == 3.0
    assert [number(frame) for frame in video.frames] == pytest.approx([0, 60, 120], abs=2)


@pytest.mark.parametrize("n_frames", (1, 4))
def test_hidden_picture_of_an_animated_png(tmp_path, n_frames):
    """A red picture for programs without animation, then green bars on a transparent background."""
    bars = [Image.new("RGBA", (48, 32), (0, 0, 0, 0)) for _ in range(n_frames)]
    for k, bar in enumerate(bars):
        bar.paste((0, 90, 0, 255), (8 * k, 0, 8 * k + 8, 32))
    animate(tmp_path / "a.png", [Image.new("RGBA", (48, 32), "red"), *bars], duration=200, default_image=True,
            blend=PngImagePlugin.Blend.OP_OVER)
    video = read_video(tmp_path / "a.png", fps=10)
    assert video.total_frames == n_frames and video.duration == pytest.approx(0.2 * n_frames)
    for k, frame in enumerate(video.frames):
        row = [frame.getpixel((8 * x + 4, 16)) for x in range(6)]
        assert row == (k + 1) * [(0, 90, 0)] + (5 - k) * [(255, 255, 255)]


@pytest.mark.parametrize("name", ("default_image", "duration"))
def test_texts_in_a_png(tmp_path, name):
    """Pillow keeps the texts of a PNG in the same dict as the facts about an animation."""
    text = PngImagePlugin.PngInfo()
    text.add_text(name, "12")
    picture(90).save(tmp_path / "a.png", pnginfo=text)
    video = read_video(tmp_path / "a.png")
    assert (number(video.frames[0]), video.duration) == (90, 0.1)


@pytest.mark.parametrize("name, milliseconds, shown", [("a.gif", 10, 0.1), ("a.webp", 11, 0.011), ("a.gif", 20, 0.02)])
def test_short_durations_of_an_animation(tmp_path, name, milliseconds, shown):
    video = read_video(animate(tmp_path / name, [picture(0), picture(60)], duration=milliseconds), fps=100)
    assert video.seconds == [0.0, shown] and video.duration == pytest.approx(2 * shown)


def test_pages_and_previews_are_not_frames(tmp_path):
    """Only the first page is shown. Of an icon, the largest picture is shown."""
    for name in ("a.tiff", "a.mpo"):
        animate(tmp_path / name, [picture(90), picture(120)])
    picture(90, (64, 64)).save(tmp_path / "a.ico", sizes=[(16, 16), (64, 64), (32, 32)])
    for name, size in (("a.tiff", (48, 32)), ("a.mpo", (48, 32)), ("a.ico", (64, 64))):
        video = read_video(tmp_path / name)
        assert (video.total_frames, video.frames[0].size, number(video.frames[0])) == (1, size, 90)


# ---- which stream ----


def test_default_stream_is_shown(tmp_path):
    first, default, cover = (encode(Image.new("RGB", (48, 32), (n, n, n)), "JPEG") for n in (40, 90, 200))
    cover = ("mjpeg", Disposition.attached_pic, [cover])
    video = read_video(mux(tmp_path / "a.mp4", ("mjpeg", Disposition(0), 2 * [first]),
                           ("mjpeg", Disposition.default, 4 * [default]), cover))
    assert number(video.frames[0]) == 90 and video.total_frames == 4
    assert "no video stream that can be decoded, only a header" in refused(mux(tmp_path / "a.mp4", cover))


def test_picture_in_tiles_is_refused():
    """A stand-in for a HEIC file, because there is no encoder for one here."""
    class Streams(list):
        video = property(list)
    tile = SimpleNamespace(type="video", disposition=Disposition.dependent, codec_context=object())
    with pytest.raises(ValueError, match="a.heic is a picture in tiles"):
        media.choose_stream("a.heic", SimpleNamespace(streams=Streams([tile, tile])))


# ---- the clock ----


def test_raw_stream_counts_its_frames(tmp_path):
    """Raw H.264 has no times, so 25 frames a second are assumed: each of the 40 frames is shown for 1/25 s."""
    write(tmp_path / "raw.h264")
    video = read_video(tmp_path / "raw.h264", fps=2.0)
    assert video.duration == pytest.approx(1.6) and video.total_frames == 40
    assert_shows(video, [0, 19, 39], [0.0, 0.76, 1.56])


@pytest.mark.parametrize("pts, durations, seconds, duration", [
    ([50, 60, 80, 90], [10, 20, 10, 3], [0.0, 0.1, 0.3, 0.4], 0.43),        # its own duration
    ([90, 80, 60, 50], [0, 0, 0, 0], [0.0, 0.1, 0.3, 0.4], 0.5),            # else the median step
    ([50], [-7], [0.0], 0.01),                                              # else one unit of the clock
    ([0, 10, 20, 30], [4, 10, 1, 1], [0.0, 0.1, 0.2, 0.3], 0.4),            # the median is less than half a step
    ([None, 7, None], [3, 3, 3], [0.0, 0.04, 0.08], 0.12)])                 # no clock: 25 frames a second
def test_duration_of_the_last_frame(pts, durations, seconds, duration):
    """The clock counts hundredths of a second."""
    stream = SimpleNamespace(time_base=Fraction(1, 100), average_rate=None)
    assert media.timeline(pts, durations, stream) == (seconds, pytest.approx(duration))


@pytest.mark.parametrize("suffix, codec, start", [("ts", "libx264", 0), ("ts", "libx264", 15), ("mkv", "libx264", 15),
                                                  ("mkv", "mpeg4", 0)])
def test_joined_recordings_follow_each_other(tmp_path, suffix, codec, start):
    """The clock of the second recording begins at 0 again, or 0.5 s before the first one ends."""
    settings = dict(n=20, codec=codec, bf="2", g="6", qscale="2", b_strategy="0")
    first = write(tmp_path / f"a.{suffix}", **settings)
    second = write(tmp_path / f"b.{suffix}", pts=[10 * (start + k) for k in range(20)],
                   brightness=lambda k: 6 * (k + 20), **settings)
    joined = tmp_path / f"joined.{suffix}"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    video = read_video(joined)
    assert video.total_frames == 40 and video.duration == pytest.approx(4.0, abs=0.1)
    assert_shows(video, [0, 13, 26, 39], [0.0, 1.3, 2.6, 3.9])


# ---- names and titles ----


@pytest.mark.parametrize("name", ["http:a.mp4", "concat:a|b.mp4", "50%02d: a.mp4", "-i", "a\nb", b"\xff.mp4"])
def test_name_is_only_a_name(tmp_path, monkeypatch, name):
    """FFmpeg reads some names as addresses, and some as patterns of many names."""
    monkeypatch.chdir(tmp_path)
    os.rename(write(tmp_path / "a.mp4", n=5), name)
    assert read_video(os.fsdecode(name)).total_frames == 5


def test_title_in_another_encoding(tmp_path):
    data = write(tmp_path / "a.avi", n=1, codec="mpeg4", title="CafeXX").read_bytes()
    assert b"CafeXX" in data
    (tmp_path / "a.avi").write_bytes(data.replace(b"CafeXX", b"Caf\xe9XX"))
    assert len(read_video(tmp_path / "a.avi").frames) == 1


# ---- broken files, and files that are not videos ----


def test_cut_off_file(tmp_path):
    """A transport stream that ends within the packet of frame 20."""
    whole = write(tmp_path / "a.ts", bf="0").read_bytes()
    with av.open(str(tmp_path / "a.ts")) as file:
        end = [packet.pos for packet in file.demux(video=0)][20]
    (tmp_path / "a.ts").write_bytes(whole[:end + 100])
    video = read_video(tmp_path / "a.ts")
    assert video.total_frames in (20, 21) and len(video.frames) == 2 and number(video.frames[0]) == 0


def spoil(path, first, last):
    """Overwrite the packets first to last - 1 of a file in which every frame is a keyframe."""
    with av.open(str(path)) as file:
        places = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for position, size in places[first:last]:
        data[position + 8:position + size] = bytes(size - 8)
    path.write_bytes(data)
    return path


def test_broken_packets_are_not_frames(tmp_path):
    """If the last ten frames cannot be decoded, the others are sampled. If frame 5 cannot, the frame at 1.0 s is
    the tenth that comes, and it is found by its time."""
    video = read_video(spoil(write(tmp_path / "a.mkv", codec="mpeg4", g="1", qscale="2"), 30, 40))
    assert video.total_frames == 30
    assert_shows(video, [0, 14, 29], [0.0, 1.4, 2.9])
    path = spoil(write(tmp_path / "a.mkv", codec="mpeg4", g="1", qscale="2"), 5, 6)
    assert_shows(read_video(path, max_frames=1), [10], [1.0])


def test_frame_larger_than_the_header_says(tmp_path, monkeypatch):
    data = encode(Image.new("RGB", (60, 40)), "JPEG")
    path = mux(tmp_path / "a.mkv", ("mjpeg", Disposition.default, [data, data]))
    assert read_video(path).frames[0].size == (60, 40)
    monkeypatch.setattr(media, "MAX_PIXELS", 60 * 40 - 1)
    assert "pixels" in refused(path)


def test_large_canvases_are_refused_first(tmp_path, monkeypatch, decoded, recwarn):
    """Tiny files that claim huge sizes. Pillow refuses pictures above twice its limit. Its warnings are silenced."""
    encoded = encode(Image.new("P", (8, 8)), "GIF")
    (tmp_path / "a.gif").write_bytes(encoded[:6] + 4 * b"\xff" + encoded[10:])
    assert "(Image size (4294836225 pixels) exceeds limit" in refused(tmp_path / "a.gif")
    path = mux(tmp_path / "a.mkv", ("vp8", Disposition.default, [bytes(100)]), width=8192, height=8193)
    assert "8192 x 8193 pixels, too many for a video" in refused(path)
    assert not decoded
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 32 - 1)
    picture(90).save(tmp_path / "a.png")
    assert read_video(tmp_path / "a.png").frames[0].size == (48, 32) and not recwarn.list


@pytest.mark.parametrize("name, text", [
    ("notes.txt", "A list of clips to watch.\n" * 40), ("a.mp4", "no video " * 100), ("a.ans", "\x1b[2J\x1b[1;1H" * 90),
    ("a.ffconcat", "ffconcat version 1.0\nfile clip.ts\n"),
    ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\nclip.ts\n"),
    ("a.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
              "a=rtpmap:96 H264/90000\n"),
    ("a.xbm", "#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {\n0x00\n};\n"),
    ("a.srt", "1\n00:00:00,000 --> 00:00:01,000\nHello\n")])
def test_texts_and_playlists_are_refused(tmp_path, name, text):
    """A live playlist would be read for ever, and a session description would wait for the network."""
    write(tmp_path / "clip.ts", n=5)
    (tmp_path / name).write_text(text)
    assert "not a video or picture that can be read" in refused(tmp_path / name)


@pytest.mark.parametrize("kind", ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"))
def test_half_a_picture_is_refused(tmp_path, kind):
    data = encode(picture(90), kind)
    (tmp_path / "a").write_bytes(data[:len(data) // 2])
    refused(tmp_path / "a")


def test_no_file_folder_or_pipe(tmp_path):
    assert "no such file" in refused(tmp_path / "none.mp4")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "empty.mp4").touch()
    assert "is empty" in refused(tmp_path / "empty.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "is a pipe" in refused(tmp_path / "pipe.mp4")


def test_sound_or_broken_frames_only(tmp_path):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 800, "NONE", ""))
        file.writeframes(bytes(1600))
    assert "no video stream that can be decoded, only audio" in refused(tmp_path / "sound.wav")
    path = spoil(write(tmp_path / "a.mkv", n=5, codec="mpeg4", g="1"), 0, 5)
    assert f"no frame of {path} can be decoded" in refused(path)
