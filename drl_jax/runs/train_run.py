"""Trains a run: the loop, its evaluations and checkpoints, and the final test."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from drl_jax.config import Config, ConfigError, TrainConfig
from drl_jax.data.batches import TrainBatches, load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.data.storage import StorageSpec
from drl_jax.evaluation.bootstrap import intervals
from drl_jax.evaluation.evaluator import Evaluator, check_split
from drl_jax.evaluation.metrics import format_table
from drl_jax.models.drl import Params, abstract_params
from drl_jax.models.tokenizers import load_tokenizer
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.checksums import params_digest
from drl_jax.runs.logging import TrainLog
from drl_jax.runs.manifest import differences, recorded
from drl_jax.runs.nonfinite import NonFiniteBatches, TrainingError
from drl_jax.runs.pictures import EvaluationPictures
from drl_jax.runs.profile import StepProfile
from drl_jax.runs.protocol_card import ProtocolCard, protocol_card
from drl_jax.runs.rank_files import evaluation_path, write_ranks
from drl_jax.runs.wall_time import WallTime
from drl_jax.runs.workdir import exclusive, read_manifest
from drl_jax.runtime.distributed import StopPoll, failing_together, is_main
from drl_jax.runtime.errors import Interrupted, UserError, one_line
from drl_jax.runtime.files import write_json
from drl_jax.runtime.signals import StopRequest
from drl_jax.runtime.worker_pool import run_module
from drl_jax.sharding import Layout, make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.state import TrainState, abstract_state, create_state, state_from_params
from drl_jax.training.train_step import make_train_step
from drl_jax.weights.load import head_start, initial_params, with_backbone_of
from drl_jax.weights.weights_file import read_weights

RESULT_FILE = "result.json"


def train(
    config: Config,
    workdir: Path,
    *,
    reproduce: Path | None = None,
    profile_steps: range = range(0),
) -> dict[str, Any]:
    """Trains, evaluates every epoch on val, and tests the best checkpoint.

    Args:
      config: the configuration.
      workdir: directory for checkpoints, logs and results. A run in it is resumed.
      reproduce: manifest of a run that this one has to repeat.
      profile_steps: steps to trace, from 1; those that the run has made already are left out.

    Returns:
      The content of `result.json`: {"test": {"t2v": .., "v2t": ..}, "card": .., "best_step": ..,
      ..}.

    Raises:
      UserError: wrong configuration, missing data, another run or another training in `workdir`,
        damaged checkpoints, a loss that is not finite, or SIGINT, SIGTERM or SIGHUP (after a
        checkpoint).
    """
    wall_time = WallTime()
    # ---------------------------------------------------------------- devices, weights, data
    layout = make_layout(fsdp=config.sharding.fsdp)
    _check_divisible(config.train, layout)
    with failing_together(UserError):
        pretrained = None
        if config.model.init:
            weights = read_weights(config.model.init, config.model.release)
            config = with_backbone_of(config, weights)
            if is_main():
                print(
                    f"{config.model.init}: {weights.description};"
                    f" {head_start(config.model, weights)}"
                )
            pretrained = initial_params(config.model, weights, jax.random.key(config.seed))
            del weights
        tokenizer = load_tokenizer(config.model)
        wall_time.spent_on("start")
        dataset = _open_dataset(config)
        wall_time.spent_on("dataset")
        batches = TrainBatches(
            dataset,
            load_split(dataset, "train", config.data),
            config.data,
            config.train.batch_size,
            config.seed,
            tokenizer,
        )
        val, test = (load_split(dataset, name, config.data) for name in ("val", "test"))
        for name, split in (("val", val), ("test", test)):
            check_split(name, split, dataset, tokenizer, config.data.max_words)
        if reproduce is not None:
            _print_differences(reproduce, config, dataset)
    steps_per_epoch = batches.steps_per_epoch
    total_steps = config.train.epochs * steps_per_epoch
    if profile_steps and profile_steps[-1] > total_steps:
        raise ConfigError(
            f"--profile_steps={profile_steps[0]}:{profile_steps[-1]}: the run ends with step"
            f" {total_steps}"
        )

    # ---------------------------------------------------------------- model and optimiser
    tx = make_optimizer(config.optim, total_steps)
    step_function = make_train_step(
        config.model,
        config.loss,
        tx,
        layout,
        seed=config.seed,
        microbatch=config.train.microbatch,
        norms_every=config.train.log_every,
    )
    evaluator = Evaluator(config, dataset, layout)
    abstract = abstract_params(config.model, layout)

    # Nothing is written before all of the above succeeds.
    with (
        _memory_errors(config),
        exclusive(workdir),
        recorded(workdir, config, dataset, wall_time) as record,
        Checkpoints(
            workdir, config.train.keep_checkpoints, identity=record.identity
        ) as checkpoints,
        StopRequest() as stop,
        StepProfile(workdir, profile_steps, wall_time) as profile,
    ):
        # Order of initialisation: resume > init > random.
        restored = checkpoints.restore_latest(abstract_state(config.model, tx, layout))
        if restored is not None:
            state, saved = restored
        else:
            record.check_weights(config)
            state, saved = _new_state(config, pretrained, tx, layout), {}
        del pretrained, restored
        start = int(state.step)
        if saved and is_main():
            print(f"resuming {workdir} from step {start} of {total_steps}")
        evaluated = bool(saved) and checkpoints.is_evaluated(start)
        record.start(checkpoints.identity.run, start, total_steps)
        nonfinite = NonFiniteBatches(workdir, config.train, batches, saved.get("skipped", []))

        # ---------------------------------------------------------------- the loop
        with TrainLog(
            workdir,
            config,
            start,
            total_steps,
            evaluated=evaluated,
            unlogged=saved.get("unlogged", []),
            accept=nonfinite.report,
            pictures=EvaluationPictures(config, dataset, val, tokenizer),
            wall_time=wall_time,
        ) as log:
            log.announce(dataset, batches, layout, abstract)

            def evaluate(step: int, state: TrainState) -> None:
                evaluation = evaluator.run(state.params, val)
                wall_time.spent_on("evaluation")
                log.evaluation(step, evaluation)
                checkpoints.attach_metric(step, evaluation.metrics["t2v"]["R@1"])
                wall_time.spent_on("checkpoints")

            def evaluate_again(step: int) -> None:
                if is_main():
                    print(f"the metric of checkpoint {step} is damaged; evaluating it again")
                params = checkpoints.restore_or_set_aside(step, abstract)
                if params is not None:
                    metrics = evaluator.run(params, val).metrics
                    checkpoints.attach_metric(step, metrics["t2v"]["R@1"])

            if total_steps == 0 and not saved:
                checkpoints.save(state)
            for step in checkpoints.with_damaged_metric():
                if step != start:
                    evaluate_again(step)
            # For a new run without epochs, or a run that was killed in the evaluation of an epoch.
            if not evaluated and start % steps_per_epoch == 0 and (start or total_steps == 0):
                evaluate(start, state)
            stream = batches.on_devices(start, layout)
            stop_requested = StopPoll(lambda: stop.pending)
            wall_time.spent_on("start")
            for step in range(start + 1, total_steps + 1):
                profile.before(step, state)
                batch = next(stream)
                wall_time.spent_on("data")
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, scalars = step_function(state, batch)
                # The first call compiles, all others return at once.
                wall_time.spent_on("compilation" if step == start + 1 else "steps")
                log.train_step(step, scalars)
                profile.after(step, state)
                stopping = stop_requested(step)
                ends_epoch = step % steps_per_epoch == 0
                due = ends_epoch or _is_due(step, config.train.checkpoint_every)
                if due:
                    log.write_means(step)
                if due or stopping:
                    # Before the evaluation, which may take long.
                    unlogged = log.before_checkpoint()
                    checkpoints.save(state, unlogged=unlogged, skipped=nonfinite.steps)
                    record.step = step
                    wall_time.spent_on("checkpoints")
                # Resuming evaluates the checkpoint of an epoch that was not evaluated.
                if ends_epoch and not stopping:
                    evaluate(step, state)
                if stopping:
                    checkpoints.wait()
                    raise Interrupted(f"stopped after step {step}; rerun the command to resume")

            # ---------------------------------------------------------------- test of the best
            if stop_requested.now():
                raise Interrupted(f"stopped before the test of step {total_steps}; rerun to resume")
            best_step, params = checkpoints.restore_best(abstract)
            tested = evaluator.run(params, test)
            card = protocol_card(
                workdir,
                config,
                dataset,
                "test",
                test,
                checkpoint="best",
                step=best_step,
                parameters_sha256=params_digest(params),
            )
            result = {
                "test": tested.metrics,
                "test_intervals": intervals(tested.ranks),
                "val": evaluator.run(params, val).metrics,
                "card": card.as_dict(),
                "best_step": best_step,
                "total_steps": total_steps,
                "skipped_steps": nonfinite.steps,
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            }
            wall_time.spent_on("evaluation")
            log.test(total_steps, result["test"], best_step)
        if is_main():
            path = evaluation_path(workdir, "test", best_step)
            write_ranks(path.with_suffix(".npz"), tested.ranks, card)
            write_json(workdir / RESULT_FILE, result)
            _print_result(result, card, wall_time)
    return result


def _print_result(result: dict[str, Any], card: ProtocolCard, wall_time: WallTime) -> None:
    best, total = result["best_step"], result["total_steps"]
    print(f"test of the best checkpoint, step {best} of {total}:")
    print(format_table(result["test"]))
    print(f"protocol\n{card}")
    print(f"time: {wall_time}")


def _new_state(config: Config, pretrained: Params | None, tx: Any, layout: Layout) -> TrainState:
    """The state before the first step."""
    if pretrained is None:
        return create_state(config.model, tx, config.seed, layout)
    return state_from_params(pretrained, tx, layout)


def _print_differences(manifest: Path, config: Config, dataset: VideoDataset) -> None:
    found = differences(read_manifest(manifest), config, dataset)
    if is_main():
        print(f"reproducing the run of {manifest}: configuration, weights and dataset are the same")
        for line in found:
            print(f"  {line}")


@contextlib.contextmanager
def _memory_errors(config: Config) -> Iterator[None]:
    """Says what to do when the devices do not have the memory for a run."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        train = config.train
        raise TrainingError(
            f"the devices do not have enough memory ({one_line(error)}); set"
            f" --config.train.microbatch to a part of train.batch_size={train.batch_size} (it is"
            f" {train.microbatch}), --config.model.remat=full, or --config.data.cache=none"
        ) from error


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_divisible(train: TrainConfig, layout: Layout) -> None:
    for name in ("batch_size", "microbatch"):
        if getattr(train, name) % layout.device_count:
            raise ConfigError(
                f"config.train.{name}={getattr(train, name)} is not divisible by the"
                f" {layout.device_count} devices; choose a multiple of {layout.device_count}"
            )


def _open_dataset(config: Config) -> VideoDataset:
    """Opens the dataset; builds it first if the configuration says so and it is absent."""
    directory, data = dataset_dir(config), config.data
    if data.build_if_absent and not directory.exists() and jax.process_count() == 1:
        print(f"no dataset in {directory} yet: building it", flush=True)
        # In a process: data_prep may import drl_jax, never the reverse.
        storage = StorageSpec.of(config).flags()
        flags = [f"--data_dir={data.data_dir}", *storage, *data.build_flags.split()]
        if run_module("data_prep.build", data.dataset, *flags):
            raise TrainingError(f"building {data.dataset} failed; see above")
    return VideoDataset(directory)
