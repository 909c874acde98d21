"""What TensorBoard shows of a run: pictures, texts, hyperparameters, and a profile on request."""

import io
import json
import re
import resource
import shutil

import numpy as np
import pytest
from PIL import Image
from support.commands import TINY, error_of
from support.files import refused
from support.finished_runs import assert_same_run, summaries

from drl_jax.evaluation.figures import block_maxima, interaction_figure, rendered
from drl_jax.models.interactions import Attribution
from drl_jax.runs.hooks import StepProfile, TrainingError
from drl_jax.runs.log_files import MetricsFile, TensorBoard, read_scalars
from drl_jax.train import main as train


@pytest.fixture(scope="module")
def arguments(shapes_data, tiny_weights):
    def make(workdir, *extra):
        return (
            "--config=configs/shapes.py:smoke",
            f"--workdir={workdir}",
            f"--config.data.data_dir={shapes_data}",
            *TINY,
            f"--config.model.init={tiny_weights}",
            "--config.train.log_every=4",
            "--config.train.pictures=True",
            *extra,
        )

    return make


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A run of two epochs of 6 steps, with a profile. Not to be changed."""
    workdir = tmp_path_factory.mktemp("tensorboard") / "run"
    assert train(arguments(workdir, "--profile_steps=3:4")) == 0
    return workdir


def test_pictures_of_each_evaluation(finished):
    shown = summaries(finished)
    tags = {"eval/similarity", *(f"eval/words_and_frames_{number}" for number in (1, 2))}
    assert tags < shown.keys()
    for tag in tags:
        assert [step for step, _ in shown[tag]] == [6, 12]
        pictures = [Image.open(io.BytesIO(value)).convert("RGB") for _, value in shown[tag]]
        # A picture of one tag has one size, and changes with the parameters.
        assert pictures[0].size == pictures[1].size
        assert min(pictures[0].size) > 300
        assert len(pictures[0].getcolors(1 << 24)) > 50
        assert pictures[0].tobytes() != pictures[1].tobytes()


def test_texts_and_hyperparameters(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    shown = summaries(finished)
    ((step, config),) = shown["run/config"]
    assert step == 0
    assert "| optim.lr | `0.0015` |" in config.decode()
    ((_, parameters),) = shown["run/parameters"]
    assert "backbone/token_embedding/embedding" in parameters.decode()

    events = EventAccumulator(str(finished))
    events.Reload()
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)
    start = metadata.parse_session_start_info_plugin_data(content["_hparams_/session_start_info"])
    assert start.hparams["model.interaction"].string_value == "wti"
    assert start.hparams["optim.lr"].number_value == 0.0015
    assert "train.log_every" not in start.hparams
    experiment = metadata.parse_experiment_plugin_data(content["_hparams_/experiment"])
    assert {info.name for info in experiment.hparam_infos} == set(start.hparams)
    tested = json.loads((finished / "result.json").read_text())["test"]
    for metric in experiment.metric_infos:
        direction, name = metric.name.tag.removeprefix("test/").split("_")
        ((step, value),) = shown[metric.name.tag]
        assert step == 12
        assert value == pytest.approx(tested[direction][re.sub(r"R(\d)", r"R@\1", name)])


def test_norms_are_of_the_steps_that_are_written(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == [4, 6, 8, 12]
    assert [line["step"] for line in lines if "train/param_norm" in line] == [4, 8, 12]
    for line in lines:
        if "train/loss" in line:
            both = line["train/t2v_loss"] + line["train/v2t_loss"]
            assert both / 2 == pytest.approx(line["train/contrastive_loss"], rel=1e-6)
            assert line["train/data_seconds"] >= 0
            # No peak of a CPU is known.
            assert "train/mfu" not in line


def test_a_run_that_was_killed_shows_everything_once(finished, arguments, tmp_path):
    """Killed in the second evaluation: its records are in the files, its metric is not attached."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "checkpoints" / "12" / "metrics.json").unlink()
    (run / "result.json").unlink()
    assert train(arguments(run)) == 0
    assert len(list(run.glob("events*"))) == 2
    assert_same_run(run, finished)


def test_a_log_that_cannot_be_read_is_not_begun_anew(finished, tmp_path):
    shutil.copy(finished / "metrics.jsonl", tmp_path)
    with refused(tmp_path / "metrics.jsonl"):
        for read in (read_scalars, MetricsFile):
            with pytest.raises(OSError, match="Too many levels of symbolic links"):
                read(tmp_path)


def test_a_line_that_cannot_be_written_names_its_file(tmp_path):
    writer = MetricsFile(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as error:
        writer.write_scalars(1, {"train/loss": 1.0})
    assert error.value.filename == str(tmp_path / "metrics.jsonl")


def test_a_file_of_events_that_cannot_be_written_is_named(tmp_path):
    """A limit of the size of files fails as a full disk does."""
    writer = TensorBoard(tmp_path, MetricsFile(tmp_path))
    (path,) = tmp_path.glob("events*")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            writer.write_scalars(1, {"train/loss": 1.0}), writer.flush()
        assert error.value.filename == str(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_orphaned_steps_are_dropped(tmp_path):
    """Of a run that was killed after step 3, whose last checkpoint is of step 2."""
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        metrics = MetricsFile(tmp_path, start)
        writer = TensorBoard(tmp_path, metrics)
        for step in steps:
            scalars = {"train/loss": float(start + step)}
            for target in (metrics, writer):
                target.write_scalars(step, scalars)
        writer.close()
    expected = [(1, 1.0), (2, 2.0), (3, 5.0), (4, 6.0)]
    assert summaries(tmp_path) == {"train/loss": expected}
    assert [tuple(line.values()) for line in read_scalars(tmp_path)] == expected


def test_a_profile_of_some_steps(finished, arguments, tmp_path, capsys):
    (trace,) = (finished / "plugins" / "profile").glob("*/*.xplane.pb")
    assert b"train_step" in trace.read_bytes()
    for value, message in (
        ("100", "must be FIRST:LAST, e.g. 100:105, not '100'"),
        ("a:b", "must be FIRST:LAST"),
        ("0:3", "steps count from 1"),
        ("5:4", "FIRST <= LAST"),
        ("10:13", "--profile_steps=10:13: the run ends with step 12"),
    ):
        flags = arguments(tmp_path / "run", f"--profile_steps={value}")
        assert message in error_of("drl_jax.train", *flags, capsys=capsys)
        assert not (tmp_path / "run").exists()


def test_a_profile_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "plugins").touch()
    message = f"the profile cannot be written to {tmp_path / 'plugins' / 'profile'}"
    profile = StepProfile(tmp_path, range(1, 2))
    profile.before_step(1, None)
    with pytest.raises(TrainingError, match=message):
        profile.after_step(1, None, {})


def test_block_maxima():
    matrix = np.arange(35.0).reshape(5, 7)
    cells, block = block_maxima(matrix, 3)
    assert block == (2, 3)
    np.testing.assert_array_equal(cells, [[9, 12, 13], [23, 26, 27], [30, 33, 34]])
    same, block = block_maxima(matrix, 7)
    assert block == (1, 1)
    np.testing.assert_array_equal(same, matrix)


@pytest.mark.filterwarnings("error")
def test_captions_of_any_characters_are_drawn():
    """Dollar signs are no formula, and characters that the font lacks are boxes."""
    words = ["[start]", "$5", "for_", "$", "视频", "\\frac", "[end]"]
    rng = np.random.default_rng(0)
    pair = Attribution(rng.random((7, 2)), np.full(7, 1 / 7), np.full(2, 0.5), np.ones(2))
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    figure = interaction_figure(pair, words, ["frame 1", "frame 2"], frames, " ".join(words))
    pixels = rendered(figure, 50)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert pixels.std() > 0
