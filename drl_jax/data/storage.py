"""How the frames of a dataset are stored."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class StorageSpec:
    """Storage variant of a dataset: one dataset can be built in several of them.

    Attributes:
      image_size: side of the square frames, pixels.
      max_frames: maximum number of frames per video.
      encoding: one of `config.STORAGE_ENCODINGS`.
    """

    image_size: int
    max_frames: int
    encoding: str

    @property
    def name(self) -> str:
        """Name of the variant's directory, e.g. `224px_12f_jpeg`."""
        return f"{self.image_size}px_{self.max_frames}f_{self.encoding}"

    @classmethod
    def from_name(cls, name: str) -> "StorageSpec":
        """The variant with a name.

        Raises:
          ValueError: it is not the name of a variant.
        """
        match = re.fullmatch(r"(\d+)px_(\d+)f_(\w+)", name)
        if not match:
            raise ValueError(f"{name!r} is not like 224px_12f_jpeg")
        return cls(int(match[1]), int(match[2]), match[3])
