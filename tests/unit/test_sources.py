"""Fault 14: malformed rows are told with their line and reason, and never stop the reading."""

from __future__ import annotations

import resource
from pathlib import Path

import orjson
import pytest

from pipelines.data.sources import Bad, Good, peek, read

GOOD = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}'


def rows(folder: Path, content: bytes, name: str = "rows.jsonl") -> list[Good | Bad]:
    path = folder / name
    path.write_bytes(content)
    return list(read(path))


MALFORMED = {
    "bad JSON": (b'{"prompt": "a", ', "is not JSON"),
    "NUL byte": (b'{"prompt": "a\x00", "completion": "b"}', "NUL byte"),
    "escaped NUL": (b'{"prompt": "a\\u0000", "completion": "b"}', "NUL character"),
    "lone surrogate": (b'{"prompt": "\\ud800", "completion": "b"}', "surrogate"),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "b"}', "is not UTF-8"),
    "UTF-16": ('{"prompt": "a", "completion": "b"}'.encode("utf-16-le")[:-1], "NUL byte"),
    "not an object": (b"[1, 2]", "is not a JSON object"),
    "no form": (b'{"text": "x"}', "has no known form"),
    "wrong role": (GOOD.replace(b'"user"', b'"tool"'), "has the role 'tool'"),
    "role is no text": (GOOD.replace(b'"user"', b"7"), "has the role 7"),
    "two users": (GOOD.replace(b'"assistant"', b'"user"'), "the assistant's must be last"),
    "assistant first": (GOOD.replace(b'"user"', b'"assistant"'), "message 1 is the assistant's"),
    "late system": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"},'
        b' {"role": "assistant", "content": "c"}]}',
        "message 2 is the system's",
    ),
    "empty answer": (GOOD.replace(b"hello", b"  "), "message 2 (assistant) is empty"),
    "no messages": (b'{"messages": []}', "has no messages"),
    "content is no text": (GOOD.replace(b'"hello"', b"null"), "has no text"),
    "empty completion": (b'{"prompt": "a", "completion": ""}', "completion is empty"),
    "preference pair": (b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "preference pair"),
    "too deep": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not JSON"),
    "too long": (b'{"prompt": "' + b"x" * 1_000_001 + b'", "completion": "b"}', "longer than 1,000,000 bytes"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_row_is_told_by_line_and_reason(tmp_path: Path, what: str) -> None:
    line, reason = MALFORMED[what]
    found = rows(tmp_path, GOOD + b"\n\n" + line + b"\n" + GOOD)
    assert [(type(row), row.line) for row in found] == [(Good, 1), (Bad, 3), (Good, 4)]
    bad = found[1]
    assert isinstance(bad, Bad)
    assert reason in bad.reason
    assert len(bad.text) <= 2_000
    orjson.dumps(bad.text)  # can be written to the quarantine


def test_a_line_of_50_megabytes_is_passed_over_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b"\n")
        for _ in range(50):
            file.write(b"x" * 1_000_000)
        file.write(b"\n" + GOOD + b"\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = list(read(path))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert [(type(row), row.line) for row in found] == [(Good, 1), (Bad, 2), (Good, 3)]
    assert grown < 20_000  # kilobytes on Linux; far less than the line


FORMS = {
    "chat": (GOOD, "hi", "hello"),
    "prompt/completion": (b'{"prompt": "hi", "completion": "hello"}', "hi", "hello"),
    "alpaca": (b'{"instruction": "Add.", "input": "1 2", "output": "3"}', "Add.\n\n1 2", "3"),
    "sharegpt": (
        b'{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}',
        "hi",
        "hello",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_told_apart(tmp_path: Path, form: str) -> None:
    line, asked, answer = FORMS[form]
    (row,) = rows(tmp_path, b"\xef\xbb\xbf" + line)
    assert isinstance(row, Good)
    assert row.form == form
    assert [(m["role"], m["content"]) for m in row.messages] == [("user", asked), ("assistant", answer)]
    assert peek(tmp_path / "rows.jsonl").form == form


def test_csv_has_quoted_lines_and_told_errors(tmp_path: Path) -> None:
    found = rows(
        tmp_path,
        b'Prompt,Completion\n"two\nlines",a\nonly one\nb,c\n\xff,d\n"open,e\nf,g\n',
        "rows.csv",
    )
    assert [(type(row), row.line) for row in found] == [(Good, 2), (Bad, 4), (Good, 5), (Bad, 6), (Bad, 7)]
    first = found[0]
    assert isinstance(first, Good)
    assert first.messages[0]["content"] == "two\nlines"
    assert [row.reason for row in found if isinstance(row, Bad)] == [
        "has 1 fields, the header has 2",
        "is not UTF-8 at byte 1; save the file as UTF-8",
        "is not CSV: unexpected end of data",
    ]


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\n \n")
    head = peek(tmp_path / "rows.jsonl")
    assert (head.good, head.bad[0].reason) == (0, "there are no rows in the file")
