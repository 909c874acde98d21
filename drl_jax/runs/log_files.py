"""The log files of a run: `metrics.jsonl`, which has every scalar, and those of TensorBoard."""

import io
import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from drl_jax.config import Config
from drl_jax.models.drl import Params
from drl_jax.runs.workdir import RESUMABLE_FIELDS, flatten
from drl_jax.runtime.files import naming, write_text

METRICS_FILE = "metrics.jsonl"
# Metrics of the test in TensorBoard's table of runs.
_TESTED = ("t2v_R1", "v2t_R1", "t2v_R5", "t2v_R10", "t2v_MnR")


class MetricsFile:
    """Appends scalars to `metrics.jsonl`: one object per write, with "step" and the tags.

    Attributes:
      first: the first step whose evaluation the run writes again.
      lines: the objects of earlier starts that stay.
      removed: those that this start writes again.
    """

    def __init__(self, workdir: Path, step: int = 0, *, evaluated: bool = False):
        """Removes the lines that are damaged or that a run that resumes from `step` writes again.

        Args:
          evaluated: whether the evaluation of `step` stays. Every start writes the test again.

        Raises:
          OSError: the file cannot be read or written.
        """
        self._path, self.first = workdir / METRICS_FILE, step + evaluated
        self.lines: list[dict[str, float]] = []
        self.removed: list[dict[str, float]] = []
        text = _read(self._path)
        found = [_parse(line) for line in text.splitlines()]
        for line in filter(None, found):
            groups = {tag.partition("/")[0] for tag in line}
            at_step = line["step"] == step and "test" not in groups
            kept = line["step"] < step or (at_step and (evaluated or "eval" not in groups))
            (self.lines if kept else self.removed).append(line)
        damaged = [number for number, line in enumerate(found, start=1) if line is None]
        # A crash can truncate the last line.
        if damaged and (damaged[0] != len(found) or text.endswith("\n")):
            print(f"{self._path}: removed {len(damaged)} damaged lines, the first: {damaged[0]}")
        if found:
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = {tag: float(value) for tag, value in scalars.items()}
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_scalars(workdir: Path) -> list[dict[str, float]]:
    """The objects of `metrics.jsonl` of a run, without damaged lines; none without the file."""
    return list(filter(None, map(_parse, _read(workdir / METRICS_FILE).splitlines())))


def _read(path: Path) -> str:
    try:
        with naming(path):
            return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _parse(line: str) -> dict[str, float] | None:
    try:
        values = json.loads(line)
        scalars = {tag: float(values[tag]) for tag in values if tag != "step"}
        return {"step": int(values["step"]), **scalars}
    except (ValueError, LookupError, TypeError, OverflowError):
        return None


class TensorBoard:
    """Writes a file of events, without TensorFlow; the methods are those of clu's `MetricWriter`.

    TensorBoard shows one continuous curve of a run that was killed: each file begins with an event
    that makes it drop the later steps of earlier files.
    """

    def __init__(self, workdir: Path, metrics: MetricsFile):
        """Opens a file; it gets the scalars that stay in `metrics` and that TensorBoard drops.

        Raises:
          ImportError: TensorBoard is not installed.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        first = metrics.first
        self.is_new = first == 0 or not any(workdir.glob("events.out.tfevents.*"))
        # A run that was tested before shows its test already.
        self._shown = [line for line in metrics.removed if line["step"] < first]
        # Files are read in the order of their names.
        self._path = workdir / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._event = Event
        with naming(self._path):
            self._records = RecordWriter(self._path.open("xb"))
        self._write(0, file_version="brain.Event:2")
        self._write(first, session_log=SessionLog(status=SessionLog.START))
        for line in metrics.lines:
            if self.is_new or line["step"] >= first:
                self.write_scalars(line["step"], {tag: line[tag] for tag in line if tag != "step"})
        self.flush()

    def describe(self, config: Config, params: Params) -> None:
        """Writes configuration and table of parameters, as texts and as hyperparameters."""
        from clu import parameter_overview
        from tensorboard.plugins.hparams import summary_v2 as hparams
        from tensorboard.plugins.text.summary_v2 import text_pb

        fields = flatten(config)
        rows = "\n".join(f"| {name} | `{value!r}` |" for name, value in fields.items())
        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        # Those that results depend on; the backbone is that of `model.init`. TensorBoard knows
        # numbers, truth values and strings.
        hyperparameters = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in fields.items()
            if name not in RESUMABLE_FIELDS and not name.startswith("model.backbone.")
        }
        # Without it, TensorBoard shows the first tags of the alphabet as the results of a run.
        experiment = hparams.hparams_config_pb(
            [hparams.HParam(name) for name in hyperparameters],
            [hparams.Metric(f"test/{name}") for name in _TESTED],
        )
        for summary in (
            text_pb("run/config", f"| field | value |\n| --- | --- |\n{rows}"),
            text_pb("run/parameters", f"```\n{table}\n```"),
            experiment,
            hparams.hparams_pb(hyperparameters),
        ):
            self._write(0, summary=summary)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if {"step": step, **scalars} not in self._shown:
            self._write_values(step, {tag: {"simple_value": v} for tag, v in scalars.items()})

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images uint8 [H, W, 3]."""
        values = {}
        for tag, pixels in images.items():
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            height, width, channels = pixels.shape
            size = {"height": height, "width": width, "colorspace": channels}
            values[tag] = {"image": {**size, "encoded_image_string": png.getvalue()}}
        self._write_values(step, values)

    def _write_values(self, step: int, values: Mapping[str, Mapping[str, Any]]) -> None:
        summary = {"value": [{"tag": tag, **value} for tag, value in values.items()]}
        self._write(step, summary=summary)

    def _write(self, step: int, **content: Any) -> None:
        event = self._event(wall_time=time.time(), step=step, **content)
        with naming(self._path):
            self._records.write(event.SerializeToString())

    def flush(self) -> None:
        with naming(self._path):
            self._records.flush()

    def close(self) -> None:
        with naming(self._path):
            self._records.close()
