"""Attention: which implementation computes it, and that both compute the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, get_abstract_mesh, use_abstract_mesh

from drl_jax.models import attention
from drl_jax.models.attention import AttentionMask, attend
from drl_jax.models.ops import lengths_of
from drl_jax.runtime.sharding import make_layout

B, T, K, D = 3, 12, 2, 16
LENGTHS = np.array([12, 5, 1], np.int32)


def inputs(dtype=jnp.float32, positions=T):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (B, positions, K, D), dtype) for key in keys]


def test_lengths_of_a_mask():
    mask = np.arange(T) < LENGTHS[:, None]
    np.testing.assert_array_equal(lengths_of(mask), LENGTHS)
    # A row of padding alone attends to something, and its output is finite.
    np.testing.assert_array_equal(lengths_of(np.zeros((2, T), bool)), [1, 1])


def test_cudnn_computes_what_its_kernel_can(monkeypatch):
    h100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    asked = []
    monkeypatch.setattr(
        attention.jax.nn,
        "dot_product_attention",
        lambda q, *_, implementation, **__: asked.append(implementation) or q,
    )

    def of(dtype=jnp.bfloat16, queries=T, width=D, choice="auto", device=h100):
        q, k = (jax.ShapeDtypeStruct((8, n, K, width), dtype) for n in (queries, T))
        mesh = AbstractMesh((8,), ("data",), abstract_device=device)
        with use_abstract_mesh(mesh):
            jax.eval_shape(lambda q, k: attend(q, k, k, implementation=choice), q, k)
        return asked.pop()

    assert of() == "cudnn"
    assert of(choice="xla") == "xla"
    assert of(dtype=jnp.float32) == "xla"
    assert of(queries=1) == "xla"
    assert of(width=12) == of(width=136) == "xla"
    assert of(device=None) == "xla"
    assert of(device=AbstractDevice("cpu", None, "cpu")) == "xla"
    assert of(device=AbstractDevice("AMD Instinct MI300X", 304, "gpu")) == "xla"


def value_and_gradients(q, k, v, mask, choice):
    def total(q, k, v):
        out = attend(q, k, v, mask, choice)
        return (out.astype(jnp.float32) ** 2).sum(), out

    compute = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = compute(q, k, v)
    return [x.astype(jnp.float32) for x in (out, *gradients)]


@pytest.mark.parametrize(
    ("positions", "mask"),
    [
        (12, AttentionMask(False, LENGTHS)),
        (13, AttentionMask()),
        (13, AttentionMask(True)),
    ],
)
def test_cudnn_is_asked_for_an_even_number_of_positions(monkeypatch, mask, positions):
    """With XLA in the place of cuDNN: values and gradients are those of XLA alone."""
    compute, asked = jax.nn.dot_product_attention, []

    def record(q, k, v, *, implementation, **arguments):
        asked.append((implementation, q.shape[1]))
        return compute(q, k, v, implementation="xla", **arguments)

    monkeypatch.setattr(attention, "_has_cudnn", lambda: True)
    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", record)
    arrays = inputs(jnp.bfloat16, positions)
    found, expected = (value_and_gradients(*arrays, mask, choice) for choice in ("auto", "xla"))
    assert asked == [("cudnn", positions + positions % 2), ("xla", positions)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=2**-7)


def test_models_are_traced_on_their_mesh():
    layout = make_layout()
    mesh = layout.mesh.abstract_mesh
    assert jax.jit(layout.on_mesh(lambda x: x + (get_abstract_mesh() == mesh), "float32"))(1) == 2


@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs an NVIDIA GPU and JAX_PLATFORMS=cuda,cpu"
)
@pytest.mark.parametrize("positions", [12, 77])
@pytest.mark.parametrize("kind", ["all", "causal", "lengths"])
def test_cudnn_agrees_with_xla(kind, positions):
    """Values and gradients, to the rounding of bfloat16: 2^-8, at each of a few roundings."""
    lengths = np.array([positions, 5, 1], np.int32) if kind == "lengths" else None
    mask = AttentionMask(kind == "causal", lengths)
    layout, arrays = make_layout(jax.devices()[:1]), inputs(jnp.bfloat16, positions)

    def compute(choice):
        function = functools.partial(value_and_gradients, mask=mask, choice=choice)
        program = jax.jit(layout.on_mesh(function, "bfloat16")).lower(*arrays)
        assert ("cudnn" in program.as_text()) == (choice == "auto")
        return program.compile()(*arrays)

    for found, expected in zip(compute("auto"), compute("xla"), strict=True):
        np.testing.assert_allclose(found, expected, atol=4 * 2**-8 * np.abs(expected).max())
