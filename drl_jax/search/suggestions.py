"""Sentences that an index answers well, for people who do not know what to ask."""

import json
import threading
from pathlib import Path

import numpy as np

from drl_jax.pretrained.model import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.search.encoding import BANK_ARRAY, WEAK, unusual
from drl_jax.search.open_index import OpenIndex, stored_windows

# Sentences that are tried, by what models know.
_SCENES = Path(__file__).parent / "page" / "scenes.json"
_MOST, _TOGETHER = 4, 32


class Suggestions:
    """Sentences for the current state of an index, which a thread finds; until then earlier ones.

    Of a list of scenes, those with the most unusual scores in windows spread over the index, each
    for another video; none that would find weak matches only.
    """

    def __init__(self, model: RetrievalModel):
        scenes = json.loads(_SCENES.read_text(encoding="utf-8"))
        self._scenes = scenes["shapes" if model.about["knows"] == "drawn shapes" else "everyday"]
        self._model, self._version, self._closed = model, None, False
        self._thread, self._found = threading.Thread(), None

    def of(self, state: OpenIndex) -> list[str] | None:
        if state.version != self._version and not self._thread.is_alive():
            self._version = state.version
            self._thread = threading.Thread(target=self._find, args=[state], daemon=True)
            self._thread.start()
        return self._found

    def close(self) -> None:
        """Waits until nothing is computed any more, which could not end with the process."""
        self._closed = True
        if self._thread.is_alive():
            self._thread.join()

    def _find(self, state: OpenIndex) -> None:
        rows, scales, owners = [], [], []
        try:
            for slot in state.spread.tolist():
                video = state.video(*state.place(slot))
                row = slot - video.slot
                rows.append({name: array[row] for name, array in stored_windows(video).items()})
                scales.append(video.record.arrays[f"window.{BANK_ARRAY}"][row])
                owners.append(video.path)
        except UserError:  # Damaged: a search says so.
            self._found = []
            return
        windows = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        found: list[tuple[float, str, str]] = []
        for first in range(0, len(self._scenes), _TOGETHER):
            if self._closed:
                return
            sentences = self._scenes[first : first + _TOGETHER]
            similarity = self._model.similarity(self._model.encode_text(sentences), windows)
            for sentence, scores in zip(sentences, similarity.tolist(), strict=True):
                calibrated = map(unusual, scores, scales)
                found += [
                    (c, sentence, o) for c, o in zip(calibrated, owners, strict=True) if c >= WEAK
                ]
        chosen: dict[str, str] = {}
        for _, sentence, owner in sorted(found, reverse=True):
            if sentence not in chosen and owner not in chosen.values():
                chosen[sentence] = owner
        self._found = list(chosen)[:_MOST]
