"""Ranking without hubs: windows that are similar to almost every sentence.

An index that has a bank of captions stores, for each window, what inverted softmax and NNN subtract
from its similarities (`evaluation/hubness.py`), for every parameter that `drl_jax.evaluate` fits.
A query chooses one of them, and the engine ranks by the difference: exactly, and each sentence on
its own. The scores that are shown are the similarities. A few dozen captions do for `calibration`,
which needs a mean; the largest similarities take thousands, so this is another bank.

The captions are in a file of the index, and its header has their hash and the parameters.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drl_jax.evaluation.hubness import inverted_softmax_bias, mean_of_largest
from drl_jax.evaluation.post_processing import BETAS, LARGEST
from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import json_sha256, write_json
from drl_jax.search.segments import SearchIndexError

# Name of the array of an index: float32 [P] for each window, by inverse temperatures of inverted
# softmax, then by numbers of largest similarities of NNN.
HUBNESS_ARRAY = "hubness"
_FILE = "hubness_bank.json"
# Windows that are compared with a bank at a time.
_COMPARED = 1024


@dataclasses.dataclass(frozen=True)
class Correction:
    """A method that ranks without hubs, and its parameters.

    Attributes:
      method: "is" or "nnn".
      parameter: the inverse temperature of "is", or how many of the largest similarities "nnn"
        takes the mean of.
      factor: what the stored number is multiplied by: the weight of "nnn", 1 for "is".
    """

    method: str
    parameter: int
    factor: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Correction":
        """Reads is, is:BETA, nnn, nnn:K or nnn:K:W; the default is 20, and 128 and 0.75.

        Raises:
          UserError: it is none of these.
        """
        method, *values = text.split(":")
        try:
            if method == "is" and len(values) <= 1:
                return cls("is", *map(int, values or ["20"]))
            if method == "nnn" and len(values) <= 2:
                largest, weight = [*values, *["128", "0.75"][len(values) :]]
                if 0 <= float(weight) < math.inf:
                    return cls("nnn", int(largest), float(weight))
        except ValueError:
            pass
        raise UserError(f"--hubness={text}: write is, is:BETA, nnn, nnn:K or nnn:K:W")

    def __str__(self) -> str:
        weight = f":{self.factor:g}" if self.method == "nnn" else ""
        return f"{self.method}:{self.parameter}{weight}"

    def biases(self, directory: Path, header: Mapping[str, Any], stored: np.ndarray) -> np.ndarray:
        """What is subtracted from the similarities of each window: float32 [S].

        Args:
          directory: of the index.
          header: of the index.
          stored: HUBNESS_ARRAY of the index, float32 [S, P].

        Raises:
          UserError: the index does not store this parameter.
        """
        bank = header["hubness"]
        if self.parameter not in bank[self.method]:
            known = ", ".join(map(str, sorted(bank[self.method])))
            raise UserError(
                f"--hubness={self}: the index {directory} has {self.method} for {known} only"
            )
        column = bank[self.method].index(self.parameter)
        column += len(bank["is"]) if self.method == "nnn" else 0
        return np.float32(self.factor) * np.asarray(stored[:, column])


def write_bank(directory: Path, captions: Sequence[str]) -> dict[str, Any]:
    """Stores the captions of a bank in an index; returns what its header says of them."""
    write_json(directory / _FILE, list(captions))
    return {
        "captions": len(captions),
        "sha256": json_sha256(list(captions)),
        "is": list(BETAS),
        "nnn": list(LARGEST),
    }


def read_bank(directory: Path, header: Mapping[str, Any]) -> list[str]:
    """Reads the captions of the bank that the header of an index describes.

    Raises:
      SearchIndexError: they are missing, or have changed.
    """
    try:
        captions = json.loads((directory / _FILE).read_text(encoding="utf-8"))
        if json_sha256(captions) == header["hubness"]["sha256"]:
            return captions
        reason = "has changed"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except ValueError:
        reason = "is damaged"
    raise SearchIndexError(
        f"{directory / _FILE} {reason}; give the captions of the index again with --bank"
    )


def check_bank(directory: Path, header: Mapping[str, Any], captions: Sequence[str]) -> None:
    """Checks that captions are those of the bank of an index, and stores them again.

    Raises:
      SearchIndexError: the index has another bank, or none.
    """
    if header.get("hubness", {}).get("sha256") != json_sha256(list(captions)):
        what = "another --bank" if "hubness" in header else "no --bank"
        raise SearchIndexError(
            f"the index {directory} was made with {what}; give another --index, or delete it"
        )
    write_json(directory / _FILE, list(captions))


def hubness_of(
    model: RetrievalModel, header: Mapping[str, Any], bank: Features, windows: Features
) -> np.ndarray:
    """The numbers of W windows, HUBNESS_ARRAY: float32 [W, P].

    Args:
      model: of the index.
      header: of the index.
      bank: arrays of the captions (`encode_text`).
      windows: arrays of the windows (`encode_video`).
    """
    count, parameters = len(next(iter(windows.values()))), header["hubness"]
    found = []
    for start in range(0, count, _COMPARED):
        size = min(_COMPARED, count - start)
        # Few shapes: the number of windows is rounded up to a power of two.
        rows = start + np.minimum(np.arange(1 << (size - 1).bit_length()), size - 1)
        part = {name: array[rows] for name, array in windows.items()}
        similarity = model.similarity(bank, part)[:, :size]
        columns = [
            *(inverted_softmax_bias(similarity, beta) for beta in parameters["is"]),
            *(mean_of_largest(similarity, count) for count in parameters["nnn"]),
        ]
        found.append(np.stack(columns, axis=1).astype(np.float32))
    return np.concatenate(found)
