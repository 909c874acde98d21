"""An open index that follows its updates."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from drl_jax.pretrained import RetrievalModel, load_source
from drl_jax.search.database import index_version
from drl_jax.search.engine import SearchEngine
from drl_jax.search.hits import Hit
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


class SearchSession:
    """An open index and its model.

    Every query is answered from the current state of the index, also while another process updates
    it. Safe to use from several threads.

    Attributes:
      directory: of the index.
      model: the model that the index was made with.
    """

    def __init__(self, directory: Path, model: RetrievalModel | None = None):
        """Opens an index.

        Args:
          directory: of the index.
          model: the model it was made with; None: loaded from where the index says it is.

        Raises:
          UserError: there is no index, no video to search, or the model is another one.
        """
        self.directory = directory
        if model is None:
            with Store(directory) as store:
                source = store.header["source"]
            model = load_source(source)
        self.model = model
        self._engine = SearchEngine(model.config.model, model.params)
        self._refreshing = threading.Lock()
        self._version: tuple[int, ...] | None = None
        self._snapshot = self.snapshot()

    @property
    def videos(self) -> Sequence[IndexedVideo]:
        """The videos that can be found."""
        return self.snapshot().videos

    def snapshot(self) -> "IndexSnapshot":
        """The current state of the index; opened again if the index has changed.

        Raises:
          UserError: see `__init__`.
        """
        with self._refreshing:
            version = index_version(self.directory)
            if not version or version != self._version:
                # The same database, with more transactions: most features are checked already.
                old = self._version
                updated = old and version and old[0] == version[0] and old[-1] < version[-1]
                previous = self._snapshot if updated else None
                self._snapshot = IndexSnapshot(self.directory, self.model, self._engine, previous)
                self._version = version
            return self._snapshot

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
        scores = model.similarity(model.encode_text(sentences), model.encode_video([path]))[:, 0]
        order = np.argsort(-scores, kind="stable")
        return [(float(scores[row]), sentences[row]) for row in order]
