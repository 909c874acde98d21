"""Transcripts beside videos as a second channel of search."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.commands import error_of
from support.served import check_schema

from drl_jax.runtime.errors import Notice, UserError
from drl_jax.search import session
from drl_jax.search.__main__ import main
from drl_jax.search.addresses import PageQuery
from drl_jax.search.api import SearchAPI
from drl_jax.search.filters import Filters
from drl_jax.search.index_file import join
from drl_jax.search.query import Query
from drl_jax.search.routes import TEMPLATES
from drl_jax.search.session import Index, fuse
from drl_jax.search.text_index import FILE, count_transcripts, find_cues, update_text
from drl_jax.search.transcripts import find_transcripts, read_transcript
from drl_jax.search.update import update_index

# One cue, of any words.
SRT = "1\n00:00:01,000 --> 00:00:02,500\n{}\n"

# ---------------------------------------------------------------------- transcripts


@pytest.mark.parametrize(
    ("name", "content", "cues"),
    [
        (
            "a.srt",
            "\ufeff1\r\n00:00:01,000 --> 00:00:02,500\r\n<i>A</i> b\r\n{\\an8}c &amp; d < e\r\n\r\n"
            "2\r\n1:00:03.5-->1:00:01.0 X1:0\r\n2024\r\n",
            [(1.0, 2.5, "A b c & d < e"), (3603.5, 3603.5, "2024")],
        ),
        (
            "a.srt",  # Without empty lines.
            "1\n00:00:01,000 --> 00:00:02,500\nA\n7\n2\n00:00:03,000 --> 00:00:04,000\nb\n",
            [(1.0, 2.5, "A 7"), (3.0, 4.0, "b")],
        ),
        (
            "a.vtt",
            "WEBVTT title\nKind: captions\n\nSTYLE\n::cue { color: red }\n\nNOTE not\nsaid\n\n"
            "name\n00:01.000 --> 00:02.000 align:start\n<v Bob>Hi <00:00:01.500><c>you</c>\n\n"
            "other\n01:00:03.000 --> 01:00:04.000\n&nbsp;\n\n",
            [(1.0, 2.0, "Hi you")],
        ),
        ("a.VTT", "WEBVTT\n", []),
        # Text of marks that end nowhere takes no time.
        ("a.srt", "0:01 --> 0:02\n" + "{\\<a" * 100_000, [(1.0, 2.0, "{\\<a" * 100_000)]),
        ("a.srt", "", []),
        (
            "a.json",
            {"text": "A", "segments": [{"id": 0, "start": 1, "end": 2.5, "text": " A\0\ud800 "}]},
            [(1.0, 2.5, "A ?")],
        ),
        ("a.json", [{"start": 1, "end": 2, "text": "A"}], [(1.0, 2.0, "A")]),
        ("a.json", {"photoTakenTime": 0}, []),
    ],
)
def test_transcripts_are_read(name, content, cues, tmp_path):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    assert [cue[:3] for cue in read_transcript(path)] == cues


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_the_encoding_of_a_transcript_is_found(encoding, tmp_path):
    path = tmp_path / "a.srt"
    path.write_text(SRT.format("Grüße"), encoding)
    assert [cue.text for cue in read_transcript(path)] == ["Grüße"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.srt", "no times", "has no line like 00:01:02,500 --> 00:01:04,000"),
        ("a.json", "{", "is no JSON"),
        ("a.json", "[" * 100_000, "is no JSON"),
        ("a.json", f'[{{"start": 0, "end": {"9" * 400}, "text": ""}}]', "in segment 0"),
        ("a.json", "3", "has no start, end and text in segment 0"),
        ("a.json", '[{"start": 0, "end": 1, "text": ""}, {"start": NaN}]', "in segment 1"),
        ("a.json", '{"segments": [{"start": NaN, "end": 1, "text": ""}]}', "in segment 0"),
        ("a.vtt", "x" * 1001, "is larger than 0 MB"),
    ],
)
def test_what_is_no_transcript_is_one_line(name, content, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "drl_jax.search.transcripts._MAX_BYTES", 1_000 if name == "a.vtt" else 1_000_000
    )
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=reason):
        read_transcript(tmp_path / name)


def test_names_say_whose_a_transcript_is(tmp_path):
    (tmp_path / "sub").mkdir()
    names = ("a.srt", "a.mp4.vtt", "a.en.srt", "a.de-DE.JSON", "a.info.json", "a b.srt", "b.en.srt")
    for name in (*names, "other.srt", "a.txt", "sub/a.srt"):
        (tmp_path / name).touch()
    (tmp_path / "a.fr.srt").mkdir()
    videos = ["a.mp4", "a.mkv", "a b.mp4", "b.mp4", "b.en.mp4", "sub/a.mp4", "gone/a.mp4"]
    found = {(one.video, one.path) for one in find_transcripts(tmp_path, videos)}
    assert found == {
        *(("a.mp4", name) for name in ("a.srt", "a.mp4.vtt", "a.en.srt", "a.de-DE.JSON")),
        *(("a.mkv", name) for name in ("a.srt", "a.en.srt", "a.de-DE.JSON")),
        *(("a b.mp4", "a b.srt"), ("b.en.mp4", "b.en.srt"), ("sub/a.mp4", "sub/a.srt")),
    }


# ---------------------------------------------------------------------- the text of an index


@pytest.fixture
def text(tmp_path):
    """Updates the text in `tmp_path` to transcripts by name; returns numbers and the bad ones."""

    def update(videos: str, is_all: bool = True, **transcripts: str | None):
        for name, said in transcripts.items():
            path = tmp_path / f"{name}.srt"
            path.unlink(missing_ok=True)
            if said is not None:
                path.write_text(SRT.format(said))
        work, paths = tmp_path / "work", [f"{video}.mp4" for video in videos.split()]
        return update_text(tmp_path, work, tmp_path, paths, is_all=is_all)

    return update


def found(directory: Path, sentence: str, video: str = "") -> list[str]:
    failures: list[str] = []
    cues = list(find_cues(directory, "", sentence, video, failures))
    if failures:
        raise UserError(*failures)
    return [path.removesuffix(".mp4") for _, path, _ in cues]


def test_only_what_changed_is_read(text, tmp_path, monkeypatch):
    read = []

    def noted(path: Path):
        read.append(path.stem)
        return read_transcript(path)

    monkeypatch.setattr("drl_jax.search.text_index.read_transcript", noted)
    assert text("a b c") == (0, {})
    assert not (tmp_path / FILE).exists()
    assert found(tmp_path, "word") == []
    assert text("a b c", a="word one", b="word two") == (2, {})
    status = (tmp_path / FILE).stat()
    assert text("a b c") == (2, {})
    assert (tmp_path / FILE).stat() == status
    assert text("a b c", b="another word", c="word three") == (3, {})
    assert read == ["a", "b", "b", "c"]
    assert found(tmp_path, "word") == ["a", "b", "c"]
    assert (found(tmp_path, "two"), found(tmp_path, "another word", "b.mp4")) == ([], ["b"])
    # Only some videos; then one is gone, and then the transcript of another.
    assert text("c", is_all=False, a="new", c="newer") == (3, {})
    assert (found(tmp_path, "new"), found(tmp_path, "newer")) == ([], ["c"])
    assert text("a c") == (2, {})
    assert text("a c", a=None) == (1, {})
    assert found(tmp_path, "word two three another new newer") == ["c"]
    # One that cannot be read now keeps what is known of it.
    monkeypatch.setattr("drl_jax.search.text_index.read_transcript", os.listdir)
    count, bad = text("a c", c="later")
    assert (count, found(tmp_path, "newer")) == (1, ["c"])
    assert list(bad) == ["c.srt"]
    assert bad["c.srt"].startswith("NotADirectoryError: ")


@pytest.mark.parametrize("size", [0, 10, 5000])
def test_a_damaged_file_is_made_again(size, text, tmp_path):
    """Or one of another version."""
    text("a b", a="word one", b="word two")
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[:size])
    with pytest.raises(UserError, match=r"cannot be searched .* delete .*text.sqlite, and index"):
        found(tmp_path, "word")
    assert count_transcripts(tmp_path) == 0 or size == 5000
    assert text("a b") == (2, {})
    assert found(tmp_path, "word") == ["a", "b"]


def test_text_that_cannot_be_written_is_one_line(text, tmp_path):
    (tmp_path / "a.srt").write_text(SRT.format("word"))
    work = tmp_path / "gone" / "work"
    with pytest.raises(
        UserError, match=r"text.sqlite cannot be written \(OperationalError: unable"
    ):
        update_text(tmp_path, work, tmp_path, ["a.mp4"], is_all=True)
    text("a")
    (tmp_path / "a.srt").write_text(SRT.format("other"))
    with pytest.raises(FileNotFoundError):
        update_text(tmp_path, work, tmp_path, ["a.mp4"], is_all=True)
    assert found(tmp_path, "word") == ["a"]


def test_words_are_no_syntax(text, tmp_path):
    text("a b c", a='He said "NEAR" (loud) café', b="don't", c="x-ray: AND OR NOT * ^ + -")
    for sentence, expected in {
        '"near"': ["a"],
        '" OR * ( ) : ^ - + NEAR(': ["a", "c"],
        "CAFE cafe\u0301": ["a"],
        "don't": ["b"],
        "x-ray": ["c"],
        "text:said": [],
        "sai*": [],
        "\0 \ud800 … '": [],
        " ".join(map(str, range(5000))) + " loud": [],
        "": [],
        " ": [],
        "loud " * 5000: ["a"],
    }.items():
        assert found(tmp_path, sentence) == expected, sentence


def test_common_words_count_only_without_others(text, tmp_path):
    names = [f"v{number:02}" for number in range(30)]
    said = {name: f"the number {name}" for name in names}
    text(" ".join(names), **{**said, "v07": "a red circle"})
    assert found(tmp_path, "the circle") == ["v07"]
    assert len(found(tmp_path, "the number")) == 29
    # Nothing else of it is said.
    assert found(tmp_path, "the number of green apples") == []


def test_ranks_are_fused():
    a, b, c, d = ((0, number) for number in range(4))
    assert fuse([a, b, c], []) == [a, b, c]
    assert fuse([a, b, c], [c]) == [c, a, b]
    assert fuse([a, b], [d]) == [a, d, b]
    assert fuse([a, b, c], [d, b]) == [b, a, d, c]
    many = [(1, number) for number in range(500)]
    assert fuse(many, [many[400], d])[:4] == [many[0], many[400], many[1], d]
    assert sorted(fuse(many, [many[400], d])) == sorted([d, *many])


# ---------------------------------------------------------------------- search

SENTENCE = "a budget for next year"
PAGE = Path(session.__file__).parent / "page"
DESCRIPTION = json.loads((PAGE / "openapi.json").read_text())


@pytest.fixture(scope="module")
def videos(test_videos, tmp_path_factory):
    """Three videos; of one there are two transcripts, of another one, and a bad one."""
    folder = tmp_path_factory.mktemp("text") / "videos"
    (folder / "sub").mkdir(parents=True)
    names = ("one.mp4", "sub/two.mp4", "sub/three.mp4")
    for name, path in zip(names, sorted(test_videos.iterdir()), strict=False):
        shutil.copy(path, folder / name)
    return folder


@pytest.fixture(scope="module")
def index(search_model, videos):
    """The index, and the hits of a query by the picture before there were transcripts."""
    directory = videos.parent / "index"
    update_index(search_model, videos, directory)
    opened = Index(directory, search_model)
    before = [hit.to_json() for hit in opened.search(SENTENCE)]
    with pytest.warns(Notice, match=r"index has no text: put transcripts \(.srt, .vtt or .json\)"):
        assert [hit.to_json() for hit in opened.search(SENTENCE, text=True)] == before
    last = before[-1]["path"].rpartition(".")[0]
    Path(f"{last}.en.srt").write_text(
        SRT.format("We had no budget.") + "\n" + SRT.format("Budget!")
    )
    Path(f"{last}.vtt").write_text("WEBVTT\n\n01:00.000 --> 01:02.000\nthe budget for next year\n")
    Path(f"{before[1]['path']}.json").write_text("[{}]")
    report = update_index(search_model, videos, directory)
    assert (report.unchanged, report.transcripts) == (3, 2)
    bad = str(Path(before[1]["path"]).relative_to(videos)) + ".json"
    assert report.bad_transcripts == {bad: "has no start, end and text in segment 0"}
    return opened, before


def test_the_ranking_by_the_picture_is_unchanged(index):
    opened, before = index
    assert [hit.to_json() for hit in opened.search(SENTENCE)] == before
    (hits,) = opened.search([SENTENCE])
    assert [hit.to_json() for hit in hits] == before
    assert {hit["found_by"] for hit in before} <= {"picture", None}
    # Nothing is said of this.
    hits = opened.search("red", text=True)
    assert [hit.to_json() for hit in hits] == [hit.to_json() for hit in opened.search("red")]


def test_hits_say_what_they_were_found_by(index):
    opened, before = index
    hits = opened.search(SENTENCE, text=True)
    # Last by the picture, and first by the text; without it, all are last by the text.
    assert [str(hit.path) for hit in hits] == [before[n]["path"] for n in (2, 0, 1)]
    assert [hit.rank for hit in hits] == [1, 2, 3]
    said = [(cue.start, cue.text, Path(cue.file).suffix) for cue in hits[0].cues]
    assert said[0] == (60.0, "the budget for next year", ".vtt")
    assert sorted(said[1:]) == [(1.0, "Budget!", ".srt"), (1.0, "We had no budget.", ".srt")]
    assert hits[0].found_by == ("text" if before[2]["weak"] else "both")
    assert not hits[0].is_weak
    assert [hit.cues for hit in hits[1:]] == [(), ()]
    assert [len(opened.search([SENTENCE], 1, text=True, moments=1)[0][0].cues)] == [1]
    assert "1:00.0 “the budget for next year”" in str(hits)
    # Also beside another query, and only in what passes the filters.
    video = opened.state().video_at(hits[1].video.path)
    beside = opened.search(Query(SENTENCE, like=(video, 0.0)), text=True)
    assert [bool(hit.cues) for hit in beside].count(True) == 1
    hits = opened.search(SENTENCE, text=True, filters=Filters(only=(video.path,)))
    assert [(hit.video.path, hit.cues) for hit in hits] == [(video.path, ())]


def test_pages_of_hits_have_one_order(index, monkeypatch):
    opened, _ = index
    monkeypatch.setattr(session, "_FUSED", 2)
    state, query = opened.state(), Query(SENTENCE)
    every = [hit.path for hit in opened.answer(state, query, 3, text=True)]
    pages = [opened.answer(state, query, n + 1, offset=n, text=True) for n in range(3)]
    assert [hit.path for page in pages for hit in page] == every
    assert len(set(every)) == 3


def test_the_api_and_the_page_show_what_is_said(index):
    opened, before = index
    api, schemas = SearchAPI(opened, 12, 0), DESCRIPTION["components"]["schemas"]
    path = str(Path(before[2]["path"]).relative_to(opened.state().folder))
    try:
        query = PageQuery.of([("q", SENTENCE), ("text", "1")])
        assert PageQuery.of([("text", "0")]) == PageQuery()
        with pytest.raises(UserError, match="text must be a number from 0 to 1"):
            PageQuery.of([("text", "yes")])
        found, facts = api.search(query), api.facts()
        opened_video = api.video(PageQuery(SENTENCE, text=1, video=path))
        without = api.search(PageQuery(SENTENCE))
    finally:
        api.media.close()
    for value, name in ((found, "Found"), (opened_video, "Video"), (facts, "Index")):
        check_schema(value, schemas[name], schemas)
    assert (facts["transcripts"], found["notice"]) == (2, None)
    first = found["hits"][0]
    # The time of the transcript is behind the end of the video.
    end = f"{first['duration']:.9g}"
    assert first["page"] == first["cues"][0]["page"]
    assert f"text=1&video={path}&t={end}" in first["page"]
    assert opened_video["cues"] == first["cues"]
    assert first["picture"].split("?t=")[1].startswith(f"{opened_video['frames'][-1]:.3f}")
    assert "text=1" not in first["moments"][0]["like"]
    by_path = {hit["path"]: hit for hit in without["hits"]}
    for hit in found["hits"][1:]:
        assert {**by_path[hit["path"]], "rank": 0, "page": ""}.keys() == hit.keys()
        assert hit["score"] == by_path[hit["path"]]["score"]
    context = {"query": query, "found": found, "index": facts, "open": opened_video}
    page = TEMPLATES.env.get_template("page.html").render(**context, max_video=1)
    assert 'name="text" value="1" autocomplete="off" checked' in page
    assert page.count("“the budget for next year”") == 2
    assert "Said or written in this video" in page
    page = TEMPLATES.env.get_template("page.html").render(
        query=PageQuery(), index={**facts, "transcripts": 0}, max_video=1
    )
    assert 'name="text"' not in page


def test_the_commands_read_and_find_text(index, videos, search_run, tmp_path, capsys):
    opened, before = index
    flag = f"--index={tmp_path / 'index'}"
    shutil.copytree(opened.directory, tmp_path / "index")
    (tmp_path / "index" / FILE).unlink()
    assert main(["query", flag, SENTENCE, "--text"]) == 0
    captured = capsys.readouterr()
    assert "“" not in captured.out
    assert captured.err.count("has no text: put transcripts") == 1
    assert main(["index", flag, f"--workdir={search_run}", f"--videos={videos}"]) == 0
    printed = capsys.readouterr().out
    assert "transcripts that --text searches: 2\n" in printed
    assert "transcripts that cannot be read (1):\n" in printed
    assert main(["query", flag, SENTENCE, "--text", "--json"]) == 0
    hit = json.loads(capsys.readouterr().out)["hits"][0]
    assert (hit["path"], hit["cues"][0]["start"]) == (before[2]["path"], 60.0)
    assert main(["query", flag, SENTENCE, "--text"]) == 0
    assert "1:00.0 “the budget for next year” (" in capsys.readouterr().out
    line = error_of("drl_jax.search", "query", flag, "--like=one.mp4@0", "--text", capsys=capsys)
    assert line.endswith("--text looks for the words of a sentence; give one")


def test_the_text_follows_the_videos(index, search_model, videos, tmp_path):
    """Of single files, of files that are gone, and of each part of a joined index."""
    _, before = index
    folder, other = tmp_path / "videos", tmp_path / "other"
    shutil.copytree(videos, folder)
    other.mkdir()
    spoken, silent = (Path(before[n]["path"]).relative_to(videos) for n in (2, 0))
    shutil.copy(videos / silent, other / "other.mp4")
    (other / "other.srt").write_text(SRT.format("The budget of others"))
    for name, path in (("index", folder), ("shard", other)):
        update_index(search_model, path, tmp_path / name)
    join(tmp_path / "joined", [tmp_path / "index", tmp_path / "shard"])
    joined = Index(tmp_path / "joined", search_model)
    hits = [hit for hit in joined.search(SENTENCE, text=True) if hit.cues]
    assert {hit.path for hit in hits} == {folder / spoken, other / "other.mp4"}
    files = {cue.file for hit in hits for cue in hit.cues}
    assert files >= {"other/other.srt", str(Path("videos", spoken).with_suffix(".vtt"))}
    (tmp_path / "shard" / FILE).write_bytes(b"no database, but as long as a header of one is" * 9)
    with pytest.warns(Notice, match=r"the text of the index .*shard cannot be searched .*; delete"):
        hits = joined.search(SENTENCE, text=True)
    assert [hit.path for hit in hits if hit.cues] == [folder / spoken]

    part = Index(tmp_path / "index", search_model)
    (folder / silent).with_suffix(".srt").write_text(SRT.format("A new budget"))
    (folder / spoken).unlink()
    update_index(search_model, folder, tmp_path / "index", only=[str(silent)])
    assert [hit.path for hit in part.search("new", text=True) if hit.cues] == [folder / silent]
    report = update_index(search_model, folder, tmp_path / "index")
    assert (report.removed, report.transcripts) == (1, 1)
    assert [hit.path for hit in part.search("budget", text=True) if hit.cues] == [folder / silent]
    assert not [*(tmp_path / "index").glob("*.part"), *(tmp_path / "index" / "spool").glob("*")]
