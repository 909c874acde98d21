"""Writes the description of a dataset: ids, sources, splits and captions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.annotations import Captioned
from data_prep.locations import name_below
from data_prep.video_folder import Plan
from drl_jax.data.description import LAYOUT
from drl_jax.data.description_files import write_captions, write_videos


def write_description(directory: Path, plan: Plan, records: Mapping[str, int]) -> dict[str, Any]:
    """Writes the files of ids, sources and captions.

    Args:
      directory: of the dataset.
      plan: its videos and captions.
      records: index of the record of each stored video, by id, ascending.

    Returns:
      The content of `metadata.json`.

    Raises:
      OSError: the disk is full.
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
        splits[name] = {"reversed_pairs": _rows_of_pairs(pairs, usable)}
    return {"layout": LAYOUT, "splits": splits}


def _rows_of_pairs(
    pairs: Sequence[tuple[str, str]], captioned: Sequence[Captioned]
) -> list[list[int]]:
    """The pairs of ids as indices of the videos, those of which both are there."""
    if not pairs:
        return []
    row = {entry.video_id: number for number, entry in enumerate(captioned)}
    return [[row[a], row[b]] for a, b in pairs if a in row and b in row]
