"""Files beside the records of a dataset: its description, and what it was built from.

`manifest.json` contains nothing that differs between two builds of the same files (no dates, no
paths), so two builds can be compared: equal `content` means equal frames, equal `annotations` equal
captions.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_prep.annotations import Annotations
from data_prep.locations import name_below
from data_prep.video_folder import Plan
from drl_jax.data.description import LAYOUT, write_captions, write_videos
from drl_jax.runtime.files import sha256


def write_description(directory: Path, plan: Plan, records: Mapping[str, int]) -> dict[str, Any]:
    """Writes the files of ids, sources and captions, and returns the content of `metadata.json`.

    `records` has the index of the record of each stored video, by id, ascending.
    """
    # Source of each record: name below the videos' folder, and start and end in seconds if cut.
    sources = (
        [name_below(clip.location, plan.folder), *(clip.span or ())]
        for clip in plan.clips
        if clip.video_id in records
    )
    write_videos(directory, records, sources)
    splits = {}
    for name, captioned in plan.annotations.splits.items():
        usable = [entry for entry in captioned if entry.video_id in records]
        if not usable:
            continue
        videos = [records[entry.video_id] for entry in usable]
        write_captions(directory, name, videos, [entry.captions for entry in usable])
        pairs = plan.annotations.reversed_pairs.get(name, [])
        row = {entry.video_id: number for number, entry in enumerate(usable)} if pairs else {}
        pairs = [[row[one], row[other]] for one, other in pairs if one in row and other in row]
        splits[name] = {"reversed_pairs": pairs}
    return {"layout": LAYOUT, "splits": splits}


def file_hashes(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its name."""
    return {path.name: sha256(path) for path in sorted(files)}


def annotation_hashes(annotations: Annotations) -> dict[str, str]:
    """SHA-256 of the annotation files, or of what was read from them, by name."""
    return file_hashes(annotations.files) | annotations.hashes


def annotation_changes(
    manifest: Mapping[str, Any], annotations: Annotations, *, named_by_user: bool
) -> list[str]:
    """For each annotation file of a new build that differs from the dataset: its name and how.

    With `named_by_user`, the names of the files say nothing about their content: a file with
    another name is the same. (A list of videos for training is none for testing.)
    """
    before, now = manifest["annotations"], annotation_hashes(annotations)
    if named_by_user and sorted(before.values()) == sorted(now.values()):
        return []
    return [
        *(f"{name} has changed" for name in now if before.get(name, now[name]) != now[name]),
        *(f"{name} is new" for name in now if name not in before),
        *(f"{name} is missing" for name in before if name not in now),
    ]
