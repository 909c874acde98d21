"""Captions and token ids in files: what is read is what was stored."""

import hashlib
import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.files import contents, refused
from support.tokenizer_files import write_gemma, write_spiece

from drl_jax.config import BackboneConfig, ModelConfig
from drl_jax.data import content, tokens
from drl_jax.data.batches import TrainBatches
from drl_jax.data.records import VideoDataset
from drl_jax.data.splits import Captions
from drl_jax.data.tokens import caption_tokens
from drl_jax.models.tokenizers import CLIPTokenizer, Tokenizer, load_tokenizer
from drl_jax.runtime.errors import Notice

VARIANT = Path("shapes") / "64px_4f_raw" / "1.0.0"
WORDS = 24  # Of the tokens that the build of `shapes` stores.


@pytest.fixture(scope="module")
def dataset(shapes_data) -> VideoDataset:
    return VideoDataset(shapes_data / VARIANT)


@pytest.fixture
def copy(shapes_data, tmp_path) -> Path:
    """Directory of a copy of the small `shapes` that a test may change."""
    return Path(shutil.copytree(shapes_data / VARIANT, tmp_path / VARIANT))


def test_captions_are_sequences():
    captions = Captions.of([["a", "b"], ["c"], ["d", "e", "f"]])
    assert list(captions) == [["a", "b"], ["c"], ["d", "e", "f"]]
    assert captions[-1] == ["d", "e", "f"]
    assert captions[:2] == [["a", "b"], ["c"]]
    assert [captions.caption(pair) for pair in range(captions.pairs)] == list("abcdef")
    assert [captions.locate(pair) for pair in (1, 2, 5)] == [(0, 1), (1, 2), (2, 5)]
    with pytest.raises(IndexError):
        captions[3]
    part = captions.subset(np.array([2, 0]))
    assert list(part) == [["d", "e", "f"], ["a", "b"]]
    assert [part.caption(pair) for pair in range(part.pairs)] == list("defab")
    assert list(captions.subset(np.array([2, 0]), first_only=True)) == [["d"], ["a"]]


def test_columns_are_sequences(dataset):
    ids = list(dataset.video_ids)
    assert len(ids) == len(set(ids)) == len(dataset)
    assert dataset.video_ids[-1] == ids[-1]
    assert dataset.video_ids[3:9:2] == ids[3:9:2]
    assert dataset.sources[0] == [f"train/{ids[0]}.mp4"]
    with pytest.raises(IndexError):
        dataset.video_ids[len(ids)]
    hashes = [int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) for name in ids]
    assert dataset.id_hashes.tolist() == hashes


@pytest.mark.parametrize("piece", [7, 10_000])
def test_hashes_are_those_of_json(dataset, monkeypatch, piece):
    monkeypatch.setattr(content, "_PIECE", piece)
    splits = {name: dataset.split(name) for name in dataset.split_names}
    in_json = {
        name: {
            "videos": split.videos.tolist(),
            "captions": list(split.captions),
            "reversed_pairs": split.reversed_pairs.tolist(),
        }
        for name, split in splits.items()
    }

    def sha256_of(value):
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    described = {"frames": "ab", "video_ids": list(dataset.video_ids), "splits": in_json}
    assert content.content_sha256("ab", dataset.video_ids, splits) == sha256_of(described)
    queries = [["é", 'a"'], [["ü", "\n"], []]]
    assert content.queries_sha256(iter(queries[0]), queries[1]) == sha256_of(queries)
    assert content.queries_sha256([], []) == sha256_of([[], []])


# ------------------------------------------------------------------------------------ token ids


def assert_equal_to_tokenize(found, captions, tokenizer, words):
    ids, mask, _ = tokenizer.tokenize(list(captions.texts), words)
    rows = [found[row] for row in range(len(ids))]
    for number, expected in enumerate((ids, mask)):
        array = np.stack([row[number] for row in rows])
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def not_called(*_):
    raise AssertionError("tokenised again")


@pytest.mark.parametrize("pad_id", [0, 9])
def test_the_build_stores_tokens_that_training_uses(dataset, shapes_config, monkeypatch, pad_id):
    captions, tokenizer = dataset.split("train").captions, CLIPTokenizer(pad_id)
    found = caption_tokens(captions, tokenizer, WORDS)
    assert isinstance(found.rows.base, np.memmap)
    assert found.rows.dtype["ids"].base == np.uint16
    assert_equal_to_tokenize(found, captions, tokenizer, WORDS)
    monkeypatch.setattr(CLIPTokenizer, "tokenize", not_called)
    batches = TrainBatches(
        dataset, dataset.split("train"), shapes_config.data, 16, 0, CLIPTokenizer()
    )
    assert next(batches.iterate(0, 0, 1))["text_mask"].any()


@pytest.mark.parametrize("kind", ["tokenizer.json", "spiece.model", "clip"])
def test_tokens_of_another_tokenizer_or_length_are_stored(kind, copy, tmp_path, monkeypatch):
    captions, tokenizer = VideoDataset(copy).split("test").captions, CLIPTokenizer()
    if kind != "clip":
        write = write_gemma if kind == "tokenizer.json" else write_spiece
        backbone = BackboneConfig(text_cleaning="lower")
        model = ModelConfig(backbone, tokenizer=str(write(tmp_path / kind)))
        tokenizer = load_tokenizer(model)
    before = set((copy / "tokens").iterdir())
    assert_equal_to_tokenize(caption_tokens(captions, tokenizer, 10), captions, tokenizer, 10)
    (entry,) = set((copy / "tokens").iterdir()) - before
    assert entry.name == f"test_10_{tokenizer.fingerprint[:16]}"
    monkeypatch.setattr(type(tokenizer), "tokenize", not_called)
    assert isinstance(caption_tokens(captions, tokenizer, 10).rows.base, np.memmap)


@pytest.fixture
def entry(copy) -> Path:
    """The stored tokens of the test split."""
    return copy / "tokens" / f"test_{WORDS}_{CLIPTokenizer().fingerprint[:16]}"


@pytest.mark.parametrize("file", ["ids.npy", "about.json"])
def test_damaged_tokens_are_computed_again(file, entry, copy):
    captions, path = VideoDataset(copy).split("test").captions, entry / file
    whole = path.read_bytes()
    other = path.parent.with_name(entry.name.replace("test_", "val_")) / file
    flipped = whole[:150] + bytes([whole[150] ^ 1]) + whole[151:]
    for damaged in (flipped, whole[:100], other.read_bytes(), None):
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        found = caption_tokens(captions, CLIPTokenizer(), WORDS)
        assert_equal_to_tokenize(found, captions, CLIPTokenizer(), WORDS)
        assert path.read_bytes() == whole


def test_tokens_that_cannot_be_stored_stay_in_memory(copy, capsys):
    shutil.rmtree(copy / "tokens")
    (copy / "tokens").write_text("not a directory")
    captions = VideoDataset(copy).split("test").captions
    for quiet in (False, True):
        found = caption_tokens(captions, CLIPTokenizer(), WORDS, quiet=quiet)
        assert_equal_to_tokenize(found, captions, CLIPTokenizer(), WORDS)
        said = capsys.readouterr().err
        assert said.count("the tokens of test cannot be read from or stored in") == (not quiet)
    assert (copy / "tokens").read_text() == "not a directory"


def test_captions_that_training_cuts_are_counted(copy):
    """At each start of a training: the second call reads the tokens that the first one stored."""
    captions, tokenizer = VideoDataset(copy).split("test").captions, CLIPTokenizer()
    lengths = [
        len(tokenizer.tokenize([text], 64).text_ids[0].nonzero()[0]) for text in captions.texts
    ]
    words = sorted(lengths)[len(lengths) // 2]
    cut = sum(length > words for length in lengths)
    assert 0 < cut < len(lengths)
    for _ in range(2):
        with pytest.warns(Notice) as notices:
            caption_tokens(captions, tokenizer, words)
        (notice,) = map(str, [warning.message for warning in notices])
        assert notice.startswith(
            f"split test: {cut} of {len(lengths)} captions cut to data.max_words={words}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        caption_tokens(captions, tokenizer, words, quiet=True)
        caption_tokens(captions, tokenizer, max(lengths))


@pytest.mark.parametrize("file", ["ids.npy", "about.json"])
def test_tokens_that_cannot_be_read_are_not_replaced(file, entry, copy, capsys):
    captions = VideoDataset(copy).split("test").captions
    before = contents(entry)
    with refused(entry / file):
        found = caption_tokens(captions, CLIPTokenizer(), WORDS)
        assert_equal_to_tokenize(found, captions, CLIPTokenizer(), WORDS)
    assert "Too many levels of symbolic links): they are kept in memory" in capsys.readouterr().err
    assert contents(entry) == before


def test_processes_may_store_tokens_at_once(copy, monkeypatch):
    """Threads stand for them: nothing of this process is shared between the calls."""
    monkeypatch.setattr(tokens, "_CHUNK", 4)
    captions = VideoDataset(copy).split("test").captions
    before = set((copy / "tokens").iterdir())
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda _: caption_tokens(captions, CLIPTokenizer(), 12).rows, range(8))
        )
    assert len({rows.tobytes() for rows in found}) == 1
    assert len(set((copy / "tokens").iterdir()) - before) == 1


def test_captions_without_a_file_are_tokenised_in_memory():
    class Large(Tokenizer):
        vocabulary_size = 256_000

        def _encode(self, captions):
            return [[255_999, row] for row in range(len(captions))]

    captions = Captions.of([["a dog", "a cat"], ["a man runs"]])
    found = caption_tokens(captions, CLIPTokenizer(), 8)
    assert_equal_to_tokenize(found, captions, CLIPTokenizer(), 8)
    # Also ids of a large vocabulary.
    assert_equal_to_tokenize(caption_tokens(captions, Large(7), 5), captions, Large(7), 5)


def test_a_fingerprint_is_of_all_that_changes_ids(tmp_path):
    file = write_gemma(tmp_path / "tokenizer.json")

    def of_file(cleaning, pad_id=0):
        backbone = BackboneConfig(text_cleaning=cleaning, pad_id=pad_id)
        return load_tokenizer(ModelConfig(backbone, tokenizer=str(file))).fingerprint

    found = {CLIPTokenizer().fingerprint, of_file("none"), of_file("lower")}
    assert len(found) == 3
    assert of_file("none", pad_id=5) == of_file("none")
    write_gemma(file, template="<bos> $A <eos>")
    assert of_file("none") not in found
