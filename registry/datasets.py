"""Data-set versions: immutable folders of clean, split rows, kept by digest.

A folder holds ``dataset.json`` and ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` (one row a line),
``rows.index`` (which row is where) and ``quarantine.jsonl`` (the rows that were refused, with source, line and
reason). ``dataset.json`` names every file's digest, and its own digest is the data set's: two data sets with the same
rows, made the same way, are one.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import orjson
from psycopg.types.json import Jsonb

from infra import storage
from infra.db import Connection, load_queries
from infra.errors import Refused

SQL = load_queries(Path(__file__).with_suffix(".sql"))
FORMAT = 1
INDEX = "rows.index"
_ENTRY = 29  # bytes: id, split's letter, line, each followed by a blank or the end of the line

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_LETTERS: Mapping[Split, str] = {"train": "t", "validation": "v", "test": "e"}


class Message(TypedDict):
    """One turn of a chat: role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example; its last message is the assistant's, which is the answer to learn.

    `id` is a digest of the messages; `source` is the slice: "train" for the pipeline's own files, "feedback" for
    corrections that people sent; rows of one `group` have the same or nearly the same prompt and share a split.
    """

    id: str
    messages: tuple[Message, ...]
    source: str = "train"
    group: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All but the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


def make_row(messages: Sequence[Mapping[str, Any]], *, source: str = "train", group: str = "") -> Row:
    """A row from chat messages, with the id that its content gives it."""
    turns = tuple(Message(role=m["role"], content=m["content"]) for m in messages)
    return Row(id=hashlib.sha256(orjson.dumps(turns)).hexdigest()[:16], messages=turns, source=source, group=group)


def question_key(messages: Iterable[Mapping[str, Any]]) -> str:
    """What a prompt asks, as one comparable text: the turns without the system's (an instruction that all rows
    share says nothing about a row), lower case, letters and digits only, one blank between words."""
    asked = [m["content"] for m in messages if m["role"] != "system"]
    return normalise("\n".join(asked or [m["content"] for m in messages]))


def normalise(text: str) -> str:
    """Unicode NFKC, case-folded, with every run of other characters than letters and digits as one blank."""
    import unicodedata

    folded = unicodedata.normalize("NFKC", text).casefold()
    # A text of symbols alone ("<=", "!!") keeps them: two such texts are not the same text.
    return re.sub(r"[\W_]+", " ", folded).strip() or " ".join(folded.split())


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A kept data set. `counts` has the rows of each split, and what was dropped and why; `contamination` which of
    the rows to learn from stood in rows that judge, None where nobody looked."""

    digest: str
    folder: Path
    counts: Mapping[str, int]
    parent: str | None
    sources: Sequence[Mapping[str, Any]] = ()
    contamination: Mapping[str, Any] | None = None

    def rows(self, split: Split, every: int = 1) -> list[Row]:
        """The rows of a split, in the kept order; with `every` n each n-th of them."""
        with (self.folder / f"{split}.jsonl").open("rb") as file:
            return [_row(orjson.loads(line)) for line in islice(file, 0, None, every)]


def _row(value: dict[str, Any]) -> Row:
    return Row(id=value["id"], messages=tuple(value["messages"]), source=value["source"], group=value["group"])


def keep(
    splits: Mapping[Split, Sequence[Row]],
    *,
    counts: Mapping[str, int],
    sources: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
    quarantine: Iterable[Mapping[str, Any]] = (),
    parent: str | None = None,
    contamination: Mapping[str, Any] | None = None,
) -> Dataset:
    """Write a data set into the artifact store; a no-op where it is there already.

    `recipe` is what made it: settings and code format, kept for who asks how. `contamination` is that of
    pipelines/data/contamination.py.
    """
    with storage.scratch("dataset") as folder:
        for split in SPLITS:
            with (folder / f"{split}.jsonl").open("wb") as file:
                for row in splits.get(split, ()):
                    value = {"id": row.id, "messages": row.messages, "source": row.source, "group": row.group}
                    file.write(orjson.dumps(value) + b"\n")
        (folder / INDEX).write_bytes(_index(splits))
        with (folder / "quarantine.jsonl").open("wb") as file:
            for refused in quarantine:
                file.write(orjson.dumps(refused) + b"\n")
        sizes: dict[str, int] = {split: len(splits.get(split, ())) for split in SPLITS}
        manifest = {
            "format": FORMAT,
            "counts": {**counts, **sizes},
            "sources": list(sources),
            "recipe": recipe,
            "parent": parent,
            "contamination": contamination,
            "files": {path.name: storage.file_digest(path) for path in sorted(folder.iterdir())},
        }
        text = orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2).decode()
        (folder / "dataset.json").write_text(text)
        digest = storage.text_digest(text)
        storage.keep("dataset", digest, folder)
    return open_dataset(digest)


def _index(splits: Mapping[Split, Sequence[Row]]) -> bytes:
    """Lines of one length, sorted: ``<id> <letter of the split> <line in its file>``."""
    entries = (
        f"{row.id} {_LETTERS[split]} {line:09}\n"
        for split in SPLITS
        for line, row in enumerate(splits.get(split, ()), 1)
    )
    return "".join(sorted(entries)).encode()


def find_rows(folder: Path, ids: Iterable[str]) -> list[tuple[Split, int, str]]:
    """(split, line, id) of every row of a kept data set that has one of these ids: some twenty looks into a million
    rows. A data set from before there was an index is read through."""
    index = folder / INDEX
    if not index.is_file():
        wanted = set(ids)
        rows = ((s, n, orjson.loads(line)["id"]) for s in SPLITS for n, line in _numbered(folder / f"{s}.jsonl"))
        return [found for found in rows if found[2] in wanted]
    letters = {letter: split for split, letter in _LETTERS.items()}
    found: list[tuple[Split, int, str]] = []
    with index.open("rb") as file:
        size = file.seek(0, 2) // _ENTRY

        def entry(place: int) -> str:
            file.seek(place * _ENTRY)
            return file.read(_ENTRY).decode()

        for row_id in dict.fromkeys(ids):
            place = bisect.bisect_left(range(size), row_id, key=entry)
            while place < size and (text := entry(place)).startswith(f"{row_id} "):
                found.append((letters[text[17]], int(text[19:28]), row_id))
                place += 1
    return found


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from enumerate(file, 1)


def check(digest: str) -> str:
    """The digest, once all files of a data set are what they were kept as. Raises NotFound, Refused."""
    folder = storage.get("dataset", digest)
    files = {"dataset.json": digest}
    if _is(folder / "dataset.json", digest):
        files |= orjson.loads((folder / "dataset.json").read_bytes())["files"]
    if changed := [name for name, wanted in files.items() if not _is(folder / name, wanted)]:
        raise Refused(f"Of the data set {digest} these files were changed where they are kept: {', '.join(changed)}.")
    return digest


def _is(file: Path, digest: str) -> bool:
    return file.is_file() and storage.file_digest(file) == digest


def open_dataset(digest: str) -> Dataset:
    """A kept data set. Raises NotFound when the artifact store lacks it."""
    folder = storage.get("dataset", digest)
    manifest = orjson.loads((folder / "dataset.json").read_bytes())
    return Dataset(
        digest=digest,
        folder=folder,
        counts=manifest["counts"],
        parent=manifest["parent"],
        sources=manifest["sources"],
        contamination=manifest.get("contamination"),
    )


def record(conn: Connection, model: str, dataset: Dataset) -> None:
    """Note in the database that a model has this data set (versions refer to it); harmless when repeated."""
    conn.execute(SQL["ensure_model"], {"model": model})
    conn.execute(
        SQL["record"],
        {
            "digest": dataset.digest,
            "model": model,
            "counts": Jsonb(dict(dataset.counts)),
            "sources": Jsonb(list(dataset.sources)),
            "parent": dataset.parent,
        },
    )
