"""What every interaction provides, and the blockwise comparison of many videos.

Shapes: A texts of L tokens, B videos of F frames, D channels. Names of features: `*_feat` are as
the encoder gives them, `*_unit` are divided by their L2 norm.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from drl_jax.config import ModelConfig
from drl_jax.models.heads import Head
from drl_jax.models.towers import TextFeatures
from drl_jax.runtime.errors import UserError

# Named arrays of texts or of videos; the first axis is the item.
Arrays = dict[str, jax.Array]
# The same on the host.
Features = dict[str, np.ndarray]
# Methods that belong to one similarity: that of a subclass may be another.
_INHERITABLE = {
    "explanation": ("attribution",),
    "pooled": ("pool_text", "pool_video"),
    "vectors": ("query_vectors", "video_vectors"),
}


@dataclasses.dataclass(frozen=True)
class Attribution:
    """How the tokens and frames of one pair contribute to its similarity; without padding.

    Attributes:
      similarity: float [L, F], cosine of each token and frame.
      token_weight: float [L], share of each token in the similarity.
      frame_weight: float [F], share of each frame.
      frame_contribution: float [F], what each frame adds to the similarity. For interactions that
        pool the frames: its cosine with the sentence.
    """

    similarity: np.ndarray
    token_weight: np.ndarray
    frame_weight: np.ndarray
    frame_contribution: np.ndarray


class Interaction(Head):
    """Compares texts with videos (section 3.2 of the paper), which are encoded separately.

    A new interaction is a subclass that is registered (`models.registry`), or in a module of its
    own and an entry of `INTERACTIONS`; everything that depends on the choice of the interaction is
    defined here.

    Raises:
      UserError: a subclass inherits something that its parent does not have.
    """

    # What a class takes from its parent, of "explanation", "pooled" and "vectors"; of these it has
    # no others than it defines.
    INHERITS: ClassVar[tuple[str, ...]] = ()

    # Values of `config.loss.cdcr` that the interaction supports.
    CDCR_VARIANTS: ClassVar[tuple[int, ...]] = (0,)
    # Names of the arrays of texts and of videos that `similarity` reads.
    TEXT_ARRAYS: ClassVar[tuple[str, ...]] = ()
    VIDEO_ARRAYS: ClassVar[tuple[str, ...]] = ()
    # Whether there are an `attribution`; `pool_text` and `pool_video`; and `query_vectors` and
    # `video_vectors`, whose dot product approximates the similarity. They follow from the methods.
    HAS_EXPLANATION: ClassVar[bool] = True
    HAS_POOLED: ClassVar[bool] = True
    HAS_VECTORS: ClassVar[bool] = False
    # Whether `similarity` draws dropout with its key.
    HAS_DROPOUT: ClassVar[bool] = False
    # Whether similarities are of single tokens and frames; the arrays then have features of both,
    # which is what `attribution` needs.
    COMPARES_TOKENS: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        inherits = vars(cls).get("INHERITS", ())
        parent = next(base for base in cls.__mro__[1:] if issubclass(base, Interaction))
        for what in inherits:
            if what not in _INHERITABLE or not getattr(parent, f"HAS_{what.upper()}"):
                raise UserError(f"{cls.__name__}: {parent.__name__} has no {what!r} to inherit")
        for what, methods in _INHERITABLE.items():
            missing = [name for name in methods if _is_inherited(cls, name)]
            has = what in inherits or not missing
            setattr(cls, f"HAS_{what.upper()}", has)
            for name in () if has else missing:
                setattr(cls, name, classmethod(functools.partial(_raise_missing, what)))

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Creates the parameters; the base class has none."""

    def encode_text(self, text: TextFeatures, text_mask: jax.Array) -> Arrays:
        """The arrays of A texts that `similarity` needs; the mask is bool [A, L]."""
        raise NotImplementedError

    def encode_video(self, frame_feat: jax.Array, frame_mask: jax.Array) -> Arrays:
        """The arrays of videos that `similarity` needs: [B, F, D], bool [B, F] -> [B, ...] each."""
        raise NotImplementedError

    def similarity(self, text: Arrays, video: Arrays, key: jax.Array | None = None) -> jax.Array:
        """sim_matrix float32 [A, B], without the temperature; `key` enables dropout.

        Videos that fill up a batch have no valid frame: their column has any finite values.
        """
        raise NotImplementedError

    def channel_correlation(
        self, text: Arrays, video: Arrays, key: jax.Array, cdcr: int
    ) -> jax.Array:
        """Cross-correlation of the channels of texts and their videos (CDCR), float32 [D, D].

        `key` is for variants that draw rows at random; `cdcr` is one of CDCR_VARIANTS, not 0.
        """
        raise NotImplementedError

    def statistics(self, text: Arrays, video: Arrays) -> Arrays:
        """Scalars of B texts and their videos that are logged, by name, without a gradient."""
        return {}

    @classmethod
    def config_error(cls, config: ModelConfig) -> str:
        """Why the interaction cannot be built from a configuration; empty if it can."""
        return ""

    # ---------------------------------------------------------------- on the host

    @classmethod
    def pool_text(cls, text: Features) -> np.ndarray:
        """One unit vector for each text, float32 [A, D]: the sentence feature."""
        return unit_features(text, "sentence")

    @classmethod
    def pool_video(cls, video: Features) -> np.ndarray:
        """One unit vector for each video, float32 [B, D]: the mean of its unit frames."""
        mask = video["frame_mask"]
        weight = mask / np.maximum(mask.sum(axis=1, keepdims=True), 1)
        return unit_sum(unit_features(video, "frame"), weight)

    @classmethod
    def query_vectors(cls, text: Features) -> np.ndarray:
        """One vector of each text for an engine that ranks by dot product: float32 [A, D]."""
        raise NotImplementedError

    @classmethod
    def video_vectors(cls, video: Features) -> np.ndarray:
        """One vector of each video for such an engine: float32 [B, D]."""
        raise NotImplementedError

    @classmethod
    def attribution(cls, text: Features, video: Features) -> Attribution:
        """Explains one pair, whose arrays have no axis of items, and features of all tokens."""
        tokens, frames = valid_units(text, video)
        return Attribution(
            similarity=tokens @ frames.T,
            token_weight=np.full(len(tokens), 1 / len(tokens)),
            frame_weight=np.full(len(frames), 1 / len(frames)),
            frame_contribution=frames @ unit_features(text, "sentence"),
        )

    @classmethod
    def video_as_text(cls, video: Features) -> Features:
        """Arrays of videos in the place of texts, for queries by video: frames stand for tokens."""
        raise UserError(
            f"the interaction {cls.__name__} has no video_as_text: queries are sentences"
        )


def _is_inherited(cls: type, name: str) -> bool:
    """Whether another interaction defines a method; a class that is none may provide it."""
    definer = next(base for base in cls.__mro__ if name in vars(base))
    return definer is not cls and issubclass(definer, Interaction)


def _raise_missing(what: str, cls: type[Interaction], *_: Features) -> NoReturn:
    noun = {"pooled": "pooled vectors"}.get(what, what)
    raise UserError(
        f"the interaction {cls.__name__} has no {noun}: define {' and '.join(_INHERITABLE[what])},"
        f" or inherit them with INHERITS = ({what!r},)"
    )


def unit_features(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """`NAME_unit`, or `NAME_feat` divided by its L2 norm."""
    if f"{name}_unit" in arrays:
        return arrays[f"{name}_unit"]
    feat = np.asarray(arrays[f"{name}_feat"], np.float32)
    return feat / np.maximum(np.linalg.norm(feat, axis=-1, keepdims=True), 1e-12)


def valid_units(text: Features, video: Features) -> tuple[np.ndarray, np.ndarray]:
    """Unit features of the valid tokens and frames of one pair: [L, D], [F, D]."""
    tokens = unit_features(text, "text")[text["text_mask"]]
    return tokens, unit_features(video, "frame")[video["frame_mask"]]


def unit_sum(unit: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Unit vectors [B, F, D] and their weights [B, F] -> their sum, normalised, float32 [B, D]."""
    return unit_features({"sum_feat": weighted_sum(unit, weight)}, "sum")


def weighted_sum(unit: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Vectors [B, F, D] and their weights [B, F] -> their sum, float32 [B, D]."""
    return np.matmul(weight[:, None], unit)[:, 0]


def frames_as_tokens(video: Features) -> Features:
    """Features and mask of frames under the names of tokens."""
    kind = "unit" if "frame_unit" in video else "feat"
    return {f"text_{kind}": video[f"frame_{kind}"], "text_mask": video["frame_mask"]}


def similarity_in_blocks(
    similarity: Callable[[Arrays, jax.Array | None], jax.Array],
    video: Arrays,
    key: jax.Array | None,
    block: int,
) -> jax.Array:
    """`similarity(video, key)`, computed by `map_video_blocks`: [A, B].

    `similarity` maps the arrays of N videos to [A, N]; each column depends on its video alone.
    """
    videos = len(jax.tree.leaves(video)[0])
    columns = map_video_blocks(lambda part, _, key: similarity(part, key), video, key, block)
    # [blocks, A, N] -> [A, blocks, N] -> [A, B]
    return jnp.moveaxis(columns, 0, 1).reshape(columns.shape[1], -1)[:, :videos]


def map_video_blocks(
    function: Callable[[Arrays, jax.Array, jax.Array | None], jax.Array],
    video: Arrays,
    key: jax.Array | None,
    block: int,
) -> jax.Array:
    """Computes `function(arrays, columns, key)` for one block of videos after another, stacked.

    Saves memory: the backward pass recomputes each block.

    Args:
      function: maps the arrays of N videos, their indices `columns` int32 [N], and a key to an
        array. Indices of B and more are padding.
      video: the interaction's arrays of B videos.
      key: for dropout (each block folds in its index), or None.
      block: videos per block; 0: all.
    """
    videos = len(jax.tree.leaves(video)[0])
    if not block or videos <= block:
        return function(video, jnp.arange(videos), key)[None]
    blocks = -(-videos // block)
    size = -(-videos // blocks)  # Blocks of equal size need the least padding.

    def split(x: jax.Array) -> jax.Array:
        # [B, ...] -> [blocks, size, ...]
        padding = ((0, blocks * size - videos), *[(0, 0)] * (x.ndim - 1))
        return jnp.pad(x, padding).reshape(blocks, size, *x.shape[1:])

    @jax.checkpoint
    def compute(part: tuple[jax.Array, Arrays]) -> jax.Array:
        index, arrays = part
        block_key = None if key is None else jax.random.fold_in(key, index)
        return function(arrays, index * size + jnp.arange(size), block_key)

    return jax.lax.map(compute, (jnp.arange(blocks), jax.tree.map(split, video)))
