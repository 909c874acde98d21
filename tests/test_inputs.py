"""What `encode_videos` and `encode_text` take, and how they refuse other things."""

import functools
import http.server
import io
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import drl_jax


@pytest.fixture(scope="module")
def file(test_videos):
    return min(test_videos.iterdir())


@pytest.fixture(scope="module")
def expected(search_model, file):
    return search_model.encode_videos([file])


@pytest.fixture(scope="module")
def frames(search_model, file):
    return search_model.read_video(file).frames


class Tensor:
    """The part of a torch tensor that is used, with a gradient and on another device."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def detach(self):
        return self

    def cpu(self):
        return self.array

    def is_floating_point(self):
        return False


class HostTensor(np.ndarray):
    def is_floating_point(self):
        return False


SOURCES = {
    "str": lambda file, frames: str(file),
    "bytes": lambda file, frames: file.read_bytes(),
    "memory": lambda file, frames: io.BytesIO(file.read_bytes()),
    "open file": lambda file, frames: file.open("rb"),
    "pipe": lambda file, frames: Pipe(file.read_bytes()),
    "channels first": lambda file, frames: np.moveaxis(frames, 3, 1),
    "float": lambda file, frames: frames / 255,
    "jax": lambda file, frames: jnp.asarray(frames),
    "torch": lambda file, frames: Tensor(frames.view(HostTensor)),
    "PIL": lambda file, frames: [Image.fromarray(frame) for frame in frames],
    "arrays": lambda file, frames: list(frames),
}


class Pipe(io.BytesIO):
    def seekable(self):
        return False


@pytest.mark.parametrize("name", SOURCES)
def test_every_form_of_a_video_has_the_features_of_its_file(
    name, search_model, file, frames, expected
):
    video = search_model.encode_videos([SOURCES[name](file, frames)])
    for key, array in expected.items():
        np.testing.assert_allclose(video[key], array, atol=1e-6)


def test_pictures_are_sampled_resized_and_put_on_white_as_those_of_files(search_model):
    wide = np.random.default_rng(0).integers(0, 256, (9, 48, 128, 3)).astype(np.uint8)
    video = search_model.read_video(wide)
    assert video.frames.shape == (4, 64, 64, 3)
    assert video.times == (0, 2, 5, 8)
    clear = Image.fromarray(np.zeros((64, 64, 4), np.uint8))
    still = search_model.read_video(clear)
    assert still.frames.shape == (1, 64, 64, 3)
    assert (still.frames == 255).all()
    # What was read for one model may be given to another.
    larger = drl_jax.Video(np.repeat(video.frames, 2, axis=1).repeat(2, axis=2), video.times)
    assert search_model.read_video(larger).times == video.times


def test_tables_and_generators_are_read_one_by_one(search_model, file, frames, expected):
    pandas = pytest.importorskip("pandas")
    read = []

    def videos():
        for number in range(20):
            read.append(number)
            yield file

    features = search_model.encode_videos(videos())
    assert len(read) == 20
    for key, array in expected.items():  # A batch has 16 videos.
        np.testing.assert_allclose(features[key], array.repeat(20, axis=0), atol=1e-6)
    column = pandas.Series([str(file), file], index=[7, 3])
    assert len(search_model.encode_videos(column)["frame_mask"]) == 2
    captions = pandas.Series(["a dog", "a cat"], index=[7, 3])
    text, same = search_model.encode_text(captions), search_model.encode_text(["a dog", "a cat"])
    np.testing.assert_array_equal(text["text_unit"], same["text_unit"])
    with pytest.raises(drl_jax.UserError, match="not a DataFrame: pass a list or one column"):
        search_model.encode_text(captions.to_frame())


def test_bad_videos_are_raised_left_out_or_returned(search_model, file, expected):
    given = [file, "none.mp4", b"text of a page", file]
    with pytest.raises(drl_jax.UserError, match=r"none\.mp4 cannot be read"):
        search_model.encode_videos(given)
    with pytest.warns(UserWarning, match=r"2 of 4 videos cannot .* number 1: none\.mp4 cannot"):
        features = search_model.encode_videos(given, errors="skip")
    assert len(features["frame_mask"]) == 2
    features, errors = search_model.encode_videos(iter(given), errors="return")
    np.testing.assert_allclose(features["frame_unit"][1], expected["frame_unit"][0], atol=1e-6)
    assert list(errors) == [1, 2]
    assert str(errors[2]).startswith("video 2 is not a video: its content is text")
    with pytest.raises(drl_jax.UserError, match="no video can be read; the first one: none"):
        search_model.encode_videos(given[1:2], errors="skip")
    features, errors = search_model.encode_videos(given[1:2], errors="return")
    assert (len(errors), features["frame_unit"].shape) == (1, (0, *expected["frame_unit"][0].shape))


FRAMES = np.zeros((2, 9, 9, 3), np.uint8)
closed = io.BytesIO()
closed.close()
closed_picture = Image.new("RGB", (9, 9))
closed_picture.close()
deleted = jnp.zeros((2, 9, 9, 3), jnp.uint8)
deleted.delete()


def failing():
    yield FRAMES
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        (FRAMES, r"an array \[2, 9, 9, 3\] may be one video or many pictures"),
        ({"a": 1}, "not a dict: pass a list"),
        (3, "takes a list of videos, not int"),
        ([None], "video 0: there is a NoneType; a video is a path"),
        ([FRAMES, FRAMES[0, 0]], r"video 1 has the shape \[9, 3\], not \[F, H, W, 3\]"),
        ([FRAMES[:0]], "video 0 has no frame"),
        ([[]], "video 0 has no frame"),
        ([FRAMES[:, :3]], "video 0 has the shape .* may be"),
        ([FRAMES.astype(np.int64)], "video 0 has int64 frames; pass uint8, or float in"),
        ([FRAMES + 2.5], "float frames from 2.5 to 2.5; pass float in"),
        ([FRAMES * np.nan], "float frames from nan to nan"),
        ([np.zeros((1, 2, 900, 3))], "video 0: picture of 900 x 2 pixels is too thin"),
        ([closed], "video 0 cannot be read .*closed file"),
        ([closed_picture], "video 0: a picture cannot be read .*closed image"),
        ([deleted], "video 0 is no array of numbers .*deleted"),
        ([FRAMES[..., 0]], r"video 0 has the shape \[2, 9, 9\], not"),
        (failing(), "the videos cannot be listed .OSError: the disk is gone"),
        (["a\0.mp4"], r"video 0: 'a\\x00\.mp4' is no path"),
        ([io.StringIO("a")], "video 0 is a file of text; open it with mode 'rb'"),
        (["http://localhost/a.mp4"], "is an address; download the file, or pass urls=True"),
    ],
)
def test_anything_else_is_one_line(videos, message, search_model):
    with pytest.raises(drl_jax.UserError, match=message):
        search_model.encode_videos(videos)


def test_an_address_is_opened_if_it_is_allowed(search_model, file, expected):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(file.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{file.name}"
        video = search_model.encode_videos([address], urls=True)
        with pytest.raises(drl_jax.UserError, match=r"cannot be downloaded .*404"):
            search_model.encode_videos([f"{address}x"], urls=True)
        server.shutdown()
    np.testing.assert_allclose(video["frame_unit"], expected["frame_unit"], atol=1e-6)
    with pytest.raises(drl_jax.UserError, match="only http and https"):
        search_model.encode_videos([f"file://{file}"], urls=True)
