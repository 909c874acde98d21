"""How the frames of a dataset are stored."""

import dataclasses
import re

from drl_jax.config import INTERPOLATIONS, RESIZES, STORAGE_ENCODINGS, Config
from drl_jax.data.frame_form import FrameForm

_NAME = re.compile(
    rf"(\d+)px_(\d+)f_({'|'.join(STORAGE_ENCODINGS)})"
    rf"(?:_({'|'.join(RESIZES[1:])}))?(?:_({'|'.join(INTERPOLATIONS[1:])}))?"
)
# Datasets that the build draws, so that it needs no source files (`data_prep.datasets.DRAWN`).
DRAWN_DATASETS = ("shapes", "shapes_stills")


@dataclasses.dataclass(frozen=True)
class StorageSpec:
    """Storage variant of a dataset, which can be built in several of them.

    Attributes:
      form: form of the frames.
      max_frames: maximum number of frames per video.
      encoding: one of `config.STORAGE_ENCODINGS`.
    """

    form: FrameForm
    max_frames: int
    encoding: str

    @classmethod
    def of(cls, config: Config) -> "StorageSpec":
        """The variant that a configuration reads."""
        form = FrameForm.of(config.model.backbone)
        return cls(form, config.data.max_frames, config.data.storage)

    @property
    def name(self) -> str:
        """Name of the variant's directory, e.g. `224px_12f_jpeg` or `256px_12f_jpeg_squash`."""
        name = f"{self.form.size}px_{self.max_frames}f_{self.encoding}"
        return "_".join([name, *self.form.changed_fields().values()])

    @classmethod
    def from_name(cls, name: str) -> "StorageSpec":
        """The variant with a name; ValueError if it is the name of none."""
        match = _NAME.fullmatch(name)
        if not match:
            raise ValueError(f"{name!r} is not like 224px_12f_jpeg")
        size, max_frames, encoding, resize, interpolation = match.groups()
        changed = {"resize": resize, "interpolation": interpolation}
        form = FrameForm(int(size), **{name: value for name, value in changed.items() if value})
        return cls(form, int(max_frames), encoding)

    def __str__(self) -> str:
        """The name and the form, e.g. `224px_12f_jpeg (crop, bicubic)`."""
        return f"{self.name} ({self.form.resize}, {self.form.interpolation})"

    def flags(self) -> list[str]:
        """Flags of `data_prep.build` that give this variant of any dataset."""
        return [
            f"--image_size={self.form.size}",
            f"--max_frames={self.max_frames}",
            f"--storage={self.encoding}",
            *(f"--{name}={value}" for name, value in self.form.changed_fields().items()),
        ]
