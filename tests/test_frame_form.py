"""Forms of frames: pixels, names, and that frames of one form are never read as another."""

import dataclasses
import shlex
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from support.commands import TINY, error_of
from support.datasets import custom
from support.videos import write_video, write_video_turned_right

from data_prep.build import main as build
from data_prep.datasets import DRAWN
from data_prep.decode import FrameCache
from drl_jax.config import BackboneConfig, Config, DataConfig, ModelConfig
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.records import DatasetError, VideoDataset, dataset_dir
from drl_jax.data.storage import DRAWN_DATASETS, StorageSpec
from drl_jax.data.video import read_frames
from drl_jax.data.video_file import VideoError
from drl_jax.search.session import Index
from drl_jax.search.update import update_index

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
CROP, SQUASH = FrameForm(32), FrameForm(32, "squash")
BILINEAR = FrameForm(32, "squash", "bilinear")


def noise(count, height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def decoded(path):
    """All frames of a file, without this package."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def squashed(pictures, size, interpolation):
    images = [Image.fromarray(picture) for picture in pictures]
    return np.stack([np.asarray(i.resize((size, size), FILTERS[interpolation])) for i in images])


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize(("height", "width"), [(40, 90), (91, 33), (25, 23), (32, 32)])
def test_squash_is_pils_resize_of_the_decoded_frame(height, width, tmp_path):
    """Also of odd sizes, which become smaller on one side and larger on the other."""
    write_video(tmp_path / "v.mkv", noise(5, height, width), fps=2)
    pictures = decoded(tmp_path / "v.mkv")[::2]
    assert pictures[0].shape == (height, width, 3)
    for interpolation in FILTERS:
        found = read_frames(tmp_path / "v.mkv", 12, FrameForm(32, "squash", interpolation))
        np.testing.assert_array_equal(found, squashed(pictures, 32, interpolation))


def test_a_turned_video_is_upright_before_it_is_squashed(tmp_path):
    write_video_turned_right(tmp_path / "v.mp4", noise(2, 40, 90), fps=1)
    upright = [np.rot90(picture, -1) for picture in decoded(tmp_path / "v.mp4")]
    assert upright[0].shape == (90, 40, 3)
    np.testing.assert_array_equal(
        read_frames(tmp_path / "v.mp4", 12, SQUASH), squashed(upright, 32, "bicubic")
    )


def test_a_video_can_be_used_in_every_form_or_in_none(tmp_path):
    write_video(tmp_path / "thin.mkv", noise(2, 2, 320), fps=2)
    for form in (CROP, SQUASH):
        with pytest.raises(VideoError, match="320 x 2"):
            read_frames(tmp_path / "thin.mkv", 12, form)


# ---------------------------------------------------------------- names


def model_of(form):
    form = {"resize": form.resize, "interpolation": form.interpolation, "size": form.size}
    return ModelConfig(backbone=BackboneConfig(image_resolution=form.pop("size"), **form))


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (FrameForm(224), "224px_12f_jpeg"),
        (FrameForm(256, "squash"), "256px_12f_jpeg_squash"),
        (FrameForm(224, "squash", "bilinear"), "224px_12f_jpeg_squash_bilinear"),
        (FrameForm(224, "crop", "bilinear"), "224px_12f_jpeg_bilinear"),
        (FrameForm(256, "squash", as_shown=True), "256px_12f_jpeg_squash_shown_time"),
    ],
)
def test_names_and_flags_of_variants(form, name, tmp_path):
    clock = "time" if form.as_shown else "frames"
    storage = StorageSpec(form, 12, "jpeg", clock)
    assert storage.name == name
    assert StorageSpec.from_name(name) == storage
    data = DataConfig(frame_clock=clock, as_shown=form.as_shown)
    assert StorageSpec.of(Config(data=data, model=model_of(form))) == storage
    given = {"--frame_clock=time", "--as_shown", "--frame_clock=frames", "--no-as_shown"}
    for dataset in ("msrvtt", "custom"):
        flags = given.intersection(storage.flags(dataset))
        assert len(flags) == (0 if form.as_shown == (dataset == "custom") else 2)
    assert FrameCache(tmp_path, storage).directory.name.startswith(f"{name}_av")


@pytest.mark.parametrize(
    "name", ["224px_12f_png", "224px_12f_jpeg_crop", "224px_12f_jpeg_bilinear_squash", "clips"]
)
def test_other_names_are_no_variants(name):
    with pytest.raises(ValueError, match="is not like 224px_12f_jpeg"):
        StorageSpec.from_name(name)


def test_datasets_without_source_files_are_those_that_the_build_draws():
    assert set(DRAWN_DATASETS) == DRAWN.keys()


# ---------------------------------------------------------------- datasets


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Three wide videos and their captions."""
    root = tmp_path_factory.mktemp("forms")
    (root / "videos").mkdir()
    names = ["a", "b", "c"]
    for number, name in enumerate(names):
        write_video(root / "videos" / f"{name}.mp4", noise(3, 40, 90, number), fps=1)
    rows = [f"{name},caption of {name}" for name in names]
    (root / "mine.csv").write_text("\n".join(["video,caption", *rows]) + "\n")
    return root


@pytest.fixture(scope="module")
def built(sources) -> Path:
    """The same videos in two forms, in one data directory."""
    for form in ([], ["--resize=squash", "--interpolation=bilinear"]):
        flags = ("--image_size=32", "--storage=raw", *form)
        assert build(custom(sources, "mine.csv", sources / "data", *flags)) == 0
    return sources


def directory_of(root, form):
    sampling = {"frame_clock": "time", "as_shown": True, "storage": "raw"}
    data = DataConfig(dataset="custom", data_dir=str(root / "data"), holdout=1, **sampling)
    return dataset_dir(Config(data=data, model=model_of(form)))


def test_a_model_reads_frames_of_its_own_form(built):
    settings = {"image_size": 32, "max_frames": 12, "storage": "raw"}
    settings |= {"frame_clock": "time", "as_shown": True}
    changed = {"resize": "squash", "interpolation": "bilinear"}
    # Manifests name the form where it is not the default.
    for form, stored in ((CROP, settings), (BILINEAR, settings | changed)):
        dataset = VideoDataset(directory_of(built, form))
        assert dataset.storage.form == dataclasses.replace(form, as_shown=True)
        assert dataset.manifest["settings"] == stored
        for video, name in enumerate(dataset.video_ids):
            expected = read_frames(built / "videos" / f"{name}.mp4", 12, form)
            np.testing.assert_array_equal(dataset.read_frames(video), expected)


def test_the_error_of_another_form_has_the_command_that_builds_it(built, tmp_path):
    shutil.copytree(directory_of(built, CROP), directory_of(tmp_path, CROP))
    wanted = directory_of(tmp_path, SQUASH)
    with pytest.raises(DatasetError) as error:
        VideoDataset(wanted)
    message, command = str(error.value).split("; build it with: ")
    assert message == (
        f"no dataset in {wanted}: wanted is 32px_12f_raw_squash_shown_time (squash,"
        " bicubic), stored is 32px_12f_raw_shown_time (crop, bicubic)"
    )
    # The command needs nothing but the places of the source files.
    command = command.replace("=DIR", f"={built / 'videos'}")
    command = shlex.split(command.replace("=PATH", f"={built / 'mine.csv'}"))
    assert command[:3] == ["python", "-m", "data_prep.build"]
    assert build(command[3:]) == 0
    assert VideoDataset(wanted).storage.form == dataclasses.replace(SQUASH, as_shown=True)


def test_training_builds_the_form_of_its_model(shapes_data, tmp_path, capsys):
    shutil.copytree(shapes_data / "source", tmp_path / "source")  # Drawing takes longest.
    arguments = (
        *("--config=configs/shapes.py:smoke", *TINY, f"--config.data.data_dir={tmp_path}"),
        *("--config.model.backbone.resize=squash", f"--workdir={tmp_path / 'run'}"),
        "--config.data.train_split=nowhere",
    )
    line = error_of("drl_jax.train", *arguments, capsys=capsys)
    target = tmp_path / "shapes" / "64px_4f_raw_squash" / "1.0.0"
    assert f"the dataset in {target} has no split 'nowhere'" in line


# ---------------------------------------------------------------- models


def test_a_model_encodes_files_in_its_own_form(search_model, sources, tmp_path):
    config = search_model.config
    backbone = dataclasses.replace(config.model.backbone, resize="squash")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
    model = dataclasses.replace(search_model, config=config)
    files = sorted((sources / "videos").iterdir())
    form = FrameForm(64, "squash")
    frames = [read_frames(file, 4, form) for file in files]
    np.testing.assert_array_equal(model.read_video(files[0]).frames, frames[0])
    # An index has the same features, and those of a crop are others.
    update_index(model, sources / "videos", tmp_path / "index", storage="float32")
    hits = Index(tmp_path / "index", model).search(["a red circle"], top=3)[0]
    found = [hit.score for hit in sorted(hits, key=lambda hit: hit.path)]
    text = model.encode_text(["a red circle"])
    expected = model.similarity(text, model.encode_videos(frames))[0]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    cropped = model.similarity(text, search_model.encode_videos(files))[0]
    assert np.abs(cropped - expected).max() > 1e-3
    assert model.fingerprint != search_model.fingerprint
