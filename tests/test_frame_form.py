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
from support.videos import SHARED, write_video, write_video_turned_right

from data_prep.build import main as build
from data_prep.check import main as check
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


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("height", "width"), [(40, 90), (91, 33), (25, 23), (32, 32)])
def test_squash_is_pils_resize_of_the_decoded_frame(height, width, interpolation, tmp_path):
    """Also of odd sizes, which become smaller on one side and larger on the other."""
    write_video(tmp_path / "v.mkv", noise(5, height, width), fps=2)
    found = read_frames(tmp_path / "v.mkv", 12, FrameForm(32, "squash", interpolation))
    pictures = decoded(tmp_path / "v.mkv")[::2]
    assert pictures[0].shape == (height, width, 3)
    np.testing.assert_array_equal(found, squashed(pictures, 32, interpolation))


def test_bilinear_crop_is_the_centre_of_pils_resize(tmp_path):
    write_video(tmp_path / "v.mkv", noise(1, 40, 60), fps=2)
    found = read_frames(tmp_path / "v.mkv", 1, FrameForm(20, "crop", "bilinear"))
    (picture,) = map(Image.fromarray, decoded(tmp_path / "v.mkv"))
    expected = picture.resize((30, 20), FILTERS["bilinear"]).crop((5, 0, 25, 20))
    np.testing.assert_array_equal(found[0], np.asarray(expected))


def test_a_turned_video_is_upright_before_it_is_squashed(tmp_path):
    write_video_turned_right(tmp_path / "v.mp4", noise(2, 40, 90), fps=1)
    upright = [np.rot90(picture, -1) for picture in decoded(tmp_path / "v.mp4")]
    assert upright[0].shape == (90, 40, 3)
    np.testing.assert_array_equal(
        read_frames(tmp_path / "v.mp4", 12, SQUASH), squashed(upright, 32, "bicubic")
    )


@pytest.mark.parametrize("form", [CROP, SQUASH])
def test_a_video_can_be_used_in_every_form_or_in_none(form, tmp_path):
    write_video(tmp_path / "thin.mkv", noise(2, 2, 320), fps=2)
    with pytest.raises(VideoError, match="320 x 2"):
        read_frames(tmp_path / "thin.mkv", 12, form)


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason="no real clips beside the project")
@pytest.mark.parametrize("name", ["carphone.mp4", "decord_video_90.mov", "fire2.mp4"])
@pytest.mark.parametrize("interpolation", FILTERS)
def test_squash_of_real_clips(name, interpolation):
    path = SHARED / "clips" / name
    found = read_frames(path, 1, FrameForm(224, "squash", interpolation))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation) % 360 // 90)
    assert upright.shape[0] != upright.shape[1]
    np.testing.assert_array_equal(found, squashed([upright], 224, interpolation))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (FrameForm(224), "224px_12f_jpeg"),
        (FrameForm(256, "squash"), "256px_12f_jpeg_squash"),
        (FrameForm(224, "squash", "bilinear"), "224px_12f_jpeg_squash_bilinear"),
        (FrameForm(224, "crop", "bilinear"), "224px_12f_jpeg_bilinear"),
    ],
)
def test_names_and_flags_of_variants(form, name, tmp_path):
    storage = StorageSpec(form, 12, "jpeg")
    assert storage.name == name
    assert StorageSpec.from_name(name) == storage
    backbone = BackboneConfig(
        image_resolution=form.size, resize=form.resize, interpolation=form.interpolation
    )
    assert StorageSpec.of(Config(model=ModelConfig(backbone=backbone))) == storage
    cache = FrameCache(tmp_path, storage).directory.name
    assert cache.startswith(f"{name}_av")


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


def flags(root, *extra):
    sources = (f"--videos={root / 'videos'}", f"--annotations={root / 'mine.csv'}")
    return ["custom", *sources, f"--data_dir={root / 'data'}", "--image_size=32", *extra]


@pytest.fixture(scope="module")
def built(sources) -> Path:
    """The same videos in three forms, in one data directory."""
    for form in ([], ["--resize=squash"], ["--resize=squash", "--interpolation=bilinear"]):
        assert build(flags(sources, "--storage=raw", *form)) == 0
    return sources


def directory_of(root, form):
    backbone = BackboneConfig(
        image_resolution=form.size, resize=form.resize, interpolation=form.interpolation
    )
    data = DataConfig(dataset="custom", data_dir=str(root / "data"), storage="raw", holdout=1)
    return dataset_dir(Config(data=data, model=ModelConfig(backbone=backbone)))


@pytest.mark.parametrize("form", [CROP, SQUASH, FrameForm(32, "squash", "bilinear")])
def test_a_model_reads_frames_of_its_own_form(form, built):
    dataset = VideoDataset(directory_of(built, form))
    assert dataset.storage.form == form
    for video, name in enumerate(dataset.video_ids):
        expected = read_frames(built / "videos" / f"{name}.mp4", 12, form)
        np.testing.assert_array_equal(dataset.read_frames(video), expected)


def test_manifests_name_the_form_where_it_is_not_the_default(built):
    settings = {"image_size": 32, "max_frames": 12, "storage": "raw"}
    squash = {**settings, "resize": "squash"}
    assert VideoDataset(directory_of(built, CROP)).manifest["settings"] == settings
    assert VideoDataset(directory_of(built, SQUASH)).manifest["settings"] == squash


@pytest.mark.parametrize(("stored", "wanted"), [(SQUASH, CROP), (CROP, SQUASH)])
def test_the_error_of_another_form_has_the_command_that_builds_it(stored, wanted, built, tmp_path):
    shutil.copytree(built / "videos", tmp_path / "videos")
    shutil.copytree(directory_of(built, stored), directory_of(tmp_path, stored))
    with pytest.raises(DatasetError) as error:
        VideoDataset(directory_of(tmp_path, wanted))
    message, command = str(error.value).split("; build it with: ")
    name = {"crop": "32px_12f_raw", "squash": "32px_12f_raw_squash"}
    assert message == (
        f"no dataset in {directory_of(tmp_path, wanted)}:"
        f" wanted is {name[wanted.resize]} ({wanted.resize}, bicubic),"
        f" stored is {name[stored.resize]} ({stored.resize}, bicubic)"
    )
    # The command needs nothing but the places of the source files.
    command = command.replace("=DIR", f"={tmp_path / 'videos'}")
    command = shlex.split(command.replace("=PATH", f"={built / 'mine.csv'}"))
    assert command[:3] == ["python", "-m", "data_prep.build"]
    assert build(command[3:]) == 0
    assert VideoDataset(directory_of(tmp_path, wanted)).storage.form == wanted


def test_a_dataset_under_the_name_of_another_form_is_refused(built, tmp_path):
    for stored, named in ((CROP, SQUASH), (SQUASH, CROP)):
        target = directory_of(tmp_path, named)
        shutil.copytree(directory_of(built, stored), target)
        with pytest.raises(DatasetError, match=f"manifest.json says {stored.resize}, bicubic"):
            VideoDataset(target)


def test_check_takes_every_form(built, capsys):
    assert check(flags(built, "--resize=squash", "--interpolation=bilinear")) == 0
    printed = capsys.readouterr().out
    assert "a build of 32px_12f_jpeg_squash_bilinear stores 3 videos, 9 frames" in printed


def test_training_builds_the_form_of_its_model(tmp_path, capsys):
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
