"""What temporal heads and interactions share: copies of the text tower, and names of weights."""

import re
from collections.abc import Collection
from typing import Any, ClassVar

from flax import nnx


class Head(nnx.Module):
    """A part of the model above the towers.

    Attributes:
      COPIED_POSITIONS: parameter that is initialised with the text tower's position embeddings; the
        blocks of `transformer` are then initialised with the text tower's. Empty: no transformer.
      REFERENCE_NAMES: patterns of the paths of parameters below the head, separated by "/", and
        their names in the reference, before common suffixes are translated.
      UNUSED_REFERENCE_NAMES: tensors of the reference's state dict that it never uses.
    """

    COPIED_POSITIONS: ClassVar[str] = ""
    REFERENCE_NAMES: ClassVar[tuple[tuple[str, str], ...]] = ()
    UNUSED_REFERENCE_NAMES: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def reference_name(cls, path: str, paths: Collection[str]) -> str | None:
        """The reference's name of one of the parameters `paths`; None if it is not the head's."""
        for pattern, name in cls.REFERENCE_NAMES:
            if re.match(pattern, path):
                return re.sub(pattern, name, path)
        return None

    @classmethod
    def config_of_weights(cls, names: Collection[str]) -> dict[str, Any] | None:
        """Fields of ModelConfig that the names of the tensors of a reference's checkpoint imply.

        None if the checkpoint is not of this head, or the head has no parameters to tell it by.
        """
        return None


def count_blocks(names: Collection[str], transformer: str) -> int:
    """The number of blocks of a transformer in a reference's checkpoint."""
    pattern = re.compile(re.escape(transformer) + r"\.resblocks\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, names) if match})
