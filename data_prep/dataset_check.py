"""Validates the source files of a dataset. Worker processes import this module."""

import collections
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.annotations import Annotations
from data_prep.datasets import builder_class
from data_prep.locations import Clip, Location
from data_prep.quarantine import read_quarantine, write_quarantine
from data_prep.sizes import count_splits, describe_split, format_bytes, stored_bytes
from data_prep.splits import shared_captions, shared_videos, warnings
from data_prep.video_folder import Plan
from drl_jax.data.storage import StorageSpec
from drl_jax.data.video import VideoFacts, inspect_video
from drl_jax.data.video_file import VideoError, ffmpeg_errors
from drl_jax.runtime.files import sha256, write_json
from drl_jax.runtime.resources import available_cpus
from drl_jax.runtime.worker_pool import WorkerFailure, map_in_processes

# A file is suspicious if its number of frames differs from what its duration implies by more than
# this fraction and by more than this number, or if it is shorter than these seconds.
_FRAMES_TOLERANCE = (0.05, 2)
_TOO_SHORT = 1.0
# Maximum number of problems of a kind that are printed; the report has all of them.
_MAX_PRINTED = 10


# Facts of a file, or why there are none; its SHA-256, and the seconds that its inspection took.
_Finding = tuple[VideoFacts | WorkerFailure, str, float]


def check_dataset(dataset: str, plan: Plan, storage: StorageSpec, timeout: float) -> dict[str, Any]:
    """Decodes all videos of a plan, also those in quarantine; returns the content of `check.json`.

    `storage` is the variant of the estimates, and `timeout` is in seconds per file.
    """
    published, protocols = builder_class(dataset).PUBLISHED, builder_class(dataset).PROTOCOLS
    findings = _inspect_files([clip.location for clip in plan.clips], storage, timeout)
    unusable, unavailable, suspicious, frames = {}, {}, {}, 0
    changed: dict[str, str] = {}
    clocks_differ: list[str] = []
    for clip in plan.clips:
        facts, *_ = findings[clip.location]
        if isinstance(facts, WorkerFailure):
            (unavailable if facts.is_passing else unusable)[clip.video_id] = facts.reason
            continue
        positions = facts.positions(storage.max_frames, clip.span, storage.frame_clock)
        if not positions:
            span, length = clip.span, facts.frames / facts.fps
            reason = f"its span {span[0]:g}-{span[1]:g} s is outside the file ({length:.1f} s)"
            unusable[clip.video_id] = reason
            continue
        frames += len(positions)
        if facts.changed:
            changed[clip.video_id] = ", ".join(facts.changed)
        if facts.clocks_differ(storage.max_frames, clip.span):
            clocks_differ.append(clip.video_id)
        if reasons := _suspicions(facts):
            suspicious[clip.video_id] = "; ".join(reasons)
    usable = {clip.video_id for clip in plan.clips} - unusable.keys() - unavailable.keys()
    seconds = sum(seconds for *_, seconds in findings.values())
    left_out = plan.annotations.left_out
    return {
        "left_out": left_out,
        "missing": {name: why for name, why in plan.unusable.items() if name not in left_out},
        "unusable": unusable,
        "unavailable": unavailable,
        "suspicious": suspicious,
        "changed_as_shown": changed,
        "clocks_differ": clocks_differ,
        "duplicate_videos": _duplicate_videos(plan.clips, findings, plan.annotations),
        "videos_in_several_splits": shared_videos(plan.annotations, protocols),
        "captions_in_several_splits": shared_captions(plan.annotations, protocols),
        "warnings": warnings(plan.annotations, plan.merged, protocols),
        "splits": count_splits(plan.annotations, usable, published),
        "build": {
            "videos": len(usable),
            "frames": frames,
            "storage": storage.name,
            "frame_clock": storage.frame_clock,
            "as_shown": storage.form.as_shown,
            "bytes": stored_bytes(frames, storage),
            "minutes": round(seconds / available_cpus() / 60, 1),
        },
        "unannotated_files": plan.unannotated,
    }


def _inspect_files(
    locations: Iterable[Location], storage: StorageSpec, timeout: float
) -> dict[Location, _Finding]:
    """Inspects each distinct file once, in parallel."""
    files = list(dict.fromkeys(locations))
    results = map_in_processes(_inspect, [(file, storage) for file in files], timeout=timeout)
    return {
        file: (found, "", timeout) if isinstance(found, WorkerFailure) else found
        for file, found in zip(tqdm(files, "checking", unit="video"), results, strict=True)
    }


def _inspect(location: Location, storage: StorageSpec) -> _Finding:
    start, digest = time.monotonic(), ""
    found: VideoFacts | WorkerFailure
    try:
        with ffmpeg_errors(location):
            digest = sha256(location)
        found = inspect_video(location, storage.max_frames, storage.form)
        if found.black:
            # A build would store it, but no caption can match it.
            found = WorkerFailure("all its sampled frames are black")
    except VideoError as problem:
        found = WorkerFailure(str(problem))
    return found, digest, time.monotonic() - start


def _suspicions(facts: VideoFacts) -> list[str]:
    """Reasons to look at a file that can be decoded."""
    found = []
    if facts.damaged_packets:
        found.append(f"{facts.damaged_packets} packets are damaged")
    seconds = facts.frames / facts.fps
    if facts.duration:
        expected = facts.duration * facts.fps
        fraction, number = _FRAMES_TOLERANCE
        if abs(facts.frames - expected) > max(fraction * expected, number):
            found.append(
                f"{facts.frames} frames, but its duration of {facts.duration:.1f} s at"
                f" {facts.fps:.2f} frames per second implies {expected:.0f}"
            )
    if seconds < _TOO_SHORT:
        found.append(f"only {facts.frames} frames ({seconds:.2f} s)")
    return found


def _duplicate_videos(
    clips: Iterable[Clip], findings: Mapping[Location, _Finding], annotations: Annotations
) -> list[dict[str, list[str]]]:
    """Groups of videos with the same content under different ids, with their splits."""
    splits, groups = collections.defaultdict(list), collections.defaultdict(list)
    for name, captioned in annotations.splits.items():
        for entry in captioned:
            splits[entry.video_id].append(name)
    for clip in clips:
        if digest := findings[clip.location][1]:
            groups[digest, clip.span].append(clip.video_id)
    return [
        {"videos": videos, "splits": sorted({s for video in videos for s in splits[video]})}
        for videos in groups.values()
        if len(videos) > 1
    ]


def print_report(report: Mapping[str, Any]) -> None:
    """Prints the report of `check_dataset`."""
    for name, split in report["splits"].items():
        print(f"  {describe_split(name, split)}")
    for kind, title in (
        ("left_out", "rows of the annotation files are left out"),
        ("missing", "annotated videos are missing"),
        ("unusable", "videos cannot be used"),
        ("unavailable", "videos could not be read this time; check again"),
        ("suspicious", "videos can be used but are suspicious"),
    ):
        _print_some(title, [f"{video}: {why}" for video, why in report[kind].items()])
    build = report["build"]
    if report["changed_as_shown"]:
        what = "are" if build["as_shown"] else "would be, with --as_shown,"
        lines = [f"{video}: {why}" for video, why in report["changed_as_shown"].items()]
        _print_some(f"videos {what} changed to what a screen shows", lines)
    if count := len(report["clocks_differ"]):
        print(
            f"{count} videos have other frames by time than by number; these are sampled by"
            f" {build['frame_clock']} (--frame_clock)"
        )
    groups = [(group["videos"], group["splits"]) for group in report["duplicate_videos"]]
    groups = [f"{', '.join(videos)} (in {', '.join(splits)})" for videos, splits in groups]
    _print_some("groups of videos have the same content", groups)
    for line in report["warnings"]:
        print(line)
    for splits, count in report["captions_in_several_splits"].items():
        print(f"{count} captions are in both {splits}")
    if count := len(report["unannotated_files"]):
        print(f"{count} video files have no annotation")
    print(
        f"a build of {build['storage']} stores {build['videos']:,} videos, {build['frames']:,}"
        f" frames, {format_bytes(build['bytes'])}, and takes about {build['minutes']}"
        " minutes on this machine"
    )


def _print_some(title: str, lines: Sequence[str]) -> None:
    if lines:
        print(f"{len(lines)} {title}:", *lines[:_MAX_PRINTED], sep="\n  ")
    if len(lines) > _MAX_PRINTED:
        print(f"  and {len(lines) - _MAX_PRINTED} more")


def report_file(quarantine: Path) -> Path:
    """Path of the JSON report, beside the quarantine list."""
    return quarantine.with_name("check.json")


def write_report(report: Mapping[str, Any], quarantine: Path) -> None:
    """Writes the report, and adds the unusable videos to the quarantine list.

    Lines of the list that were added by hand are kept; those of the previous check are replaced.
    """
    try:
        previous = json.loads(report_file(quarantine).read_text(encoding="utf-8"))["unusable"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # Missing or damaged.
        previous = {}
    listed = read_quarantine(quarantine)
    added_by_hand = {video: why for video, why in listed.items() if video not in previous}
    quarantine.parent.mkdir(parents=True, exist_ok=True)
    write_quarantine(quarantine, {**added_by_hand, **report["unusable"]})
    write_json(report_file(quarantine), report)
