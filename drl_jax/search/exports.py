"""Moments as editing programs read them: lists of cuts on frames, and a zip file of clips.

Programs count frames. Where the rate is constant, a cut has the frames whose time lies in the
moment; where it varies, the nearest ones at the nominal rate.
"""

import csv
import dataclasses
import io
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import IO
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np

from drl_jax.search.addresses import BadRequest
from drl_jax.search.clips import ROUNDING, Timing
from drl_jax.search.open_index import IndexedVideo

# Media types by the names of formats, which are the suffixes of their files.
FORMATS = {
    "csv": "text/csv; charset=utf-8",
    "otio": "application/json",
    "edl": "text/plain; charset=utf-8",
    "fcpxml": "application/xml",
    "zip": "application/zip",
}
# Seconds of all clips of a zip file, at most.
MAX_SECONDS = 600.0
# Rates that have timecodes; those of 29.97 and 59.94 leave out numbers (drop-frame).
_NTSC = Fraction(1000, 1001)
_RATES = (24 * _NTSC, Fraction(24), Fraction(25), 30 * _NTSC, Fraction(30))
_RATES += (48 * _NTSC, Fraction(48), Fraction(50), 60 * _NTSC, Fraction(60))
_CODE = re.compile(r"(\d\d):(\d\d):(\d\d)([:;.,])(\d\d)")


@dataclasses.dataclass(frozen=True)
class Cut:
    """A moment of a video, seconds, and its frames: `first` and the one after the last."""

    video: IndexedVideo
    file: Path
    start: float
    end: float
    score: float | None
    timing: Timing
    rate: Fraction
    first: int
    stop: int
    count: int  # Frames of the video.
    offset: int  # Number that the timecode of the file gives its first frame.

    @classmethod
    def of(
        cls,
        video: IndexedVideo,
        file: Path,
        start: float,
        end: float,
        score: float | None,
        timing: Timing,
    ) -> "Cut":
        # Of a low rate, a multiple has timecodes.
        multiples = [rate for rate in _RATES if (rate / timing.rate).denominator == 1]
        rate = [*multiples, min(_RATES, key=lambda rate: abs(rate - timing.rate))][0]
        step = int(rate / timing.rate) if multiples else 1
        numbers = np.asarray(video.times) * float(rate / step)
        is_constant = np.abs(numbers - np.rint(numbers)).max() <= 1.5 * ROUNDING * rate

        def frame_at(time: float) -> int:
            if is_constant:
                return step * math.ceil((time - ROUNDING) * rate / step)
            return step * round(time * rate / step)

        count = max(step, frame_at(video.duration))
        first = min(max(0, frame_at(start)), count - step)
        stop = max(first + step, min(frame_at(end), count))
        offset = _number_of(timing.timecode, rate)
        return cls(video, file, start, end, score, timing, rate, first, stop, count, offset)

    @property
    def name(self) -> str:
        return clean(PurePosixPath(self.video.path).name)


def clean(name: str) -> str:
    """A name without what XML, lists of cuts or other systems' files cannot have."""
    return "".join(c if c.isprintable() and c not in "'\"<>:|?*\\/" else "_" for c in name)


def timecode(number: int, rate: Fraction) -> str:
    """Hours, minutes, seconds and frames of the number of a frame; with `;` in drop-frame."""
    base, dropped = round(rate), _dropped(rate)
    if dropped:
        tens, rest = divmod(number, 600 * base - 9 * dropped)
        number += dropped * (9 * tens + max(0, rest - dropped) // (60 * base - dropped))
    seconds, frame = divmod(number, base)
    minutes, second = divmod(seconds, 60)
    code = f"{minutes // 60 % 24:02}:{minutes % 60:02}:{second:02}"
    return f"{code}{';' if dropped else ':'}{frame:02}"


def _dropped(rate: Fraction) -> int:
    """Numbers that the timecode leaves out in most minutes."""
    return round(rate) // 15 if rate in (30 * _NTSC, 60 * _NTSC) else 0


def _number_of(code: str, rate: Fraction) -> int:
    """The number of the frame with a timecode; 0 for what is none."""
    if (match := _CODE.fullmatch(code)) is None:
        return 0
    hours, minutes, seconds, frame = (int(match[group]) for group in (1, 2, 3, 5))
    minutes += 60 * hours
    dropped = 0 if match[4] == ":" else _dropped(rate) * (minutes - minutes // 10)
    return (60 * minutes + seconds) * round(rate) + frame - dropped


def cut_list(kind: str, cuts: Sequence[Cut], title: str) -> bytes:
    """A file of cuts, one after another.

    Raises BadRequest if OpenTimelineIO is not installed, or an EDL would have several rates.
    """
    if kind == "csv":
        return _csv(cuts)
    otio, title = _opentimelineio(), clean(title) or "Moments"
    if kind == "otio":
        return otio.adapters.write_to_string(_timeline(otio, cuts, title), "otio_json").encode()
    if kind == "fcpxml":
        return _fcpxml(otio, cuts, title)
    if len(rates := {cut.rate for cut in cuts}) > 1:
        given = ", ".join(f"{float(rate):.5g}" for rate in sorted(rates))
        line = f"an EDL has one frame rate, and these videos have {given}"
        raise BadRequest(f"{line}; choose videos of one rate, or another format")
    text = otio.adapters.write_to_string(_timeline(otio, cuts, title), "cmx_3600")
    # Which timecodes they are, the adapter leaves out.
    mode = "DROP FRAME" if _dropped(cuts[0].rate) else "NON-DROP FRAME"
    return text.replace("\n", f"\nFCM: {mode}\n", 1).encode()


def _csv(cuts: Iterable[Cut]) -> bytes:
    writer = csv.writer(text := io.StringIO())
    writer.writerow(
        ("path", "start", "end", "start_timecode", "end_timecode", "frames_per_second", "score")
    )
    for cut in cuts:
        codes = (timecode(cut.offset + number, cut.rate) for number in (cut.first, cut.stop))
        times = (f"{cut.start:.3f}", f"{cut.end:.3f}", *codes, f"{float(cut.rate):.6g}")
        writer.writerow((cut.video.path, *times, "" if cut.score is None else f"{cut.score:.6f}"))
    return text.getvalue().encode(errors="surrogateescape")


def _opentimelineio() -> ModuleType:
    try:
        import opentimelineio as otio

        if {"cmx_3600", "fcpx_xml"} <= {*otio.adapters.available_adapter_names()}:
            return otio
    except ImportError:
        pass
    raise BadRequest(
        "the server needs OpenTimelineIO and its adapters for this: pip install 'drl_jax[editing]'",
        501,
    )


def _address(cut: Cut, host: str = "") -> str:
    return f"file://{host}{quote(os.fsencode(cut.file.absolute()))}"


def _timeline(otio: ModuleType, cuts: Iterable[Cut], title: str, host: str = ""):
    """The cuts, one after another, as OpenTimelineIO's Timeline."""
    time = otio.opentime
    track = otio.schema.Track("Moments", kind=otio.schema.TrackKind.Video)
    for cut in cuts:

        def frames(first: int, count: int, rate: float = float(cut.rate)):
            return time.TimeRange(time.RationalTime(first, rate), time.RationalTime(count, rate))

        media = otio.schema.ExternalReference(_address(cut, host), frames(cut.offset, cut.count))
        part = frames(cut.offset + cut.first, cut.stop - cut.first)
        # AX: programs look for the file by its name.
        about = {"cmx_3600": {"reel": "AX"}, "drl_jax": {"score": cut.score}}
        track.append(otio.schema.Clip(cut.name, media, part, about))
    timeline = otio.schema.Timeline(title)
    timeline.tracks.append(track)
    return timeline


def _fcpxml(otio: ModuleType, cuts: Sequence[Cut], title: str) -> bytes:
    # With the host, the adapter does not start ffprobe on the files.
    host = "localhost"
    text = otio.adapters.write_to_string(_timeline(otio, cuts, title, host), "fcpx_xml")
    root = ElementTree.fromstring(text.encode())
    resources, formats = root.find("resources"), dict[tuple, ElementTree.Element]()
    # The adapter knows no rates of NTSC, merges such formats, and leaves the sound out.
    for one in resources.findall("format"):
        resources.remove(one)
    by_address = {_address(cut, host): cut for cut in cuts}
    format_of = {}
    for asset in resources.findall("asset"):
        cut = by_address[asset.get("src")]
        key = rate, width, height = cut.rate, cut.timing.width, cut.timing.height
        if key not in formats:
            about = {"id": f"f{len(formats) + 1}", "width": str(width), "height": str(height)}
            about["frameDuration"] = f"{rate.denominator}/{rate.numerator}s"
            formats[key] = ElementTree.Element("format", about)
            resources.insert(len(formats) - 1, formats[key])
        format_of[asset.get("id")] = formats[key].get("id")
        asset.set("src", _address(cut))
        asset.set("format", formats[key].get("id"))
        asset.set("hasAudio", str(int(cut.timing.has_sound)))
    for one in root.findall("asset-clip"):  # Clips beside the project.
        root.remove(one)
    sequence = root.find("project/sequence")
    sequence.set("format", "f1")
    for clip in sequence.find("spine"):
        (picture,) = clip
        clip.tag, asset = "asset-clip", picture.get("ref")
        clip.attrib |= {"ref": asset, "format": format_of[asset]}
        clip.remove(picture)
    ElementTree.indent(root)
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE fcpxml>\n'
    return (head + ElementTree.tostring(root, "unicode") + "\n").encode()


def zip_file(clips: Iterable[tuple[str, Path]], folder: Path) -> IO[bytes]:
    """An open temporary file with clips by their names, at its start."""
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    with zipfile.ZipFile(file, "w") as archive:
        for name, clip in clips:
            archive.write(clip, name)
    file.seek(0)
    return file
