"""Pictures that users give as queries, decoded in processes with limits of memory and time.

Worker processes import this module, so it does not import jax.
"""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from drl_jax.data.frame_form import FrameForm
from drl_jax.data.video import VideoError, to_form
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.resources import memory_limit
from drl_jax.runtime.worker_pool import CallPool, WorkerFailure

# What cameras, screenshots and web pages are. Pillow has decoders of many more formats, of which
# few people look at the faults, and one starts another program.
FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "AVIF")
# Largest picture that is decoded, pixels; JPEG is scaled while it is decoded.
MAX_PIXELS = 50_000_000
# Bytes and seconds that decoding a picture may take.
_MEMORY, _SECONDS = 2**30, 10.0


def open_picture(pool: CallPool, path: Path, form: FrameForm, name: str = "") -> bytes:
    """Decodes an image file as a frame: the bytes of uint8 [S, S, 3].

    It is upright, on white where it is transparent, and the first picture of several.

    Args:
      pool: its processes decode the file, as many at once as it has.
      path: of the file.
      form: form of the frame.
      name: of the file, for the message of an error; empty: its path.

    Raises:
      UserError: it cannot be read, has none of FORMATS, or exceeds a limit.
    """
    decoded = pool.call(_decode, path, form, timeout=_SECONDS)
    if isinstance(decoded, WorkerFailure):
        decoded = f"cannot be decoded ({decoded.reason})"
    if isinstance(decoded, str):
        raise UserError(f"{name or path} {decoded}")
    return decoded


def _decode(path: Path, form: FrameForm) -> bytes | str:
    """The frame, or what is wrong with the file."""
    # Pillow's own limit refuses pictures that are scaled here, and it warns of damaged metadata.
    Image.MAX_IMAGE_PIXELS = None
    warnings.simplefilter("ignore")
    Image.init()
    known = [name for name in FORMATS if name.upper() in Image.OPEN]
    pixels = 0
    try:
        with memory_limit(_MEMORY), Image.open(path, formats=known) as image:
            width, height = image.size
            pixels = width * height
            if pixels > MAX_PIXELS:
                factor = next((n for n in (2, 4) if pixels <= n * n * MAX_PIXELS), 8)
                image.draft(None, (max(1, width // factor), max(1, height // factor)))
            if image.width * image.height > MAX_PIXELS:
                return f"has {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded"
            image.load()
            return to_form(np.asarray(_opaque(_upright(image))), form).tobytes()
    except UnidentifiedImageError:
        return f"is not a {', '.join(known[:-1])} or {known[-1]} file; convert it to one"
    except MemoryError:
        return f"needs more than {_MEMORY >> 20:,} MB to be decoded"
    except VideoError as error:
        return f"cannot be used: {error}"
    # Pillow raises many types of errors for damaged files; those of the system have a number.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            return f"cannot be read: {error.strerror}"
        # Decoders do not say whether memory was missing.
        return "is damaged" if 0 < pixels <= MAX_PIXELS else "is damaged, or too large"


def _upright(image: Image.Image) -> Image.Image:
    """Turns a picture as its camera was held."""
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    # The metadata are damaged.
    except Exception:
        return image


def _opaque(image: Image.Image) -> Image.Image:
    """Converts a picture to RGB, on white where it is transparent."""
    if image.mode.startswith("I"):
        # 16 bits, which Pillow cuts at 255.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white
