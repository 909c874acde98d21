"""TensorBoard files of a run: one continuous curve, however often it was stopped."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from drl_jax.runtime.files import replacing

# Whether a record of a step with these tags stays when a run is resumed.
Keep = Callable[[int, Iterable[str]], bool]


def tensorboard_writers(workdir: Path, keep: Keep) -> list:
    """clu's TensorBoard writer, or none where TensorFlow is not installed.

    Args:
      workdir: directory of the run.
      keep: records of earlier files that the resumed run does not write again.
    """
    # TensorFlow, which only writes files here, prints about its optimisations otherwise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        from clu import metric_writers
    except ImportError:
        print("TensorFlow is not installed: no TensorBoard files, only metrics.jsonl")
        return []
    for path in workdir.glob("events.out.tfevents.*"):
        _rewrite(path, keep)
    return [metric_writers.SummaryWriter(str(workdir))]


def _rewrite(path: Path, keep: Keep) -> None:
    """Removes the records that are not kept, and what follows a damaged record."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    # The file's timestamp and name stay, so that TensorBoard reads several files in their order.
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        writer = RecordWriter(file)
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            tags = [value.tag for value in event.summary.value]
            if not tags or keep(event.step, tags):
                writer.write(record)
        writer.flush()
