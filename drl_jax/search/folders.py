"""Searches folders of videos: chooses a model, indexes them, and answers or serves.

`drl_jax search FOLDER ...` is the other commands in one, with an index of its own place.
"""

import argparse
import hashlib
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import jax

from drl_jax.hub.recommended import RECOMMENDED
from drl_jax.pretrained.model import RetrievalModel, load, load_source
from drl_jax.runtime.errors import UserError, printable
from drl_jax.runtime.lock import LockError
from drl_jax.search.commands import print_answers
from drl_jax.search.index_file import has_index, part_directories, read_header
from drl_jax.search.session import Index
from drl_jax.search.watch import tell, updating
from drl_jax.weights.source import is_name, resolved, to_download

# Seconds between looks whether a new index can be searched.
_PAUSE = 0.2
# Without them, a browser would be one of text, in the terminal of the server.
_DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")


def search_folders(options: argparse.Namespace) -> None:
    """Indexes the folders, and answers the sentence, or else serves the page meanwhile.

    Raises UserError: there is no such folder, no video in it, or the model is not there.
    """
    folders, sentence = split_words(options.words)
    directory = options.index or default_index(folders)
    model = _model_of(directory, options.model, agrees=options.yes)
    tell(f"model: {' '.join(model.source.values())}; index: {directory}")
    index = Index(directory, model)
    if sentence:
        try:
            for folder in folders:
                tell(f"{folder}: {index.add(folder, progress=True)}")
        except LockError as error:  # E.g. a server updates it.
            tell(f"{error}; what is stored is searched")
        answer = index.search(sentence, top=options.top, text=options.text)
        print_answers(options, index, [sentence], [answer])
        return
    from drl_jax.search.serve import serve  # Answers need no server.

    with updating(index, folders, follows=options.watch) as thread:
        while not (found := _is_searchable(index)) and thread.is_alive():
            thread.join(_PAUSE)
        if not (found or _is_searchable(index)):
            raise UserError(f"no video of {', '.join(map(str, folders))} can be searched")
        if not options.no_browser and any(map(os.environ.get, _DISPLAYS)):
            options.on_start = webbrowser.open
        options.watch = False
        serve(index, options)


def _is_searchable(index: Index) -> bool:
    try:
        index.state()
        return True
    except UserError:
        return False


def split_words(words: Sequence[str]) -> tuple[list[Path], str]:
    """The folders among words, which come first, and the sentence that the others are."""
    folders = [Path(word) for word in words]
    are_there = [bool(word) and Path(word).is_dir() for word in words]
    count = [*are_there, False].index(False)
    # Words of a sentence have spaces, or there are several; a folder that is not there is neither.
    rest = words[count:]
    if not count or any("/" in word and " " not in word for word in rest):
        wrong = rest[0] if rest else ""
        what = "is a file, and no folder" if Path(wrong).is_file() else "is no folder"
        raise UserError(f"{printable(wrong)} {what}: write drl_jax search FOLDER")
    return folders[:count], " ".join(rest)


def default_index(folders: Sequence[Path]) -> Path:
    """Where the index of some folders is, unless the user names another place."""
    home = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
    places = [folder.resolve() for folder in folders]
    digest = hashlib.sha256(b"\0".join(map(os.fsencode, places))).hexdigest()[:10]
    return home / "drl_jax" / "indexes" / f"{printable(places[0].name) or 'root'}-{digest}"


def _model_of(directory: Path, name: str, *, agrees: bool) -> RetrievalModel:
    """The model of an index, the named one, or the recommended one of this machine."""
    made = read_header(part_directories(directory)[0])["source"] if has_index(directory) else {}
    if made and not name:
        return load_source(made)
    name = name or ("general" if jax.default_backend() == "cpu" else "large")
    if is_name(name) and (size := to_download(name)) != 0:
        if made and resolved(name) not in map(resolved, made.values()):
            other = " ".join(made.values())
            raise UserError(f"{directory} was made with {other}: omit --model, or name an --index")
        _ask(name, size, agrees=agrees)
    return load(name)


def _ask(name: str, size: int | None, *, agrees: bool) -> None:
    """Says what is downloaded, and asks whether it may be; raises a UserError if it may not."""
    source = resolved(name)
    known = next((one for one in RECOMMENDED.values() if one.source == source), None)
    facts = [f"{size / 1e9:.2f} GB"] if size else []
    if known is not None:
        facts += [f"licence {known.licence}", f"languages: {known.languages}"]
    tell(f"the model {source} is downloaded once ({'; '.join(facts) or 'size unknown'})")
    if known is RECOMMENDED["general"]:
        others = ", ".join(f"{n} ({r.languages})" for n, r in RECOMMENDED.items() if n != "general")
        tell(f"others with --model=NAME: {others}, a file, a run, or hf-hub:ORG/NAME")
    if agrees:
        return
    if not sys.stdin.isatty():
        raise UserError("--yes agrees to the download; --model=FILE takes a file of weights")
    if input("download it? [Y/n] ").strip().lower() not in ("", "y", "yes"):
        raise UserError("nothing was downloaded; --model=FILE takes a file of weights")
