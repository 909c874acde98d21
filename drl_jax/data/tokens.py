"""Token ids of a dataset's captions, in files that are mapped into memory.

They are in the directory `tokens` of a dataset, in one directory for each split, tokenizer and
number of words. The build stores those of the default tokenizer; a training with another one stores
its own. They follow from the captions, so they can be deleted at any time.
"""

import dataclasses
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from drl_jax.data.splits import CaptionOrigin, Captions
from drl_jax.models.tokenizers.base import Tokenizer, warn_of_cut
from drl_jax.runtime.errors import refusal
from drl_jax.runtime.files import publishing, seal, sha256, unseal, write_json

TOKENS = "tokens"
_IDS_FILE, _ABOUT_FILE = "ids.npy", "about.json"
# Captions that are tokenised at a time.
_CHUNK = 8192


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids of T captions.

    Attributes:
      rows: [T] with the fields `length` and `ids` [L]; those after `length` are 0.
      pad_id: id after the last token.
    """

    rows: np.ndarray
    pad_id: int

    def __getitem__(self, text: int) -> tuple[np.ndarray, np.ndarray]:
        """text_ids int32 [L] and text_mask bool [L] of a caption, as `Tokenizer.tokenize`."""
        ids = self.rows["ids"][text].astype(np.int32)
        mask = np.arange(len(ids)) < self.rows["length"][text]
        ids[~mask] = self.pad_id
        return ids, mask


def caption_tokens(
    captions: Captions, tokenizer: Tokenizer, max_words: int, *, quiet: bool = False
) -> Tokens:
    """The tokens of `captions.texts`: stored ones, or else computed and stored where possible.

    Stored ones that are damaged, or of other captions, are computed again; those that cannot be
    read stay as they are. Processes may do so at the same time. Unless it is `quiet`, says how many
    captions are cut (`warn_of_cut`).
    """
    texts, origin = captions.texts, captions.origin
    found = None
    try:
        found = _read(origin, len(texts), tokenizer, max_words) if origin else None
        if found is None and origin:
            store_tokens(captions, tokenizer, max_words, quiet=quiet)
            found = _read(origin, len(texts), tokenizer, max_words)
    except OSError as error:
        if not quiet:
            tqdm.write(
                f"the tokens of {origin.split} cannot be read from or stored in"
                f" {origin.directory / TOKENS} ({error.strerror or error}): they are kept in"
                " memory, and computed again by the next training",
                file=sys.stderr,
            )
    rows, cut = found or _in_memory(texts, tokenizer, max_words, quiet)
    if not quiet:
        warn_of_cut(cut, len(texts), max_words, f"split {origin.split}" if origin else "")
    return Tokens(rows, tokenizer.pad_id)


def store_tokens(
    captions: Captions, tokenizer: Tokenizer, max_words: int, *, quiet: bool = False
) -> int:
    """Stores the tokens of captions with an origin; returns how many are cut. Raises OSError."""
    texts, origin, cut = captions.texts, captions.origin, 0
    entry = _entry(origin, tokenizer, max_words)
    entry.parent.mkdir(exist_ok=True)
    # An entry that is there is damaged, or another process has just stored the same tokens: both
    # may be replaced, and a process that has mapped their file keeps it.
    shutil.rmtree(entry, ignore_errors=True)
    try:
        with publishing(entry) as unfinished:
            with (unfinished / _IDS_FILE).open("wb") as file:
                dtype = np.lib.format.dtype_to_descr(_row_dtype(tokenizer, max_words))
                header = {"descr": dtype, "fortran_order": False, "shape": (len(texts),)}
                np.lib.format.write_array_header_1_0(file, header)
                for rows, cut_rows in _tokenized(texts, tokenizer, max_words, quiet):
                    file.write(rows.tobytes())
                    cut += cut_rows
            about = _about(origin, len(texts), tokenizer, max_words)
            about |= {"ids_sha256": sha256(unfinished / _IDS_FILE), "cut": cut}
            write_json(unfinished / _ABOUT_FILE, seal(about))
    except OSError:
        if not (entry / _ABOUT_FILE).exists():  # Stored by another process.
            raise
    return cut


def _entry(origin: CaptionOrigin, tokenizer: Tokenizer, max_words: int) -> Path:
    name = f"{origin.split}_{max_words}_{tokenizer.fingerprint[:16]}"
    return origin.directory / TOKENS / name


def _about(
    origin: CaptionOrigin, texts: int, tokenizer: Tokenizer, max_words: int
) -> dict[str, object]:
    """What stored tokens were made from."""
    return {
        "captions": texts,
        "captions_sha256": origin.sha256,
        "tokenizer": tokenizer.fingerprint,
        "max_words": max_words,
    }


def _read(
    origin: CaptionOrigin, texts: int, tokenizer: Tokenizer, max_words: int
) -> tuple[np.ndarray, int] | None:
    """Maps stored tokens, and how many are cut; None if they cannot be used. Raises OSError."""
    entry = _entry(origin, tokenizer, max_words)
    try:
        about = unseal((entry / _ABOUT_FILE).read_text(encoding="utf-8"))
        digest, cut = about.pop("ids_sha256", None), about.pop("cut", None)
        if cut is None or about != _about(origin, texts, tokenizer, max_words):
            return None
        if digest != sha256(entry / _IDS_FILE):
            return None
        rows = np.load(entry / _IDS_FILE, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        if (refused := refusal(error)) is not None:
            raise refused from error
        return None
    # A plain array: indexing one of class memmap takes longer.
    return rows.view(np.ndarray), cut


def _row_dtype(tokenizer: Tokenizer, max_words: int) -> np.dtype:
    """The smallest type of numbers for ids and lengths, so that rows are aligned."""
    number = np.min_scalar_type(max(tokenizer.vocabulary_size - 1, max_words)).newbyteorder("<")
    return np.dtype([("length", number), ("ids", number, (max_words,))])


def _in_memory(
    texts: Sequence[str], tokenizer: Tokenizer, max_words: int, quiet: bool
) -> tuple[np.ndarray, int]:
    chunks, cut = zip(*_tokenized(texts, tokenizer, max_words, quiet), strict=True)
    return np.concatenate(chunks), sum(cut)


def _tokenized(
    texts: Sequence[str], tokenizer: Tokenizer, max_words: int, quiet: bool
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the rows of `Tokens`, and how many are cut, for a chunk of captions at a time."""
    dtype = _row_dtype(tokenizer, max_words)
    # The bar appears only if there is something to wait for.
    with tqdm(total=len(texts), desc="tokenizing", unit="caption", delay=2, disable=quiet) as bar:
        for start in range(0, len(texts), _CHUNK):
            ids, mask, is_cut = tokenizer.tokenize(texts[start : start + _CHUNK], max_words)
            rows = np.zeros(len(ids), dtype)
            rows["length"] = mask.sum(axis=1)
            rows["ids"] = np.where(mask, ids, 0)
            yield rows, int(is_cut.sum())
            bar.update(len(rows))
