"""Log files of a run that cannot be read or written, or were left behind; and its pictures."""

import resource

import numpy as np
import pytest
from support.files import limit, refused
from support.finished_runs import summaries

from drl_jax.evaluation.figures import block_maxima, interaction_figure, rendered
from drl_jax.models.interactions import Attribution
from drl_jax.runs.hooks import StepProfile, TrainingError
from drl_jax.runs.log_files import MetricsFile, TensorBoard, read_scalars


def test_a_log_that_cannot_be_read_is_not_begun_anew(tmp_path):
    MetricsFile(tmp_path).write_scalars(1, {"train/loss": 1.0})
    with refused(tmp_path / "metrics.jsonl"):
        for read in (read_scalars, MetricsFile):
            with pytest.raises(OSError, match="Too many levels of symbolic links"):
                read(tmp_path)


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    scalars, metrics = {"train/loss": 1.0}, MetricsFile(tmp_path)
    events = TensorBoard(tmp_path, metrics)
    (path,) = tmp_path.glob("events*")
    events.write_scalars(1, scalars)
    for write, name in (
        (lambda: metrics.write_scalars(1, scalars), "metrics.jsonl"),
        (events.flush, path.name),
    ):
        with (
            limit(resource.RLIMIT_FSIZE, 0),
            pytest.raises(OSError, match="File too large") as error,
        ):
            write()
        assert error.value.filename == str(tmp_path / name)


def test_a_profile_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "plugins").touch()
    message = f"the profile cannot be written to {tmp_path / 'plugins' / 'profile'}"
    profile = StepProfile(tmp_path, range(1, 2))
    profile.before_step(1, None)
    with pytest.raises(TrainingError, match=message):
        profile.after_step(1, None, {})


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
