"""The real packages that read files of `drl_jax.embed` find what the model finds."""

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from drl_jax.embed.encode import embed_captions, embed_videos

CAPTIONS = ["a red circle moves left", "two blue squares", "dogs, cats and a bird"]
BEST = 10


@pytest.fixture(scope="module")
def files(search_model, shapes_data, tmp_path_factory) -> tuple[Path, Path]:
    """Parquet files of the test videos of shapes, and of CAPTIONS."""
    folder = tmp_path_factory.mktemp("databases")
    (videos,) = Path(shapes_data).rglob("videos/test")
    embed_videos(search_model, videos, folder / "videos.parquet")
    embed_captions(search_model, CAPTIONS, folder / "captions.parquet")
    return folder / "videos.parquet", folder / "captions.parquet"


@pytest.fixture(scope="module")
def ids(files) -> np.ndarray:
    return np.array(pyarrow.parquet.read_table(files[0])["video_id"].to_pylist())


@pytest.fixture(scope="module")
def queries(search_model) -> np.ndarray:
    """Pooled vectors of CAPTIONS."""
    return search_model.pool_text(search_model.encode_text(CAPTIONS))


@pytest.fixture(scope="module")
def videos(search_model, shapes_data, ids) -> dict[str, np.ndarray]:
    """What the model itself makes of the videos, in the order of `ids`."""
    (folder,) = Path(shapes_data).rglob("videos/test")
    return search_model.encode_videos([folder / name for name in ids])


def ranked(ids, similarity) -> list[str]:
    return ids[np.argsort(-similarity, kind="stable")][:BEST].tolist()


def max_sim(search_model, videos, weight: str) -> np.ndarray:
    """Each token with its best valid frame, summed by weights, for each caption and video."""
    text = search_model.encode_text(CAPTIONS)
    pairs = np.einsum("ald,bfd->abfl", text["text_unit"], videos["frame_unit"])
    best = np.where(videos["frame_mask"][None, :, :, None], pairs, -np.inf).max(axis=2)
    return (best * text[weight][:, None]).sum(axis=2)


def assert_columns(search_model, videos, queries, ids, pooled, frame_unit) -> None:
    """Pooled vectors [N, D] and the frames of each row [F, D] are those of the model."""
    expected = search_model.pool_videos(videos)
    np.testing.assert_allclose(pooled, expected, atol=1e-5)
    for query in queries:
        assert ranked(ids, pooled @ query) == ranked(ids, expected @ query)
    for found, unit, mask in zip(
        frame_unit, videos["frame_unit"], videos["frame_mask"], strict=True
    ):
        np.testing.assert_allclose(found, unit[mask], atol=1e-5)


def test_pandas(search_model, files, videos, queries, ids):
    table = pytest.importorskip("pandas").read_parquet(files[0])
    frames = [np.stack(row) for row in table["frame_unit"]]
    assert_columns(search_model, videos, queries, ids, np.stack(table["pooled"]), frames)


def test_polars(search_model, files, videos, queries, ids):
    table = pytest.importorskip("polars").read_parquet(files[0])
    frames = [row.to_numpy() for row in table["frame_unit"]]
    assert_columns(search_model, videos, queries, ids, table["pooled"].to_numpy(), frames)


def test_datasets(search_model, files, videos, queries, ids, tmp_path):
    library = pytest.importorskip("datasets")
    table = library.Dataset.from_parquet(str(files[0]), cache_dir=tmp_path).with_format("numpy")
    pooled = np.stack(table["pooled"])
    frames = [row["frame_unit"] for row in table]
    assert_columns(search_model, videos, queries, ids, pooled, frames)


def test_lancedb(search_model, files, videos, queries, ids, tmp_path):
    database = pytest.importorskip("lancedb").connect(tmp_path)
    table = database.create_table("videos", pyarrow.parquet.read_table(files[0]))
    pooled = search_model.pool_videos(videos)

    def found(query, column: str, distance: str) -> list[str]:
        search = table.search(query, vector_column_name=column).distance_type(distance)
        return [row["video_id"] for row in search.limit(BEST).to_list()]

    for query in queries:
        assert found(query, "pooled", "dot") == ranked(ids, pooled @ query)
    tokens = pyarrow.parquet.read_table(files[1])["text_unit"].to_pylist()
    similarity = max_sim(search_model, videos, "text_mask")
    for query, expected in zip(tokens, similarity, strict=True):
        assert found(query, "frame_unit", "cosine") == ranked(ids, expected)


def test_qdrant(search_model, files, videos, queries, ids):
    library = pytest.importorskip("qdrant_client")
    models, client = library.models, library.QdrantClient(":memory:")
    width = queries.shape[1]
    dot = {"size": width, "distance": models.Distance.DOT}
    best = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    columns = {
        "pooled": models.VectorParams(**dot),
        "frame_unit": models.VectorParams(**dot, multivector_config=best),
    }
    client.create_collection("videos", vectors_config=columns)
    rows = pyarrow.parquet.read_table(files[0]).to_pylist()
    points = (
        models.PointStruct(
            id=number,
            vector={name: row[name] for name in columns},
            payload={"video_id": row["video_id"]},
        )
        for number, row in enumerate(rows)
    )
    client.upsert("videos", list(points))

    def found(query, column: str) -> list[str]:
        answer = client.query_points("videos", query=query, using=column, limit=BEST)
        return [point.payload["video_id"] for point in answer.points]

    for query in queries:
        expected = ranked(ids, search_model.pool_videos(videos) @ query)
        assert found(query.tolist(), "pooled") == expected
    captions = pyarrow.parquet.read_table(files[1]).to_pylist()
    similarity = max_sim(search_model, videos, "text_weight")
    for caption, expected in zip(captions, similarity, strict=True):
        query = np.array(caption["text_unit"]) * np.array(caption["text_weight"])[:, None]
        assert found(query.tolist(), "frame_unit") == ranked(ids, expected)
