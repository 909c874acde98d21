"""Linear layers, whose weight gradients are float32 and contract one axis, and their adapters."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout as DenseLayout
from jax.experimental.layout import with_layout_constraint
from jax.nn.initializers import variance_scaling

from drl_jax.config import LORA_TARGETS, LoRAConfig
from drl_jax.runtime.sharding import is_on_cpu, replicate

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
        bias = None if self.bias is None else self.bias[...]
        y = project(x, self.kernel[...], bias, self.dtype)
        if self.adapter is None:
            return y
        if (key := adapter_dropout_key()) is not None:
            kept = 1.0 - self.adapter.dropout
            mask = jax.random.bernoulli(jax.random.fold_in(key, self.adapter_number), kept, x.shape)
            x = jnp.where(mask, x / kept, 0.0)
        # Not merged into the kernel, whose gradient would have all its rows and columns.
        low = project(x, self.lora_a[...], None, self.dtype)
        return y + self.adapter.scale * project(low, self.lora_b[...], None, self.dtype)


def project(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """x @ kernel + bias in a dtype: [..., Din], float32 [Din, Dout], [Dout] -> [..., Dout]."""
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    y = matmul(rows, kernel)
    if bias is not None:
        # In float32, as the sum over rows that is its gradient.
        y = (y + bias).astype(dtype)
    return y.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[N, Din] times a float32 kernel [Din, Dout], in the dtype of `x`: [N, Dout]."""
    return _product(x, gathered(kernel, x.dtype))


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    # Not `matmul`: rematerialisation sees a product here, and may keep it.
    return _product(x, gathered(kernel, x.dtype)), (x, kernel)


def _matmul_backward(saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    of_x = _product(gradient, gathered(kernel, x.dtype), contracted=(1, 1))
    if x.dtype == jnp.bfloat16 and is_on_cpu():
        transposed = with_layout_constraint(x.T, DenseLayout((0, 1)))
        of_kernel = jnp.matmul(transposed, gradient, preferred_element_type=kernel.dtype)
    else:
        of_kernel = jax.lax.dot_general(
            x, gradient, (((0,), (0,)), ((), ())), preferred_element_type=kernel.dtype
        )
    return of_x, of_kernel


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


matmul.defvjp(_matmul_forward, _matmul_backward)


def gathered(kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A kernel in a dtype, whole on each device of the current mesh.

    With fsdp, XLA otherwise splits the product by columns and moves activations between devices,
    which are many times larger.
    """
    return replicate(kernel.astype(dtype))


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
