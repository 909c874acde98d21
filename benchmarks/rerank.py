"""What a reranker adds to its first stage, and what it costs: a study over seeds.

    python -m benchmarks.rerank [--seeds=0,1,2,3,4] [--directory=runs/rerank] [--record]

Trains wti and xti for each seed, and rerankers of wti: as it is, without the first stage's score
(`no_prior`), and without positions of frames (`no_positions`). What is there already is used again,
so that a study continues. Prints R@1 and pair accuracy on test, the paired 95 % interval of the
difference in t2v R@1 to wti, over all seeds together (videos are drawn, each with all its captions
and seeds), the number of seeds with more than wti, milliseconds for a query and its candidates, and
bytes of a window in an index. `ViT-B/32` is a reranker of that size with random parameters, and a
query of 24 words. `--figure=FILE` draws R@1 against both costs.
"""

import argparse
import collections
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

import drl_jax
from benchmarks.measure import arguments, positive_ints, report, table
from drl_jax.config import ModelConfig
from drl_jax.evaluation.evaluator import Evaluation
from drl_jax.evaluation.metrics import Ranks, metrics_of
from drl_jax.evaluation.reranking import PairScorer, rerank_evaluation
from drl_jax.models.interactions import INTERACTIONS, Features
from drl_jax.models.reranker import RerankerConfig, pair_arrays, reranker_definition
from drl_jax.runs.evaluate_run import OpenEvaluation, open_evaluation
from drl_jax.runs.rerank_training import RerankSettings, train_reranker
from drl_jax.runs.reranker_file import read_tensors
from drl_jax.runs.workdir import load_config
from drl_jax.runtime.cli import positive_int, run_command
from drl_jax.runtime.sharding import make_layout
from drl_jax.search.encoding import quantize

_RESAMPLES = 2000
_WORDS, _FRAMES = 24, 12


def no_prior(pairs: Features) -> Features:
    return {**pairs, "score": np.zeros_like(pairs["score"])}


def no_positions(words: int, pairs: Features) -> Features:
    return {**pairs, "position": np.minimum(pairs["position"], words)}


def trained_run(options: argparse.Namespace, seed: int, interaction: str) -> Path:
    """The run of a first stage, trained if it is not there."""
    workdir = Path(options.directory) / f"{interaction}_{seed}"
    if not (workdir / "result.json").exists():
        changes = {
            "seed": seed,
            "model.interaction": interaction,
            "data.data_dir": options.data_dir,
        }
        if interaction == "xti":
            changes["loss.cdcr"] = 0
        drl_jax.train(options.config, workdir, overrides=changes)
    return workdir


def evaluated(workdir: Path) -> tuple[OpenEvaluation, Evaluation]:
    opened = open_evaluation(
        workdir, load_config(workdir), checkpoint="best", split_name="test", frame_order="time"
    )
    return opened, opened.run()


def interval(one: list[Ranks], other: list[Ranks]) -> tuple[float, float, float, int]:
    """Difference of t2v R@1 over all seeds, its 95 % interval, and the seeds that have more."""
    owner, videos = one[0].text_to_video, len(one[0].v2t)
    of_seeds = np.array(
        [(b.t2v <= 1).astype(float) - (a.t2v <= 1) for a, b in zip(one, other, strict=True)]
    )
    change, count = (np.bincount(owner, x, videos) for x in (of_seeds.mean(axis=0), None))
    rng = np.random.default_rng(0)
    drawn = rng.integers(videos, size=(_RESAMPLES, videos))
    of_draws = change[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    low, high = np.percentile(100 * of_draws, (2.5, 97.5))
    return 100 * of_seeds.mean(), float(low), float(high), int((of_seeds.mean(axis=1) > 0).sum())


def milliseconds(function: Callable[[], object], repeats: int = 10) -> float:
    function()  # It compiles.
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def query_ms(score: Callable, text: Features, video: Features, count: int) -> float:
    """Milliseconds for one query and its candidates, which are in memory."""
    rows, columns = np.zeros(count, int), np.arange(count) % len(video["frame_mask"])
    return milliseconds(lambda: score(text, video, rows, columns, np.zeros(count, np.float32)))


def gflop(sizes: RerankerConfig, positions: int, candidates: int) -> float:
    """Products of a query: matches, all blocks for all positions, but the last for its first."""
    matches = 2 * positions * sizes.width**2 + 4 * positions**2 * sizes.width
    full = 24 * positions * sizes.width**2 + 4 * positions**2 * sizes.width
    last = (6 * positions + 18) * sizes.width**2 + 4 * positions * sizes.width
    return candidates * (matches + (sizes.layers - 1) * full + last) / 1e9


def vit_b_32(candidates: list[int]) -> list[dict[str, Any]]:
    """The costs of a query of 24 words and windows of 12 frames."""
    sizes = RerankerConfig.of(ModelConfig(interaction="wti"), 32, _FRAMES)
    shapes, rng = reranker_definition(sizes, "float32")[1], np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.02 * rng.normal(size=x.shape).astype(np.float32), shapes)
    scorer = PairScorer(sizes, "float32", make_layout())

    def side(name: str, items: int, length: int) -> Features:
        unit = rng.normal(size=(items, length, sizes.width)).astype(np.float32)
        return {
            f"{name}_unit": unit / np.linalg.norm(unit, axis=-1, keepdims=True),
            f"{name}_mask": np.ones((items, length), bool),
            f"{name}_weight": np.full((items, length), 1 / length, np.float32),
        }

    text, video = side("text", 1, _WORDS), side("frame", max(candidates), _FRAMES)
    score, rows = functools.partial(scorer.scores, jax.device_put(params)), []
    for count in candidates:
        pairs = pair_arrays(sizes, text, video, *np.zeros((2, 1), int), np.zeros(1))
        work = gflop(sizes, 1 + pairs["tokens"].shape[1], count)
        ms = query_ms(score, text, video, count)
        rows.append({"method": f"ViT-B/32, rerank {count}", "ms": ms, "gflop": work})
    return rows


class Study:
    """Runs, rerankers and their ranks on test, by method and seed."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.ranks = options, collections.defaultdict[str, list[Ranks]](list)
        self.costs: dict[str, dict[str, float]] = {}

    def run(self, seed: int) -> None:
        opened, evaluation = evaluated(trained_run(self.options, seed, "wti"))
        self.ranks["wti"].append(evaluation.ranks)
        self._cost("wti", opened, evaluation)
        candidates, words = self.options.candidates, opened.config.data.max_words
        for name, change in (
            ("rerank", None),
            ("no_prior", no_prior),
            ("no_positions", functools.partial(no_positions, words)),
        ):
            # A study of the same seed has its files.
            target = opened.workdir / f"{name}.safetensors"
            settings = RerankSettings(20, self.options.epochs, seed, self.options.lr)
            features = str(opened.workdir / "features")
            train_reranker(
                opened.workdir,
                opened.config,
                settings,
                features=features,
                target=target,
                change=change,
            )
            tensors, about = read_tensors(target)
            sizes = RerankerConfig(*about["sizes"])
            scorer = PairScorer(sizes, opened.config.model.dtype, opened.layout, change)
            score = functools.partial(scorer.scores, unflatten_dict(tensors, sep="/"))
            for count in candidates if name == "rerank" else candidates[1:2]:
                found = rerank_evaluation(score, evaluation, count, opened.split.reversed_pairs)
                method = f"{name} {count}"
                self.ranks[method].append(found.ranks)
                ms = query_ms(score, evaluation.text, evaluation.video, count)
                first = self.costs["wti"]
                self.costs[method] = {**first, "ms": first["ms"] + ms}
        opened, evaluation = evaluated(trained_run(self.options, seed, "xti"))
        self.ranks["xti"].append(evaluation.ranks)
        self._cost("xti", opened, evaluation)

    def _cost(self, method: str, opened: OpenEvaluation, evaluation: Evaluation) -> None:
        """Of one query and all videos; bytes are those that an index stores."""
        one = {name: array[:1] for name, array in evaluation.text.items()}
        compare = opened.evaluator.embedder.similarity
        ms = milliseconds(lambda: compare(opened.params, one, evaluation.video))
        names = INTERACTIONS[opened.config.model.interaction].VIDEO_ARRAYS
        window = {name: evaluation.video[name][:1] for name in names}
        stored = quantize(window, "bfloat16")
        self.costs[method] = {"ms": ms, "bytes": sum(array.nbytes for array in stored.values())}

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for method, ranks in self.ranks.items():
            change, low, high, more = interval(self.ranks["wti"], ranks)
            found = [metrics_of(one) for one in ranks]
            row = {
                "method": method,
                "t2v_R1": np.mean([one["t2v"]["R@1"] for one in found]),
                "v2t_R1": np.mean([one["v2t"]["R@1"] for one in found]),
                "pair_accuracy": np.mean([one.get("pair_accuracy", np.nan) for one in found]),
                "change": change,
                "low": low,
                "high": high,
                "seeds_more": more,
                **self.costs[method],
            }
            rows.append(row)
        return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """R@1 against milliseconds and bytes, with the intervals of the differences to wti."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, cost, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("ms", "bytes"),
        ("milliseconds a query", "bytes a window"),
        strict=True,
    ):
        for row in rows:
            ends = [[row["change"] - row["low"]], [row["high"] - row["change"]]]
            axes.errorbar(row[cost], row["t2v_R1"], yerr=ends, fmt="o", capsize=3)
            where = (row[cost], row["t2v_R1"])
            axes.annotate(row["method"], where, (4, 4), textcoords="offset points", fontsize=7)
        axes.set_xlabel(label)
        axes.set_xscale("log")
    figure.axes[0].set_ylabel("t2v R@1, %")
    figure.savefig(path)


def _rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {n: round(float(v), 2) if isinstance(v, float) else v for n, v in row.items()}
        for row in rows
    ]


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = arguments(
        "rerank",
        __doc__,
        ("seeds", _seeds, [0, 1, 2, 3, 4], "of first stages and rerankers"),
        ("epochs", positive_int, 20, "of a reranker"),
        ("lr", float, 1e-3, "of a reranker"),
        ("candidates", positive_ints, [10, 20, 100], "that are reranked; the second for variants"),
        ("config", str, "configs/shapes_events.py", "of the first stages"),
        ("directory", Path, Path("runs/rerank"), "of the runs"),
        ("data_dir", str, "data", "directory of built datasets"),
        ("figure", str, "", "file of the figure"),
    )
    options = parser.parse_args()

    def work() -> None:
        study = Study(options)
        for seed in options.seeds:
            study.run(seed)
            rows = _rounded(study.rows())
            print(f"seeds so far: {len(study.ranks['wti'])}\n{table(rows)}", flush=True)
        costs = _rounded(vit_b_32(options.candidates))
        print(table(costs))
        if options.figure:
            draw(rows, Path(options.figure))
        settings = {name: getattr(options, name) for name in ("seeds", "epochs", "lr", "config")}
        ranks = {
            method: [(one.t2v <= 1).astype(int).tolist() for one in of_seeds]
            for method, of_seeds in study.ranks.items()
        }
        report(rows, options, **settings, vit_b_32=costs, is_first=ranks)

    return run_command("benchmarks.rerank", work)


if __name__ == "__main__":
    sys.exit(main())
