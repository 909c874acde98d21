"""How the frames of a dataset are stored."""

import dataclasses
import re

from drl_jax.config import FRAME_CLOCKS, INTERPOLATIONS, RESIZES, STORAGE_ENCODINGS, Config
from drl_jax.data.frame_form import FrameForm

_NAME = re.compile(
    rf"(\d+)px_(\d+)f_({'|'.join(STORAGE_ENCODINGS)})"
    rf"(?:_({'|'.join(RESIZES[1:])}))?(?:_({'|'.join(INTERPOLATIONS[1:])}))?(_shown)?"
    rf"(?:_({'|'.join(FRAME_CLOCKS[1:])}))?"
)
# Datasets that the build draws, so that it needs no source files (`data_prep.datasets.DRAWN`).
DRAWN_DATASETS = ("shapes", "shapes_events", "shapes_stills")
# Those of the user's own videos, which are sampled as a viewer sees them.
OWN_DATASETS = ("custom",)


@dataclasses.dataclass(frozen=True)
class StorageSpec:
    """Storage variant of a dataset, which can be built in several of them.

    Attributes:
      form: form of the frames.
      max_frames: maximum number of frames per video.
      encoding: one of `config.STORAGE_ENCODINGS`.
      frame_clock: one of `config.FRAME_CLOCKS`.
    """

    form: FrameForm
    max_frames: int
    encoding: str
    frame_clock: str = FRAME_CLOCKS[0]

    @classmethod
    def of(cls, config: Config) -> "StorageSpec":
        """The variant that a configuration reads."""
        data = config.data
        form = FrameForm.of(config.model.backbone, data.as_shown)
        return cls(form, data.max_frames, data.storage, data.frame_clock)

    @property
    def name(self) -> str:
        """Name of the variant's directory, e.g. `224px_12f_jpeg` or `256px_12f_jpeg_squash`."""
        name = f"{self.form.size}px_{self.max_frames}f_{self.encoding}"
        changed = {**self.form.changed_fields()}
        if changed.get("as_shown"):
            changed["as_shown"] = "shown"
        if self.frame_clock != FRAME_CLOCKS[0]:
            changed["frame_clock"] = self.frame_clock
        return "_".join([name, *map(str, changed.values())])

    @classmethod
    def from_name(cls, name: str) -> "StorageSpec":
        """The variant with a name; ValueError if it is the name of none."""
        match = _NAME.fullmatch(name)
        if not match:
            raise ValueError(f"{name!r} is not like 224px_12f_jpeg")
        size, max_frames, encoding, resize, interpolation, shown, clock = match.groups()
        form = FrameForm(
            int(size), resize or RESIZES[0], interpolation or INTERPOLATIONS[0], bool(shown)
        )
        return cls(form, int(max_frames), encoding, clock or FRAME_CLOCKS[0])

    def __str__(self) -> str:
        """The name and the form, e.g. `224px_12f_jpeg (crop, bicubic)`."""
        return f"{self.name} ({self.form.resize}, {self.form.interpolation})"

    def flags(self, dataset: str) -> list[str]:
        """Flags of `data_prep.build` that give this variant of a dataset."""
        flags = [
            f"--image_size={self.form.size}",
            f"--max_frames={self.max_frames}",
            f"--storage={self.encoding}",
        ]
        default = FrameForm(self.form.size)
        names = ("resize", "interpolation")
        values = {name: getattr(self.form, name) for name in names}
        flags += [f"--{name}={v}" for name, v in values.items() if v != getattr(default, name)]
        # The defaults of a dataset of the user's own are others.
        is_own = dataset in OWN_DATASETS
        if self.frame_clock != FRAME_CLOCKS[is_own]:
            flags.append(f"--frame_clock={self.frame_clock}")
        if self.form.as_shown != is_own:
            flags.append("--as_shown" if self.form.as_shown else "--no-as_shown")
        return flags
