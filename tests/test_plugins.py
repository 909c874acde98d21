"""Interactions, temporal heads and datasets of one's own: files of `--plugin`, and registration."""

import dataclasses
import json
import linecache
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.commands import ROOT, error_of
from support.params import assert_same_arrays

import drl_jax
from data_prep.build import main as build
from drl_jax.config import LossConfig
from drl_jax.convert import main as convert
from drl_jax.data.records import VideoDataset
from drl_jax.embed.__main__ import main as embed
from drl_jax.evaluate import main as evaluate
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.models.interactions.token_wise import WeightedTokenWise
from drl_jax.models.temporal import TEMPORAL_HEADS
from drl_jax.runs.run_plugins import describe_plugins, how_to_open
from drl_jax.runs.workdir import claim_workdir, load_config
from drl_jax.runtime.errors import Notice, UserError
from drl_jax.runtime.plugins import DATASETS, load_plugins, origin_of
from drl_jax.search.__main__ import main as search
from drl_jax.train import main as train

SUPPORT = ROOT / "tests" / "support"
PLUGIN = SUPPORT / "plugin_models.py"
MINE = PLUGIN.read_text()
BEST = ("--config.model.interaction=best", "--config.model.agg_module=mixed")
BEST += ("--config.loss.cdcr=0", "--config.model.weights_key=clip")
SHORT = "--config.train.epochs=1"


@pytest.fixture(autouse=True)
def nothing_is_registered(best_run):
    """Each test starts with the classes of the package, as a command does."""

    def forget() -> None:
        for registry in (INTERACTIONS, TEMPORAL_HEADS, DATASETS):
            for name in [n for n, cls in registry.items() if cls and origin_of(cls)]:
                del registry[name]

    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def best_run(tiny_arguments, tmp_path_factory) -> Path:
    """A run of an interaction and a temporal head that are written from scratch."""
    workdir = tmp_path_factory.mktemp("runs") / "best"
    assert train(tiny_arguments(workdir, f"--plugin={PLUGIN}", *BEST)) == 0
    return workdir


def test_a_run_keeps_its_plugin_and_needs_it_to_be_named(best_run, tmp_path, capsys):
    copy = best_run / "plugins" / PLUGIN.name
    assert copy.read_text() == MINE
    rows = json.loads((best_run / "manifest.json").read_text())["plugins"]
    found = [(row["field"], row["name"], row["class"], row["file"]) for row in rows]
    module = "drl_jax_plugins.plugin_models"
    head = ("agg_module", "mixed", f"{module}.Mixed", PLUGIN.name)
    assert found == [("interaction", "best", f"{module}.Best", PLUGIN.name), head]
    # Without it nothing of the run is executed, and each command says what is missing.
    with pytest.raises(UserError, match=r"not 'best'.* you should read: --plugin=.*\.py$"):
        drl_jax.load(best_run)
    workdir, videos, exported = (
        f"--workdir={best_run}",
        f"--videos={tmp_path}",
        tmp_path / "b.safetensors",
    )
    for module, *arguments in (
        ("drl_jax.evaluate", workdir),
        ("drl_jax.compare", str(best_run), str(best_run)),
        ("drl_jax.convert", str(best_run), str(exported)),
        ("drl_jax.embed", workdir, videos, f"--out={tmp_path / 'out.npz'}"),
        ("drl_jax.search", "index", workdir, videos, f"--index={tmp_path / 'index'}"),
    ):
        assert f"--plugin={copy}" in error_of(module, *arguments, capsys=capsys)
    assert evaluate([workdir, f"--plugin={copy}", f"--report={tmp_path}"]) == 0
    load_plugins([str(PLUGIN)])
    model = drl_jax.load(best_run)
    expected = load_file(best_run / "best.safetensors")["interaction.scale"]
    np.testing.assert_array_equal(model.params["interaction"]["scale"], expected)
    assert np.any(expected != 1)
    with pytest.raises(UserError, match="Best has no video_as_text: queries are sentences"):
        model.interaction.video_as_text({})
    assert convert([str(best_run), str(exported), f"--plugin={copy}"]) == 0
    assert drl_jax.load(exported).fingerprint == model.fingerprint
    del INTERACTIONS["best"]
    with pytest.raises(UserError, match="not 'best'; register one of your own, or name its file"):
        drl_jax.load(exported)


def test_another_version_of_a_plugin(best_run, tiny_arguments, tmp_path, capsys):
    """A run does not go on with it, and a user of the run is told."""
    changed = tmp_path / PLUGIN.name
    changed.write_text(MINE + "# changed\n")
    files = [path for path in best_run.rglob("*") if path.is_file() and path.name != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in files}
    flags = tiny_arguments(best_run, f"--plugin={changed}", *BEST)
    message = error_of("drl_jax.train", *flags, capsys=capsys)
    assert "plugin_models.py is another version than the run" in message
    again = (f"--reproduce={best_run / 'manifest.json'}", f"--workdir={tmp_path / 'again'}")
    message = error_of("drl_jax.train", *again, f"--plugin={changed}", capsys=capsys)
    assert "plugin_models.py is another version than the run of the manifest" in message
    assert before == {path: path.stat().st_mtime_ns for path in files}
    with pytest.warns(Notice, match=r"another version of plugin_models\.py; results may differ"):
        drl_jax.load(best_run)
    copy = best_run / "plugins" / PLUGIN.name
    assert train(tiny_arguments(best_run, f"--plugin={copy}", *BEST)) == 0
    assert f"resuming {best_run} from step 12 of 12" in capsys.readouterr().out


def test_a_copy_of_wti_gives_the_numbers_of_wti(tiny_arguments, tmp_path):
    source = (ROOT / "drl_jax/models/interactions/token_wise.py").read_text()
    copied = tmp_path / "copied.py"
    register = 'drl_jax.register_interaction("copied", WeightedTokenWise)'
    copied.write_text(f"{source}\nimport drl_jax\n{register}\n")
    assert train(tiny_arguments(tmp_path / "wti", SHORT)) == 0
    arguments = (f"--plugin={copied}", "--config.model.interaction=copied", SHORT)
    assert train(tiny_arguments(tmp_path / "copied", *arguments)) == 0
    runs = (tmp_path / "copied", tmp_path / "wti")
    assert_same_arrays(*(load_file(run / "best.safetensors") for run in runs))
    copy, wti = (json.loads((run / "result.json").read_text()) for run in runs)
    assert copy["test"] == wti["test"]


def test_what_a_subclass_does_not_inherit(tiny_arguments, test_videos, tmp_path, capsys):
    """Search ranks exactly and without words; reports and embeddings have what there is."""
    run = tmp_path / "halved"
    flags = (f"--workdir={run}", f"--plugin={PLUGIN}")
    options = ("--config.model.interaction=halved", "--config.train.pictures=True")
    assert train(tiny_arguments(run, flags[1], *options, SHORT)) == 0
    assert evaluate([*flags, f"--report={tmp_path / 'report'}"]) == 0
    assert 'id="words"' not in (tmp_path / "report" / "index.html").read_text()
    model, path = drl_jax.load(run), min(test_videos.glob("*.mp4"))
    text, video = model.encode_text(["a red circle"]), model.encode_videos([path])
    whole = WeightedTokenWise.similarity(None, text, video)
    np.testing.assert_allclose(model.similarity(text, video), whole / 2, atol=1e-6)
    for call in (model.pool_text, model.interaction.query_vectors):
        with pytest.raises(UserError, match=r"Halved has no .*vectors: define .* INHERITS = \('"):
            call(text)
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(path, folder)
    index = f"--index={tmp_path / 'index'}"
    assert search(["index", *flags, f"--videos={folder}", index]) == 0
    capsys.readouterr()
    query = ("query", index, flags[1], "a red circle")
    assert search([*query]) == 0
    assert "best at" not in capsys.readouterr().out
    assert search([*query, "--json"]) == 0
    (hit,) = json.loads(capsys.readouterr().out)["hits"]
    assert {moment["explanation"] for moment in hit["moments"]} == {None}
    message = error_of("drl_jax.search", *query, "--engine=scan", capsys=capsys)
    assert "the interaction halved has no vectors" in message
    figure = ("--query=a dog", f"--video={path}", f"--out={tmp_path / 'figure.png'}")
    message = error_of("drl_jax.search", "explain", *flags, *figure, capsys=capsys)
    assert "Halved has no explanation: define attribution" in message
    out = tmp_path / "videos.npz"
    assert embed([*flags, f"--videos={folder}", f"--out={out}"]) == 0
    assert "halved has no pooled vectors" in capsys.readouterr().out
    assert {"frame_unit", "pooled"} & set(np.load(out)) == {"frame_unit"}


def test_what_a_class_says_it_inherits():
    class Same(WeightedTokenWise):
        INHERITS = ("pooled",)

    class Own(Same):
        @classmethod
        def attribution(cls, text, video):
            return None

    assert (Same.HAS_POOLED, Same.HAS_EXPLANATION, Same.HAS_VECTORS) == (True, False, False)
    assert (Own.HAS_POOLED, Own.HAS_EXPLANATION, Own.HAS_VECTORS) == (False, True, False)
    for inherits in (("vectors",), ("pool",)):
        with pytest.raises(UserError, match=f"Wrong: Same has no '{inherits[0]}' to inherit"):
            type("Wrong", (Same,), {"INHERITS": inherits})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("x = 1\n\nraise ValueError('no\\nluck')", ", line 3: ValueError: no luck"),
        ("import os\nclass :\n", ", line 2: SyntaxError: invalid syntax"),
        ("import drl_jax", "registers nothing; call drl_jax.register_interaction"),
        (f"{MINE}\ndrl_jax.register_interaction('dp', Best)", "'dp' exists, it is a part of"),
        (f"{MINE}\ndrl_jax.register_temporal_head('none', Mixed)", "head 'none' exists, it is a p"),
        (f"{MINE}\ndrl_jax.register_interaction('best', Halved)", "it is drl_jax_plugins.bad.Best"),
        (f"{MINE}\ndrl_jax.register_interaction('b c', Best)", "letters, digits and _ only"),
        (f"{MINE}\ndrl_jax.register_interaction('x', Mixed)", "a subclass of Interaction can be"),
        (f"{MINE}\ndrl_jax.register_interaction('x', Interaction)",
         "Interaction does not define encode_text, encode_video, similarity, TEXT_ARRAYS, VIDEO"),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_used_is_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "bad.py"
    if content is not None:
        path.write_text(content)
    arguments = ("--workdir=absent", f"--plugin={path}")
    assert message in error_of("drl_jax.evaluate", *arguments, capsys=capsys)


def test_a_class_of_a_notebook(shapes_config, tmp_path, monkeypatch):
    """It has no file, so its source is recorded; the cell may run again."""
    cell, classes = MINE.split("drl_jax.register")[0], {"__name__": "__main__"}
    lines = (len(cell), None, cell.splitlines(keepends=True), "<cell>")
    monkeypatch.setitem(linecache.cache, "<cell>", lines)
    for _ in range(2):
        exec(compile(cell, "<cell>", "exec"), classes)
        drl_jax.register_interaction("best", classes["Best"])
    assert INTERACTIONS["best"] is classes["Best"]
    with pytest.raises(UserError, match=r"'best' exists, it is __main__\.Best"):
        drl_jax.register_interaction("best", classes["Halved"])
    model = dataclasses.replace(shapes_config.model, interaction="best")
    config = dataclasses.replace(shapes_config, model=model, loss=LossConfig(cdcr=0))
    (row,) = describe_plugins(config)
    assert row["class"] == "__main__.Best"
    assert row["source"] == cell[cell.index("class Best") : cell.index("class Mixed")].strip()
    assert "class __main__.Best" in how_to_open(tmp_path, {"plugins": [row]})
    claim_workdir(tmp_path, config)
    assert load_config(tmp_path) == config


def test_a_dataset_of_a_plugin(test_videos, tmp_path, capsys):
    plugin = SUPPORT / "plugin_dataset.py"
    names = [path.stem for path in sorted(test_videos.glob("*.mp4"))[:2]]
    (tmp_path / "mine.json").write_text(json.dumps(dict.fromkeys(names, "a circle")))
    sources = (f"--videos={test_videos}", f"--annotations={tmp_path}", f"--data_dir={tmp_path}")
    arguments = ("mine", *sources, "--image_size=64")
    assert "invalid choice: 'mine'" in error_of("data_prep.build", *arguments, capsys=capsys)
    flag = f"--plugin={plugin}"
    assert build([*arguments, flag]) == build([*arguments, flag]) == 0
    (info,) = (tmp_path / "mine").rglob("dataset_info.json")
    assert json.loads(info.read_text())["name"] == "mine"
    assert list(VideoDataset(info.parent).video_ids) == names
    other = tmp_path / "other.py"
    other.write_text(plugin.read_text().replace('"mine", B', '"msvd", B'))
    message = error_of("data_prep.build", "msvd", *sources, f"--plugin={other}", capsys=capsys)
    assert "the dataset 'msvd' exists" in message
