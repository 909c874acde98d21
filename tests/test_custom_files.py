"""The csv and jsonl files of `custom`: what is read, and what is refused with its row."""

import json
import unicodedata

import pytest
from support.commands import error_of
from support.videos import numbered_frames, write_video

from data_prep.annotations import AnnotationError
from data_prep.build import main as build
from data_prep.datasets import builder_class
from data_prep.video_folder import make_plan


def read(tmp_path, content, name="mine.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return builder_class("custom").read_annotations(path)


def captions_of(annotations):
    return {
        name: {entry.video_id: entry.captions for entry in split}
        for name, split in annotations.splits.items()
    }


EXPECTED = {"train": {"a.mp4@5-62.5": ["one, two"]}, "test": {"b.mp4": ["three"]}}


VARIANTS = {
    "commas.csv": 'video,caption,start,end,split\na.mp4, "one, two", 5,62.5, train\n'
    "b.mp4,three,,,test",
    "semicolons.csv": "Video;Caption; Start ;End;SPLIT\na.mp4;one, two;0:05;1:02.5;train\n\n"
    "b.mp4;three;;;test\n;;;;\n",
    "tabs.tsv": "split\tvideo\tstart\tend\tcaption\r\n"
    "train\ta.mp4\t0:00:05\t00:01:02.5\tone, two\r\ntest\tb.mp4\t\t\tthree\r\n",
    "excel.csv": "\ufeffsep=;\r\nvideo;caption;start;end;split\r\na.mp4;one, two;5;62.5;train\r\n"
    "b.mp4;three;;;test\r\n",
    "excel_tabs.csv": "SEP=\t\nsplit\tvideo\tstart\tend\tcaption\n"
    "train\ta.mp4\t5\t62.5\tone, two\ntest\tb.mp4\t\t\tthree\n",
    "excel_bars.csv": "sep=|\nvideo|caption|start|end|split\na.mp4|one, two|5|62.5|train\n"
    "b.mp4|three|||test\n",
    "byte_order_mark.csv": "\ufeffvideo,caption,split,start,end\n"
    '"a.mp4","one, two","train",5,62.5\n"b.mp4","three","test",,\n',
    "lines.JSONL": '{"Video": "a.mp4", "Caption": "one, two", "start": "0:05", "end": 62.5, '
    '"split": "train"}\r\n\r\n{"video": "b.mp4", "caption": "three", "split": "test"}',
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_one_file_are_the_same_dataset(name, tmp_path):
    assert captions_of(read(tmp_path, VARIANTS[name], name)) == EXPECTED


def test_line_ends_inside_a_text(tmp_path):
    annotations = read(tmp_path, 'video,caption,split\na,"one\ntwo",train\nb,"say ""hi""",test\n')
    assert captions_of(annotations) == {"train": {"a": ["one\ntwo"]}, "test": {"b": ['say "hi"']}}
    for text in ('video,caption\na,"one\ntwo"\n', 'caption,video\n"one\n\ntwo",a\n'):
        assert read(tmp_path, text).splits["train"][0].captions[0].split() == ["one", "two"]
    row = json.dumps({"video": "a", "caption": "one\u2028two\x85three"}, ensure_ascii=False)
    annotations = read(tmp_path, f"{row}\n{row}\n", "mine.jsonl")
    assert captions_of(annotations) == {"train": {"a": ["one\u2028two\x85three"] * 2}}


def rows(first, last):
    return "".join(f"v{n}.mp4,caption {n},train\n" for n in range(first, last + 1))


HEADER = "video,caption,split\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # The quotation mark swallows the rest of the file, or the rows up to another quoted text.
        (HEADER + rows(2, 499) + 'v500.mp4,"caption 500,train\n' + rows(501, 999),
         "mine.csv, row 500: a quotation mark that opens in this row is not closed"),
        (HEADER + rows(2, 499) + 'v500.mp4,"caption 500,train\n' + rows(501, 699)
         + 'v700.mp4,"caption, 700",train\n' + rows(701, 999),
         "mine.csv, row 500: a quotation mark that opens in this row is not closed (read up to line"
         " 700"),
        # It closes by accident, at a quotation mark for inches.
        (HEADER + rows(2, 9) + 'v10.mp4,"caption 10,train\n' + rows(11, 19)
         + 'v20.mp4,a screen of 5",train\n' + rows(21, 30),
         "row 10: a quotation mark that opens in this row closes only in line 20, after text that"
         " looks like other rows"),
        # The same in the next row. Its commas can be those of the text, or of either row.
        (HEADER + 'v2.mp4,"a clip 2,train\nv3.mp4,a clip 3",train\n',
         "row 2: a quotation mark that opens in this row closes only in line 3, after text that"
         " looks like other rows"),
        (HEADER + 'v2.mp4,"a clip 2,train\r\nv3.mp4,a clip, 3",train\r\n',
         "row 2: a quotation mark that opens in this row closes only in line 3"),
        (HEADER + 'v2.mp4,"a clip, 2,train\nv3.mp4,a clip 3",train\n',
         "row 2: a quotation mark that opens in this row closes only in line 3"),
        ('caption;video\n"a clip 2;v2.mp4\na clip 3";v3.mp4\n',
         "row 2: a quotation mark that opens in this row closes only in line 3"),
        ('video,caption\nv2.mp4,"a clip 2\nv3.mp4,a clip 3"\n',
         "row 2: a quotation mark that opens in this row closes only in line 3"),
        # More than the reader's limit of 131,072 characters.
        (HEADER + 'v2.mp4,"caption 2,train\n' + rows(3, 9999),
         "row 2: a quotation mark that opens"),
        (HEADER + 'a.mp4,"big" dog,train\n', "row 2 is not valid CSV"),
        # The physical line counts, also after a text with line ends.
        (HEADER + 'a.mp4,"x\ny",train\n' + "b.mp4,waves, then sand,train\n",
         "row 4 has 4 fields, but the header names 3 (video, caption, split); a text that"
         " contains ',' must be between quotation marks"),
        ("sep=,\n" + HEADER + "a.mp4,x\n", "row 3 has 2 fields, but the header names 3"),
        ("sep=,\n" + HEADER + 'v3.mp4,"a clip 3,train\nv4.mp4,a clip 4",train\n',
         "row 3: a quotation mark that opens in this row closes only in line 4"),
        ("sep=,\n" + HEADER + 'a.mp4,"x,train\n',
         "row 3: a quotation mark that opens in this row is not closed (read up to line 3"),
        ("sep=;\n", "mine.csv has no video and no caption; it has nothing"),
        (HEADER + "a.mp4,x\n", "row 2 has 2 fields, but the header names 3"),
        (HEADER + "a.mp4,waves, then sand\n", "row 2: 'then sand' is not a split (train, val or"
         " test); a caption with a comma needs quotation marks"),
        (HEADER + "a.mp4,x,Train\n", "row 2: 'Train' is not a split (train, val or test); did you"
         " mean train?"),
        (HEADER + "a.mp4,x,validation\n", "did you mean val?"),
        (HEADER + "a.mp4,x,dev\n", "did you mean val?"),
        (HEADER + "a.mp4,x,tset\n", "did you mean test?"),
        ("video,caption,Caption\na,b,c\n", "mine.csv has two columns 'caption'"),
        ("video,caption,start,end\na,b,0:05,1:75\n",
         "row 2: start and end must be seconds or h:mm:ss, with a decimal point, not '0:05' and"
         " '1:75'"),
        ("video;caption;start;end\na;b;0;1,5\n", "not '0' and '1,5'"),
        ("video,caption\n\na.mp4,\n", "row 3: caption is empty"),
        (HEADER.encode("utf-16"), "mine.csv is in UTF-16 or is no text; save it as text in UTF-8"),
        (HEADER.encode("utf-16-le"), "mine.csv is in UTF-16 or is no text"),
        (f"{HEADER}a,b,train\nc,Café,train\nd,été,train\n".encode("latin-1"),
         "2 of the 3 rows of"),
        (f"{HEADER}c,Café,train\n".encode("latin-1"),
         "mine.csv, row 2: caption is not text in UTF-8 (byte 0xe9); save the file as UTF-8"),
    ],
)  # fmt: skip
def test_a_csv_that_would_be_misread_is_refused_with_its_row(content, message, tmp_path, capsys):
    with pytest.raises(AnnotationError) as error:
        read(tmp_path, content)
    assert message in str(error.value)
    flags = (f"--videos={tmp_path}", f"--annotations={tmp_path / 'mine.csv'}")
    line = error_of(
        "data_prep.build", "custom", *flags, f"--data_dir={tmp_path / 'data'}", capsys=capsys
    )
    assert message in line


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": 7010, "caption": "a"}, "line 1: video must be a text, not 7010"),
        ({"video": "a", "caption": 7}, "line 1: caption must be a text, not 7"),
        ({"video": "a", "captions": ["b", None]}, "line 1: caption must be a text, not None"),
        ({"video": "a", "caption": "b", "split": "Test"}, "line 1: 'Test' is not a split"),
        ({"video": "a", "caption": "b", "start": True, "end": 2}, "line 1: start and end must be"),
        (
            {"video": "a", "caption": "b", "start": 0, "end": 10**400 - 1},
            r"line 1: start and end must be seconds or h:mm:ss, .* not 0 and 9+\.\.\.$",
        ),
    ],
)
def test_a_wrong_value_in_jsonl(row, message, tmp_path):
    with pytest.raises(AnnotationError, match=message):
        read(tmp_path, json.dumps(row), "mine.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            r'{"video": "a", "caption": "b \ud83d"}',
            r"line 1: caption has half of a character in 'b \\ud83d'",
        ),
        (
            r'{"video": "a\ud83d", "caption": "b"}',
            r"line 1: video has half of a character in 'a\\ud83d'",
        ),
        (
            r'{"video": "a\tb", "caption": "c"}',
            r"line 1: video has a line end or a tab in its name",
        ),
    ],
)
def test_a_text_that_cannot_be_stored(row, message, tmp_path):
    with pytest.raises(AnnotationError, match=message):
        read(tmp_path, row, "mine.jsonl")


def test_a_json_file_that_is_not_jsonl(tmp_path):
    with pytest.raises(AnnotationError, match=r"must be a .csv or .jsonl file \(one JSON object"):
        read(tmp_path, "[]", "mine.json")


def test_spans_that_differ_after_the_sixth_digit_have_their_own_ids(tmp_path):
    annotations = read(
        tmp_path,
        "video,caption,start,end\na,one,1234.561,1300\na,two,1234.562,1300\na,three,0.5,2\n"
        "a,four,1234.561,1300\n",
    )
    assert sorted(entry.video_id for split in annotations.splits.values() for entry in split) == [
        "a@0.5-2",  # As before: ids in built datasets and in lists of quarantine stay.
        "a@1234.561-1300.0",
        "a@1234.562-1300.0",
    ]
    assert annotations.sources["a@1234.562-1300.0"][0].span == (1234.562, 1300)
    assert captions_of(annotations)["train"]["a@1234.561-1300.0"] == ["one", "four"]


@pytest.mark.parametrize(("annotated", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_compared_in_their_composed_form(annotated, stored, tmp_path):
    name = unicodedata.normalize(stored, "Café/été.mp4")
    (tmp_path / "videos" / name).parent.mkdir(parents=True)
    write_video(tmp_path / "videos" / name, numbered_frames(10), fps=10)
    for annotation in ("Café/été.mp4", "été.mp4", "été", "été.mov", "Café/été"):
        text = unicodedata.normalize(annotated, annotation)
        plan = make_plan(read(tmp_path, f"video,caption\n{text},a\n"), tmp_path / "videos", {})
        assert [clip.location for clip in plan.clips] == [tmp_path / "videos" / name]


# ---------------------------------------------------------------- repeats, and rows left out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '{"video": "a", "caption": "b", "caption": "c"}',
            r"an object has the key 'caption' at line 1 column 16 and again: line 1 column 32",
        ),
        ('{"video": "a", "Caption": "b", "caption ": "c"}', "line 1: has two fields 'caption'"),
        ('{"video": "a", "caption": "b", "x": [{"k": 1, "k": 1}]}', "the key 'k' at line 1 column"),
    ],
)
def test_a_repeated_field_is_refused_with_both_places(row, message, tmp_path):
    with pytest.raises(AnnotationError, match=message):
        read(tmp_path, row, "mine.jsonl")
    with pytest.raises(AnnotationError, match=r"row 2: captions must be a JSON list"):
        read(tmp_path, 'video,captions\na,"[{""b"": 1, ""b"": 2}]"\n')


def test_wrong_rows_are_left_out_and_counted(tmp_path):
    good = [json.dumps({"video": "a", "caption": f"good {number}"}) for number in range(10)]
    wrong = {
        '{"video": "b", "caption": null}': "caption is empty",
        '{"video": "b", "caption": 7}': "caption must be a text, not 7",
        '{"video": null, "caption": "b"}': "video is empty",
        '{"video": "b"}': "has no caption; it has video",
        '{"video": "b", "caption": "c", "end": -1}': "end must be after start, and start 0 or more;"
        " got 0.0 to -1",
        '{"video": "b", "caption": "caf\udce9"}': "caption is not text in UTF-8 (byte 0xe9); save"
        " the file as UTF-8",
        '{"video": "b\\nc", "caption": "d"}': "video has a line end or a tab in its name",
        "[7]": 'is not an object: {"caption": ..}',
        '{"video": "b", "caption": "c": 2}': "is not JSON (Expecting ',' delimiter: line 1 column"
        " 30 (char 29))",
    }
    lines = "\n".join([*good, *wrong]).encode(errors="surrogateescape")
    annotations = read(tmp_path, lines, "mine.jsonl")
    assert captions_of(annotations) == {"train": {"a": [f"good {number}" for number in range(10)]}}
    places = (f"mine.jsonl, line {number}" for number in range(11, 20))
    assert annotations.left_out == dict(zip(places, wrong.values(), strict=True))
    # The same in csv, where a row of a video may be wrong and another one not.
    rows = b"video,caption\na,one\nb,\na,caf\xe9\n,x\na,two\na,three\n"
    annotations = read(tmp_path, rows)
    assert captions_of(annotations) == {"train": {"a": ["one", "two", "three"]}}
    assert annotations.left_out == {
        "mine.csv, row 3": "caption is empty",
        "mine.csv, row 4": "caption is not text in UTF-8 (byte 0xe9); save the file as UTF-8",
        "mine.csv, row 5": "video is empty",
    }


@pytest.mark.parametrize(("good", "ends"), [(3, True), (4, False)])
def test_a_build_ends_if_more_than_half_of_the_rows_are_wrong(good, ends, tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", numbered_frames(25)[5:], fps=10)
    (tmp_path / "mine.csv").write_text("video,caption\n" + "a,x\n" * good + "a,\n" * 4)
    flags = [f"--videos={tmp_path / 'videos'}", f"--annotations={tmp_path / 'mine.csv'}"]
    flags = ["custom", *flags, f"--data_dir={tmp_path / 'data'}", "--image_size=32"]
    if ends:
        line = error_of("data_prep.build", *flags, capsys=capsys)
        assert "4 of the 7 rows of" in line
        assert "a build may lose at most 50%: correct or remove them; the first: mine.csv" in line
        return
    assert build(flags) == 0
    out = capsys.readouterr().out
    assert "4 rows are left out (the first: mine.csv, row 6: caption is empty)" in out
    assert "left out 4 videos and rows (full list: " in out
    manifest = tmp_path / "data" / "custom" / "32px_12f_jpeg" / "1.0.0" / "manifest.json"
    assert len(json.loads(manifest.read_text())["left_out"]) == 4
    with pytest.raises(SystemExit):
        build(["--help"])
    assert "they are more than 50 % of a file's rows" in " ".join(capsys.readouterr().out.split())
