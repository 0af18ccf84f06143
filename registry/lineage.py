"""Where a version comes from, and where a row went: both ways through data sets, studies and bundles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra import storage
from infra.db import Connection, load_queries
from infra.errors import NotFound
from registry import bundle, datasets, versions
from registry.names import Ref

SQL = load_queries(Path(__file__).with_suffix(".sql"))
_HOW = {"train": "trained on it", "validation": "was chosen by it", "test": "was judged by it"}


def of_version(conn: Connection, ref: Ref) -> dict[str, Any]:
    """All that a version was made of, from its manifest, with what is known here of each part. Raises NotFound."""
    found = versions.find(conn, ref)
    manifest = found.parsed
    training = manifest.training or {}
    dataset = None
    if manifest.dataset is not None:
        row = conn.execute(SQL["dataset"], {"digest": manifest.dataset}).fetchone()
        known = row or _data(found)
        dataset = {"digest": manifest.dataset, "here": storage.has("dataset", manifest.dataset), **known}
    began = training.get("init_bundle")
    return {
        "model": found.model,
        "version": found.number,
        "bundle": found.bundle_digest,
        "base": manifest.base.model_dump(mode="json"),
        "hosted": manifest.hosted and manifest.hosted.model_dump(mode="json"),
        "dataset": dataset,
        "study": manifest.study,
        "trial": manifest.trial,
        "params": manifest.params,
        "training": training or None,
        "began_from": began and {"bundle": began, "versions": _names(conn, began)},
        "code_version": manifest.code_version,
        "environment": manifest.files.get(bundle.ENVIRONMENT),
        "run_id": found.run_id,
        "mlflow_run_id": found.mlflow_run_id,
    }


def environment_of(version: versions.Version) -> dict[str, Any] | None:
    """The lock in a version's bundle; None for one that was made before bundles had it."""
    return _sealed(version, bundle.ENVIRONMENT)


def _data(version: versions.Version) -> dict[str, Any]:
    """What a bundle says of its data set, which may be of another store; nothing where it is not in our form."""
    try:
        facts = _sealed(version, bundle.DATA) or {"counts": {}, "sources": [], "parent": None}
        return {
            "counts": {str(name): int(count) for name, count in facts["counts"].items()},
            "sources": [
                {name: str(source[name]) for name in ("path", "digest", "split", "origin", "licence") if name in source}
                | {"path": str(source["path"]), "digest": str(source["digest"])}
                for source in facts["sources"]
            ],
            "parent": facts["parent"] and str(facts["parent"]),
        }
    except (OSError, LookupError, TypeError, ValueError, AttributeError):
        return {}


def _sealed(version: versions.Version, name: str) -> dict[str, Any] | None:
    """A JSON file of a version's bundle; None where it has none."""
    import orjson

    return dict(orjson.loads((version.folder() / name).read_bytes())) if name in version.parsed.files else None


def of_row(conn: Connection, ids: Sequence[str]) -> dict[str, Any]:
    """Who saw a row, which is known by its id, or by several if it may have been redacted: ``{"rows": [ids],
    "datasets": [{"digest", "model", "split", "line", "id"}], "versions": [{"model", "version", "how", ...}]}``.

    A version whose training began from the adapter of one that was trained on the row has seen it too.
    """
    places = []
    for row in conn.execute(SQL["datasets"]).fetchall():
        if storage.has("dataset", row["digest"]):
            for split, line, row_id in datasets.find_rows(storage.get("dataset", row["digest"]), ids):
                places.append({**row, "split": split, "line": line, "id": row_id})
    order = list(_HOW)
    splits: dict[str, str] = {}  # where one stands twice, what taught by it says most
    for place in sorted(places, key=lambda place: -order.index(place["split"])):
        splits[place["digest"]] = place["split"]
    learned = [digest for digest, split in splits.items() if split == "train"]
    seen = conn.execute(SQL["saw"], {"digests": list(splits), "learned": learned}).fetchall()
    found = [
        {
            "model": row["model"],
            "version": row["number"],
            "how": f"began from {row['through']}" if row["through"] else _HOW[splits[row["dataset_digest"]]],
            "dataset": row["dataset_digest"],
            "serving": row["serving"],
        }
        for row in seen
    ]
    return {"rows": list(ids), "datasets": places, "versions": found}


def learned(conn: Connection, bundle_digest: str | None) -> list[datasets.Dataset]:
    """The data sets that a bundle's adapter has learned from, its own and those of all that it began from, as far as
    they are kept here; none for no bundle."""
    found = [row["digest"] for row in conn.execute(SQL["learned"], {"bundle": bundle_digest})]
    return [datasets.open_dataset(digest) for digest in found if digest and storage.has("dataset", digest)]


def untold(conn: Connection, bundle_digest: str | None) -> list[str]:
    """Of what a bundle's adapter is, or began from, whatever learned from data that is not known here: versions made
    elsewhere, or deleted, by their digests. None for no bundle."""
    found = conn.execute(SQL["learned"], {"bundle": bundle_digest}) if bundle_digest is not None else ()
    return [row["name"] for row in found if row["digest"] is None or not storage.has("dataset", row["digest"])]


def _names(conn: Connection, digest: str) -> list[str]:
    return [f"{row['model']}:{row['number']}" for row in conn.execute(SQL["by_bundle"], {"digest": digest})]


def check_row_id(text: str) -> str:
    """A row's id as data sets write it, with or without ``sha256:`` before it. Raises NotFound for what is none."""
    row_id = text.removeprefix("sha256:").lower()[:16]
    if len(row_id) < 16 or not set(row_id) <= set("0123456789abcdef"):
        raise NotFound(f"{text[:80]!a} is no row.", hint="Give FILE:LINE, or a row's id of 16 hexadecimal digits.")
    return row_id
