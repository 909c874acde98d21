"""`drl_jax.compare`: paired differences of two runs, and what it refuses to compare."""

import dataclasses
import json

import numpy as np
import pytest
from support.commands import error_of
from support.files import refused
from support.runs import make_run

from drl_jax.compare import main as compare
from drl_jax.evaluate import main as evaluate
from drl_jax.evaluation.bootstrap import Difference
from drl_jax.runs.compare_run import RankedRun, check_same_queries, verdict
from drl_jax.runs.protocol_card import read_ranks
from drl_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def runs(shapes_config, tmp_path_factory):
    """A run that `evaluate` tested, and one that nothing tested."""
    parent = tmp_path_factory.mktemp("compare")
    runs = parent / "tested", parent / "untested"
    for seed, run in enumerate(runs):
        make_run(run, shapes_config, "dp", seed=seed)
    assert evaluate([f"--workdir={runs[0]}"]) == 0
    return runs


def test_an_untested_run_is_evaluated_once(runs, capsys):
    tested, untested = runs
    printed = []
    for _ in range(2):
        assert compare([str(tested), str(untested)]) == 0
        printed.append(capsys.readouterr().out)
    first, *table = printed[0].splitlines()
    assert first == f"evaluating checkpoint 0 of {untested} on test"
    assert table == printed[1].splitlines()
    assert table[0] == "shapes, split test: 32 videos, 32 captions, similarities: raw"
    chosen = "step 0, the latest, since none was evaluated; seed 0; frames 64px_4f_raw"
    assert table[1:3] == [f"A  {tested}: {chosen}", f"B  {untested}: {chosen}"]

    metrics = json.loads((tested / "eval_test_0.json").read_text())["metrics"]
    row = next(line.split() for line in table if line.startswith("t2v MnR"))
    assert row[2] == f"{metrics['t2v']['MnR']:.1f}"
    assert table[-1].startswith("t2v R@1")


def test_ranks_of_other_parameters_are_not_used(runs, capsys):
    """For example those of a run that was deleted and trained anew."""
    tested, untested = runs
    compare([str(tested), str(untested)])
    path = tested / "eval_test_0.npz"
    with np.load(path) as file:
        arrays = dict(file)
    card = json.loads(str(arrays["card"])) | {"parameters_sha256": "0" * 64}
    np.savez(path, **(arrays | {"card": json.dumps(card), "t2v": arrays["t2v"] * 0 + 1}))
    capsys.readouterr()
    assert compare([str(tested), str(untested)]) == 0
    assert f"evaluating checkpoint 0 of {tested}" in capsys.readouterr().out
    ranks, card = read_ranks(path)
    assert card.parameters_sha256 != "0" * 64
    assert ranks.t2v.max() > 1

    before = path.read_bytes()
    with refused(path):
        line = error_of("drl_jax.compare", str(tested), str(untested), capsys=capsys)
        assert f"{path} cannot be read: Too many levels" in line
    assert path.read_bytes() == before
    path.write_bytes(before[:-100])
    assert read_ranks(path) is None
    path.write_bytes(before)


def test_runs_of_other_queries_or_frames_are_refused(runs):
    ranks, card = read_ranks(runs[0] / "eval_test_0.npz")
    assert (card.frames, card.content != "") == ("64px_4f_raw", True)

    def check(**other):
        cards = card, dataclasses.replace(card, **other)
        check_same_queries(*(RankedRun(runs[0], ranks, card) for card in cards))

    check(seeds=(1,))
    check(frames="224px", content="d")
    with pytest.raises(UserError, match="different frames"):
        check(content="d")
    message = (
        r"were tested on different captions or videos \(shapes, split test, content .*"
        "; shapes, split val, content"
    )
    with pytest.raises(UserError, match=message):
        check(queries="other", split="val", frames="224px", content="d")


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("t2v R@1", (40, 45, 1, 9, 0.02), "t2v R@1: B is better than A by 5.0, which is more than"),
        ("t2v R@1", (45, 40, -9, 1, 0.1), "A is better than B by 5.0, which may be the luck"),
        ("t2v MnR", (9, 8, -2, -0.5, 0.01), "B is better than A by 1.0, which is more than"),
        ("t2v R@1", (40, 40, -2, 2, 1), "t2v R@1 is the same for A and B."),
    ],
)
def test_the_verdict_is_a_sentence(name, values, expected):
    assert expected in verdict(name, Difference(*values))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "nowhere"], "no run in nowhere"),
        (["{run}", "{empty}"], "no checkpoints in "),
        (["{run}", "{run}", "--checkpoint=5"], "no checkpoint of step 5"),
        (["{run}", "{run}", "--split=dev"], "no split 'dev'"),
        (["{run}"], "the following arguments are required: RUN_B"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, arguments, message, capsys):
    (tmp_path / "config.json").write_bytes((runs[0] / "config.json").read_bytes())
    arguments = [text.format(run=runs[0], empty=tmp_path) for text in arguments]
    assert message in error_of("drl_jax.compare", *arguments, capsys=capsys)
