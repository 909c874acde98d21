"""Moments as editing programs read them: lists of cuts on frames, and a zip file of clips.

Programs count frames. Where the rate is constant, a cut has the frames whose time lies in the
moment; where it varies, the nearest ones at the nominal rate.
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import NamedTuple
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
_DROP = (30 * _NTSC, 60 * _NTSC)
_RATES = (24 * _NTSC, 48 * _NTSC, *_DROP, *map(Fraction, (24, 25, 30, 48, 50, 60)))
_COLUMNS = ("path", "start", "end", "start_timecode", "end_timecode", "frames_per_second", "score")


class Cut(NamedTuple):
    """A moment of a video, seconds."""

    video: IndexedVideo
    file: Path
    start: float
    end: float
    score: float | None
    timing: Timing

    @property
    def name(self) -> str:
        return clean(PurePosixPath(self.video.path).name)

    @property
    def rate(self) -> Fraction:
        """Of its timecode: that of the file, the least multiple that has one, or the nearest."""
        own = self.timing.rate
        return min(_RATES, key=lambda rate: ((rate / own).denominator > 1, abs(rate - own)))

    @property
    def frames(self) -> tuple[int, int, int]:
        """The first one, the one after the last, and how many the video has, at its rate."""
        step = self.rate / self.timing.rate
        step = int(step) if step.denominator == 1 else 1
        rate = self.rate / step
        numbers = np.asarray(self.video.times) * float(rate)
        off = np.abs(numbers - np.rint(numbers)).max()
        is_constant = not self.timing.may_vary and off <= 1.5 * ROUNDING * rate

        def frame_at(time: float) -> int:
            return math.ceil((time - ROUNDING) * rate) if is_constant else round(time * rate)

        count = max(1, frame_at(self.video.duration))
        first = min(max(0, frame_at(self.start)), count - 1)
        stop = max(first + 1, min(frame_at(self.end), count))
        return step * first, step * stop, step * count


def clean(name: str) -> str:
    """A name without what XML, lists of cuts or other systems' files cannot have."""
    return "".join(c if c.isprintable() and c not in "'\"<>:|?*\\/" else "_" for c in name)


def cut_list(kind: str, cuts: Sequence[Cut], title: str) -> bytes:
    """A file of cuts, one after another; a CSV has timecodes if OpenTimelineIO is installed.

    Raises BadRequest if it is not and another format needs it, or an EDL would have several rates.
    """
    otio, title = _opentimelineio(), clean(title) or "Moments"
    if kind == "csv":
        return _csv(otio, cuts)
    if otio is None:
        install = "pip install 'drl_jax[editing]'"
        raise BadRequest(f"the server lacks OpenTimelineIO or its adapters: {install}", 501)
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
    mode = "DROP FRAME" if cuts[0].rate in _DROP else "NON-DROP FRAME"
    return text.replace("\n", f"\nFCM: {mode}\n", 1).encode()


def _opentimelineio() -> ModuleType | None:
    try:
        import opentimelineio as otio
    except ImportError:
        return None
    return otio if {"cmx_3600", "fcpx_xml"} <= {*otio.adapters.available_adapter_names()} else None


def _csv(otio: ModuleType | None, cuts: Iterable[Cut]) -> bytes:
    writer = csv.writer(text := io.StringIO())
    writer.writerow(_COLUMNS)
    for cut in cuts:
        codes = ["", ""]
        if otio is not None:
            begin = _begin(otio, cut)
            codes = [_time(otio, cut, begin + one).to_timecode() for one in cut.frames[:2]]
        times = (f"{cut.start:.3f}", f"{cut.end:.3f}", *codes, f"{float(cut.rate):.6g}")
        writer.writerow((cut.video.path, *times, "" if cut.score is None else f"{cut.score:.6f}"))
    return text.getvalue().encode()


def _time(otio: ModuleType, cut: Cut, frame: int):
    return otio.opentime.RationalTime(frame, float(cut.rate))


def _begin(otio: ModuleType, cut: Cut) -> int:
    """The frame that the timecode of the file gives its first one."""
    try:
        return round(otio.opentime.from_timecode(cut.timing.timecode, float(cut.rate)).value)
    except ValueError:
        return 0


def _address(cut: Cut, host: str = "") -> str:
    return f"file://{host}{quote(os.fsencode(cut.file.absolute()))}"


def _timeline(otio: ModuleType, cuts: Iterable[Cut], title: str, host: str = ""):
    """The cuts, one after another, as OpenTimelineIO's Timeline."""
    track = otio.schema.Track("Moments", kind=otio.schema.TrackKind.Video)
    for cut in cuts:
        begin, (first, stop, count) = _begin(otio, cut), cut.frames
        of_file, of_cut = (
            otio.opentime.TimeRange(_time(otio, cut, start), _time(otio, cut, length))
            for start, length in ((begin, count), (begin + first, stop - first))
        )
        media = otio.schema.ExternalReference(_address(cut, host), of_file)
        # AX: programs look for the file by its name.
        about = {"cmx_3600": {"reel": "AX"}, "drl_jax": {"score": cut.score}}
        track.append(otio.schema.Clip(cut.name, media, of_cut, about))
    timeline = otio.schema.Timeline(title)
    timeline.tracks.append(track)
    return timeline


def _fcpxml(otio: ModuleType, cuts: Sequence[Cut], title: str) -> bytes:
    # With the host, the adapter does not start ffprobe on the files.
    host = "localhost"
    text = otio.adapters.write_to_string(_timeline(otio, cuts, title, host), "fcpx_xml")
    root = ElementTree.fromstring(text.encode())
    resources, sequence = root.find("resources"), root.find("project/sequence")
    # The adapter knows no rates of NTSC, merges such formats, and leaves the sound out.
    for one in (*resources.findall("format"), *root.findall("asset-clip")):
        (resources if one.tag == "format" else root).remove(one)
    by_address = {_address(cut, host): cut for cut in cuts}
    for number, asset in enumerate(resources.findall("asset"), start=1):
        cut = by_address[asset.get("src")]
        duration = f"{cut.rate.denominator}/{cut.rate.numerator}s"
        sides = {"width": str(cut.timing.width), "height": str(cut.timing.height)}
        about = {"id": f"f{number}", "frameDuration": duration, **sides}
        resources.insert(number - 1, ElementTree.Element("format", about))
        sound = str(int(cut.timing.has_sound))
        asset.attrib |= {"src": _address(cut), "format": about["id"], "hasAudio": sound}
    sequence.set("format", "f1")
    for clip in sequence.find("spine"):
        (picture,) = clip
        clip.tag = "asset-clip"
        clip.set("ref", picture.get("ref"))
        clip.remove(picture)
    ElementTree.indent(root)
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE fcpxml>\n'
    return (head + ElementTree.tostring(root, "unicode") + "\n").encode()
