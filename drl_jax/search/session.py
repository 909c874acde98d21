"""An open index that follows its updates."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from drl_jax.pretrained import RetrievalModel, load_source
from drl_jax.runtime.errors import UserError
from drl_jax.search.engine import SearchEngine
from drl_jax.search.hits import Hit
from drl_jax.search.hubness import Correction
from drl_jax.search.joined import check_present, part_directories, part_versions
from drl_jax.search.query import Query
from drl_jax.search.rows import IndexedVideo
from drl_jax.search.snapshot import IndexSnapshot
from drl_jax.search.store import Store


class Searcher(Protocol):
    """Answers sentences: a session, or a candidate engine in front of it."""

    @property
    def videos(self) -> Sequence[IndexedVideo]:
        """The videos that can be found."""

    def search(self, sentences: Sequence[str], top: int) -> list[list[Hit]]:
        """The best videos for each sentence."""


# `index_version` of each part of an index, by its directory.
Versions = dict[Path, tuple[int, ...]]
# Seconds that a query may wait until a new state of its index is open.
_PATIENCE = 0.25


class SearchSession:
    """An open index and its model.

    Every query is answered from the current state of the index, also while another process updates
    it. Where opening a state takes long, it is opened in the background, and queries are answered
    from the one before until then. Safe to use from several threads.

    Attributes:
      directory: of the index.
      model: the model that the index was made with.
      correction: for hubs, of queries of one sentence.
    """

    def __init__(
        self,
        directory: Path,
        model: RetrievalModel | None = None,
        correction: Correction | None = None,
    ):
        """Opens an index.

        Args:
          directory: of the index.
          model: the model it was made with; None: loaded from where the index says it is.
          correction: for hubs, of queries of one sentence; None: they are ranked by similarity.

        Raises:
          UserError: there is no index, no video to search, the model is another one, or the index
            does not store what the correction needs.
        """
        self.directory, self.correction = directory, correction
        if model is None:
            first = part_directories(directory)[0]
            check_present(directory, first)
            with Store(first) as store:
                source = store.header["source"]
            model = load_source(source)
        self.model = model
        self._engine = SearchEngine(model.config.model, model.params)
        self._refreshing = threading.Lock()
        self._opening: threading.Thread | None = None
        self._versions: Versions = {}
        self._seconds = 0.0  # That opening the last state took.
        self._open(part_versions(directory))

    @property
    def videos(self) -> Sequence[IndexedVideo]:
        """The videos that can be found."""
        return self.snapshot().videos

    def snapshot(self) -> "IndexSnapshot":
        """A state of the index to answer from; see the class.

        Raises:
          UserError: see `__init__`.
        """
        with self._refreshing:
            versions = part_versions(self.directory)
            if versions == self._versions and all(versions.values()):
                return self._snapshot
            if self._seconds < _PATIENCE or not self._is_update(versions):
                self._open(versions)
            elif self._opening is None or not self._opening.is_alive():
                self._opening = threading.Thread(
                    target=self._open_in_background, args=(versions,), daemon=True
                )
                self._opening.start()
            return self._snapshot

    def _open(self, versions: Versions) -> None:
        start = time.monotonic()
        # Most features of an update are checked already.
        previous = self._snapshot if self._is_update(versions) else None
        self._snapshot = IndexSnapshot(
            self.directory, self.model, self._engine, previous, self.correction, versions
        )
        self._versions, self._seconds = versions, time.monotonic() - start

    def _open_in_background(self, versions: Versions) -> None:
        try:
            self._open(versions)
        except UserError:
            self._seconds = 0.0  # The next query opens it, and says what is wrong.

    def _is_update(self, versions: Versions) -> bool:
        """Whether they are of the same databases, with more transactions."""
        if list(versions) != list(self._versions):
            return False
        pairs = [(self._versions[part], version) for part, version in versions.items()]
        return all(old and new and old[0] == new[0] and old[-1] <= new[-1] for old, new in pairs)

    def search(self, sentences: Sequence[str], top: int) -> list[list[Hit]]:
        """See `IndexSnapshot.search`."""
        return self.snapshot().search(sentences, top)

    def answer(self, query: Query, top: int) -> list[Hit]:
        """See `IndexSnapshot.answer`."""
        return self.snapshot().answer(query, top)

    def search_by_video(self, path: Path, top: int) -> list[Hit]:
        """See `IndexSnapshot.search_by_video`."""
        return self.snapshot().search_by_video(path, top)

    def rank_sentences(self, path: Path, sentences: Sequence[str]) -> list[tuple[float, str]]:
        """Ranks sentences by their similarity to a video file.

        Returns:
          Pairs of similarity and sentence, the best first.

        Raises:
          UserError: the file cannot be read, or a sentence is blank.
        """
        model = self.model
        scores = model.similarity(model.encode_text(sentences), model.encode_videos([path]))[:, 0]
        order = np.argsort(-scores, kind="stable")
        return [(float(scores[row]), sentences[row]) for row in order]
