"""Which frames are shown, and when: on videos made here, whole, awkward and broken."""

import os
from concurrent.futures import Future
from fractions import Fraction

import av
import pytest
from PIL import Image

from minioutro import read_video
from minioutro import video as video_module
from minioutro.video import resize_longest_edge, sample_indices


def picture(n, size=(48, 32)):
    """Frame n: its brightness says its number; the left edge is red, so that turning is seen."""
    image = Image.new("RGB", size, (n, n, n))
    image.paste((255, 0, 0), (0, 0, 8, size[1]))
    return image


def number(image):
    """The frame number that a decoded picture shows, from its middle."""
    return image.getpixel((image.width // 2, image.height // 2))[1]


def write(path, n=40, fps=10, pts=None, codec="libx264", muxer=None, brightness=lambda k: 6 * k, all_keys=False,
          **options):
    """n frames, the k-th with brightness 6 k; pts are in hundredths of a second if given.

    all_keys: the file says that every frame is a keyframe.
    """
    with av.open(str(path), "w", options=muxer) as file:
        stream = file.add_stream(codec, rate=fps, options={"crf": "5", **options})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 100)
        for k in range(n):
            frame = av.VideoFrame.from_image(picture(brightness(k)))
            frame.pts, frame.time_base = pts[k] if pts else 100 * k // fps, Fraction(1, 100)
            for packet in stream.encode(frame):
                packet.is_keyframe |= all_keys
                file.mux(packet)
        file.mux(stream.encode())
    return path


def assert_shows(video, indices, seconds):
    assert [round(number(frame) / 6) for frame in video.frames] == indices
    assert video.seconds == pytest.approx(seconds, abs=1e-3)


# ---- which frames ----


def test_sampling_by_hand():
    """4 s at 10 fps: 4 frames, first and last among them: 0, 13, 26, 39. 0.04 s: the first alone.

    120 s at 25 fps: more seconds than 64, so the first and the last second are left out.
    """
    assert sample_indices(40, 10.0, 4.0) == [0, 13, 26, 39]
    assert sample_indices(1, 25.0, 0.04) == [0]
    assert sample_indices(3, 25.0, 0.12, fps=25.0) == [0, 1, 2]
    long = sample_indices(3000, 25.0, 120.0)
    assert (len(long), long[0], long[-1]) == (64, 25, 2975)
    assert sample_indices(5, 10.0, 10.0) == [0, 1, 2, 3, 4]         # never more than there are
    assert sample_indices(100, 10.0, 2.0, max_frames=1) == [0]
    assert sample_indices(100, 10.0, 10.0, max_frames=1) == [10]    # 10 s are more than 1: a second is left out


def test_sampling_rounds_as_numpy_does():
    """122 / 14 * 7 is 61, but in floating point, in this order, 60.999..., which numpy cuts to 60."""
    assert sample_indices(123, 123 / 15, 15.0)[7] == 60


@pytest.mark.parametrize("wrong", [dict(fps=0), dict(fps=-1.0), dict(max_frames=0)])
def test_sampling_refuses_what_makes_no_sense(wrong):
    with pytest.raises(ValueError, match="positive"):
        sample_indices(10, 10.0, 1.0, **wrong)


def test_frames_and_times_of_a_plain_video(tmp_path):
    video = read_video(write(tmp_path / "a.mp4"))
    assert_shows(video, [0, 13, 26, 39], [0.0, 1.3, 2.6, 3.9])
    assert (video.duration, video.total_frames) == (pytest.approx(4.0), 40)
    assert video.frames[0].size == (48, 32) and video.frames[0].mode == "RGB"
    assert_shows(read_video(tmp_path / "a.mp4", fps=0.5), [0, 39], [0.0, 3.9])
    assert_shows(read_video(tmp_path / "a.mp4", max_frames=3), [0, 19, 39], [0.0, 1.9, 3.9])


def test_with_a_variable_rate_each_frame_has_its_own_time(tmp_path):
    """20 frames every 0.1 s, then 20 every 0.3 s: 8 s, 8 frames, uniform in number and not in time."""
    pts = [10 * k if k < 20 else 200 + 30 * (k - 20) for k in range(40)]
    video = read_video(write(tmp_path / "a.mkv", pts=pts))
    indices = [0, 5, 11, 16, 22, 27, 33, 39]
    assert_shows(video, indices, [pts[i] / 100 for i in indices])
    assert video.duration == pytest.approx(8.0, abs=0.31)           # the last step is not in the file


def test_times_count_from_the_first_frame(tmp_path):
    video = read_video(write(tmp_path / "a.mkv", pts=[300 + 10 * k for k in range(40)]))
    assert_shows(video, [0, 13, 26, 39], [0.0, 1.3, 2.6, 3.9])


def test_frames_that_an_edit_list_cuts_away_are_not_counted(tmp_path):
    """The first ten frames lie before time 0 and are in the file only to be decoded."""
    write(tmp_path / "a.mp4", pts=[10 * k - 100 for k in range(40)],
          muxer={"use_editlist": "1", "avoid_negative_ts": "disabled"})
    video = read_video(tmp_path / "a.mp4")
    assert video.total_frames == 30
    assert_shows(video, [10, 24, 39], [0.0, 1.4, 2.9])


@pytest.mark.parametrize("name, codec, options", [("a.mp4", "libx264", {"bf": "3"}),
                                                  ("a.avi", "mpeg4", {"bf": "2", "qscale": "2"})])
def test_frames_that_are_stored_out_of_order_are_shown_in_order(tmp_path, name, codec, options):
    """An avi has no presentation times: with B-frames its packets say the wrong ones."""
    video = read_video(write(tmp_path / name, codec=codec, **options))
    assert [round(number(frame) / 6) for frame in video.frames] == [0, 13, 26, 39]


# ---- long videos: what lies between is passed over ----


@pytest.fixture
def decoded(monkeypatch):
    """How many frames each pass over a video has decoded."""
    decode, passes = video_module.decode, []

    def counting(stream):
        for frame in decode(stream):
            passes[-1] += 1
            yield frame

    def opening(path, open_video=video_module.open_video):
        passes.append(0)
        return open_video(path)
    monkeypatch.setattr(video_module, "decode", counting)
    monkeypatch.setattr(video_module, "open_video", opening)
    return passes


def long_video(path, n=1600, g="25", **options):
    """A keyframe every 25 frames; brightness counts to 40 and starts again."""
    return write(path, n=n, fps=25, brightness=lambda k: 6 * (k % 40), g=g, **options)


@pytest.mark.parametrize("name, options", [("a.mp4", {"bf": "3", "b_strategy": "0"}), ("a.mkv", {}),
                                           ("a.mp4", {"bf": "3", "x264-params": "open-gop=1"})])
def test_a_long_video_is_not_decoded_whole(tmp_path, decoded, name, options):
    """First frame, middle and last; two keyframes lie at most 25 frames before the two."""
    video = read_video(long_video(tmp_path / name, **options), max_frames=3)
    assert_shows(video, [k % 40 for k in (25, 800, 1575)], [1.0, 32.0, 63.0])
    assert len(decoded) == 2 and decoded[0] == 0 and decoded[1] < 100       # packets, then these frames


def test_where_nothing_can_be_passed_over_all_is_decoded(tmp_path, decoded):
    """In a transport stream seeking ends behind the keyframe; with few keyframes, or in a short video, it is
    not worth it."""
    video = read_video(long_video(tmp_path / "a.ts"), max_frames=3)
    assert_shows(video, [k % 40 for k in (25, 799, 1574)], [1.0, 31.96, 62.96])
    assert decoded[-1] > 1500 and sum(decoded) < 1600
    for video in (dict(g="400"), dict(n=900)):
        decoded.clear()
        read_video(long_video(tmp_path / "a.mp4", **video), max_frames=3)
        assert len(decoded) == 2 and decoded[-1] > 800


def test_a_frame_that_is_called_a_keyframe_and_is_none_is_not_believed(tmp_path, decoded):
    """After seeking to one, frames would show what is between it and the last; so all are decoded."""
    video = read_video(long_video(tmp_path / "a.mp4", codec="mpeg4", qscale="2", all_keys=True), max_frames=3)
    assert_shows(video, [k % 40 for k in (25, 800, 1575)], [1.0, 32.0, 63.0])
    assert len(decoded) == 3 and decoded[-1] > 1500             # packets, a vain attempt, all


# ---- how they are shown ----


def test_decoded_frames_do_not_pile_up(tmp_path, monkeypatch):
    """A worker that does nothing until it is waited for never has more than four frames in its queue."""
    queue, lengths = {}, []

    class Idle(video_module.ThreadPoolExecutor):
        def submit(self, *call):
            queue[future := Future()] = call
            lengths.append(len(queue))
            return future

    def work(images):
        for future in queue.keys() & set(images):
            function, *arguments = queue.pop(future)
            future.set_result(function(*arguments))
    monkeypatch.setattr(video_module, "ThreadPoolExecutor", Idle)
    monkeypatch.setattr(video_module, "wait", work)
    monkeypatch.setattr(Future, "result", lambda self, result=Future.result: (work([self]), result(self))[1])
    assert_shows(read_video(write(tmp_path / "a.mp4"), fps=10.0), list(range(40)), [k / 10 for k in range(40)])
    assert lengths == [1, 2, 3] + [4] * 37


def test_frames_are_scaled_as_they_are_decoded_as_the_processor_would(tmp_path):
    whole, small = (read_video(write(tmp_path / "a.mp4"), longest_edge=edge) for edge in (None, 30))
    assert small.frames[0].size == (30, 20)
    for frame, scaled in zip(whole.frames, small.frames):
        assert scaled.tobytes() == resize_longest_edge(frame, 30).tobytes()


@pytest.mark.parametrize("size, edge, expected", [
    ((80, 60), 32, (32, 24)), ((60, 81), 32, (24, 32)), ((97, 33), 32, (32, 10)), ((50, 50), 32, (32, 32)),
    ((100, 63), 32, (32, 20)), ((100, 60), 32, (32, 20)), ((10, 5), 32, (32, 16)), ((900, 20), 32, (32, 1))])
def test_the_shorter_side_is_cut_to_an_integer_and_made_even(size, edge, expected):
    """100 x 60 to 32: int(32 / 1.67) = 19, odd, so 20. Once more changes nothing, save for a thread."""
    once = resize_longest_edge(Image.new("RGB", size), edge)
    assert once.size == expected
    assert expected[1] == 1 or resize_longest_edge(once, edge) is once


def test_a_turned_picture_is_shown_upright(tmp_path):
    """EXIF orientation 6: turn clockwise by 90 degrees, so the red left edge comes to the top."""
    exif = Image.Exif()
    exif[0x112] = 6
    picture(200).save(tmp_path / "a.jpg", exif=exif, quality=95)
    frame = read_video(tmp_path / "a.jpg").frames[0]
    assert frame.size == (32, 48)
    assert frame.getpixel((16, 2))[1] < 60 and frame.getpixel((2, 40))[1] > 150


def test_pictures_and_animations_are_videos(tmp_path):
    picture(90).save(tmp_path / "a.png")
    picture(90).convert("RGBA").save(tmp_path / "50%02d: a.png")
    for name in ("a.png", "50%02d: a.png"):
        video = read_video(tmp_path / name)
        assert (len(video.frames), video.seconds, video.total_frames) == (1, [0.0], 1)
        assert number(video.frames[0]) == 90
    frames = [picture(n) for n in (0, 60, 120)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[500, 2000, 500])
    video = read_video(tmp_path / "a.gif")
    assert video.seconds == [0.0, 0.5, 2.5] and video.duration == 3.0
    assert [number(frame) for frame in video.frames] == [0, 60, 120]


def test_a_stream_without_a_clock_counts_its_frames(tmp_path):
    """Raw H.264 has no times: 40 frames at the usual 25 a second, each shown for 1/25 s."""
    write(tmp_path / "raw.h264")
    video = read_video(tmp_path / "raw.h264", fps=2.0)
    assert video.duration == pytest.approx(1.6) and video.total_frames == 40
    assert_shows(video, [0, 19, 39], [0.0, 0.76, 1.56])


def test_a_title_in_another_encoding_does_not_matter(tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w") as file:
        file.metadata["title"] = "CafeXX"
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for packet in (*stream.encode(av.VideoFrame.from_image(picture(90))), *stream.encode()):
            file.mux(packet)
    data = (tmp_path / "a.avi").read_bytes()
    assert b"CafeXX" in data
    (tmp_path / "a.avi").write_bytes(data.replace(b"CafeXX", b"Caf\xe9XX"))
    assert len(read_video(tmp_path / "a.avi").frames) == 1


# ---- what is broken ----


def test_a_file_that_is_cut_off_shows_what_is_there(tmp_path):
    """Half of a transport stream: fewer frames, and the last of those that are there is shown."""
    whole = write(tmp_path / "a.ts").read_bytes()
    (tmp_path / "half.ts").write_bytes(whole[:len(whole) // 2])
    video = read_video(tmp_path / "half.ts")
    assert 1 < video.total_frames < 40
    assert round(number(video.frames[-1]) / 6) == video.total_frames - 1
    assert video.duration == pytest.approx(video.total_frames / 10, abs=0.11)


def spoil(path, first, last):
    """Zero the packets first to last - 1 of a file in which every frame is a key frame."""
    with av.open(str(path)) as file:
        places = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for position, size in places[first:last]:
        data[position + 8:position + size] = bytes(size - 8)
    path.write_bytes(data)


def test_broken_packets_are_passed_over(tmp_path):
    """Without the last ten frames, those that decode are sampled instead. Without number 5, the frame of
    1.0 s, asked for alone, is the tenth that comes: it is found by its time, not by its number."""
    path = write(tmp_path / "a.mkv", codec="mpeg4", g="1", qscale="2")
    spoil(path, 30, 40)
    video = read_video(path)
    assert video.total_frames == 30
    assert_shows(video, [0, 14, 29], [0.0, 1.4, 2.9])
    spoil(write(path, codec="mpeg4", g="1", qscale="2"), 5, 6)
    assert_shows(read_video(path, max_frames=1), [10], [1.0])


def test_what_cannot_be_passed_over_is_decoded_once_to_see(tmp_path, decoded):
    """Packets; the sampled frames, in vain; all frames; the sampled frames of those."""
    spoil(write(tmp_path / "a.mkv", codec="mpeg4", g="1", qscale="2"), 30, 40)
    read_video(tmp_path / "a.mkv")
    assert decoded == [0, 30, 30, 30]


def test_a_frame_that_no_picture_can_be_made_of_names_its_file(tmp_path, monkeypatch):
    def upright(*_):
        raise av.error.InvalidDataError(22, "no such colours")
    monkeypatch.setattr(video_module, "upright", upright)
    assert "no such colours" in refused(write(tmp_path / "a.mp4"))


def refused(path) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        read_video(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_video_is_refused_by_name_and_reason(tmp_path):
    assert "no such file" in refused(tmp_path / "none.mp4")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "empty.mp4").touch()
    assert "is empty" in refused(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("no video " * 100)
    assert "not a video" in refused(tmp_path / "text.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "is a pipe" in refused(tmp_path / "pipe.mp4")


def test_sound_alone_and_frames_that_do_not_decode_are_refused(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.planes[0].update(bytes(1600))
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
    assert "no video stream that can be decoded, only audio" in refused(tmp_path / "sound.wav")
    spoil(write(tmp_path / "a.mkv", n=5, codec="mpeg4", g="1"), 0, 5)
    assert "no frame of it can be decoded" in refused(tmp_path / "a.mkv")
