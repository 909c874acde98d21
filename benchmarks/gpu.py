"""Runs and records all benchmarks of a GPU.

    python -m benchmarks.gpu

Runs the benchmarks that need only jax, flax, optax and numpy, each in its own process, with sizes
for one large GPU, and writes their records. A benchmark that fails, e.g. out of memory, does not
stop the others; failures are listed at the end. `--try` runs the same programs with sizes for a CPU
and writes no records.
"""

import subprocess
import sys
from collections.abc import Sequence

from drl_jax.runtime.cli import Parser, run_command
from drl_jax.runtime.errors import UserError

_LARGE = ("--name=train_step_large", "--microbatch=128", "--remat=full")
RUNS = (
    ("train_step", "--models=32,16", "--dtypes=bfloat16,tf32,float32", "--batches=32,64,128"),
    ("train_step", *_LARGE, "--dtypes=bfloat16", "--batches=512,1024"),
    ("similarity", "--sizes=1000,2000,5000,10000", "--plain_up_to=5000"),
)
TRY = (
    ("train_step", "--batches=1", "--frames=1", "--words=8", "--steps=1"),
    ("train_step", *_LARGE, "--batches=2", "--frames=1", "--words=8", "--steps=1"),
    ("similarity", "--sizes=100"),
)


def run_all(small: bool) -> None:
    """Runs the benchmarks one after another, `small` ones on any device without records.

    Raises a UserError if JAX finds no GPU (unless `small`), or a benchmark failed.
    """
    # In another process, because initialising JAX here would reserve the GPU's memory.
    query = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    backend = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    if backend == "cpu" and not small:
        raise UserError(
            "JAX finds no GPU: install it with pip install 'jax[cuda]', or use --try for small"
            " sizes on the CPU"
        )
    failed = []
    for name, *flags in TRY if small else RUNS:
        print(f"== {name} {' '.join(flags)}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
        if subprocess.run([*command, *([] if small else ["--record"])]).returncode:
            failed.append(" ".join([name, *flags]))
    if failed:
        raise UserError(f"failed: {'; '.join(failed)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = Parser("python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--try", dest="small", action="store_true", help="small sizes, any device, no records"
    )
    options = parser.parse_args(arguments)
    return run_command("benchmarks.gpu", lambda: run_all(options.small))


if __name__ == "__main__":
    sys.exit(main())
