"""Trains the CLIP that `configs/shapes.py` starts from, and writes the files that are installed.

    python -m benchmarks.shapes_clip

Builds `shapes_stills`, trains `configs/shapes_clip.py` in a run of this commit, and writes
shapes_clip.safetensors and its record, shapes_clip.json. Rerun the command to continue. Other flags
(`--config.GROUP.FIELD=VALUE`) are passed to the training.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from drl_jax.hub.installed import DIRECTORY
from drl_jax.runtime.cli import Parser, run_command
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import sha256, write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = Parser("python -m benchmarks.shapes_clip", description=__doc__.splitlines()[0])
    _, flags = parser.parse_known_args(arguments)
    return run_command(
        "benchmarks.shapes_clip",
        lambda: make_weights(flags),
        on_interrupt="rerun the command to continue",
    )


def make_weights(flags: list[str]) -> None:
    """Builds, trains, exports and writes the record."""
    commit = _commit()
    workdir = Path("runs") / f"shapes_clip_{commit[:12]}"
    if not workdir.exists():
        # A dataset that is there already may be of another commit.
        _run(["-m", "data_prep.build", "shapes_stills", "--data_dir=data", "--overwrite"])
    _run(["-m", "drl_jax.train", "--config=configs/shapes_clip.py", f"--workdir={workdir}", *flags])
    weights = DIRECTORY / "shapes_clip.safetensors"
    convert = ["-m", "drl_jax.convert", str(workdir), str(weights)]
    _run([*convert, "--clip_only", "--dtype=float16"])

    from benchmarks.measure import make_record
    from drl_jax.weights.weights_file import read_weights

    result = json.loads((workdir / "result.json").read_text(encoding="utf-8"))
    record = make_record(
        "shapes_clip",
        [{"split": split, **result[split]} for split in ("val", "test")],
        command=" ".join(["python -m benchmarks.shapes_clip", *flags]),
        commit=commit,
        seed=read_weights(weights).config.seed,
        parameters=result["parameters"],
        bytes=weights.stat().st_size,
        sha256=sha256(weights),
    )
    write_json(weights.with_suffix(".json"), record)
    print(json.dumps(record, indent=1))


def _commit() -> str:
    """The commit of the working tree, whose code must be unchanged."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], check=True, capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()

    try:
        # An interrupted call may have written the weights.
        others = (".", f":(exclude){DIRECTORY}")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *others)
        commit = git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError("the record names a commit: run this in a clone with git") from error
    if changed:
        raise UserError("commit your changes first: the record names the commit of the code")
    return commit


def _run(command: list[str]) -> None:
    if status := subprocess.run([sys.executable, *command]).returncode:
        raise UserError(f"python {' '.join(command)} ended with exit status {status}; see above")


if __name__ == "__main__":
    sys.exit(main())
