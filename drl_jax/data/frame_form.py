"""The form of a frame: how a picture becomes the square that a model takes.

Decoding workers import this module, so it does not import jax.
"""

import dataclasses

from drl_jax.config import BackboneConfig


@dataclasses.dataclass(frozen=True)
class FrameForm:
    """The form of a frame; the defaults are OpenAI's CLIP.

    Attributes:
      size: side of the square, pixels.
      resize: "crop" resizes the short side and cuts out the centre; "squash" resizes both sides.
      interpolation: one of `config.INTERPOLATIONS`.
    """

    size: int
    resize: str = BackboneConfig.resize
    interpolation: str = BackboneConfig.interpolation

    @classmethod
    def of(cls, backbone: BackboneConfig) -> "FrameForm":
        """The form of the frames that an image tower takes."""
        return cls(backbone.image_resolution, backbone.resize, backbone.interpolation)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a frame: (height, width, channels)."""
        return (self.size, self.size, 3)

    def changed_fields(self) -> dict[str, str]:
        """`resize` and `interpolation`, by name, where they are not the default."""
        fields = {"resize": self.resize, "interpolation": self.interpolation}
        return {n: value for n, value in fields.items() if value != getattr(BackboneConfig, n)}
