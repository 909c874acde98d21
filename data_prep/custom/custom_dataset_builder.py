"""Your own dataset, in one csv or jsonl file, WebDataset shards, or Parquet files."""

from pathlib import Path

from data_prep.annotations import Annotations
from data_prep.custom.container_files import find_containers
from data_prep.custom.listings import read_listing
from data_prep.custom.shards import read_shards
from data_prep.custom.tables import read_tables
from data_prep.retrieval_builder import RetrievalBuilder
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.storage import StorageSpec


class Builder(RetrievalBuilder):
    """Your own videos and captions.

    A row of a csv, jsonl or Parquet file has `video` (path below the videos' folder, or file name),
    `caption` or a list `captions`, and optionally `start` and `end` (seconds or h:mm:ss) and
    `split` (train, val or test). Rows with the same video and span are one video with several
    captions. A Parquet file may have the contents of the videos in a column `bytes` instead. A
    sample of a WebDataset shard has a video and a .txt or .json with the other fields. Without
    splits, a tenth of the files becomes val and a tenth test, chosen by the hash of their names.
    """

    DEFAULT_STORAGE = StorageSpec(FrameForm(224, as_shown=True), 12, "jpeg", "time")

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        files = find_containers(path)
        if files is None:
            return read_listing(path)
        return read_tables(files) if files.are_tables else read_shards(files)
