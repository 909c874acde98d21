"""MSR-VTT, splits of the 1k-A protocol."""

from pathlib import Path

from data_prep.annotations import (
    AnnotationError,
    Annotations,
    group_captions,
    read_csv_columns,
    read_sentences,
    with_all_captions,
)
from data_prep.retrieval_builder import RetrievalBuilder

_SENTENCES = "MSRVTT_data.json"
_TRAIN = {"train_9k": "MSRVTT_train.9k.csv", "train_7k": "MSRVTT_train.7k.csv"}
_TEST = "MSRVTT_JSFUSION_test.csv"


class Builder(RetrievalBuilder):
    """MSR-VTT: 10,000 videos of 20 captions each; 9k and 7k training splits, 1k-A test."""

    def read_annotations(self, directory: Path) -> Annotations:
        files = {
            _SENTENCES: "the captions of all videos",
            **{file: f"the split {split}" for split, file in _TRAIN.items()},
            _TEST: "the split test (1k-A)",
        }
        missing = {name: use for name, use in files.items() if not (directory / name).is_file()}
        annotations = Annotations({}, missing_files=missing)
        if _SENTENCES not in missing:
            captions = read_sentences(directory / _SENTENCES)
            for split, file in _TRAIN.items():
                if file not in missing:
                    rows = read_csv_columns(directory / file, ("video_id",))
                    annotations.splits[split] = with_all_captions(
                        [video for (video,) in rows],
                        captions,
                        directory / file,
                        directory / _SENTENCES,
                    )
        if _TEST not in missing:
            # The protocol's own sentence of each video; a row is a query.
            rows = read_csv_columns(directory / _TEST, ("video_id", "sentence"))
            annotations.splits["test"] = group_captions(rows)
        if not annotations.splits:
            raise AnnotationError(
                f"no split can be read from {directory}: it lacks "
                + ", ".join(f"{name} ({use})" for name, use in missing.items())
            )
        return annotations
