"""Rows of a batch: every format, and every kind of bad row with its line number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ziggurat.pipelines.batch.rows import BadRow, Line, read_rows

BOM = b"\xef\xbb\xbf"


def told(path: Path, data: str | bytes) -> list[Line | BadRow]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_rows(path)


@pytest.mark.parametrize("bom", [b"", BOM], ids=["", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_every_format_says_the_same(tmp_path, bom, end):
    lines = ['{"prompt": "a “red” circle", "seed": 3, "guidance": 2, "set": {"a": [1]}}', "", '{"prompt": "b, c"}']
    table = ["prompt,seed,guidance,set", 'a “red” circle,3,2,"{""a"": [1]}"', "", '"b, c",,,']
    from_lines = told(tmp_path / "rows.jsonl", bom + end.join(lines).encode())
    from_table = told(tmp_path / "rows.csv", bom + end.join(table).encode())
    semicolons = ["prompt;seed;guidance;set", 'a “red” circle;3;2;"{""a"": [1]}"', "", "b, c;;;"]
    from_semicolons = told(tmp_path / "other.csv", bom + end.join(semicolons).encode())
    assert [line.number for line in from_lines] == [1, 3]
    assert [line.number for line in from_table] == [line.number for line in from_semicolons] == [2, 4]
    rows = [line.row for line in from_lines if isinstance(line, Line)]
    assert rows == [line.row for line in from_table if isinstance(line, Line)]
    assert rows == [line.row for line in from_semicolons if isinstance(line, Line)]
    assert (rows[0].prompt, rows[0].seed, rows[0].guidance, rows[0].arguments) == ("a “red” circle", 3, 2.0, {"a": [1]})
    text = told(tmp_path / "rows.txt", bom + end.join(["a “red” circle", "  ", "b, c"]).encode())
    assert [(line.number, line.row.prompt) for line in text if isinstance(line, Line)] == [
        (1, "a “red” circle"),
        (3, "b, c"),
    ]


def test_a_table_keeps_lines_within_quotes_and_counts_them(tmp_path):
    first, second = told(tmp_path / "rows.csv", 'prompt,seed\n"two\nlines",1\nlast,2\n')
    assert isinstance(first, Line)
    assert isinstance(second, Line)
    assert (first.number, first.row.prompt) == (2, "two\nlines")
    assert (second.number, second.row.prompt) == (4, "last")


def test_paths_are_relative_to_the_file(tmp_path):
    row = {"prompt": "a", "image": "here.png", "plan": "plans/one.json"}
    first, second = told(tmp_path / "rows.jsonl", json.dumps(row) + "\n" + json.dumps({"prompt": "a", "plan": "none"}))
    assert isinstance(first, Line)
    assert isinstance(second, Line)
    assert (first.row.image, first.row.plan) == (str(tmp_path / "here.png"), str(tmp_path / "plans/one.json"))
    assert second.row.plan == "none"


def test_rows_may_come_from_python():
    first, second, third = read_rows(["a", {"prompt": "b", "image": Path("x.png")}, 7])
    assert isinstance(first, Line)
    assert isinstance(second, Line)
    assert (first.row.prompt, second.row.image) == ("a", "x.png")
    assert isinstance(third, BadRow)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('["a"]', "a row is an object of settings, got list"),
        ('{"seed": 1}', "prompt: Field required"),
        ('{"prompt": null}', "prompt: Input should be a valid string"),
        ('{"prompt": "a", "fames": 9}', "fames: Extra inputs are not permitted"),
        ('{"prompt": "a", "frames": "9"}', "frames: Input should be a valid integer"),
        ('{"prompt": "a", "frames": 9.5}', "frames: Input should be a valid integer"),
        ('{"prompt": "a", "seed": true}', "seed: Input should be a valid integer"),
        ('{"prompt": "a", "guidance": NaN}', "NaN is no JSON number"),
        ('{"prompt": "a", "guidance": 1e999}', "guidance: Input should be a finite number"),
        ('{"prompt": "a", "arguments": []}', "arguments: Input should be a valid dictionary"),
        ('{"prompt": "a", "set": {}, "arguments": {}}', "Extra inputs are not permitted"),
        ('{"prompt": "\\ud800"}', "prompt is not valid UTF-8"),
        ('{"prompt": "a\\u0000b"}', "prompt holds a NUL"),
        (b'{"prompt": "\xff"}', "prompt is not valid UTF-8"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_lines_of_json_stand_alone(tmp_path, line, words):
    data = line if isinstance(line, bytes) else line.encode()
    before, bad, after = told(tmp_path / "rows.jsonl", b'{"prompt": "a"}\n' + data + b'\n{"prompt": "b"}\n')
    assert isinstance(before, Line)
    assert isinstance(after, Line)
    assert isinstance(bad, BadRow)
    assert str(bad).startswith("line 2: ")
    assert words in bad.error


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"a", "has 1 cells, but the header 3"),
        (b"a,1,9,9", "has 4 cells, but the header 3"),
        (b"a,one,9", "seed: Input should be a valid integer"),
        (b"a,1,9.5", "frames: Input should be a valid integer"),
        (b",1,9", "prompt: Field required"),
        (b"\xff\xfe,1,9", "prompt is not valid UTF-8"),
        (b'"a" b,1,9', "not valid CSV"),
        (b"a" * 200_000 + b",1,9", "not valid CSV"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_lines_of_a_table_stand_alone(tmp_path, line, words):
    data = b"prompt,seed,frames\na,1,9\n" + line + b"\nb,2,9\n"
    before, bad, after = told(tmp_path / "rows.csv", data)
    assert isinstance(before, Line)
    assert isinstance(bad, BadRow)
    assert bad.number == 3
    assert words in bad.error
    assert isinstance(after, Line)
    assert after.number == 4


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("rows.csv", b"prompt,fames\na,1\n", "the unknown column 'fames'"),
        ("rows.csv", b"seed,frames\n1,9\n", "a table needs prompt"),
        ("rows.csv", b"", "the columns .none."),
        ("rows.csv", b"prompt,prompt\na,b\n", "a table needs prompt, once"),
        ("rows.txt", "a".encode("utf-16"), "is UTF-16: save it as UTF-8"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_files_that_can_not_be_read_at_all(tmp_path, name, data, words):
    with pytest.raises(ValueError, match=words):
        told(tmp_path / name, data)
    with pytest.raises(ValueError, match="does not exist or is no file"):
        read_rows(tmp_path / "absent.csv")
