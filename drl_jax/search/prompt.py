"""The prompt: answers sentences and captions until `q`."""

from collections.abc import Callable, Sequence

from drl_jax.runtime.errors import UserError, printable
from drl_jax.search.explain import format_timestamp
from drl_jax.search.hits import Hit
from drl_jax.search.session import Searcher

_HELP = "t SENTENCE: search, i NUMBER: search with a caption of the test split, q: quit"


def format_hits(hits: Sequence[Hit]) -> str:
    """Formats hits as text: rank, score and path; then each moment, with its words for the best."""
    lines = []
    # Set apart instead of listed as if they were answers.
    for hit in sorted(hits, key=lambda hit: hit.is_weak):
        if hit.is_weak and "weak matches:" not in lines:
            lines.append("weak matches:")
        lines.append(f"{hit.rank:4}  {hit.score:.4f}  {printable(str(hit.path))}")
        for moment in hit.moments:
            span = f"{format_timestamp(moment.start)} to {format_timestamp(moment.end)}"
            peak = format_timestamp(moment.peak)
            lines.append(f"{'':14}{span}, best at {peak} ({moment.score:.4f})")
            if moment is hit.moments[0]:
                words = (
                    f"{word} {format_timestamp(time)}"
                    + (f" ({weight:.0%})" if weight >= 0.005 else "")
                    for word, time, _, weight in moment.explanation.matches()
                )
                lines.append(f"{'':14}{'  '.join(words)}")
    return "\n".join(lines)


def run_prompt(
    searcher: Searcher,
    captions: Sequence[str],
    top: int,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = print,
) -> None:
    """Reads and answers queries until `q` or the end of the input.

    Args:
      searcher: answers.
      captions: the captions that `i` selects from; may be empty.
      top: number of hits.
      read: shows a prompt and returns a line; EOFError ends the prompt.
      write: prints.
    """
    write(f"{len(searcher.videos)} videos. {_HELP}")
    while True:
        try:
            command, _, rest = read("> ").strip().partition(" ")
            if command == "t" and not rest.strip():
                rest = read("sentence: ")
            elif command == "i" and not rest.strip():
                rest = read("number: ")
        except EOFError:
            write("")
            return
        if command == "q":
            return
        try:
            write(_answer(searcher, captions, top, command, rest.strip()))
        except UserError as error:
            write(str(error))


def _answer(searcher: Searcher, captions: Sequence[str], top: int, command: str, rest: str) -> str:
    if command not in ("t", "i"):
        return _HELP
    sentence = rest if command == "t" else _caption(captions, rest)
    (hits,) = searcher.search([sentence], top)
    return f"{sentence}\n{format_hits(hits)}"


def _caption(captions: Sequence[str], number: str) -> str:
    if not captions:
        raise UserError("there are no captions to select from; give --captions=FILE")
    if not number.isdecimal() or int(number) >= len(captions):
        raise UserError(f"i takes a number from 0 to {len(captions) - 1}, not {number!r}")
    return captions[int(number)]
