"""What a query finds: videos, their moments, and why."""

import base64
import dataclasses
import functools
import html
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from drl_jax.models.interactions import Attribution, Features, Interaction
from drl_jax.models.tokenizers.base import END, START
from drl_jax.runtime.errors import UserError, printable
from drl_jax.search.encoding import WEAK
from drl_jax.search.engine import Part
from drl_jax.search.open_index import IndexedVideo
from drl_jax.search.reading import path_of
from drl_jax.search.transcripts import Cue
from drl_jax.search.windows import Window

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How L tokens of a query, also start and end, and F frames at some seconds make the score.

    With a reranker, `attention` is its attention to the tokens, float [L], which is not what they
    add to a score; and `added` is what the frames add to it, float [F].
    """

    tokens: list[str]
    times: np.ndarray
    attribution: Attribution
    attention: np.ndarray | None = None
    added: np.ndarray | None = None

    def peak(self, start: float = -np.inf, end: float = np.inf) -> float:
        """Time of the frame from `start` to `end` that contributes most, seconds."""
        inside = (start <= self.times) & (self.times <= end)
        of_frames = np.where(inside, self.attribution.frame_contribution, -np.inf)
        return float(self.times[of_frames.argmax()])

    def words(self) -> list[tuple[str, float, np.ndarray]]:
        """The words, without the marks of start and end.

        For each: the word, its share of the score, and its cosine with each frame, float [F].
        """
        weight, found = np.float64(self.attribution.token_weight), []
        for word, rows in self._joined():
            # Tokens of a word without any weight count equally.
            shares = weight[rows] + 1e-12
            cosines = np.average(self.attribution.similarity[rows], axis=0, weights=shares)
            found.append((word, float(weight[rows].sum()), cosines))
        return found

    def _joined(self) -> list[tuple[str, list[int]]]:
        """The words, and the numbers of their tokens."""
        joined: list[tuple[str, list[int]]] = []
        continues = False
        for row, token in enumerate(self.tokens):
            if token in (START, END):
                continue
            word, rows = joined.pop() if continues else ("", [])
            # A trailing "-" says that the word continues; the token of a hyphen alone is "-".
            continues = len(token) > 1 and token.endswith("-")
            joined.append((word + (token[:-1] if continues else token), [*rows, row]))
        return joined

    def figure(self, frames: Sequence[np.ndarray], title: str) -> "Figure":
        """The cosines of words and frames, below pictures of these, uint8 [S, S, 3]."""
        from drl_jax.evaluation.figures import interaction_figure  # Others need no matplotlib.

        clocks = list(map(format_timestamp, self.times))
        given = (self.attribution, self.tokens, clocks, frames, title)
        return interaction_figure(*given, added=self.added)

    def to_json(self) -> dict[str, Any]:
        """The words and frames; `marks_share` is that of the marks of start and end."""
        words = self.words()
        return {
            "marks_share": round(max(0.0, 1 - sum(weight for _, weight, _ in words)), 4),
            "times": rounded(self.times, 3),
            "frame_weights": rounded(self.attribution.frame_weight),
            "words": [
                {"word": word, "weight": round(weight, 4), "similarity": rounded(similarity)}
                for word, weight, similarity in words
            ],
            "reranker": self._reranker_json(),
        }

    def _reranker_json(self) -> dict[str, list[float]] | None:
        if self.attention is None or self.added is None:
            return None
        words = [self.attention[rows].sum() for _, rows in self._joined()]
        return {"attention": rounded(np.array(words)), "added": rounded(self.added)}


def explain(
    interaction: type[Interaction], part: Part, video: Features, tokens: list[str], times: Sequence
) -> Explanation | None:
    """Explains the similarity of a window and the most similar text of a part of a query.

    None if the interaction has no explanation.

    `video` has no axis of items; `tokens` are of the longest text, `times` of the frames, seconds.
    """
    if not interaction.HAS_EXPLANATION:
        return None
    count = len(part.text["text_mask"])
    texts = [{name: array[row] for name, array in part.text.items()} for row in range(count)]
    found = [interaction.attribution(text, video) for text in texts]
    best = max(found, key=lambda attribution: attribution.frame_contribution.sum())
    length, frames = best.similarity.shape
    return Explanation(tokens[:length], np.asarray(times[:frames]), best)


@dataclasses.dataclass(frozen=True)
class Moment:
    """A part of a video, in seconds, that answers a query.

    `score` is the similarity of its window, `number` that of the coarse window it was found by, and
    `unusual` by how many standard deviations the score is above those of other captions, or of
    other windows for a picture or a video as the query.
    """

    start: float
    end: float
    score: float
    window: Window
    number: int
    unusual: float | None
    _explain: Callable[[], Explanation | None] = dataclasses.field(repr=False, compare=False)

    @functools.cached_property
    def explanation(self) -> Explanation | None:
        """Why the window has its score, by the first part of the query; made when it is shown."""
        return self._explain()

    @property
    def peak(self) -> float:
        """Time of the frame that contributes most; a moment can be a part of its window.

        Without an explanation, the middle.
        """
        if self.explanation is None:
            return (self.start + self.end) / 2
        return self.explanation.peak(self.start, self.end)

    def to_json(self) -> dict[str, Any]:
        """The moment without its explanation; times in seconds."""
        return {
            **{name: round(getattr(self, name), 3) for name in ("start", "end", "peak")},
            "score": round(self.score, 6),
            "unusual": None if self.unusual is None else round(self.unusual, 2),
        }


@dataclasses.dataclass(frozen=True, repr=False)
class Hit:
    """A video that a query found; the first rank is 1. One that is only listed has none, 0.

    The best of its moments is the first. Windows and scores, float [W], are of the coarse windows,
    refined where they were candidates; `is_same` is whether the picture that was asked is in it.
    `cues` are lines of its transcripts with words that were looked for, the best first.
    `reranked` is its similarity as a reranker changed it; None for others.
    """

    rank: int
    path: Path
    video: IndexedVideo
    moments: tuple[Moment, ...] = ()
    windows: tuple[Window, ...] = ()
    scores: np.ndarray | tuple[()] = ()
    is_same: bool = False
    cues: tuple[Cue, ...] = ()
    reranked: float | None = None

    @property
    def score(self) -> float | None:
        """Similarity of its best window; None without moments."""
        return self.moments[0].score if self.moments else None

    @property
    def is_weak(self) -> bool:
        """Whether nothing is said, and other captions, or other windows, are about as similar."""
        return bool(self.moments) and self.found_by is None

    @property
    def found_by(self) -> str | None:
        """What it was found by: picture, text or both; None if it is weak, or only listed."""
        unusual = self.moments[0].unusual if self.moments else -math.inf
        is_seen = self.is_same or unusual is None or unusual >= WEAK
        if self.cues:
            return "both" if is_seen else "text"
        return "picture" if is_seen else None

    def facts(self) -> dict[str, Any]:
        """The hit as JSON, without its path and moments."""
        score = None if self.score is None else round(self.score, 6)
        facts = {"rank": self.rank or None, "score": score, "weak": self.is_weak}
        facts["reranked"] = None if self.reranked is None else round(self.reranked, 6)
        facts |= {"same_picture": self.is_same, "duration": round(self.video.duration, 3)}
        return facts | {"found_by": self.found_by, "cues": [cue._asdict() for cue in self.cues]}

    def explain(self, moment: int = 0) -> "Figure":
        """A figure of matplotlib: the cosines of the words and frames of one of the moments.

        Raises UserError if the hit has no such moment, the interaction has no explanation, or the
        index is damaged.
        """
        if not 0 <= moment < len(self.moments):
            raise UserError(f"the hit has {len(self.moments)} moments, from 0, and none {moment}")
        shown = self.moments[moment]
        if (explanation := shown.explanation) is None:
            raise UserError("the interaction of this index has no explanation")
        strip = Image.open(io.BytesIO(self.video.thumbnails(shown.window.frames)))
        frames = np.split(np.asarray(strip), len(shown.window.frames), axis=1)
        return explanation.figure(frames, f"{path_of(self.path.name)}  {shown.score:.4f}")

    def __reduce__(self) -> tuple:
        raise UserError(
            "a hit is a part of an open index: store hit.to_json(), or hits.to_pandas()"
        )

    def __repr__(self) -> str:
        """Rank, score and path; then each moment, and each line that is said."""
        score = f"{self.score:.4f}  " if self.moments else ""
        same = "  (has this picture)" if self.is_same else ""
        if self.reranked is not None:
            same += f"  (reranked: {self.reranked:.4f})"
        lines = [f"{self.rank:4}  {score}{printable(path_of(self.path))}{same}"]
        for moment in self.moments:
            start, end, peak = map(format_timestamp, (moment.start, moment.end, moment.peak))
            best = f", best at {peak}" if moment.explanation else ""
            lines.append(f"{start} to {end}{best} ({moment.score:.4f})")
        for cue in self.cues:
            said = f"“{printable(cue.text)}” ({printable(cue.file)})"
            lines.append(f"{format_timestamp(cue.start)} {said}")
        return f"\n{'':14}".join(lines)

    def _repr_html_(self) -> str:
        """The best moment as a strip of pictures, with the times and scores of all moments."""
        strip = ""
        if self.moments:
            jpeg = base64.b64encode(self.video.thumbnails(self.moments[0].window.frames)).decode()
            strip = f'<br><img src="data:image/jpeg;base64,{jpeg}" alt="" style="max-width:100%">'
        return f"<p>{html.escape(repr(self).strip())}{strip}</p>"

    def to_json(self) -> dict[str, Any]:
        moments = [
            {**m.to_json(), "explanation": m.explanation and m.explanation.to_json()}
            for m in self.moments
        ]
        return {**self.facts(), "path": path_of(self.path), "moments": moments}


class Hits(list[Hit]):
    """The hits of a query, best first. A notebook shows them as pictures with times and scores."""

    def __init__(
        self,
        hits: Sequence[Hit],
        query: str = "",
        notice: str = "",
        rerank_ms: float | None = None,  # What a reranker took.
    ):
        super().__init__(hits)
        self.rerank_ms = rerank_ms
        self.query, self.notice = query, notice  # Why something that was asked for is missing.

    def __getitem__(self, which: Any) -> Any:
        """A hit, or the `Hits` of a slice."""
        found = super().__getitem__(which)
        about = self.query, self.notice, self.rerank_ms
        return Hits(found, *about) if isinstance(which, slice) else found

    def to_pandas(self) -> "pandas.DataFrame":
        """A row per moment: query, rank, path, start, end and peak in seconds, score, is_weak,
        reranked.

        A path is text that can be stored; `hit.path` is the file, also if its name is not UTF-8.

        Raises UserError if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("to_pandas needs pandas; install it: pip install pandas") from error
        columns = ("query", "rank", "path", "start", "end", "peak", "score", "is_weak", "reranked")
        rows = [
            (*(self.query, hit.rank, path_of(hit.path)), *found, hit.is_weak, hit.reranked)
            for hit in self
            for found in ((m.start, m.end, m.peak, m.score) for m in hit.moments)
        ]
        return pandas.DataFrame(rows, columns=columns).astype({"reranked": float})

    def __str__(self) -> str:
        """The hits as text; weak ones are set apart instead of listed as if they were answers."""
        answers, weak = ([hit for hit in self if hit.is_weak is kind] for kind in (False, True))
        title = ["weak matches:"] if weak else []
        return "\n".join([*map(repr, answers), *title, *map(repr, weak)])

    def __repr__(self) -> str:
        return f"{len(self)} hits of {self.query!r}\n{self}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.query)}</p>{''.join(hit._repr_html_() for hit in self)}"


def rounded(values: np.ndarray, digits: int = 4) -> list[float]:
    return [round(value, digits) for value in np.asarray(values, np.float64).tolist()]


def format_clock(seconds: float) -> str:
    """Formats seconds as players do: 1:02, or 1:00:02 with hours."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_timestamp(seconds: float) -> str:
    """Formats seconds as 1:02.5, or 1:00:02.5 with hours."""
    tenths = round(10 * seconds)
    return f"{format_clock(tenths // 10)}.{tenths % 10}"
