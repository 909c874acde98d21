"""Linear layers, whose weight gradients are float32 and contract one axis, and their adapters."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout as DenseLayout
from jax.experimental.layout import with_layout_constraint
from jax.nn.initializers import variance_scaling

from drl_jax.config import LORA_TARGETS, LoRAConfig
from drl_jax.runtime.sharding import is_on_cpu, replicate

# Name of the results that a layer keeps for the backward pass (`layers.rematerialized`).
KEPT = "linear"
# Names of a low-rank adapter's parameters.
ADAPTER = ("lora_a", "lora_b")
# Of the adapters' dropout; None: there is none.
_KEY: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("key", default=None)


@contextlib.contextmanager
def adapter_dropout(key: jax.Array | None) -> Iterator[None]:
    """Enables the dropout of adapters in what the block traces; None: it stays disabled."""
    token = _KEY.set(key)
    try:
        yield
    finally:
        _KEY.reset(token)


def adapter_dropout_key() -> jax.Array | None:
    return _KEY.get()


class Linear(nnx.Linear):
    """`nnx.Linear` that flattens the leading axes of its input.

    The gradient of the kernel then contracts one axis instead of two, which XLA's CPU backend does
    up to twice as fast. It is float32 also where the product is bfloat16, so that the sums over
    rows and over devices keep their bits.
    """

    adapter: LoRAConfig | None = None

    def add_adapter(self, config: LoRAConfig, name: str, *, rngs: nnx.Rngs) -> None:
        """Adds a low-rank adapter that changes nothing yet; `name` is one of LORA_TARGETS."""
        self.adapter, self.adapter_number = config, LORA_TARGETS.index(name)
        # Kaiming's initialisation with a = sqrt(5), as torch's linear layers and PEFT.
        initial = variance_scaling(1 / 3, "fan_in", "uniform")
        self.lora_a = nnx.Param(initial(rngs.params(), (self.in_features, config.rank)))
        self.lora_b = nnx.Param(jnp.zeros((config.rank, self.out_features)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., Din] -> [..., Dout]."""
        return self.parts(x)[0]

    def parts(self, *inputs: jax.Array) -> tuple[jax.Array, ...]:
        """Each of n inputs [..., Din] with its n-th of the channels of the result: [..., Dout/n].

        Products of their own need no copies that split the result and concatenate its gradient.
        """
        if len(inputs) > 1 and is_on_cpu() and all(x is inputs[0] for x in inputs):
            # A copy takes less time there than narrow products lose.
            return tuple(jnp.split(self(inputs[0]), len(inputs), axis=-1))
        bias = None if self.bias is None else self.bias[...]
        found = project(inputs, self.kernel[...], bias, self.dtype)
        if self.adapter is None:
            return found
        # Not merged into the kernel, whose gradient would have all its rows and columns.
        low = {id(x): self._low(x) for x in inputs}
        added = project([low[id(x)] for x in inputs], self.lora_b[...], None, self.dtype)
        return tuple(y + self.adapter.scale * z for y, z in zip(found, added, strict=True))

    def _low(self, x: jax.Array) -> jax.Array:
        """The product with the first matrix of the adapter, after dropout."""
        if (key := adapter_dropout_key()) is not None:
            kept = 1.0 - self.adapter.dropout
            mask = jax.random.bernoulli(jax.random.fold_in(key, self.adapter_number), kept, x.shape)
            x = jnp.where(mask, x / kept, 0.0)
        return project([x], self.lora_a[...], None, self.dtype)[0]


def project(
    inputs: Sequence[jax.Array], kernel: jax.Array, bias: jax.Array | None, dtype: jnp.dtype
) -> tuple[jax.Array, ...]:
    """Products of n inputs [..., Din] and an n-th each of the columns of a kernel, plus the bias.

    Float32 [Din, Dout] and [Dout] -> n of [..., Dout/n] in a dtype.
    """
    # Of an input that comes twice, once, so that cuBLAS adds its gradients to each other.
    rows = {id(x): x.reshape(-1, x.shape[-1]).astype(dtype) for x in inputs}
    found = _affine(tuple(rows[id(x)] for x in inputs), kernel, bias)
    # With the bias, which cuBLAS adds to a product before it writes it.
    found = (checkpoint_name(y, KEPT) for y in found)
    return tuple(y.reshape(*x.shape[:-1], -1) for x, y in zip(inputs, found, strict=True))


@jax.custom_vjp
def _affine(
    inputs: tuple[jax.Array, ...], kernel: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, ...]:
    """`project` of n inputs [N, Din] in its dtype."""
    return _affine_forward(inputs, kernel, bias)[0]


def _affine_forward(
    inputs: tuple[jax.Array, ...], kernel: jax.Array, bias: jax.Array | None
) -> tuple[tuple[jax.Array, ...], tuple]:
    found = [_product(x, part) for x, part in zip(inputs, _columns(kernel, inputs), strict=True)]
    if bias is not None:
        parts = jnp.split(bias.astype(inputs[0].dtype), len(inputs))
        found = [y + part for y, part in zip(found, parts, strict=True)]
    return tuple(found), (inputs, kernel, bias)


def _affine_backward(
    saved: tuple, gradients: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array | None]:
    inputs, kernel, bias = saved
    of_inputs = tuple(
        _product(gradient, part, contracted=(1, 1))
        for gradient, part in zip(gradients, _columns(kernel, inputs), strict=True)
    )
    of_kernel = [_kernel_gradient(*pair) for pair in zip(inputs, gradients, strict=True)]
    of_bias = None
    if bias is not None:
        of_bias = jnp.concatenate([jnp.sum(g, axis=0, dtype=bias.dtype) for g in gradients])
    return of_inputs, jnp.concatenate(of_kernel, axis=1), of_bias


_affine.defvjp(_affine_forward, _affine_backward)


def _columns(kernel: jax.Array, inputs: tuple[jax.Array, ...]) -> list[jax.Array]:
    """The columns for each input, in its dtype, whole on each device of the current mesh.

    With fsdp, XLA otherwise splits the product by columns and moves activations between devices,
    which are many times larger.
    """
    return jnp.split(replicate(kernel.astype(inputs[0].dtype)), len(inputs), axis=1)


def _kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """[N, Din], [N, Dout] -> float32 [Din, Dout]."""
    if x.dtype == jnp.bfloat16 and is_on_cpu():
        transposed = with_layout_constraint(x.T, DenseLayout((0, 1)))
        return jnp.matmul(transposed, gradient, preferred_element_type=jnp.float32)
    return jax.lax.dot_general(
        x, gradient, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def _product(x: jax.Array, y: jax.Array, contracted: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product of two matrices of one dtype, in that dtype.

    XLA's CPU backend multiplies bfloat16 with the processor's own instructions (AMX) only if the
    result is float32 and no operand is transposed; it converts both to float32 otherwise, which is
    five times slower. The sums are the same.
    """
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    if x.dtype == jnp.bfloat16 and is_on_cpu():
        y = jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)
        return y.astype(x.dtype)
    return jax.lax.dot_general(x, y, dimensions)


def linear_without_bias_gradient(layer: nnx.Linear, x: jax.Array) -> jax.Array:
    """A linear layer whose bias shifts all values that a softmax then compares.

    Its exact gradient is 0, and rounding error, which Adam amplifies, differs between device
    counts; so it gets none. Under the sigmoid loss, `logit_bias` is learned instead of xti's.
    """
    return x @ layer.kernel[...] + jax.lax.stop_gradient(layer.bias[...])


# ---------------------------------------------------------------- parameters of adapters


def without_adapters(params: dict[str, Any]) -> dict[str, Any]:
    """A tree of parameters without those of adapters."""
    return {
        name: without_adapters(value) if isinstance(value, dict) else value
        for name, value in params.items()
        if name not in ADAPTER
    }


def merge_adapters(params: dict[str, Any], scale: float) -> dict[str, Any]:
    """A tree of parameters whose kernels have their adapters added; it has none then."""
    merged = {
        name: merge_adapters(value, scale) if isinstance(value, dict) else value
        for name, value in params.items()
        if name not in ADAPTER
    }
    if "lora_a" in params:
        change = jnp.matmul(params["lora_a"], params["lora_b"], precision="highest")
        merged["kernel"] = params["kernel"] + scale * change
    return merged
