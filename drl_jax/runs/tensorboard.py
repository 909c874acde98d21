"""TensorBoard files of a run: one continuous curve, however often it was stopped."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from drl_jax.runtime.files import replacing

# Whether a record of a step with these tags stays when a run is resumed.
Keep = Callable[[int, Iterable[str]], bool]


def tensorboard_writers(workdir: Path, keep: Keep, lines: Sequence[Mapping[str, float]]) -> list:
    """clu's TensorBoard writer, or none where TensorFlow is not installed.

    Args:
      workdir: directory of the run.
      keep: records of earlier files that the resumed run does not write again.
      lines: what the files have to contain: "step" and tags, as in `metrics.jsonl`. If they do not,
        because they are damaged or missing, they are written again, with the time of now.
    """
    # TensorFlow, which only writes files here, prints about its optimisations otherwise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        from clu import metric_writers
    except ImportError:
        print("TensorFlow is not installed: no TensorBoard files, only metrics.jsonl")
        return []
    files = sorted(workdir.glob("events.out.tfevents.*"))
    found = {point for path in files for point in _rewrite(path, keep)}
    wanted = {(line["step"], tag) for line in lines for tag in line if tag != "step"}
    complete = found == wanted
    if not complete:
        for path in files:
            path.unlink()
    writer = metric_writers.SummaryWriter(str(workdir))
    if not complete:
        print(f"the TensorBoard files in {workdir} are written again from metrics.jsonl")
        for line in lines:
            writer.write_scalars(
                line["step"], {tag: value for tag, value in line.items() if tag != "step"}
            )
    return [writer]


def _rewrite(path: Path, keep: Keep) -> set[tuple[int, str]]:
    """Removes the records that are not kept, and what follows a damaged record.

    Returns:
      The steps and tags that stay.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    points = set()
    # The file's timestamp and name stay, so that TensorBoard reads several files in their order.
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        writer = RecordWriter(file)
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            tags = [value.tag for value in event.summary.value]
            if not tags or keep(event.step, tags):
                writer.write(record)
                points |= {(event.step, tag) for tag in tags}
        writer.flush()
    return points
