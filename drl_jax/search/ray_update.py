"""Reads and encodes the videos of an update on a Ray cluster.

Tasks on all processors read; one actor for each GPU of the cluster, or one for each node if there
is none, encodes. Frames of short videos go from a task to an actor through Ray's object store,
those of long ones through files of the index. The driver alone writes the index.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from drl_jax.pretrained import RetrievalModel, load_source
from drl_jax.runtime.cluster import ClusterError
from drl_jax.runtime.compilation_cache import cache_compilations
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.node_check import Needs
from drl_jax.runtime.ray_cluster import RayCluster, name_of, problem_of_task
from drl_jax.runtime.ray_map import NODE_LOST, check_worker
from drl_jax.runtime.worker_pool import WorkerFailure
from drl_jax.search.encoding import WindowEncoder
from drl_jax.search.index_file import IndexWriter
from drl_jax.search.reading import VideoRead, read_video_on_node
from drl_jax.search.update import AHEAD, FramesLostError

# Batches that an actor has at a time: it fetches the frames of one while it encodes another.
_AT_ACTOR = 2
# A batch that has lost so many actors fails; losses of nodes do not count.
_MAX_CRASHES = 3
# Seconds between two looks at the actors.
_WAIT = 0.2
# Seconds after which it is printed that no actor has started.
_START_TIMEOUT = 120.0
# Packages on whose versions frames or features depend.
_PACKAGES = ("av", "numpy", "pillow", "jax", "jaxlib", "flax")


class RayEngine:
    """An engine of `update.IndexEngine`."""

    def __init__(
        self, cluster: RayCluster, model: RetrievalModel, writer: IndexWriter, example: Path
    ):
        """Checks the nodes, and starts to load the model on them.

        Args:
          cluster: whose nodes share the videos, the index, and the files of the model.
          model: encodes.
          writer: of the index.
          example: one of the videos.

        Raises:
          ClusterError: a node cannot do the work.
        """
        cluster.check({"--index": writer.directory}, example, _PACKAGES, ["drl_jax"])
        self._cluster = cluster
        source = dict(model.source)
        if "tokenizer" in source:  # Nodes have other working directories.
            source["tokenizer"] = str(Path(source["tokenizer"]).absolute())
        self._arguments = (
            *(source, model.fingerprint, dict(writer.header)),
            *(writer.directory.absolute(), cluster.needs()),
        )
        # Decided once: features of another kind of device differ by rounding.
        self._on_gpus = cluster.gpus() > 0
        self._actors: list[_Actor] = []
        # Actors that died, by node, since one of it finished a batch.
        self._crashes: collections.Counter[str] = collections.Counter()
        # Batches that no actor has.
        self._queue: collections.deque[_Batch] = collections.deque()
        self._started_at = time.monotonic()
        self._start_actors()

    def read(
        self, calls: Sequence[tuple], allowed: Sequence[float]
    ) -> Iterator[VideoRead | WorkerFailure]:
        results = self._cluster.map(
            read_video_on_node, calls, timeout=allowed, ahead=AHEAD, keep="frames"
        )
        for result in results:
            if isinstance(result, OSError):  # It names the node.
                yield VideoRead("", failure=result.strerror)
            else:
                yield result

    def encode(self, reads: Sequence[VideoRead]) -> "_Batch":
        batch = _Batch(self, reads)
        self._queue.append(batch)
        self.work(wait=False)
        return batch

    def batches(self) -> int:
        return _AT_ACTOR * len(self._actors) + 1

    def work(self, *, wait: bool) -> None:
        """Gives batches to actors, and takes what they have finished.

        Args:
          wait: whether to wait for a moment if nothing is finished.

        Raises:
          ClusterError: an actor cannot work, or batches keep on killing theirs.
        """
        self._start_actors()
        for actor in self._actors:
            while self._queue and actor.is_ready and len(actor.running) < _AT_ACTOR:
                actor.start(self._queue.popleft())
        if time.monotonic() - self._started_at > _START_TIMEOUT:
            if not any(actor.is_ready for actor in self._actors):
                tqdm.write("still waiting for an encoder; are the GPUs of the cluster free?")
            self._started_at = math.inf
        refs = {ref: actor for actor in self._actors for ref in actor.refs()}
        ready = ray.wait(list(refs), num_returns=1, timeout=_WAIT if wait else 0)[0] if refs else []
        for ref in ready:
            self._take(refs[ref], ref)

    def _take(self, actor: "_Actor", ref: ray.ObjectRef) -> None:
        """Takes one result of an actor."""
        batch = actor.running.pop(ref, None)
        try:
            result = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            if batch is None or not isinstance(error.cause, NODE_LOST):
                raise ClusterError(problem_of_task(error)) from error
            batch.outcome = FramesLostError()
        except NODE_LOST:  # The frames, or the features.
            if batch is not None:
                batch.outcome = FramesLostError()
        except ray.exceptions.RayError as error:
            self._lose(actor, batch, error)
        else:
            if batch is not None:
                batch.outcome = result
                self._crashes[actor.node] = 0
            elif result:
                raise ClusterError(f"{actor.name} {result}")
            else:
                actor.is_ready = True

    def _lose(self, actor: "_Actor", batch: "_Batch | None", error: Exception) -> None:
        """Gives the batches of an actor that died to others.

        Raises:
          ClusterError: it is not the first of the node, or of the batch, and no node died.
        """
        self._actors.remove(actor)
        actor.kill()
        lost = [*([batch] if batch else []), *actor.running.values()]
        self._queue.extendleft(reversed(lost))
        if not any(node["NodeID"] == actor.node and node["Alive"] for node in ray.nodes()):
            return
        self._crashes[actor.node] += 1
        for first in lost[:1]:
            first.crashes += 1
        if max(self._crashes[actor.node], *(first.crashes for first in lost), 0) >= _MAX_CRASHES:
            reason = str(error).strip().partition("\n")[0]
            raise ClusterError(
                f"processes that encode on {actor.name} died {_MAX_CRASHES} times ({reason}); have"
                " they enough memory?"
            ) from error

    def _start_actors(self) -> None:
        """Starts the actors of nodes that have none: at the start, of a new node, after a crash.

        Raises:
          ClusterError: no node can have one.
        """
        resource = "GPU" if self._on_gpus else "CPU"
        nodes = self._cluster.nodes()
        if not any(node["Resources"].get(resource) for node in nodes.values()):
            raise ClusterError(f"no node of the cluster has a {resource}; add one, then rerun")
        for key, node in nodes.items():
            wanted = int(node["Resources"].get(resource, 0))
            existing = sum(actor.node == key for actor in self._actors)
            for _ in range(existing, wanted if self._on_gpus else min(1, wanted)):
                actor = _Actor(key, name_of(node), int(self._on_gpus), self._arguments)
                self._actors.append(actor)


class _Batch:
    """An `update.Encoded`."""

    def __init__(self, engine: RayEngine, reads: Sequence[VideoRead]):
        self.reads = reads
        self.crashes = 0
        self.outcome: list[dict[str, np.ndarray]] | FramesLostError | None = None
        self._engine = engine

    def done(self) -> bool:
        if self.outcome is None:
            self._engine.work(wait=False)
        return self.outcome is not None

    def result(self) -> list[dict[str, np.ndarray]]:
        while self.outcome is None:
            self._engine.work(wait=True)
        if isinstance(self.outcome, FramesLostError):
            raise self.outcome
        return self.outcome


class _Actor:
    """An actor as the driver sees it.

    Attributes:
      node: id of its node.
      name: of its node, for messages.
      is_ready: whether it has loaded the model.
      running: its batches, by the reference of their result.
    """

    def __init__(self, node: str, name: str, gpus: int, arguments: tuple):
        self.node, self.name = node, name
        self.is_ready = False
        self.running: dict[ray.ObjectRef, _Batch] = {}
        # No processors: those are for reading, and the actor has to start while all are busy.
        actor = ray.remote(_NodeEncoder).options(
            num_cpus=0,
            num_gpus=gpus,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        self._handle = actor.remote()
        self._loading = self._handle.load.remote(*arguments)

    def refs(self) -> list[ray.ObjectRef]:
        """What is not finished."""
        return list(self.running) if self.is_ready else [self._loading]

    def kill(self) -> None:
        """Ends the actor: one that only does not answer would keep its GPU."""
        ray.kill(self._handle)

    def start(self, batch: _Batch) -> None:
        """Starts to encode a batch."""
        reads = [dataclasses.replace(read, frames=None, strips=()) for read in batch.reads]
        # Arguments of the call itself: Ray replaces references in these only.
        frames = [read.frames for read in batch.reads]
        self.running[self._handle.encode.remote(reads, *frames)] = batch


class _NodeEncoder:
    """Encodes on a node, in an actor."""

    def load(
        self,
        source: dict[str, str],
        fingerprint: str,
        header: dict[str, Any],
        directory: Path,
        needs: Needs,
    ) -> str:
        """Loads the model; returns why it cannot be used, or an empty string."""
        check_worker(needs)
        cache_compilations()
        try:
            model = load_source(source)
        except UserError as error:
            return f"cannot load the model: {error}"
        if model.fingerprint != fingerprint:
            where = source.get("workdir") or source["weights"]
            return f"has another model in {where}; give it the same files"
        self._encoder = WindowEncoder(model, directory, header)
        return ""

    def encode(
        self, reads: list[VideoRead], *frames: np.ndarray | None
    ) -> list[dict[str, np.ndarray]]:
        """Encodes the windows of videos; `frames` are those of the short ones."""
        pairs = zip(reads, frames, strict=True)
        return self._encoder.encode([dataclasses.replace(r, frames=f) for r, f in pairs])
