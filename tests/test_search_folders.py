"""`drl_jax search FOLDER`: an index, an answer and the page, without naming a place or a model."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from support.commands import ROOT

import drl_jax.__main__
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.lock import locked
from drl_jax.search import folders
from drl_jax.search.__main__ import main
from drl_jax.search.folders import default_index, split_words
from drl_jax.search.index_file import LOCK


@pytest.fixture
def videos(test_videos, tmp_path, monkeypatch):
    """A folder with the name of a command."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "query"
    folder.mkdir()
    for video in sorted(test_videos.iterdir())[:3]:
        shutil.copy(video, folder / video.name)
    return folder


def test_a_sentence_is_answered(videos, search_run, capsys):
    # Flags may stand anywhere.
    command = ["--top=2", "./query", "--json", "a", "red", "circle"]
    assert main([*command, f"--model={search_run}"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert (answer["query"], answer["model"]["knows"]) == ("a red circle", "drawn shapes")
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2]
    assert "query: 3 added" in captured.err
    assert default_index([videos]).parent == videos.parent / "data" / "drl_jax" / "indexes"
    assert (default_index([videos]) / "index.json").exists()
    # The index knows its model, and where its videos are.
    assert main(command) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == answer
    assert f"model: {search_run} 0; index: {default_index([videos])}" in captured.err
    assert "3 unchanged" in captured.err
    # While a server updates it.
    with locked(default_index([videos]) / LOCK, "the index"):
        assert main(command) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == answer
    assert "or stop it; what is stored is searched\n" in captured.err
    assert main([*command, "--model=fast"]) == 1
    assert "0: omit --model, or name an --index" in capsys.readouterr().err


def test_words_are_folders_and_then_a_sentence(videos):
    (videos / "more").mkdir()
    both, sentence = split_words([str(videos), "query/more", "a dog", "and/or a cat"])
    assert (both, sentence) == ([videos, Path("query", "more")], "a dog and/or a cat")
    file = str(next(videos.glob("*.mp4")))
    for words in (["nowhere"], ["a dog"], ["./query", "./nowhere"], ["nowhere", "./query"], [file]):
        with pytest.raises(UserError, match=r" no folder: write drl_jax search FOLDER"):
            split_words(words)


def test_the_page_is_served_while_folders_are_indexed(videos, search_run, monkeypatch):
    served = []
    monkeypatch.setattr("drl_jax.search.serve.serve", lambda index, options: served.append(index))
    assert main(["./query", f"--model={search_run}", "--port=0"]) == 0
    assert len(served[0].search("a dog", top=9)) > 0
    empty = videos.parent / "empty"
    empty.mkdir()
    assert main([str(empty), f"--model={search_run}"]) == 1
    assert len(served) == 1
    with pytest.raises(SystemExit):
        main(["./query", "--port=65536"])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_download_is_agreed_to(videos, monkeypatch, capsys):
    monkeypatch.setattr(folders, "to_download", lambda name: 1_790_000_000)
    monkeypatch.setattr(folders, "load", lambda name: pytest.fail("it was downloaded"))
    command = ["./query", "a dog"]
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert main(command) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--yes agrees to the download; --model=FILE takes a file of weights" in line
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert main(command) == 1
    shown = capsys.readouterr()
    facts = "facebook/PE-Core-B16-224 is downloaded once (1.79 GB; licence Apache-2.0; languages:"
    assert facts in shown.err
    assert "multilingual (English and many others)" in shown.err
    assert "nothing was downloaded" in shown.err
    for words, answer in ((["--yes"], ""), ([], "y\n")):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        with pytest.raises(pytest.fail.Exception, match="it was downloaded"):
            main([*command, *words])


def test_verbs_are_the_modules(capsys):
    for verb, (_, module) in drl_jax.__main__.VERBS.items():
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
        with pytest.raises(SystemExit) as ended:
            drl_jax.__main__.main([verb, "--help"])
        assert ended.value.code == 0
    assert drl_jax.__main__.main([]) == 0
    assert "search videos with a sentence" in capsys.readouterr().out
    assert drl_jax.__main__.main(["serch"]) == 2
    assert "no verb 'serch' (did you mean search?)" in capsys.readouterr().err
