"""MTEB, the real package: the same numbers as `drl_jax.evaluate`, on a task of `shapes`."""

from pathlib import Path

import numpy as np
import pytest
from support.runs import make_run
from support.videos import numbered_frames, write_video

mteb = pytest.importorskip("mteb")

import datasets
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

import drl_jax
from drl_jax.integrations.mteb import LateInteraction, PooledVectors
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.runs.evaluate_run import Evaluated, evaluate

METADATA = {
    "description": "Captions and clips of the test split of shapes.",
    "dataset": {"path": "shapes", "revision": "1"},
    "type": "Any2AnyRetrieval",
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "main_score": "ndcg_at_10",
}


class ShapesTask(AbsTaskRetrieval):
    """Clips by caption; a subclass has captions by clip. `dataset` is set by `make_task`."""

    metadata = TaskMetadata(
        name="ShapesT2V", category="t2v", modalities=["text", "video"], **METADATA
    )

    def load_data(self, **options):
        self.data_loaded = True


class ShapesV2T(ShapesTask):
    metadata = TaskMetadata(
        name="ShapesV2T", category="v2t", modalities=["text", "video"], **METADATA
    )


def make_task(kind: type, texts: dict[str, str], clips: dict, relevant: dict) -> ShapesTask:
    """A task from captions and clips by id, and for each query the ids of its documents."""
    text = datasets.Dataset.from_dict({"id": list(texts), "text": list(texts.values())})
    video = {"id": list(clips), "video": list(clips.values())}
    feature = datasets.Video()
    if not isinstance(next(iter(clips.values())), str):
        feature = datasets.Array4D((None, 3, *np.shape(next(iter(clips.values())))[2:]), "uint8")
    columns = datasets.Features({"id": datasets.Value("string"), "video": feature})
    video = datasets.Dataset.from_dict(video, features=columns)
    queries, corpus = (text, video) if kind is ShapesTask else (video, text)
    task = kind()
    split = {"queries": queries, "corpus": corpus, "relevant_docs": relevant, "top_ranked": None}
    task.dataset = {"default": {"test": split}}
    return task


@pytest.fixture(scope="module", params=sorted(INTERACTIONS))
def evaluated(request, shapes_config, tmp_path_factory) -> tuple[Evaluated, drl_jax.RetrievalModel]:
    workdir = tmp_path_factory.mktemp("mteb") / "run"
    config = make_run(workdir, shapes_config, request.param)
    return evaluate(workdir, config), drl_jax.load(workdir)


@pytest.fixture(scope="module")
def pairs(evaluated, shapes_data) -> tuple[dict[str, str], dict[str, str]]:
    """Captions by id, and files by id, in the order of the similarity matrix."""
    opened = evaluated[0].opened
    ids = [opened.dataset.video_ids[video] for video in opened.split.videos]
    files = {path.stem: str(path) for path in Path(shapes_data).rglob("videos/test/*.mp4")}
    captions = [captions[0] for captions in opened.split.captions]
    return dict(zip(ids, captions, strict=True)), {name: files[name] for name in ids}


def scores_of(model, task) -> dict[str, float]:
    (result,) = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    return result.scores["test"][0]


@pytest.mark.parametrize("kind", [ShapesTask, ShapesV2T])
def test_late_interaction_is_that_of_evaluate(kind, evaluated, pairs, tmp_path):
    evaluation, model = evaluated[0].evaluation, evaluated[1]
    task = make_task(kind, *pairs, {name: {name: 1} for name in pairs[0]})
    # MTEB forgets it.
    split, searched = task.dataset["default"]["test"], LateInteraction(model)
    scores = scores_of(searched, task)
    direction = "t2v" if kind is ShapesTask else "v2t"
    for k in (1, 5, 10):
        expected = evaluation.metrics[direction][f"R@{k}"]
        assert 100 * scores[f"recall_at_{k}"] == pytest.approx(expected, abs=1e-4), k
    assert scores["main_score"] == scores["ndcg_at_10"]
    options = {"task_metadata": task.metadata, "num_proc": None}
    found = searched.search(split["queries"], top_k=1000, **options)
    matrix = evaluation.sim_matrix if kind is ShapesTask else evaluation.sim_matrix.T
    names = list(pairs[0])
    assert list(found) == names
    for row, query in zip(matrix, names, strict=True):
        similarity = [found[query][name] for name in names]
        np.testing.assert_allclose(similarity, row, rtol=0, atol=1e-4)
        assert list(found[query].values()) == sorted(found[query].values(), reverse=True)
    # Of some documents, as in reranking, and the best of them.
    chosen = dict.fromkeys(names, names[:3])
    reranked = searched.search(split["queries"], top_k=2, top_ranked=chosen, **options)
    for query in names:
        expected = sorted(names[:3], key=found[query].get, reverse=True)[:2]
        assert list(reranked[query]) == expected


@pytest.mark.parametrize("kind", [ShapesTask, ShapesV2T])
def test_pooled_vectors_are_those_of_the_api(kind, evaluated, pairs):
    evaluation, model = evaluated[0].evaluation, evaluated[1]
    captions, files = pairs
    scores = scores_of(
        PooledVectors(model), make_task(kind, *pairs, {name: {name: 1} for name in captions})
    )
    text = model.pool_text(model.encode_text(list(captions.values())))
    similarity = text @ model.pool_videos(model.encode_videos(list(files.values()))).T
    if model.config.model.interaction == "dp":
        np.testing.assert_allclose(similarity, evaluation.sim_matrix, rtol=0, atol=1e-4)
    similarity = similarity if kind is ShapesTask else similarity.T
    rank = (similarity > np.diag(similarity)[:, None]).sum(axis=1)
    for k in (1, 5, 10):
        assert scores[f"recall_at_{k}"] == pytest.approx((rank < k).mean(), abs=1e-4), k


def test_clips_are_files_bytes_or_pictures(search_model, shapes_data, tmp_path):
    """Frames of another size are resized as those of files are."""
    frames = numbered_frames(8, 48, 96)
    write_video(tmp_path / "a.mp4", frames, fps=2)
    expected = search_model.encode_videos([tmp_path / "a.mp4"])
    content = (tmp_path / "a.mp4").read_bytes()
    # Those that the file is sampled at, one a second.
    pictures = [search_model.read_video(tmp_path / "a.mp4").frames]
    shown = [np.moveaxis(frames[::2], -1, 1)]
    model = PooledVectors(search_model)
    for clips, feature in (
        ([{"path": None, "bytes": content}], datasets.Video(decode=False)),
        ([np.moveaxis(pictures[0], -1, 1)], datasets.Array4D((4, 3, 64, 64), "uint8")),
        (shown, datasets.Array4D((4, 3, 48, 96), "uint8")),
    ):
        rows = datasets.Dataset.from_dict(
            {"video": clips}, features=datasets.Features({"video": feature})
        )
        vector = model.encode(type("Loader", (), {"dataset": rows}))
        np.testing.assert_allclose(vector, search_model.pool_videos(expected), atol=1e-4)


def test_what_is_not_a_text_or_a_video_is_one_line(search_model, tmp_path):
    (tmp_path / "bad.mp4").write_text("no video")
    model, searched = PooledVectors(search_model), LateInteraction(search_model)
    for columns, message in (
        ({"text": ["a"], "video": [[0]]}, "a row of the task has text and video"),
        ({"audio": [[0]]}, "a row of the task has audio"),
        ({"video": [{"path": str(tmp_path / "bad.mp4"), "bytes": None}]}, "bad.mp4 is not a video"),
    ):
        rows = datasets.Dataset.from_dict(columns)
        with pytest.raises(drl_jax.UserError, match=message):
            model.encode(type("Loader", (), {"dataset": rows}))
    texts = datasets.Dataset.from_dict({"id": ["1"], "text": ["a dog"]})
    options = {"task_metadata": ShapesTask.metadata, "num_proc": None}
    metadata = TaskMetadata(name="T", category="t2t", modalities=["text"], **METADATA)
    options["task_metadata"] = metadata
    searched.index(texts, **options)
    with pytest.raises(drl_jax.UserError, match="compares texts with videos, not text with text"):
        searched.search(texts, top_k=1, **options)


def test_other_objects_are_no_models():
    for wrapper in (LateInteraction, PooledVectors):
        with pytest.raises(drl_jax.UserError, match="takes a model that"):
            wrapper("runs/shapes")


def test_names_tell_models_apart(evaluated):
    _, model = evaluated
    late, pooled = LateInteraction(model).mteb_model_meta, PooledVectors(model).mteb_model_meta
    assert late.name == f"drl_jax/{model.config.model.interaction}" != pooled.name
    assert late.revision == pooled.revision == model.fingerprint
    assert late.modalities == pooled.modalities == ["text", "video"]
