"""Transformer layers, stacked and run with `lax.scan`. Names are OpenAI's.

Shapes: B rows, T positions, D channels, K heads.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, normal, xavier_uniform

from drl_jax.config import ModelConfig
from drl_jax.models.attention import NO_MASK, AttentionMask, attend
from drl_jax.sharding import replicate, split_rows

# LayerNorm epsilon of the reference's new heads, which come from a BERT implementation. CLIP's own
# towers use 1e-5.
BERT_LN_EPS = 1e-12


class BlockRunConfig(NamedTuple):
    """How blocks run; changes no parameter.

    Attributes:
      dtype: of the matrix products and of the residual stream.
      remat: what the backward pass computes again (`ModelConfig.remat`).
      attention: what computes attention (`ModelConfig.attention`).
      unroll: blocks per iteration of the scan.
    """

    dtype: jnp.dtype
    remat: str
    attention: str
    unroll: int

    @classmethod
    def of(cls, config: ModelConfig) -> "BlockRunConfig":
        return cls(jnp.dtype(config.dtype), config.remat, config.attention, config.scan_unroll)


class BlockInit(NamedTuple):
    """Initialisers of the four kernels of a residual attention block."""

    in_proj: Initializer
    out_proj: Initializer
    c_fc: Initializer
    c_proj: Initializer


def clip_block_init(width: int, layers: int) -> BlockInit:
    """OpenAI's initialisation of a tower of `layers` blocks (CLIP.initialize_parameters)."""
    residual = normal(width**-0.5 * (2 * layers) ** -0.5)
    return BlockInit(normal(width**-0.5), residual, normal((2 * width) ** -0.5), residual)


def new_block_init() -> BlockInit:
    """The reference's initialisation of blocks that are not in a checkpoint."""
    return BlockInit(xavier_uniform(), normal(0.02), normal(0.02), normal(0.02))


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's activation, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


class Linear(nnx.Linear):
    """`nnx.Linear` that flattens the leading axes of its input.

    The gradient of the kernel then contracts one axis instead of two, which XLA's CPU backend does
    up to twice as fast. It is float32 also where the product is bfloat16, so that the sums over
    rows and over devices keep their bits.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., Din] -> [..., Dout]."""
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        product = matmul(rows, self.kernel[...])
        if self.bias is not None:
            # In float32, as the sum over rows that is its gradient.
            product = (product + self.bias[...]).astype(self.dtype)
        return product.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[N, Din] times a float32 kernel [Din, Dout], in the dtype of `x`: [N, Dout]."""
    return x @ gathered(kernel, x.dtype)


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    # Not `matmul`: rematerialisation sees a product here, and may keep it.
    return x @ gathered(kernel, x.dtype), (x, kernel)


def _matmul_backward(saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    of_kernel = jax.lax.dot_general(
        x, gradient, (((0,), (0,)), ((), ())), preferred_element_type=kernel.dtype
    )
    return gradient @ gathered(kernel, x.dtype).T, of_kernel


matmul.defvjp(_matmul_forward, _matmul_backward)


def gathered(kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A kernel in a dtype, whole on each device of the current mesh.

    With fsdp, XLA otherwise splits the product by columns and moves activations between devices,
    which are many times larger.
    """
    return replicate(kernel.astype(dtype))


class SelfAttention(nnx.Module):
    """Multi-head self-attention with a fused input projection, as torch's MultiheadAttention."""

    def __init__(
        self, width: int, heads: int, init: BlockInit, run: BlockRunConfig, *, rngs: nnx.Rngs
    ):
        self.heads, self.implementation = heads, run.attention
        linear = functools.partial(Linear, dtype=run.dtype, rngs=rngs)
        self.in_proj = linear(width, 3 * width, kernel_init=init.in_proj)
        self.out_proj = linear(width, width, kernel_init=init.out_proj)

    def __call__(self, x: jax.Array, mask: AttentionMask, queries: int) -> jax.Array:
        rows, positions, width = x.shape
        # [B, T, 3D] -> three of [B, T, K, D/K]. The gradient of a split is a concatenation, that of
        # three indexed parts a sum of three padded arrays.
        q, k, v = (
            part.reshape(rows, positions, self.heads, width // self.heads)
            for part in jnp.split(self.in_proj(x), 3, axis=-1)
        )
        attended = attend(q[:, :queries], k, v, mask, self.implementation)
        return self.out_proj(attended.reshape(rows, queries, width))


class MLP(nnx.Module):
    """Two linear layers with QuickGELU between them; the hidden width is 4 D."""

    def __init__(self, width: int, init: BlockInit, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, dtype=dtype, rngs=rngs)
        self.c_fc = linear(width, 4 * width, kernel_init=init.c_fc)
        self.c_proj = linear(4 * width, width, kernel_init=init.c_proj)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(quick_gelu(self.c_fc(x)))


class ResidualAttentionBlock(nnx.Module):
    """Pre-LN block: x + attn(ln_1(x)), then x + mlp(ln_2(x)). The norms are float32.

    Only the outputs of the first `queries` positions are computed.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        eps: float,
        init: BlockInit,
        run: BlockRunConfig,
        *,
        rngs: nnx.Rngs,
    ):
        norm = functools.partial(nnx.LayerNorm, width, epsilon=eps, dtype=jnp.float32, rngs=rngs)
        self.ln_1 = norm()
        self.attn = SelfAttention(width, heads, init, run, rngs=rngs)
        self.ln_2 = norm()
        self.mlp = MLP(width, init, run.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: AttentionMask, queries: int) -> jax.Array:
        x = x[:, :queries] + self.attn(self.ln_1(x), mask, queries)
        return x + self.mlp(self.ln_2(x))


class Transformer(nnx.Module):
    """Blocks with parameters stacked on a leading axis, run with `lax.scan`.

    One block is compiled instead of all. With ViT-B/32 on a CPU this also runs twice as fast as a
    Python loop over blocks.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        eps: float,
        init: BlockInit,
        run: BlockRunConfig,
        rngs: nnx.Rngs,
    ):
        """Stacks `layers` blocks.

        Args:
          width: D.
          layers: number of blocks.
          heads: K.
          eps: of the LayerNorms.
          init: initialisers of each block's kernels.
          run: how the blocks run.
          rngs: random keys of new parameters.
        """
        self.run = run._replace(unroll=min(run.unroll, layers))

        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(layer_rngs: nnx.Rngs) -> ResidualAttentionBlock:
            return ResidualAttentionBlock(width, heads, eps, init, run, rngs=layer_rngs)

        self.resblocks = stack(rngs.split(layers))

    def __call__(
        self, x: jax.Array, mask: AttentionMask = NO_MASK, queries: int | None = None
    ) -> jax.Array:
        """Runs the blocks.

        Args:
          x: [B, T, D].
          mask: the positions that each position attends to.
          queries: number Q of leading positions whose output is needed. The last block computes
            nothing for the others. None: all.

        Returns:
          [B, Q, D] in the dtype of `run`.
        """
        block, stacked = nnx.split(self.resblocks)

        def block_function(queries: int):
            def run_block(carry, params):
                return nnx.merge(block, params)(carry, mask, queries), None

            return rematerialized(run_block, self.run.remat)

        # With fsdp, an embedding table that is split by columns would split all that follows, too.
        x = split_rows(x.astype(self.run.dtype))
        run_block = block_function(x.shape[1])
        if queries is None:
            return jax.lax.scan(run_block, x, stacked, unroll=self.run.unroll)[0]
        # Split instead of indexed: see SelfAttention.
        leaves, tree = jax.tree.flatten(stacked)
        parts = [jnp.split(leaf, [len(leaf) - 1]) for leaf in leaves]
        first, last = (tree.unflatten(part) for part in zip(*parts, strict=True))
        x = jax.lax.scan(run_block, x, first, unroll=self.run.unroll)[0]
        return block_function(queries)(x, jax.tree.map(lambda leaf: leaf[0], last))[0]


def rematerialized(function: Callable, remat: str) -> Callable:
    """Chooses what the backward pass of a function computes again (`ModelConfig.remat`)."""
    if remat == "none":
        return function
    policy = None
    if remat == "dots":
        # Products of activations with parameters; those of attention have batch axes.
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(function, policy=policy)
