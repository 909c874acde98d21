"""Looks at a dataset before it is built: what is missing, broken or suspicious.

    python -m data_prep.check msrvtt --videos=DIR --annotations=DIR [--data_dir=data]

Decodes every annotated video whole. Writes `DATA_DIR/DATASET/check.json`, and what no build can use
into `DATA_DIR/DATASET/quarantine.txt`, which builds honour. Exits with 0 if every annotated video
can be used, with 1 if some cannot, and with 2 if the dataset cannot be checked.
"""

import argparse
import collections
import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep import estimate
from data_prep.annotations import Annotations
from data_prep.command import add_source_flags, form_of
from data_prep.datasets import builder_class, dataset_names
from data_prep.manifest import count_splits, describe_split
from data_prep.quarantine import quarantine_file, read_quarantine, write_quarantine
from data_prep.video_folder import Clip, Plan, make_plan
from drl_jax.data.video import VideoError, VideoFacts, inspect_video, sample_positions
from drl_jax.runs.workdir import write_json
from drl_jax.runtime.errors import UserError, report_errors
from drl_jax.runtime.worker_pool import Lost, map_in_processes

# A file whose frames differ from what its duration says by more than this share, and by more than
# this number, is suspicious.
_FRAMES_OFF = (0.05, 2)
_TOO_SHORT = 1.0
# Problems that are printed one by one; the report has all.
_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found of one file.

    Attributes:
      facts: None if it cannot be decoded.
      error: why it should be left out; empty if it should not.
      digest: sha256 of the file; empty if it could not be read.
      seconds: that the decoding took.
    """

    facts: VideoFacts | None
    error: str
    digest: str
    seconds: float


def check(
    plan: Plan,
    published: Mapping[str, Mapping[str, tuple[int, int]]],
    form: tuple[int, int, str],
    timeout: float,
) -> dict[str, Any]:
    """Decodes all videos of a plan and reports.

    Args:
      plan: the dataset, nothing in quarantine.
      published: see `RetrievalBuilder.PUBLISHED`.
      form: what a build would store: side of the frames in pixels, frames a video, storage.
      timeout: seconds that a file may take.

    Returns:
      The report: "missing", "unusable" and "suspicious" (reasons by video), "duplicate_videos"
      (groups of ids with the same file content), "captions_in_several_splits", "splits", "build"
      (estimates), "unannotated_files".
    """
    files = list(dict.fromkeys(clip.path for clip in plan.clips))
    found = map_in_processes(
        _inspect, [(path, form[1], form[0]) for path in files], timeout=timeout
    )
    findings: dict[Path, Finding] = {}
    for path, finding in tqdm(zip(files, found, strict=True), "checking", len(files), unit="video"):
        if isinstance(finding, Lost):
            finding = Finding(None, finding.reason, "", timeout)
        findings[path] = finding

    unusable, suspicious, frames = {}, {}, 0
    for clip in plan.clips:
        finding = findings[clip.path]
        error = finding.error or _span_error(clip, finding.facts)
        if error:
            unusable[clip.video_id] = error
            continue
        facts = finding.facts
        frames += len(sample_positions(facts.frames, facts.fps, form[1], clip.span))
        if reasons := suspicions(facts):
            suspicious[clip.video_id] = "; ".join(reasons)
    usable = {clip.video_id for clip in plan.clips} - unusable.keys()
    seconds = sum(finding.seconds for finding in findings.values())
    return {
        "missing": plan.unusable,
        "unusable": unusable,
        "suspicious": suspicious,
        "duplicate_videos": _duplicate_videos(plan.clips, findings, plan.annotations),
        "captions_in_several_splits": _shared_captions(plan.annotations),
        "repeated_captions": _repeated_captions(plan.annotations),
        "splits": count_splits(plan.annotations, usable, published),
        "build": {
            "videos": len(usable),
            "frames": frames,
            "bytes": estimate.stored_bytes(frames, form),
            "minutes": round(seconds / (os.cpu_count() or 1) / 60, 1),
        },
        "unannotated_files": plan.unannotated,
    }


def _inspect(path: Path, max_frames: int, image_size: int) -> Finding:
    start = time.monotonic()
    digest = ""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        facts, error = inspect_video(path, max_frames, image_size), ""
        if facts.black:
            # A build would store it as it is; no sentence can find it.
            error = "all its sampled frames are black"
    except VideoError as problem:
        facts, error = None, str(problem)
    except OSError as problem:
        facts, error = None, f"cannot be opened ({problem.strerror})"
    return Finding(facts, error, digest, time.monotonic() - start)


def _span_error(clip: Clip, facts: VideoFacts) -> str:
    if clip.span is None or sample_positions(facts.frames, facts.fps, 1, clip.span):
        return ""
    length = facts.frames / facts.fps
    return f"its span {clip.span[0]:g}-{clip.span[1]:g} s lies outside the file ({length:.1f} s)"


def suspicions(facts: VideoFacts) -> list[str]:
    """What a person should look at in a file that can be decoded."""
    found = []
    if facts.damaged_packets:
        found.append(f"{facts.damaged_packets} packets are damaged")
    seconds = facts.frames / facts.fps
    if facts.duration:
        expected = facts.duration * facts.fps
        share, number = _FRAMES_OFF
        if abs(facts.frames - expected) > max(share * expected, number):
            found.append(
                f"{facts.frames} frames where its {facts.duration:.1f} s at {facts.fps:.2f} a"
                f" second would have {expected:.0f}"
            )
    if seconds < _TOO_SHORT:
        found.append(f"only {facts.frames} frames ({seconds:.2f} s)")
    if facts.variable_rate:
        found.append("variable frame rate: its frames are sampled by number, not by time")
    return found


def _splits_of(annotations: Annotations) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for name, captioned in annotations.splits.items():
        for entry in captioned:
            splits.setdefault(entry.video_id, []).append(name)
    return splits


def _duplicate_videos(
    clips: Iterable[Clip], findings: Mapping[Path, Finding], annotations: Annotations
) -> list[dict[str, list[str]]]:
    """Videos of the same content under different names, with the splits they stand in."""
    splits = _splits_of(annotations)
    groups = collections.defaultdict(list)
    for clip in clips:
        if digest := findings[clip.path].digest:
            groups[digest, clip.span].append(clip.video_id)
    return [
        {"videos": videos, "splits": sorted({s for video in videos for s in splits[video]})}
        for videos in groups.values()
        if len(videos) > 1
    ]


def _shared_captions(annotations: Annotations) -> dict[str, int]:
    """For pairs of splits without a common video, how many captions both have."""
    captions, videos = {}, {}
    for name, captioned in annotations.splits.items():
        captions[name] = {_folded(text) for entry in captioned for text in entry.captions}
        videos[name] = {entry.video_id for entry in captioned}
    shared = {}
    for one, other in itertools.combinations(captions, 2):
        # 1k-A's 9k and 7k share videos on purpose, and with them captions.
        common = len(captions[one] & captions[other])
        if common and not videos[one] & videos[other]:
            shared[f"{one} and {other}"] = common
    return shared


def _repeated_captions(annotations: Annotations) -> dict[str, int]:
    """For each split, how many captions several of its videos have: queries without one answer."""
    repeated = {}
    for name, captioned in annotations.splits.items():
        owners = collections.Counter(
            text for entry in captioned for text in {_folded(text) for text in entry.captions}
        )
        if count := sum(1 for owner in owners.values() if owner > 1):
            repeated[name] = count
    return repeated


def _folded(caption: str) -> str:
    return " ".join(caption.lower().split())


def print_report(report: Mapping[str, Any]) -> None:
    """The report for a person."""
    for name, split in report["splits"].items():
        print(f"  {describe_split(name, split)}")
    for kind, title in (
        ("missing", "annotated, and not there"),
        ("unusable", "cannot be used"),
        ("suspicious", "can be used, and look suspicious"),
    ):
        _print_some(title, [f"{video}: {why}" for video, why in report[kind].items()])
    _print_some(
        "groups of videos with the same content",
        [
            f"{', '.join(group['videos'])} (in {', '.join(group['splits'])})"
            for group in report["duplicate_videos"]
        ],
    )
    for splits, count in report["captions_in_several_splits"].items():
        print(f"{count} captions stand in {splits}")
    for split, count in report["repeated_captions"].items():
        print(f"{count} captions of {split} belong to several videos")
    if count := len(report["unannotated_files"]):
        print(f"{count} video files are not annotated")
    build = report["build"]
    print(
        f"a build stores {build['videos']:,} videos, {build['frames']:,} frames,"
        f" {estimate.in_words(build['bytes'])}, and takes about {build['minutes']} minutes here"
    )


def _print_some(title: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    print(f"{len(lines)} {title}:")
    for line in lines[:_SHOWN]:
        print(f"  {line}")
    if len(lines) > _SHOWN:
        print(f"  and {len(lines) - _SHOWN} more")


def _added_by_hand(quarantine: Path) -> dict[str, str]:
    """Lines of the quarantine that are not the last check's own."""
    report = quarantine.with_name("check.json")
    own = json.loads(report.read_text(encoding="utf-8"))["unusable"] if report.is_file() else {}
    return {video: why for video, why in read_quarantine(quarantine).items() if video not in own}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser("data_prep.check", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=sorted(set(dataset_names()) - {"shapes"}))
    add_source_flags(parser, required=True)
    options = parser.parse_args(arguments)
    builder = builder_class(options.dataset)

    def run() -> int:
        try:
            annotations = builder.read_annotations(options.annotations)
            plan = make_plan(annotations, options.videos, {})
        except UserError as error:
            print(f"data_prep.check: {error}", file=sys.stderr)
            return 2
        report = check(plan, builder.PUBLISHED, form_of(options), options.timeout)
        print_report(report)
        quarantine = quarantine_file(options.data_dir, options.dataset)
        try:
            by_hand = _added_by_hand(quarantine)
            write_quarantine(quarantine, {**by_hand, **report["unusable"]})
            write_json(quarantine.with_name("check.json"), report)
        except OSError as error:
            print(
                f"data_prep.check: cannot write to {quarantine.parent} ({error.strerror})",
                file=sys.stderr,
            )
            return 2
        print(f"wrote {quarantine.with_name('check.json')} and {quarantine}")
        return 1 if report["missing"] or report["unusable"] else 0

    return report_errors("data_prep.check", run, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
