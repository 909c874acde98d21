"""The formats of a file of embeddings.

A file has named arrays with the same first axis, numbers or strings, and a JSON text about their
model under the name `drl_jax`:

- npz: an array each; the text is an array without axes.
- safetensors: a tensor each. Arrays of strings are JSON in the metadata, as is the text.
- Parquet: a column each, in which a row of an array is a list of fixed size, or a list of lists.
  The text is in the metadata of the schema.
"""

import io
import json
from pathlib import Path

import numpy as np

from drl_jax.runtime.errors import Unavailable
from drl_jax.runtime.files import replacing

# Name of the text about the model.
ABOUT = "drl_jax"


def write_arrays(path: Path, arrays: dict[str, np.ndarray], about: str) -> int:
    """Writes a file atomically, in the format of its suffix, one of `embeddings.SUFFIXES`.

    Args:
      path: of the file.
      arrays: bool, numbers or strings; the same first axis.
      about: JSON.

    Returns:
      The size of the file, bytes.

    Raises:
      Unavailable: it cannot be written, e.g. because the disk is full.
    """
    content = _FORMATS[path.suffix](arrays, about)
    try:
        with replacing(path) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise Unavailable(path, error, "written") from error
    return len(content)


def _npz(arrays: dict[str, np.ndarray], about: str) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays, **{ABOUT: np.array(about)})
    return file.getvalue()


def _safetensors(arrays: dict[str, np.ndarray], about: str) -> bytes:
    from safetensors.numpy import save

    numbers = {name: array for name, array in arrays.items() if array.dtype.kind != "U"}
    strings = {
        name: json.dumps(array.tolist()) for name, array in arrays.items() if name not in numbers
    }
    return save(numbers, metadata={**strings, ABOUT: about})


def _parquet(arrays: dict[str, np.ndarray], about: str) -> bytes:
    # Takes half a second, and the other formats do not need it.
    import pyarrow
    import pyarrow.parquet

    def column(array: np.ndarray) -> pyarrow.Array:
        values = pyarrow.array(array.reshape(-1))
        for size in reversed(array.shape[1:]):
            values = pyarrow.FixedSizeListArray.from_arrays(values, size)
        return values

    table = pyarrow.table({name: column(array) for name, array in arrays.items()})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table.replace_schema_metadata({ABOUT: about}), file)
    return file.getvalue()


_FORMATS = {".npz": _npz, ".safetensors": _safetensors, ".parquet": _parquet}
