"""Compares runs by what they wrote."""

import json
from pathlib import Path

import pytest


def metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without the speed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("train/examples_per_second", None)
    return lines


def curve(workdir: Path, tag: str) -> list[tuple[int, float]]:
    """The points that TensorBoard shows of a tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(workdir))
    events.Reload()
    return [(e.step, float(make_ndarray(e.tensor_proto))) for e in events.Tensors(tag)]


def assert_same_run(workdir: Path, expected: Path) -> None:
    """Two runs have the same metrics, results and parameters, and TensorBoard has them once."""
    assert metrics(workdir) == metrics(expected)
    results = [json.loads((run / "result.json").read_text()) for run in (workdir, expected)]
    assert results[0] == results[1]
    for tag in ("train/loss", "eval/t2v_R1"):
        points = [(line["step"], line[tag]) for line in metrics(workdir) if tag in line]
        shown = curve(workdir, tag)
        assert [step for step, _ in shown] == [step for step, _ in points]
        assert [value for _, value in shown] == pytest.approx([value for _, value in points])
    steps = [line["step"] for line in metrics(workdir)]
    assert steps == sorted(steps)
