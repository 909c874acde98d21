"""What a reranker adds to its first stage, and what it costs: a study over seeds.

    python -m benchmarks.rerank [--seeds=0,1,2,3,4] [--directory=runs/rerank] [--record]

Trains wti for each seed, xti for some, and rerankers of wti: as it is, without the first stage's
similarity (`no_prior`), and without the order of frames (`no_order`). What is there already is used
again, so that a study continues. Prints R@1 and pair accuracy on test, the paired 95 % interval of
the difference in t2v R@1 to wti, over all seeds together (videos are drawn, each with all its
captions and seeds), the number of seeds that gain, milliseconds for a query and its
candidates, and bytes of a window in an index. `ViT-B/32` is a reranker of that size with random
parameters, and a query of 24 words. `--figure=FILE` draws R@1 against both costs.
"""

import argparse
import collections
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

import drl_jax
from benchmarks.measure import arguments, positive_ints, report, seconds, table
from drl_jax.config import ModelConfig
from drl_jax.evaluation.evaluator import Evaluation
from drl_jax.evaluation.metrics import Ranks, metrics_of
from drl_jax.evaluation.reranking import RerankScorer, rerank_evaluation
from drl_jax.models.drl import Params
from drl_jax.models.interactions import INTERACTIONS, Features
from drl_jax.models.reranker import RerankerConfig, reranker_definition
from drl_jax.runs.evaluate_run import OpenEvaluation, open_evaluation
from drl_jax.runs.rerank_training import NO_ORDER, NO_PRIOR, RerankSettings, train_reranker
from drl_jax.runs.reranker_file import read_tensors
from drl_jax.runs.workdir import load_config
from drl_jax.runtime.cli import positive_int, run_command
from drl_jax.search.encoding import quantize

_RESAMPLES = 2000
_WORDS, _FRAMES = 24, 12


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


def query_ms(scorer: RerankScorer, params: Params, text: Features, video: Features) -> float:
    """Milliseconds for one query and its candidates, which are in memory."""
    text = {name: array[:1] for name, array in text.items()}
    return 1000 * seconds(scorer.changes, params, text, video, repeats=10)


def vit_b_32(candidates: list[int]) -> list[dict[str, Any]]:
    """The costs of a query of 24 words and windows of 12 frames."""
    sizes = RerankerConfig.of(ModelConfig(interaction="wti"), _FRAMES)
    definition, shapes = reranker_definition(sizes)
    rng, scorer = np.random.default_rng(0), RerankScorer(sizes)
    params = jax.tree.map(lambda x: 0.02 * rng.normal(size=x.shape).astype(np.float32), shapes)

    def side(name: str, items: int, length: int) -> Features:
        unit = rng.normal(size=(items, length, sizes.width)).astype(np.float32)
        return {
            f"{name}_unit": unit / np.linalg.norm(unit, axis=-1, keepdims=True),
            f"{name}_mask": np.ones((items, length), bool),
            f"{name}_weight": np.full((items, length), 1 / length, np.float32),
        }

    text, rows = side("text", 1, _WORDS), []
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    for number in candidates:
        video = side("frame", number, _FRAMES)
        lowered = jax.jit(lambda p, *a: nnx.merge(definition, p)(*a)).lower(params, text, video)
        work = lowered.compile().cost_analysis()["flops"] / 1e9
        ms = query_ms(scorer, jax.device_put(params), text, video)
        row = {"method": f"ViT-B/32, rerank {number}", "million": count, "gflop": work, "ms": ms}
        rows.append(row)
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
        for variant in ("", NO_PRIOR, NO_ORDER):
            name = variant or "rerank"
            # A study of the same seed has its files.
            target = opened.workdir / f"{name}.safetensors"
            settings = RerankSettings(epochs=self.options.epochs, seed=seed, variant=variant)
            features = str(opened.workdir / "features")
            given = (opened.workdir, opened.config, settings)
            train_reranker(*given, features=features, target=target)
            tensors, about = read_tensors(target)
            scorer = RerankScorer(RerankerConfig(*about["sizes"]))
            params = jax.device_put(unflatten_dict(tensors, sep="/"))
            text = evaluation.text
            video, prior = settings.seen(evaluation.video, evaluation.sim_matrix)
            scores = prior + scorer.changes(params, text, video)
            candidates = self.options.candidates
            for count in candidates[1:2] if variant else candidates:
                found = rerank_evaluation(scores, evaluation, count, opened.split.reversed_pairs)
                method = f"{name} {count}"
                self.ranks[method].append(found.ranks)
                some = {side: array[:count] for side, array in video.items()}
                first = self.costs["wti"]
                ms = first["ms"] + query_ms(scorer, params, text, some)
                self.costs[method] = {**first, "ms": ms}

    def run_xti(self, seed: int) -> None:
        opened, evaluation = evaluated(trained_run(self.options, seed, "xti"))
        self.ranks["xti"].append(evaluation.ranks)
        self._cost("xti", opened, evaluation)

    def _cost(self, method: str, opened: OpenEvaluation, evaluation: Evaluation) -> None:
        """Of one query and all videos; bytes are those that an index stores."""
        one = {name: array[:1] for name, array in evaluation.text.items()}
        compare = opened.evaluator.embedder.similarity
        ms = 1000 * seconds(compare, opened.params, one, evaluation.video, repeats=10)
        names = INTERACTIONS[opened.config.model.interaction].VIDEO_ARRAYS
        window = {name: evaluation.video[name][:1] for name in names}
        stored = quantize(window, "bfloat16")
        self.costs[method] = {"ms": ms, "bytes": sum(array.nbytes for array in stored.values())}

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for method, ranks in self.ranks.items():
            change, low, high, more = interval(self.ranks["wti"][: len(ranks)], ranks)
            found = [metrics_of(one) for one in ranks]
            row = {
                "method": method,
                "seeds": len(ranks),
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
            given = {"yerr": ends, "fmt": "o", "capsize": 3, "label": row["method"]}
            axes.errorbar(row[cost], row["t2v_R1"], **given)
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.1 * max(row[cost] for row in rows))
    figure.axes[0].set_ylabel("t2v R@1, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
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
        ("xti", int, 1, "seeds of xti, which takes ten times as long to train as wti"),
        ("epochs", positive_int, 60, "of a reranker"),
        ("candidates", positive_ints, [10, 20, 100], "that are reranked; the second for variants"),
        ("config", str, "configs/shapes_events.py", "of the first stages"),
        ("directory", Path, Path("runs/rerank"), "of the runs"),
        ("data_dir", str, "data", "directory of built datasets"),
        ("figure", str, "", "file of the figure"),
    )
    options = parser.parse_args()

    def work() -> None:
        study = Study(options)
        runs = [(study.run, seed) for seed in options.seeds]
        # The first of them, as differences are paired.
        runs += [(study.run_xti, seed) for seed in options.seeds[: options.xti]]
        for run, seed in runs:
            run(seed)
            rows = _rounded(study.rows())
            print(f"seed {seed}\n{table(rows)}", flush=True)
        costs = _rounded(vit_b_32(options.candidates))
        print(table(costs))
        if options.figure:
            draw(rows, Path(options.figure))
        settings = {name: getattr(options, name) for name in ("seeds", "epochs", "config")}
        report(rows, options, **settings, vit_b_32=costs)

    return run_command("benchmarks.rerank", work)


if __name__ == "__main__":
    sys.exit(main())
