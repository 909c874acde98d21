"""Transformer layers, stacked and run with `lax.scan`. Names are OpenAI's.

Shapes: B rows, T positions, D channels, K heads. Of the argument `run`, a model's configuration,
blocks take how they compute: `array_dtype`, `remat`, `attention` and `scan_unroll`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout as DenseLayout
from jax.experimental.layout import with_layout_constraint
from jax.nn.initializers import Initializer, normal, xavier_uniform

from drl_jax.config import BackboneConfig, LoRAConfig, ModelConfig
from drl_jax.models.attention import NO_MASK, AttentionMask, Rotation, attend, rotate
from drl_jax.models.linear import KEPT, Linear, adapter_dropout, adapter_dropout_key
from drl_jax.runtime.sharding import is_on_cpu, split_rows

# LayerNorm epsilon of the reference's new heads, which come from a BERT implementation. CLIP's own
# towers use 1e-5.
BERT_LN_EPS = 1e-12


class BlockConfig(NamedTuple):
    """What a residual attention block computes."""

    width: int  # D
    heads: int  # K
    hidden_width: int  # of the MLP
    activation: str  # of the MLP, one of `config.ACTIVATIONS`
    eps: float  # of the LayerNorms

    @classmethod
    def of_tower(cls, config: BackboneConfig, tower: str) -> "BlockConfig":
        """The blocks of a tower, "vision" or "text"."""
        sizes = (getattr(config, f"{tower}_{name}") for name in ("width", "heads", "hidden_width"))
        activation = (tower == "text" and config.text_activation) or config.activation
        return cls(*sizes, activation=activation, eps=config.layer_norm_eps)


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


def new_block_config(config: BackboneConfig) -> BlockConfig:
    """Blocks of a head over features: those of the text tower, with `BERT_LN_EPS`.

    For features of another width, with as many heads as have at least the channels of the tower's.
    """
    text, width = BlockConfig.of_tower(config, "text"), config.embed_dim
    if width != text.width:
        most = max(1, width // (text.width // text.heads))
        heads = max(heads for heads in range(1, most + 1) if width % heads == 0)
        text = text._replace(width=width, heads=heads, hidden_width=4 * width)
    return text._replace(eps=BERT_LN_EPS)


def new_block_init() -> BlockInit:
    """The reference's initialisation of blocks that are not in a checkpoint."""
    return BlockInit(xavier_uniform(), normal(0.02), normal(0.02), normal(0.02))


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's activation, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


# By the names of `config.ACTIVATIONS`.
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def layer_norm(width: int, eps: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A LayerNorm that computes in float32."""
    return nnx.LayerNorm(width, epsilon=eps, dtype=jnp.float32, rngs=rngs)


class SelfAttention(nnx.Module):
    """Multi-head self-attention with a fused input projection, as torch's MultiheadAttention."""

    def __init__(self, config: BlockConfig, init: BlockInit, run: ModelConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.heads, self.implementation = config.heads, run.attention
        linear = functools.partial(Linear, dtype=jnp.dtype(run.array_dtype), rngs=rngs)
        self.in_proj = linear(width, 3 * width, kernel_init=init.in_proj)
        self.out_proj = linear(width, width, kernel_init=init.out_proj)

    def __call__(
        self, x: jax.Array, mask: AttentionMask, queries: int, rotation: Rotation | None = None
    ) -> jax.Array:
        rows, positions, width = x.shape
        # Not a slice of all: `parts` takes the same array as one.
        asking = x if queries == positions else x[:, :queries]
        # [B, Q or T, D] -> [B, Q or T, K, D/K]
        q, k, v = (
            part.reshape(rows, -1, self.heads, width // self.heads)
            for part in self.in_proj.parts(asking, x, x)
        )
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        attended = attend(q, k, v, mask, self.implementation)
        return self.out_proj(attended.reshape(rows, queries, width))  # [B, Q, K, D/K] -> [B, Q, D]

    def pool(self, x: jax.Array, probe: jax.Array) -> jax.Array:
        """Attends to all positions with one query: [B, T, D], [1, 1, D] -> [B, 1, D]."""
        rows, _, width = x.shape
        probe = jnp.broadcast_to(probe, (rows, 1, width))
        # [B, 1 or T, D] -> [B, 1 or T, K, D/K]
        q, k, v = (
            part.reshape(rows, -1, self.heads, width // self.heads)
            for part in self.in_proj.parts(probe, x, x)
        )
        attended = attend(q, k, v, implementation=self.implementation)
        return self.out_proj(attended.reshape(rows, 1, width))


class MLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: BlockConfig, init: BlockInit, run: ModelConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, dtype=jnp.dtype(run.array_dtype), rngs=rngs)
        self.activation = config.activation
        self.c_fc = linear(config.width, config.hidden_width, kernel_init=init.c_fc)
        self.c_proj = linear(config.hidden_width, config.width, kernel_init=init.c_proj)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(_ACTIVATIONS[self.activation](self.c_fc(x)))


class ResidualAttentionBlock(nnx.Module):
    """Pre-LN block: x + attn(ln_1(x)), then x + mlp(ln_2(x)). The norms are float32.

    Only the outputs of the first `queries` positions are computed.
    """

    def __init__(self, config: BlockConfig, init: BlockInit, run: ModelConfig, *, rngs: nnx.Rngs):
        self.ln_1 = layer_norm(config.width, config.eps, rngs=rngs)
        self.attn = SelfAttention(config, init, run, rngs=rngs)
        self.ln_2 = layer_norm(config.width, config.eps, rngs=rngs)
        self.mlp = MLP(config, init, run, rngs=rngs)

    def __call__(
        self, x: jax.Array, mask: AttentionMask, queries: int, rotation: Rotation | None = None
    ) -> jax.Array:
        x = row_major(x)
        attended = self.attn(row_major(self.ln_1(x)), mask, queries, rotation)
        x = row_major(x[:, :queries] + attended)
        return x + self.mlp(row_major(self.ln_2(x)))


def row_major(x: jax.Array) -> jax.Array:
    """Pins the layout of an array on a GPU, where XLA otherwise copies it into others and back."""
    return x if is_on_cpu() else with_layout_constraint(x, DenseLayout(tuple(range(x.ndim))))


class Transformer(nnx.Module):
    """Blocks with parameters stacked on a leading axis.

    On a CPU, `lax.scan` runs them: one block is compiled instead of all, and ViT-B/32 is twice as
    fast. On a GPU, they follow each other: what a loop keeps for the backward pass is copied into
    stacks and out of them.
    """

    def __init__(
        self,
        config: BlockConfig,
        layers: int,
        *,
        init: BlockInit,
        run: ModelConfig,
        lora: LoRAConfig | None = None,
        rngs: nnx.Rngs,
    ):
        has_adapters = lora is not None and lora.rank > 0
        self.dropout = lora.dropout if has_adapters else 0.0
        self.dtype, self.remat = jnp.dtype(run.array_dtype), run.remat
        self.unroll = min(run.scan_unroll, layers)
        # The first layers whose parameters have no gradient (`drl.model_definition`).
        self.frozen_layers = 0

        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(layer_rngs: nnx.Rngs) -> ResidualAttentionBlock:
            block = ResidualAttentionBlock(config, init, run, rngs=layer_rngs)
            for name in lora.targets.split(",") if has_adapters else ():
                module = block.attn if hasattr(block.attn, name) else block.mlp
                getattr(module, name).add_adapter(lora, name, rngs=layer_rngs)
            return block

        self.resblocks = stack(rngs.split(layers))

    def __call__(
        self,
        x: jax.Array,
        mask: AttentionMask = NO_MASK,
        queries: int | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """[B, T, D] -> [B, Q, D] in the dtype of the matrix products.

        `queries` is the number Q of leading positions whose output is needed, by default T; the
        last block computes nothing for the others. `rotation` is of all T positions.
        """
        block, stacked = nnx.split(self.resblocks)

        def block_function(queries: int):
            def run_block(carry, layer):
                params, key = layer
                with adapter_dropout(None if key is None else jax.random.wrap_key_data(key)):
                    return nnx.merge(block, params)(carry, mask, queries, rotation), None

            return rematerialized(run_block, self.remat)

        # With fsdp, an embedding table that is split by columns would split all that follows, too.
        x = split_rows(x.astype(self.dtype))
        run_block = block_function(x.shape[1])
        key = adapter_dropout_key() if self.dropout else None
        if key is not None:
            layers = len(jax.tree.leaves(stacked)[0])
            key = jax.random.key_data(jax.random.split(key, layers))
        leaves, tree = jax.tree.flatten((stacked, key))
        if not is_on_cpu():
            # The gradient of a split is a concatenation, that of indexing a sum of padded arrays.
            split = zip(*(jnp.split(leaf, len(leaf)) for leaf in leaves), strict=True)
            *first, last = (tree.unflatten([leaf[0] for leaf in layer]) for layer in split)
            frozen = self.frozen_layers
            first = [*jax.lax.stop_gradient(first[:frozen]), *first[frozen:]]
            for params in first:
                x = run_block(x, params)[0]
            return block_function(queries or x.shape[1])(x, last)[0]
        if self.frozen_layers:
            parts = [jnp.split(leaf, [self.frozen_layers]) for leaf in leaves]
            frozen, leaves = zip(*parts, strict=True)
            # A loop of their own: one over all layers would have a backward pass over all.
            frozen = jax.lax.stop_gradient(tree.unflatten(frozen))
            x = jax.lax.scan(run_block, x, frozen, unroll=self.unroll)[0]
        if queries is None:
            return jax.lax.scan(run_block, x, tree.unflatten(leaves), unroll=self.unroll)[0]
        parts = [jnp.split(leaf, [len(leaf) - 1]) for leaf in leaves]
        first, last = (tree.unflatten(part) for part in zip(*parts, strict=True))
        x = jax.lax.scan(run_block, x, first, unroll=self.unroll)[0]
        return block_function(queries)(x, jax.tree.map(lambda leaf: leaf[0], last))[0]


class AttentionPool(nnx.Module):
    """Pools positions with one learned query: attention, then x + mlp(layernorm(x)).

    The "MAP head" of SigLIP and the pooling of Perception Encoder, which has these names.
    """

    def __init__(self, config: BlockConfig, init: BlockInit, run: ModelConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.probe = nnx.Param(width**-0.5 * rngs.params.normal((1, 1, width)))
        self.attn = SelfAttention(config, init, run, rngs=rngs)
        self.layernorm = layer_norm(width, config.eps, rngs=rngs)
        self.mlp = MLP(config, init, run, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, D]."""
        x = self.attn.pool(x, self.probe[...])
        return (x + self.mlp(self.layernorm(x)))[:, 0]


def rematerialized(function: Callable, remat: str) -> Callable:
    """Chooses what the backward pass of a function computes again (`ModelConfig.remat`)."""
    if remat == "none":
        return function
    keep = jax.checkpoint_policies.save_only_these_names(KEPT)
    return jax.checkpoint(function, policy=keep if remat == "dots" else None)
