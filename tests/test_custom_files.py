"""The csv and jsonl files of `custom`: what is read, and what is refused with its row."""

import json

import pytest
from support.commands import error_of
from support.datasets import captions_of, custom, read_custom

from data_prep.annotations import AnnotationError
from data_prep.build import main as build


def read(tmp_path, content, name="mine.csv"):
    return read_custom(tmp_path / name, content)


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
    "byte_order_mark.csv": "\ufeffvideo,captions,split,start,end\n"
    '"a.mp4","[""one, two""]","train",5,62.5\n"b.mp4","[""three""]","test",,\n',
    "lines.JSONL": '{"Video": "a.mp4", "Caption": "one, two", "start": "0:05", "end": 62.5, '
    '"split": "train"}\r\n\r\n{"video": "b.mp4", "caption": "three", "split": "test"}',
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_one_file_are_the_same_dataset(name, tmp_path):
    annotations = read(tmp_path, VARIANTS[name], name)
    expected = {"train": {"a.mp4@5-62.5": ["one, two"]}, "test": {"b.mp4": ["three"]}}
    assert captions_of(annotations) == expected
    assert annotations.sources["a.mp4@5-62.5"][0].span == (5, 62.5)


def test_line_ends_inside_a_text(tmp_path):
    text = 'video,caption,split\na,"one\ntwo",train\na,2,train\nb,"say ""hi""",test\n'
    expected = {"train": {"a": ["one\ntwo", "2"]}, "test": {"b": ['say "hi"']}}
    assert captions_of(read(tmp_path, text)) == expected
    for text in ('video,caption\na,"one\ntwo"\n', 'caption,video\n"one\n\ntwo",a\n'):
        assert read(tmp_path, text).splits["train"][0].captions[0].split() == ["one", "two"]
    row = json.dumps({"video": "a", "caption": "one\u2028two\x85three"}, ensure_ascii=False)
    annotations = read(tmp_path, f"{row}\n{row}\n", "mine.jsonl")
    assert captions_of(annotations) == {"train": {"a": ["one\u2028two\x85three"] * 2}}


def test_a_tenth_of_the_files_is_drawn_for_val_and_for_test(tmp_path):
    header = "video,caption,start,end\n"
    rows = [f"v{n}.mp4,caption {part},{part},{part + 1}\n" for n in range(30) for part in range(3)]
    annotations = read(tmp_path, header + "".join(rows))
    files = {
        name: {annotations.sources[entry.video_id][0].file for entry in split}
        for name, split in annotations.splits.items()
    }
    assert {name: len(names) for name, names in files.items()} == {"train": 24, "val": 3, "test": 3}
    # No file is in two splits, and the order of the rows does not matter.
    assert len(set.union(*files.values())) == 30
    again = captions_of(read(tmp_path, header + "".join(rows[::-1])))
    assert {name: set(split) for name, split in again.items()} == {
        name: {entry.video_id for entry in split} for name, split in annotations.splits.items()
    }


def test_spans_that_differ_after_the_sixth_digit_have_their_own_ids(tmp_path):
    spans = ("one,1234.561,1300", "two,1234.562,1300", "three,0.5,2", "four,1234.561,1300")
    rows = "\n".join(["video,caption,start,end", *(f"a,{span}" for span in spans)])
    annotations = read(tmp_path, rows)
    assert captions_of(annotations) == {
        "train": {
            "a@1234.561-1300.0": ["one", "four"],
            "a@1234.562-1300.0": ["two"],
            "a@0.5-2": ["three"],
        }
    }
    assert annotations.sources["a@1234.562-1300.0"][0].span == (1234.562, 1300)


# ---------------------------------------------------------------- what is refused


def rows(first, last):
    return "".join(f"v{n}.mp4,caption {n},train\n" for n in range(first, last + 1))


HEADER = "video,caption,split\n"
OPENS = "a quotation mark that opens in this row"
CSV = [
    # The quotation mark swallows the rest of the file, or the rows up to another quoted text.
    (HEADER + rows(2, 499) + 'v500.mp4,"caption 500,train\n' + rows(501, 999),
     f"mine.csv, row 500: {OPENS} is not closed"),
    (HEADER + rows(2, 499) + 'v500.mp4,"caption 500,train\n' + rows(501, 699)
     + 'v700.mp4,"caption, 700",train\n' + rows(701, 999),
     f"mine.csv, row 500: {OPENS} is not closed (read up to line 700"),
    # It closes by accident, at a quotation mark for inches.
    (HEADER + rows(2, 9) + 'v10.mp4,"caption 10,train\n' + rows(11, 19)
     + 'v20.mp4,a screen of 5",train\n' + rows(21, 30),
     f"row 10: {OPENS} closes only in line 20, after text that looks like other rows"),
    # The same in the next row. Its commas can be those of the text, or of either row.
    (HEADER + 'v2.mp4,"a clip 2,train\r\nv3.mp4,a clip, 3",train\r\n',
     f"row 2: {OPENS} closes only in line 3"),
    (HEADER + 'v2.mp4,"a clip, 2,train\nv3.mp4,a clip 3",train\n',
     f"row 2: {OPENS} closes only in line 3"),
    ('caption;video\n"a clip 2;v2.mp4\na clip 3";v3.mp4\n',
     f"row 2: {OPENS} closes only in line 3"),
    ('video,caption\nv2.mp4,"a clip 2\nv3.mp4,a clip 3"\n',
     f"row 2: {OPENS} closes only in line 3"),
    # More than the reader's limit of 131,072 characters.
    (HEADER + 'v2.mp4,"caption 2,train\n' + rows(3, 9999), f"row 2: {OPENS}"),
    (HEADER + 'a.mp4,"big" dog,train\n', "row 2 is not valid CSV"),
    # The physical line counts, also after a text with line ends, and after Excel's line.
    (HEADER + 'a.mp4,"x\ny",train\n' + "b.mp4,waves, then sand,train\n",
     "row 4 has 4 fields, but the header names 3 (video, caption, split); a text that"
     " contains ',' must be between quotation marks"),
    ("sep=,\n" + HEADER + "a.mp4,x\n", "row 3 has 2 fields, but the header names 3"),
    ("sep=,\n" + HEADER + 'v3.mp4,"a clip 3,train\nv4.mp4,a clip 4",train\n',
     f"row 3: {OPENS} closes only in line 4"),
    ("sep=;\n", "mine.csv has no video and no caption; it has nothing"),
    ("file,caption\na,b\n", "mine.csv has no video; it has file, caption"),
    ("video,caption,Caption\na,b,c\n", "mine.csv has two columns 'caption'"),
    ("video,caption\n", "has no rows"),
    ("video,caption,split\na,b,train\nc,d,\n", "some rows have a split and others"),
    (HEADER + "a.mp4,waves, then sand\n", "row 2: 'then sand' is not a split (train, val or"
     " test); a caption with a comma needs quotation marks"),
    (HEADER + "a.mp4,x,Train\n", "row 2: 'Train' is not a split (train, val or test); did you"
     " mean train?"),
    (HEADER + "a.mp4,x,dev\n", "did you mean val?"),
    (HEADER + "a.mp4,x,tset\n", "did you mean test?"),
    ("video,caption,start,end\na,b,0:05,1:75\n",
     "row 2: start and end must be seconds or h:mm:ss, with a decimal point, not '0:05' and"
     " '1:75'"),
    ("video;caption;start;end\na;b;0;1,5\n", "not '0' and '1,5'"),
    ("video,caption,start,end\na,b,5,3\n", "row 2: end must be after start"),
    ("video,caption,start,end\na,b,5,\n", "start is set but end is not"),
    ("video,caption\n\nhttp://a.mp4,b\n", "row 3: video is a URL (http://a.mp4); download"),
    ("video,captions\na,b\n", "row 2: captions must be a JSON list"),
    ('video,captions\na,"[{""b"": 1, ""b"": 2}]"\n', "row 2: captions must be a JSON list"),
    (HEADER.encode("utf-16"), "mine.csv is in UTF-16 or is no text; save it as text in UTF-8"),
    (HEADER.encode("utf-16-le"), "mine.csv is in UTF-16 or is no text"),
    (f"{HEADER}c,Café,train\n".encode("latin-1"),
     "mine.csv, row 2: caption is not text in UTF-8 (byte 0xe9); save the file as UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), CSV)
def test_a_csv_that_would_be_misread_is_refused_with_its_row(content, message, tmp_path):
    with pytest.raises(AnnotationError) as error:
        read(tmp_path, content)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_json_file_that_is_not_jsonl(tmp_path):
    with pytest.raises(AnnotationError, match=r"must be a .csv or .jsonl file \(one JSON object"):
        read(tmp_path, "[]", "mine.json")


WRONG = {
    '{"video": "b", "caption": null}': "caption is empty",
    '{"video": "b", "caption": 7}': "caption must be a text, not 7",
    '{"video": "b", "captions": ["c", null]}': "caption must be a text, not None",
    '{"video": "b", "captions": "c"}': "captions must be a list",
    '{"video": null, "caption": "b"}': "video is empty",
    '{"video": 7010, "caption": "a"}': "video must be a text, not 7010",
    '{"video": "b"}': "has no caption; it has video",
    '{"video": "b", "caption": "c", "end": -1}': "end must be after start, and start 0 or more;"
    " got 0.0 to -1",
    '{"video": "b", "caption": "c", "start": true, "end": 2}': "start and end must be seconds or"
    " h:mm:ss, with a decimal point, not True and 2",
    f'{{"video": "b", "caption": "c", "end": {"9" * 400}}}': "start and end must be seconds or"
    f" h:mm:ss, with a decimal point, not 0.0 and {'9' * 57}...",
    '{"video": "b", "caption": "caf\udce9"}': "caption is not text in UTF-8 (byte 0xe9); save"
    " the file as UTF-8",
    r'{"video": "b", "caption": "c \ud83d"}': r"caption has half of a character in 'c \ud83d'",
    r'{"video": "b\ud83d", "caption": "c"}': r"video has half of a character in 'b\ud83d'",
    r'{"video": "b\nc", "caption": "d"}': "video has a line end or a tab in its name",
    "[7]": 'is not an object: {"caption": ..}',
    '{"video": "b", "caption": "c": 2}': "is not JSON (Expecting ',' delimiter: line 1 column"
    " 30 (char 29))",
    '{"video": "b", "caption": "c", "caption": "d"}': "is not JSON (an object has the key"
    " 'caption' at line 1 column 16 and again: line 1 column 32 (char 31))",
    '{"video": "a", "Caption": "b", "caption ": "c"}': "has two fields 'caption'",
}


def test_wrong_rows_are_left_out_with_their_reasons(tmp_path):
    good = [json.dumps({"video": "a", "caption": f"{number}"}) for number in range(len(WRONG))]
    lines = "\n".join([*good, *WRONG]).encode(errors="surrogateescape")
    annotations = read(tmp_path, lines, "mine.jsonl")
    assert captions_of(annotations) == {
        "train": {"a": [f"{number}" for number in range(len(good))]}
    }
    places = (f"mine.jsonl, line {len(good) + number}" for number in range(1, len(WRONG) + 1))
    assert annotations.left_out == dict(zip(places, WRONG.values(), strict=True))
    # In csv, too, where a row of a video may be wrong and another one not.
    annotations = read(tmp_path, b"video,caption\na,one\nb,\na,caf\xe9\n,x\na,two\na,three\n")
    assert captions_of(annotations) == {"train": {"a": ["one", "two", "three"]}}
    assert annotations.left_out == {
        "mine.csv, row 3": "caption is empty",
        "mine.csv, row 4": "caption is not text in UTF-8 (byte 0xe9); save the file as UTF-8",
        "mine.csv, row 5": "video is empty",
    }


def test_a_build_ends_if_more_than_half_of_the_rows_are_wrong(tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("video,caption\n" + "a,x\n" * 3 + "a,\n" * 4)
    arguments = custom(tmp_path, "mine.csv", tmp_path / "data")
    line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert "4 of the 7 rows of" in line
    assert "a build may lose at most 50%: correct or remove them; the first: mine.csv" in line
    assert not (tmp_path / "data" / "custom" / "cache").exists()
    with pytest.raises(SystemExit):
        build(["--help"])
    assert "they are more than 50 % of a file's rows" in " ".join(capsys.readouterr().out.split())
    # Half is not more than half.
    read(tmp_path, "video,caption\n" + "a,x\n" * 4 + "a,\n" * 4)
