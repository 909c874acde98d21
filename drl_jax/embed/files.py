"""Files of captions that are read, and files of embeddings that are written.

An output is `NAME.npz`, or `NAME-00000-of-00012.npz` and so on where there are several files. A
file has named arrays with the same first axis, and a JSON text `drl_jax`: what it was made with,
and which inputs could not be read. So a later run knows which files are finished.

- npz: an array each; the text is an array without axes.
- Parquet: a column each; the text is in the metadata of the schema. Arrays with an axis of frames
  or tokens are lists of the valid ones, so there are no masks.
"""

import contextlib
import csv
import dataclasses
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import drl_jax
from drl_jax.runtime.errors import Unavailable, UserError, raise_if_refused
from drl_jax.runtime.files import parse_json, replacing
from drl_jax.runtime.lock import locked

SUFFIXES = (".npz", ".parquet")
# Precisions of the stored features.
DTYPES = ("float32", "float16")
# Captions or videos in a file, unless a command asks for another number.
SHARD_SIZE = 1000
_CAPTION_SUFFIXES = (".txt", ".csv", ".jsonl", ".json")
# Name of the column of a table and of the field of an object; and of the text about a file.
_FIELD, _ABOUT = "caption", "drl_jax"


def check_out(out: Path) -> None:
    """Raises a UserError if an output cannot have this path."""
    if out.suffix not in SUFFIXES:
        raise UserError(f"{out}: the formats are {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no directory {out.parent}")


def read_captions(path: Path) -> list[str]:
    """Reads the captions of a file by its suffix.

    `.txt` has one in each line, `.csv` a column `caption`, `.jsonl` a string or an object with the
    field `caption` in each line, and `.json` a list of these. Raises UserError if it cannot be
    read, has no captions, or a caption is blank.
    """
    if path.suffix not in _CAPTION_SUFFIXES:
        raise UserError(f"{path}: a file of captions is {', '.join(_CAPTION_SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Unavailable(path, error) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it") from error
    try:
        # Blank lines at the end are no captions.
        values = _values(path, text.rstrip())
        captions = [_checked(value, f"{path}, {place}") for place, value in values]
    except (csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not a {path.suffix[1:]} file ({error})") from error
    if not captions:
        raise UserError(f"{path} has no captions")
    return captions


def _values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yields captions, or objects with one, each with its place."""
    lines = enumerate(io.StringIO(text), start=1)
    if path.suffix == ".txt":
        yield from ((f"line {number}", line.strip()) for number, line in lines)
    elif path.suffix == ".jsonl":
        for number, line in lines:
            yield f"line {number}", parse_json(line) if line.strip() else ""
    elif path.suffix == ".json":
        values = parse_json(text)
        if not isinstance(values, list):
            raise UserError(f"{path} is not a list of captions")
        yield from ((f"item {number}", value) for number, value in enumerate(values, start=1))
    else:
        rows = csv.reader(io.StringIO(text), strict=True)
        header = next(rows, [_FIELD])
        if header.count(_FIELD) != 1:
            what = f"two columns {_FIELD}" if _FIELD in header else f"no column {_FIELD}"
            raise UserError(f"{path} has {what}; it has {', '.join(header)}")
        column = header.index(_FIELD)
        for row in rows:
            yield f"line {rows.line_num}", "".join(row[column : column + 1])


def _checked(value: Any, where: str) -> str:
    caption = value.get(_FIELD) if isinstance(value, dict) else value
    if not isinstance(caption, str):
        raise UserError(f"{where}: there is no {_FIELD}")
    if not caption.strip():
        raise UserError(f"{where}: the caption is blank")
    # JSON can hold half of a surrogate pair.
    if "\0" in caption or any("\ud800" <= character <= "\udfff" for character in caption):
        raise UserError(f"{where}: the caption has a character that is no text")
    return caption


@dataclasses.dataclass(repr=False)
class Output:
    """The files of an output, which this process alone writes (`open_output`)."""

    files: dict[Path, range]  # with the numbers of their inputs
    made_with: dict[str, Any]  # all that they depend on, JSON values by names for messages
    finished: set[Path] = dataclasses.field(default_factory=set)
    rows: int = 0  # of the finished files
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)  # why, by name

    def __repr__(self) -> str:
        lines = [f"{self.rows} rows in {', '.join(map(str, self.files))}"]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in self.unreadable.items()])

    def pending(self) -> dict[Path, range]:
        """Those of `files` that are not finished."""
        return {file: part for file, part in self.files.items() if file not in self.finished}

    def write(
        self,
        file: Path,
        arrays: dict[str, np.ndarray],
        unreadable: Mapping[str, str],
        is_finished: bool,
    ) -> None:
        """Writes arrays of bool, numbers or strings with the same first axis.

        The next run makes a file again that is not finished. Raises Unavailable.
        """
        rows = len(next(iter(arrays.values())))
        state = {"rows": rows, "unreadable": unreadable, "is_finished": is_finished}
        about = {"version": drl_jax.__version__, **self.made_with, **state}
        encode = _npz if file.suffix == ".npz" else _parquet
        content = encode(arrays, json.dumps(about))
        try:
            with replacing(file, durable=True) as unfinished:
                unfinished.write_bytes(content)
        except OSError as error:
            raise Unavailable(file, error, "written") from error
        self.add(file, about)

    def add(self, file: Path, about: Mapping[str, Any]) -> None:
        """Counts a file that is complete, whose text is `about`."""
        self.finished.add(file)
        self.rows += about["rows"]
        self.unreadable |= about["unreadable"]


@contextlib.contextmanager
def open_output(
    out: Path, made_with: Mapping[str, Any], inputs: int, shard_size: int
) -> Iterator[Output]:
    """Locks an output of a number of captions or videos; finds what an earlier run finished.

    Raises:
      UserError: another process writes it, or there are files of another origin.
    """
    starts = range(0, inputs, shard_size)
    names = [f"{out.stem}-{n:05d}-of-{len(starts):05d}{out.suffix}" for n in range(len(starts))]
    paths = [out.with_name(name) for name in names] if len(starts) > 1 else [out]
    parts = (range(start, min(start + shard_size, inputs)) for start in starts)
    files = dict(zip(paths, parts, strict=True))
    output = Output(files, {**made_with, "--shard_size": shard_size})
    name = re.compile(re.escape(out.stem) + r"(-\d{5,}-of-\d{5,})?" + re.escape(out.suffix))
    with contextlib.ExitStack() as stack:
        try:
            lock = locked(out.with_name(f"{out.name}.lock"), f"the output {out}")
            stack.enter_context(lock)
        except OSError as error:
            raise Unavailable(out, error, "written") from error
        for path in sorted(path for path in out.parent.iterdir() if name.fullmatch(path.name)):
            # JAX was the only encoder, before it was recorded.
            about = {"--encoder": "jax", **_read_about(path)}
            for key, value in output.made_with.items():
                if about.get(key) != value:
                    other = f"was made with another {key.removeprefix('--')}"
                    raise UserError(f"{path} {other}; give another name, or move it away")
            if about["is_finished"]:
                output.add(path, about)
        # What a process that was killed left behind.
        for part in out.parent.glob("*.part"):
            if part.with_name(part.name.rsplit(".", 2)[0]) in files:
                part.unlink(missing_ok=True)
        yield output


def _read_about(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(json.loads(str(file[_ABOUT])))
        import pyarrow.parquet

        return dict(json.loads(pyarrow.parquet.read_schema(path).metadata[_ABOUT.encode()]))
    except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise_if_refused(path, error)
        raise UserError(
            f"{path} is damaged, or no file of drl_jax.embed; move it away, or give another name"
        ) from error


def _npz(arrays: dict[str, np.ndarray], about: str) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays, **{_ABOUT: np.array(about)})
    return file.getvalue()


def _parquet(arrays: dict[str, np.ndarray], about: str) -> bytes:
    # Takes half a second, and npz does not need it.
    import pyarrow
    import pyarrow.parquet

    mask = arrays["text_mask" if "text_mask" in arrays else "frame_mask"]
    offsets = np.concatenate([[0], mask.sum(axis=1).cumsum()]).astype(np.int32)

    def column(name: str, array: np.ndarray) -> pyarrow.Array:
        has_positions = name == "token" or name.startswith(("text_", "frame_"))
        rows = array[mask] if has_positions else array
        values = pyarrow.array(rows.reshape(-1))
        if rows.ndim > 1:
            values = pyarrow.FixedSizeListArray.from_arrays(values, rows.shape[1])
        return pyarrow.ListArray.from_arrays(offsets, values) if has_positions else values

    stored = [name for name in arrays if not name.endswith("_mask")]
    table = pyarrow.table({name: column(name, arrays[name]) for name in stored})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table.replace_schema_metadata({_ABOUT: about}), file)
    return file.getvalue()
