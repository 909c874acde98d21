"""Linear layers, whose weight gradients are float32 and contract one axis."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout as DenseLayout
from jax.experimental.layout import with_layout_constraint

from drl_jax.runtime.sharding import is_on_cpu, replicate

# Names of a low-rank adapter's parameters.
ADAPTER = ("lora_a", "lora_b")


class Linear(nnx.Linear):
    """`nnx.Linear` that flattens the leading axes of its input.

    The gradient of the kernel then contracts one axis instead of two, which XLA's CPU backend does
    up to twice as fast. It is float32 also where the product is bfloat16, so that the sums over
    rows and over devices keep their bits.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., Din] -> [..., Dout]."""
        bias = None if self.bias is None else self.bias[...]
        return project(x, self.kernel[...], bias, self.dtype)


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
