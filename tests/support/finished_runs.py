"""Compares runs by what they wrote."""

import json
from pathlib import Path

import pytest

from drl_jax.runs.hooks import TIMING_TAGS


def summaries(workdir: Path) -> dict[str, list[tuple]]:
    """What TensorBoard shows by tag, without the speed: steps and scalars, pictures or texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0, "images": 0, "scalars": 0})
    events.Reload()
    kinds = {
        "scalars": (events.Scalars, lambda event: event.value),
        "images": (events.Images, lambda event: event.encoded_image_string),
        "tensors": (events.Tensors, lambda event: make_ndarray(event.tensor_proto).tolist()),
    }
    return {
        tag: [(event.step, value_of(event)) for event in read(tag)]
        for kind, (read, value_of) in kinds.items()
        for tag in events.Tags()[kind]
        if tag not in TIMING_TAGS
    }


def metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without the speed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{tag: line[tag] for tag in line if tag not in TIMING_TAGS} for line in lines]


def assert_same_run(workdir: Path, expected: Path) -> None:
    """Two runs have the same metrics, results and parameters, and TensorBoard has them once."""
    assert metrics(workdir) == metrics(expected)
    results = [json.loads((run / "result.json").read_text()) for run in (workdir, expected)]
    assert results[0] == results[1]
    shown = summaries(workdir)
    steps = {tag: [step for step, _ in values] for tag, values in shown.items()}
    for tag in {tag for line in metrics(workdir) for tag in line} - {"step"}:
        points = [(line["step"], line[tag]) for line in metrics(workdir) if tag in line]
        assert steps[tag] == [step for step, _ in points], tag
        assert [value for _, value in shown[tag]] == pytest.approx([value for _, value in points])
    # Pictures, texts and hyperparameters.
    for tag, values in summaries(expected).items():
        expected_steps = [step for step, _ in values]
        assert [step for step, _ in shown[tag]] == expected_steps == sorted(set(expected_steps)), (
            tag
        )
    steps = [line["step"] for line in metrics(workdir)]
    assert steps == sorted(steps)
