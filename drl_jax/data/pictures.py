"""Pictures of decoded frames: what a screen shows of them, and the array that a model takes.

Decoding workers import this module, so it does not import jax.
"""

import contextlib
import functools
import tempfile

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from drl_jax.data.frame_form import FrameForm
from drl_jax.data.video_file import IN_ONE_THREAD, VideoError

# PIL's filters; they average over all pixels that become one.
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Above this aspect ratio, the picture resized by its short side would not fit in memory.
_MAX_ASPECT_RATIO = 64
# Transfer characteristics of HDR, and primaries (ITU-T H.273).
_PQ, _HLG, _BT2020, _UNKNOWN = 16, 18, 9, 2
# Places along each side of the table of colours.
_PLACES = 33
# Linear BT.2020 to BT.709 (ITU-R BT.2087).
_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
)
# Reference white, cd/m2 (ITU-R BT.2408), and the share of it from which highlights are compressed.
_WHITE, _KNEE = 203.0, 0.8


def to_form(image: np.ndarray, form: FrameForm) -> np.ndarray:
    """Resizes a picture to a square.

    Args:
      image: uint8 [H, W, 3].
      form: size, resize and interpolation.

    Returns:
      uint8 [size, size, 3].

    Raises:
      VideoError: the aspect ratio is too large.
    """
    height, width = image.shape[:2]
    short, long = min(height, width), max(height, width)
    # Also where nothing is cropped, so that a dataset has the same videos in every form.
    if long > _MAX_ASPECT_RATIO * short:
        raise VideoError(f"picture of {width} x {height} pixels is too thin to resize")
    size, resampling = form.size, _RESAMPLING[form.interpolation]
    if form.resize == "squash":
        return np.asarray(Image.fromarray(image).resize((size, size), resampling))
    # As in torchvision: the long side is truncated, the offset of the crop rounded half to even.
    scaled = int(size * long / short)
    new_width, new_height = (size, scaled) if width <= height else (scaled, size)
    left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    resized = Image.fromarray(image).resize((new_width, new_height), resampling)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Turns a picture as its camera was held, and converts it to RGB, on white."""
    with contextlib.suppress(Exception):  # The metadata are damaged.
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow cuts at 255.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def pad_frames(frames: np.ndarray, max_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads a video [F, H, W, 3], or features [F, D], with zeros to max_frames, with a mask."""
    padding = (0, max_frames - len(frames))
    mask = np.arange(max_frames) < len(frames)
    return np.pad(frames, (padding, *[(0, 0)] * (frames.ndim - 1))), mask


def what_is_changed(frame: av.VideoFrame) -> set[str]:
    """What `as_shown` changes of a decoded frame: any of "HDR", "interlaced", "transparent"."""
    found = {
        "HDR": frame.color_trc in (_PQ, _HLG),
        "interlaced": frame.interlaced_frame,
        "transparent": _has_alpha(frame),
    }
    return {name for name, is_found in found.items() if is_found}


def _has_alpha(frame: av.VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components)


class FrameConverter:
    """Converts frames to upright pictures; reusing one for a whole video is faster.

    With `as_shown`, a picture is what a screen of standard range shows: HDR (PQ or HLG) is
    tone-mapped to BT.709, and what is transparent is on white.
    """

    def __init__(self, as_shown: bool):
        self._as_shown = as_shown
        self._reformat = functools.partial(VideoReformatter().reformat, **IN_ONE_THREAD)
        self._tone_mappers: dict[tuple[int, ...], av.filter.Graph] = {}

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """A frame as uint8 [H, W, 3]."""
        if self._as_shown and frame.color_trc in (_PQ, _HLG):
            rgb = self._tone_mapped(frame)
        elif self._as_shown and _has_alpha(frame):
            rgba = self._reformat(frame, format="rgba").to_ndarray()
            alpha = rgba[..., 3:].astype(np.uint16)
            rgb = ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        else:
            rgb = self._reformat(frame, format="rgb24").to_ndarray()
        quarter_turns = round(frame.rotation) % 360 // 90
        return np.ascontiguousarray(np.rot90(rgb, quarter_turns))

    def _tone_mapped(self, frame: av.VideoFrame) -> np.ndarray:
        deep = self._reformat(frame, format="rgb48le")
        is_wide = frame.color_primaries in (_BT2020, _UNKNOWN)
        key = frame.width, frame.height, frame.color_trc, is_wide
        if key not in self._tone_mappers:
            self._tone_mappers[key] = _tone_mapper(deep, _colour_table(*key[2:]))
        mapper = self._tone_mappers[key]
        mapper.push(deep)
        return self._reformat(mapper.pull(), format="rgb24").to_ndarray()


def _tone_mapper(frame: av.VideoFrame, table: str) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    # The filter takes a file alone, and has read it when the graph is ready.
    with tempfile.NamedTemporaryFile("w", suffix=".cube") as file:
        file.write(table)
        file.flush()
        mapper, sink = graph.add("lut3d", file=file.name), graph.add("buffersink")
        source.link_to(mapper)
        mapper.link_to(sink)
        graph.configure()
    return graph


@functools.cache
def _colour_table(transfer: int, is_wide: bool) -> str:
    """The colours of a screen for those of an HDR signal, as a file of the format .cube."""
    levels = np.linspace(0, 1, _PLACES)
    blue, green, red = np.meshgrid(levels, levels, levels, indexing="ij")  # Red changes fastest.
    shown = tone_map(np.stack([red, green, blue], axis=-1).reshape(-1, 3), transfer, is_wide)
    rows = "\n".join(f"{r:.6f} {g:.6f} {b:.6f}" for r, g, b in shown.tolist())
    return f"LUT_3D_SIZE {_PLACES}\n{rows}\n"


def tone_map(signal: np.ndarray, transfer: int, is_wide: bool = True) -> np.ndarray:
    """What a BT.709 screen shows of an HDR signal.

    Light is relative to reference white (203 cd/m2). Up to 80 % of it, colours stay what they are;
    what is brighter approaches the white of the screen and keeps its hue.

    Args:
      signal: R'G'B' in 0..1, float [N, 3].
      transfer: 16 is PQ (SMPTE ST 2084), 18 is HLG (for a screen of 1,000 cd/m2); both by BT.2100.
      is_wide: whether its primaries are those of BT.2020.

    Returns:
      R'G'B' in 0..1, float [N, 3], for a screen with the gamma of BT.1886.
    """
    if transfer == _PQ:
        root = signal ** (1 / 78.84375)
        ratio = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
        light = 10_000 * ratio ** (1 / 0.1593017578125)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
        luminance = scene @ np.array([0.2627, 0.678, 0.0593])
        light = 1000 * scene * luminance[:, None] ** 0.2
    light = light / _WHITE
    if is_wide:
        light = np.maximum(light @ _TO_BT709.T, 0)
    brightest = np.maximum(light.max(axis=1, keepdims=True), 1e-9)
    over = np.maximum(brightest - _KNEE, 0)
    mapped = np.minimum(brightest, _KNEE) + (1 - _KNEE) * over / (1 - _KNEE + over)
    return (light * mapped / brightest) ** (1 / 2.4)
