"""Which of the rows that were read may be used: few enough malformed ones, and what the privacy policy says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from infra.errors import UsageError
from infra.settings import get_settings
from pipelines.data import sources
from registry.datasets import Message, Row, make_row
from registry.privacy import redact

Pii = Literal["redact", "keep", "drop"]


@dataclass(kw_only=True)
class Screened:
    """Rows that may be used, where each stood (``train.jsonl:12``), the quarantine's entries, and counts of what
    happened."""

    rows: list[Row] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    redacted: int = 0
    private: int = 0


def read_files(
    paths: Iterable[Path],
    *,
    pii: Pii,
    max_bad: float,
    refused_to: str,
    progress: Callable[[int], None] | None = None,
) -> Screened:
    """Read and screen files. Malformed rows go to the quarantine.

    Raises UsageError when a file has a larger share of malformed rows than `max_bad`, or no usable row; the
    quarantine is then written to ``<home>/quarantine/<refused_to>.jsonl``, so that the rows can be mended.
    """
    kept = Screened()
    for path in paths:
        good, bad = 0, []
        for row in sources.read(path):
            if isinstance(row, sources.Bad):
                bad.append(row)
            else:
                good += 1
                screen(kept, row.messages, pii=pii, source="train", place=f"{path.name}:{row.line}")
            if progress and (good + len(bad)) % 1000 == 0:
                progress(kept.read + good + len(bad))
        kept.read += good + len(bad)
        kept.quarantine += [
            {
                "source": path.name,
                "line": row.line,
                "reason": row.reason,
                "text": row.text if pii == "keep" else redact(row.text),
            }
            for row in bad
        ]
        if not good or len(bad) > max_bad * (good + len(bad)):
            _refuse(path, good, bad, max_bad, _write(kept.quarantine, refused_to))
    return kept


def screen(kept: Screened, messages: Iterable[Message], *, pii: Pii, source: str, place: str = "") -> None:
    """Add one row, as the privacy policy wants it."""
    before = tuple(messages)
    after = before if pii == "keep" else tuple(_redacted(m) for m in before)
    if after != before:
        if pii == "drop":
            kept.private += 1
            return
        kept.redacted += 1
    kept.rows.append(make_row(after, source=source))
    kept.places.append(place or source)


def _redacted(message: Message) -> Message:
    return Message(role=message["role"], content=redact(message["content"]))


def _write(quarantine: Iterable[Mapping[str, Any]], name: str) -> Path:
    target = get_settings().home / "quarantine" / f"{name}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"".join(orjson.dumps(entry) + b"\n" for entry in quarantine))
    return target


def _refuse(path: Path, good: int, bad: list[sources.Bad], max_bad: float, quarantine: Path) -> None:
    shown = "".join(f"\n  {path.name}:{row.line}: {row.reason}" for row in bad[:10])
    more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
    total = good + len(bad)
    share = f"{len(bad)} of {total} rows are malformed, and data.quality.max_bad allows {max_bad:.0%}"
    raise UsageError(
        f"{path}: {share if bad else 'there are no rows in the file'}{':' if bad else '.'}{shown}{more}",
        hint=f"All of them, with line and reason, are in {quarantine}; mend the rows, or raise data.quality.max_bad.",
        details={"malformed": len(bad), "rows": total, "quarantine": str(quarantine)},
    )
