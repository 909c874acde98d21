"""The whole record of a GPU with one command.

    python -m benchmarks.gpu

Runs the benchmarks that need only jax, flax, optax and numpy, each in a process of its own, with
sizes for one large GPU, and writes their records. What fails (out of memory, say) is named at the
end, and the rest goes on. `--try` runs the same with sizes for a CPU and records nothing.
"""

import argparse
import subprocess
import sys

_LARGE = ("--name=train_step_large", "--microbatch=128", "--remat")
RUNS = (
    ("train_step", "--models=32,16", "--dtypes=bfloat16,float32", "--batches=32,64,128"),
    ("train_step", *_LARGE, "--dtypes=bfloat16", "--batches=512,1024"),
    ("similarity", "--sizes=1000,2000,5000,10000", "--plain_up_to=5000"),
    ("search",),
    ("cdcr",),
    ("compile",),
    ("memory",),
    ("collectives",),
)
TRY = (
    ("train_step", "--batches=1", "--frames=1", "--words=8", "--steps=1"),
    ("train_step", *_LARGE, "--batches=2", "--frames=1", "--words=8", "--steps=1"),
    ("similarity", "--sizes=100"),
    ("search", "--sizes=1000"),
    ("cdcr", "--batch=4"),
    ("compile",),
    ("memory", "--batches=128", "--devices=1"),
    ("collectives", "--devices=2", "--batch=16"),
)


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--try", dest="small", action="store_true", help="small sizes, any device")
    options = parser.parse_args()
    # Asked in another process: this one must not hold the GPU's memory.
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    backend = subprocess.run(ask, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    if backend == "cpu" and not options.small:
        sys.exit(
            "benchmarks.gpu: JAX sees no GPU here (pip install 'jax[cuda]'); --try runs anyway"
        )
    failed = []
    for name, *flags in TRY if options.small else RUNS:
        print(f"== {name} {' '.join(flags)}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
        if subprocess.run([*command, *([] if options.small else ["--record"])]).returncode:
            failed.append(" ".join([name, *flags]))
    if failed:
        sys.exit("benchmarks.gpu: failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
