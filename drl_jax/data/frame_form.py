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
      as_shown: whether frames are what a screen shows of them: deinterlaced, of standard range, and
        on white where they are transparent.
    """

    size: int
    resize: str = BackboneConfig.resize
    interpolation: str = BackboneConfig.interpolation
    as_shown: bool = False

    @classmethod
    def of(cls, backbone: BackboneConfig, as_shown: bool = False) -> "FrameForm":
        """The form of the frames that an image tower takes."""
        return cls(backbone.image_resolution, backbone.resize, backbone.interpolation, as_shown)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a frame: (height, width, channels)."""
        return (self.size, self.size, 3)

    def changed_fields(self) -> dict[str, str | bool]:
        """All fields but `size`, by name, where they are not the default.

        Names and manifests of datasets have these alone.
        """
        default = FrameForm(self.size)
        names = ("resize", "interpolation", "as_shown")
        fields = {name: getattr(self, name) for name in names}
        return {name: value for name, value in fields.items() if value != getattr(default, name)}
