"""What the benchmarks rest on: they count right, and import no more than they say."""

import subprocess
import sys

import jax
import jax.numpy as jnp
from conftest import ROOT
from jax.lax import with_sharding_constraint

from benchmarks.hlo import collective_bytes
from drl_jax.sharding import make_layout


def test_collectives_are_counted_as_often_as_their_loop_runs():
    layout = make_layout()

    @jax.jit
    def program(x):
        def turn(rows, _):
            # Each turn needs all rows of the turn before.
            whole = with_sharding_constraint(jnp.sin(rows), layout.whole)
            return with_sharding_constraint(jnp.sort(whole, axis=0), layout.rows), None

        return jax.lax.scan(turn, x, None, length=5)[0]

    x = jax.ShapeDtypeStruct((64, 3), jnp.float32, sharding=layout.rows)
    moved = collective_bytes(program.lower(x).compile().as_text())
    assert moved == {"all-gather": 5 * 64 * 3 * 4}


def test_what_runs_on_a_bare_gpu_machine_imports_little():
    absent = "tensorflow clu tensorflow_datasets grain av orbax ml_collections torch PIL tqdm"
    code = (
        "import sys\n"
        f"for name in {absent.split()}: sys.modules[name] = None\n"
        "import benchmarks.train_step, benchmarks.similarity, benchmarks.memory\n"
        "import benchmarks.collectives, benchmarks.compile, benchmarks.cdcr, benchmarks.search\n"
        "import benchmarks.gpu\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
