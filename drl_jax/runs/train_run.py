"""Trains a run: the loop, its evaluations and checkpoints, and the final test."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from drl_jax.config import Config, ConfigError, TrainConfig
from drl_jax.data.batches import TrainBatches, load_split
from drl_jax.data.records import MANIFEST, VideoDataset, dataset_dir
from drl_jax.data.storage import StorageSpec
from drl_jax.evaluation.bootstrap import intervals
from drl_jax.evaluation.evaluator import Evaluator, check_split
from drl_jax.evaluation.metrics import format_table
from drl_jax.models.drl import Params, abstract_params, param_shapes
from drl_jax.models.tokenizers import load_tokenizer
from drl_jax.runs.adapter_files import save_adapter
from drl_jax.runs.checkpoint_files import owner
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.hooks import Evaluations, StepProfile, TrainingError, TrainLog, WallTime
from drl_jax.runs.manifest import differences, recorded
from drl_jax.runs.protocol_card import evaluation_path, protocol_card, write_ranks
from drl_jax.runs.run_params import head_start, with_backbone_of
from drl_jax.runs.stored_features import check_frozen, stored_features
from drl_jax.runs.weights_writer import save_weights
from drl_jax.runs.workdir import (
    ADAPTER_FILE,
    BEST_FILE,
    CHECKPOINTS,
    exclusive,
    own_manifest,
    read_manifest,
)
from drl_jax.runtime.distributed import StopPoll, failing_together, is_main
from drl_jax.runtime.errors import Interrupted, Notice, Unavailable, UserError, one_line
from drl_jax.runtime.files import write_json
from drl_jax.runtime.sharding import Layout, make_layout
from drl_jax.runtime.signals import StopRequest
from drl_jax.runtime.worker_pool import run_module
from drl_jax.training.flops import train_step_flops
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import (
    TrainState,
    abstract_state,
    create_state,
    make_train_step,
    state_from_params,
)
from drl_jax.training.trainable import Trainable
from drl_jax.weights.load import initial_params
from drl_jax.weights.weights_file import read_weights

RESULT_FILE = "result.json"
# Values of `TrainBatches.cache`.
_CACHED = {
    "none": "read from disk each epoch",
    "memory": "kept in memory",
    "device": "kept on the devices",
    "features": "left out for their stored features",
}


def train(
    config: Config,
    workdir: Path,
    *,
    reproduce: Path | None = None,
    profile_steps: range = range(0),
    ray: str = "",
) -> dict[str, Any]:
    """Trains, evaluates every epoch on val, and tests the best checkpoint.

    Args:
      workdir: directory for checkpoints, logs and results. A run in it is resumed.
      reproduce: manifest of a run that this one has to repeat.
      profile_steps: steps to trace, from 1; those that the run has made already are left out.
      ray: address of a cluster whose nodes compute the stored features (`config.data.features`).

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
        config, pretrained = _read_init(config)
        trainable = Trainable.of(config.optim)
        trainable.check(param_shapes(config.model))
        check_frozen(config)
        tokenizer = load_tokenizer(config.model)
        wall_time.spent_on("start")
        dataset = _open_dataset(config)
        wall_time.spent_on("dataset")
        splits = [load_split(dataset, name, config.data) for name in ("train", "val", "test")]
    features = None
    if config.data.features:
        features = stored_features(config, dataset, splits, pretrained, layout, ray=ray)
        wall_time.spent_on("features")
    with failing_together(UserError):
        train_split, val, test = splits
        batch_size, seed = config.train.batch_size, config.seed
        batches = TrainBatches(
            dataset, train_split, config.data, batch_size, seed, tokenizer, features
        )
        for name, split in (("val", val), ("test", test)):
            check_split(name, split, dataset, tokenizer, config.data.max_words)
        if reproduce is not None:
            found = differences(read_manifest(reproduce), config, dataset)
            title = f"reproducing the run of {reproduce}: configuration, weights and dataset are"
            if is_main():
                print("\n  ".join([f"{title} the same", *found]))
    steps_per_epoch = batches.steps_per_epoch
    total_steps = config.train.epochs * steps_per_epoch
    every = config.train.checkpoint_every
    if profile_steps and profile_steps[-1] > total_steps:
        first, last = profile_steps[0], profile_steps[-1]
        raise ConfigError(f"--profile_steps={first}:{last}: the run ends with step {total_steps}")

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
        trainable=trainable,
    )
    evaluator = Evaluator(config, dataset, layout, features)
    abstract = abstract_params(config.model, layout)

    # Nothing is written before all of the above succeeds.
    with (
        _memory_errors(config),
        exclusive(workdir),
        recorded(workdir, config, dataset, wall_time.seconds) as record,
        Checkpoints(
            workdir, config.train.keep_checkpoints, identity=record.identity
        ) as checkpoints,
        StopRequest() as stop,
    ):
        # Order of initialisation: resume > init > random.
        restored = checkpoints.restore_latest(abstract_state(config.model, tx, layout))
        if restored is not None:
            state, saved = restored
        else:
            record.check_weights(config)
            saved = {}
            if pretrained is not None:
                state = state_from_params(pretrained, tx, layout)
            else:
                state = create_state(config.model, tx, config.seed, layout)
        del pretrained, restored
        start = int(state.step)
        if is_main():
            if saved:
                print(f"resuming {workdir} from step {start} of {total_steps}")
            _print_start(config, dataset, batches, layout)
            if total_steps:
                _print_cost(config, trainable, state)
        record.start(checkpoints.identity.run, start, total_steps)
        if total_steps == 0:
            checkpoints.save(state)

        # ---------------------------------------------------------------- hooks
        evaluated = bool(saved) and checkpoints.is_evaluated(start)
        log = TrainLog(
            workdir, config, batches, total_steps, wall_time, start, saved, evaluated=evaluated
        )
        evaluations = Evaluations(
            config, evaluator, val, dataset, checkpoints, log, wall_time, abstract, steps_per_epoch
        )
        hooks: list[Any] = [log, evaluations]
        if profile_steps:
            hooks.append(StepProfile(workdir, profile_steps))

        def call(moment: str, *arguments: Any) -> None:
            for hook in hooks:
                if (method := getattr(hook, moment, None)) is not None:
                    method(*arguments)
                    wall_time.spent_on(hook.activity)

        if is_main():
            (workdir / BEST_FILE).unlink(missing_ok=True)
        with contextlib.ExitStack() as ending:
            for hook in hooks:  # Each ends, also if another cannot.
                if hasattr(hook, "end"):
                    ending.callback(hook.end)
            # ---------------------------------------------------------------- the loop
            call("start", start, state)
            stream = batches.on_devices(start, layout)
            stop_requested = StopPoll(lambda: stop.pending)
            wall_time.spent_on("start")
            for step in range(start + 1, total_steps + 1):
                call("before_step", step, state)
                batch = next(stream)
                wall_time.spent_on("data")
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, scalars = step_function(state, batch)
                # The first call compiles, all others return at once.
                wall_time.spent_on("compilation" if step == start + 1 else "steps")
                call("after_step", step, state, scalars)
                stopping = stop_requested(step)
                due = step % steps_per_epoch == 0 or (every > 0 and step % every == 0)
                if due or stopping:
                    log_state = log.before_checkpoint(step, ends_interval=due)
                    wall_time.spent_on("logging")
                    checkpoints.save(state, **log_state)
                    record.step = step
                    wall_time.spent_on("checkpoints")
                    call("after_checkpoint", step, state, stopping)
                if stopping:
                    checkpoints.wait()
                    raise Interrupted(f"stopped after step {step}; rerun the command to resume")

            # ---------------------------------------------------------------- test of the best
            if stop_requested.now():
                raise Interrupted(f"stopped before the test of step {total_steps}; rerun to resume")
            best_step, params = checkpoints.restore_best(abstract)
            tested = evaluator.run(params, test)
            card = protocol_card(workdir, config, dataset, "test", test, "best", best_step, params)
            result = {
                "test": tested.metrics,
                "test_intervals": intervals(tested.ranks),
                "val": evaluator.run(params, val).metrics,
                "card": dataclasses.asdict(card),
                "best_step": best_step,
                "total_steps": total_steps,
                "skipped_steps": log.skipped,
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            }
            wall_time.spent_on("evaluation")
            log.test(total_steps, result["test"], best_step)
        if is_main():
            path = evaluation_path(workdir, "test", best_step)
            write_ranks(path.with_suffix(".npz"), tested.ranks, card)
            write_json(workdir / RESULT_FILE, result)
            _write_best(workdir, config, best_step, params)
            print(f"test of the best checkpoint, step {best_step} of {total_steps}:")
            print(f"{format_table(result['test'])}\nprotocol\n{card}\ntime: {wall_time}")
    return result


def _read_init(config: Config) -> tuple[Config, Params | None]:
    """The configuration with the sizes of `model.init`, and its parameters; None without it."""
    model = config.model
    if not model.init:
        return config, None
    weights = read_weights(model.init, model.release, model.weights_key)
    config = with_backbone_of(config, weights)
    if is_main():
        print(f"{model.init}: {weights.description}; {head_start(config.model, weights)}")
    return config, initial_params(config.model, weights, jax.random.key(config.seed))


def _write_best(workdir: Path, config: Config, step: int, params: Params) -> None:
    """Writes the best parameters as one file, which opens without Orbax; a full disk is no error.

    With adapters, those and the heads, without the base.

    With fsdp over several processes, no process has them all.
    """
    leaves = jax.tree.leaves(params)
    if not all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in leaves):
        return
    origin = owner(workdir / CHECKPOINTS / str(step))
    try:
        if not config.model.lora.rank:
            save_weights(workdir / BEST_FILE, params, config, origin=origin)
        else:
            base = own_manifest(workdir)["weights_sha256"]
            save_adapter(workdir / ADAPTER_FILE, params, config, base, origin)
    except Unavailable as error:
        warnings.warn(f"{error}; the run is complete without it", Notice, stacklevel=2)


def _print_start(
    config: Config, dataset: VideoDataset, batches: TrainBatches, layout: Layout
) -> None:
    """Prints the dataset, where its frames are kept, and the devices."""
    devices = layout.mesh.devices
    print(
        f"{config.data.dataset}: {len(dataset)} videos, {batches.num_examples} examples an epoch;"
        f" frames are {_CACHED[batches.cache]}; {devices.size} {devices.flat[0].platform}"
        f" device(s), {jax.process_count()} process(es)"
    )
    if manifest := dataset.manifest:
        hashes = (f"{name} {digest[:8]}" for name, digest in manifest["annotations"].items())
        print(
            f"built from {', '.join(hashes)}; content {manifest['content'][:8]}, decoded by PyAV"
            f" {manifest['versions']['av']}, {len(manifest['left_out'])} videos left out"
            f" ({dataset.directory / MANIFEST})"
        )


def _print_cost(config: Config, trainable: Trainable, state: TrainState) -> None:
    """Prints how much is trained, and the optimiser's memory and the work that it takes."""
    trained, _ = jax.eval_shape(trainable.split, state.params)
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (trained, state.params)]
    memory = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    sizes = (config.train.batch_size, config.data.max_frames, config.data.max_words)
    stored = bool(config.data.features)
    flops = train_step_flops(config.model, config.loss, *sizes, trainable, stored) / sizes[0]
    print(
        f"trained: {counts[0]:,} of {counts[1]:,} parameters; optimiser {memory / 1e6:,.2f} MB;"
        f" {flops / 1e9:,.3g} GFLOP a pair"
    )


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
            f" config.train.microbatch to a part of train.batch_size={train.batch_size} (it is"
            f" {train.microbatch}), config.model.remat=full, or config.data.cache=none"
        ) from error


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
        storage = StorageSpec.of(config).flags(data.dataset)
        flags = [f"--data_dir={data.data_dir}", *storage, *data.build_flags.split()]
        if run_module("data_prep.build", data.dataset, *flags):
            raise TrainingError(f"building {data.dataset} failed; see above")
    return VideoDataset(directory)
