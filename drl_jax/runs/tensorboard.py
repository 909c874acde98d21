"""TensorBoard files of a run: one continuous curve, however often it was stopped."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drl_jax.config import Config
from drl_jax.models.drl import Params
from drl_jax.runs.workdir import RESUMABLE_FIELDS, flatten
from drl_jax.runtime.errors import raise_if_refused
from drl_jax.runtime.files import naming, replacing

if TYPE_CHECKING:
    from clu.metric_writers import MetricWriter

# Whether a record of a step with these tags stays when a run is resumed.
Keep = Callable[[int, Iterable[str]], bool]
# Tags of what `describe` writes; TensorBoard chooses those of hyperparameters.
_CONFIG, _PARAMETERS = "run/config", "run/parameters"
_DESCRIPTION = (_CONFIG, _PARAMETERS, "_hparams_/experiment", "_hparams_/session_start_info")
# Metrics of the test in the table of runs.
_TESTED = ("t2v_R1", "v2t_R1", "t2v_R5", "t2v_R10", "t2v_MnR")


def tensorboard_writer(
    workdir: Path, keep: Keep, lines: Sequence[Mapping[str, float]]
) -> "MetricWriter | None":
    """clu's TensorBoard writer, or None where TensorFlow is not installed.

    Args:
      workdir: directory of the run.
      keep: records of earlier files that the resumed run does not write again.
      lines: what the files have to contain: "step" and tags, as in `metrics.jsonl`. If they do not,
        because they are damaged or missing, the scalars are written again, with the time of now;
        pictures that can be read stay.
    """
    # TensorFlow, which only writes files here, prints about its optimisations otherwise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        from clu import metric_writers
    except ImportError:
        print("TensorFlow is not installed: no TensorBoard files, only metrics.jsonl")
        return None

    def keep_old(step: int, tags: Iterable[str]) -> bool:
        return not set(tags) & set(_DESCRIPTION) and keep(step, tags)

    files = sorted(workdir.glob("events.out.tfevents.*"))
    found = {point for path in files for point in _rewrite(path, keep_old)}
    wanted = {(line["step"], tag) for line in lines for tag in line if tag != "step"}
    complete = found == wanted
    if not complete:
        for path in files:
            _rewrite(path, keep_old, scalars=False)
    writer = metric_writers.SummaryWriter(str(workdir))
    if not complete:
        print(f"the TensorBoard files in {workdir} are written again from metrics.jsonl")
        for line in lines:
            writer.write_scalars(
                line["step"], {tag: value for tag, value in line.items() if tag != "step"}
            )
    return writer


@contextlib.contextmanager
def writing(workdir: Path) -> Iterator[None]:
    """Reports an error of the disk in the block, which uses the writer.

    Raises:
      Unavailable: the files cannot be written.
    """
    try:
        yield
    except Exception as error:
        raise_if_refused(f"the TensorBoard files in {workdir}", error, "written")
        raise


def describe(writer: "MetricWriter", config: Config, params: Params) -> None:
    """Writes the configuration and the table of parameters, as texts and as hyperparameters.

    `tensorboard_writer` removes those of an earlier start, so that a run has them once.

    Args:
      writer: that of `tensorboard_writer`.
      config: of the run.
      params: its parameters, or their shapes.
    """
    from clu import parameter_overview
    from tensorboard.plugins.hparams import api

    fields = flatten(config)
    rows = "\n".join(f"| {name} | `{value!r}` |" for name, value in fields.items())
    table = parameter_overview.get_parameter_overview(params, include_stats=False)
    config_table = f"| field | value |\n| --- | --- |\n{rows}"
    writer.write_texts(0, {_CONFIG: config_table, _PARAMETERS: f"```\n{table}\n```"})
    # Those that results depend on; the backbone is that of `model.init`. TensorBoard knows numbers,
    # truth values and strings.
    hyperparameters = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in fields.items()
        if name not in RESUMABLE_FIELDS and not name.startswith("model.backbone.")
    }
    experiment = api.hparams_config_pb(
        hparams=[api.HParam(name) for name in hyperparameters],
        metrics=[api.Metric(f"test/{name}") for name in _TESTED],
    ).value[0]
    # Without it, TensorBoard shows the first tags of the alphabet as the results of a run.
    metadata = experiment.metadata.SerializeToString()
    writer.write_summaries(0, {experiment.tag: 0.0}, {experiment.tag: metadata})
    writer.write_hparams(hyperparameters)


def _rewrite(path: Path, keep: Keep, *, scalars: bool = True) -> set[tuple[int, str]]:
    """Removes the records that are not kept, and what follows a damaged record.

    Args:
      path: of a file.
      keep: which records stay.
      scalars: whether scalars may stay.

    Returns:
      The steps and tags of the scalars that stay.

    Raises:
      OSError: it cannot be read or written.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    points = set()
    # An error of the disk, which TensorFlow reports in its own way, must not be taken for damage.
    with naming(path):
        path.read_bytes()
    # The file's timestamp and name stay, so that TensorBoard reads several files in their order.
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        writer = RecordWriter(file)
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            tags = [value.tag for value in event.summary.value]
            plugins = {value.metadata.plugin_data.plugin_name for value in event.summary.value}
            is_scalar = plugins == {"scalars"}
            if not tags or (keep(event.step, tags) and (scalars or not is_scalar)):
                writer.write(record)
                points |= {(event.step, tag) for tag in tags if is_scalar}
        writer.flush()
    return points
