"""Collectives are counted correctly, and GPU benchmarks import only the packages they name."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import with_sharding_constraint
from support.commands import ROOT

from benchmarks.films import KINDS, Clip, make_film
from benchmarks.hlo import collective_bytes, collective_counts
from benchmarks.moments import overlap
from drl_jax.runtime.sharding import make_layout


def test_collectives_in_a_loop_count_once_per_iteration():
    layout = make_layout()

    @jax.jit
    def program(x):
        def iteration(rows, _):
            # Each iteration needs all rows of the previous one.
            gathered = with_sharding_constraint(jnp.sin(rows), layout.replicated)
            return with_sharding_constraint(jnp.sort(gathered, axis=0), layout.batch_sharded), None

        return jax.lax.scan(iteration, x, None, length=5)[0]

    x = jax.ShapeDtypeStruct((64, 3), jnp.float32, sharding=layout.batch_sharded)
    moved = collective_bytes(program.lower(x).compile().as_text())
    assert moved == {"all-gather": 5 * 64 * 3 * 4}


def test_asynchronous_collectives_count_their_results():
    """The text of a GPU's program has a tuple of operands and results."""
    hlo = """
ENTRY %main (a: f32[4]) -> f32[8] {
  %g = ((f32[4]{0}, /*index=1*/bf16[2,3]), (f32[8]{0}, bf16[4,3]{1,0})) all-gather-start(%a, %b)
  %s = ((bf16[8,2]{1,0}), bf16[1,2]{1,0}) reduce-scatter-start(%c)
  %r = (f32[5]{0}, f32[6]{0}) all-reduce-start(%d, %e)
  %q = f32[7]{0} all-reduce(%f)
}
"""
    assert collective_bytes(hlo) == {
        "all-gather": 4 * 8 + 2 * 12,
        "reduce-scatter": 2 * 2,
        "all-reduce": 4 * (5 + 6 + 7),
    }
    assert collective_counts(hlo) == {
        "blocking": 1,
        "bfloat16_sums": 1,
        "all-gather": 1,
        "reduce-scatter": 1,
        "all-reduce": 2,
    }


def test_gpu_benchmarks_need_only_jax_flax_optax_and_numpy():
    absent = "tensorflow clu tensorflow_datasets grain av orbax ml_collections torch PIL tqdm"
    code = (
        "import sys\n"
        f"for name in {absent.split()}: sys.modules[name] = None\n"
        "import benchmarks.train_step, benchmarks.similarity\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("kind", KINDS)
def test_films_show_their_clips(kind):
    """Where they say so: the objects are those of the clips."""
    rng = np.random.default_rng(0)
    clips = [Clip("a", np.full((13, 16, 16, 3), 30 * n, np.uint8)) for n in range(1, 4)]
    for clip in clips:
        clip.frames[:, 4:8, 4:8] = rng.integers(150, 256, 3)
    film = make_film(kind, clips)
    assert [number for number, _, _ in film.parts] == [0, 1, 2]
    for number, start, end in film.parts:
        assert end - start == (1 if kind == "event1s" else 3.25)
        shown = film.frames[round(start * film.fps) : round(end * film.fps), 5, 5]
        if kind != "flicker":
            np.testing.assert_array_equal(shown, clips[number].frames[: len(shown), 5, 5])
    assert overlap((0, 4), (2, 6)) == 2 / 6
    assert overlap((0, 1), (2, 6)) == 0
