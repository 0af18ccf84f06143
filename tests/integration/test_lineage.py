"""From a version to all that it was made of, and from a row to every version that saw it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import version_rows
from psycopg.types.json import Jsonb
from safetensors.numpy import save_file

from infra import storage
from infra.db import transaction
from infra.errors import NotFound, UsageError
from infra.settings import Settings
from pipelines.data.contamination import of_dataset
from pipelines.lineage import row_ids
from pipelines.reproduction import apart
from registry import bundle, datasets, deployments, lineage, versions
from registry.bases import Base
from registry.datasets import Dataset, Row, make_row
from registry.environment import differences, lock
from registry.gates import decide
from registry.names import parse_ref


def row(text: str) -> Row:
    return make_row([{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}], group=text)


def keep(model: str, **splits: list[Row]) -> Dataset:
    source = {"path": "rows.jsonl", "digest": "sha256:f", "split": "train", "origin": "file", "licence": "CC0-1.0"}
    made = datasets.keep({**splits}, counts={}, sources=[source], recipe={"of": model})  # type: ignore[arg-type]
    with transaction() as conn:
        datasets.record(conn, model, made)
    return made


def add(model: str, number: int, bundle: str, dataset: Dataset | None, began_from: str | None = None) -> None:
    with transaction() as conn:
        conn.execute("alter table version disable trigger user")  # rows of versions made by hand
        version_rows.add_version(conn, model, number)
        digest = dataset.digest if dataset else None
        training = {"init_bundle": began_from} if began_from else None
        manifest = {**version_rows.MANIFEST, "dataset": digest, "training": training}
        conn.execute(
            "update version set dataset_digest = %s, bundle_digest = %s, manifest = %s"
            " where model = %s and number = %s",
            (digest, bundle, Jsonb(manifest), model, number),
        )
        conn.execute("alter table version enable trigger user")


def saw(row_id: str) -> dict[str, str]:
    with transaction() as conn:
        found = lineage.of_row(conn, [row_id])
    return {f"{v['model']}:{v['version']}": v["how"] for v in found["versions"]}


def test_who_saw_a_row(database: Settings) -> None:
    a, b, c, other = row("a"), row("b"), row("c"), row("other")
    first = keep("m", train=[a, other], validation=[b], test=[c])
    second = keep("n", train=[c], validation=[other], test=[a])
    add("m", 1, "sha256:1", first)
    add("m", 2, "sha256:2", keep("m", train=[other]), began_from="sha256:1")
    add("m", 3, "sha256:3", keep("m", train=[other], test=[b]), began_from="sha256:2")
    add("n", 1, "sha256:n", second)
    add("n", 2, "sha256:n2", None, began_from="sha256:n")
    with transaction() as conn:
        deployments.promote(conn, "m", 3, actor="os:t@h", reason="x")
    assert saw(a.id) == {
        "m:1": "trained on it", "m:2": "began from m:1", "m:3": "began from m:2", "n:1": "was judged by it",
    }  # fmt: skip
    assert saw(b.id) == {"m:1": "was chosen by it", "m:3": "was judged by it"}
    assert saw(c.id) == {"m:1": "was judged by it", "n:1": "trained on it", "n:2": "began from n:1"}
    assert saw(row("nobody's").id) == {}
    with transaction() as conn:
        found = lineage.of_row(conn, [a.id])
        of = lineage.of_version(conn, parse_ref("m:2"))
    assert [(p["split"], p["line"], p["model"]) for p in found["datasets"]] == [("train", 1, "m"), ("test", 1, "n")]
    assert [v["serving"] for v in found["versions"]] == [None, None, "champion", None]
    assert of["began_from"] == {"bundle": "sha256:1", "versions": ["m:1"]}
    assert of["dataset"]["sources"][0]["licence"] == "CC0-1.0"
    assert of["dataset"]["here"] is True


def test_a_bundle_says_what_its_data_was_where_that_is_not_here(database: Settings, tiny_base: Base) -> None:
    made = keep("m", train=[row("a")])
    sealed = versions.seal(
        versions.VersionDraft(model="m", method="prompt", base=tiny_base, adapter=None, dataset=made.digest)
    )
    folder = storage.get("bundle", sealed)
    assert "CC0-1.0" in (folder / "README.md").read_text()
    add("m", 1, sealed, None)
    manifest = bundle.read(folder).model_dump(mode="json")
    with transaction() as conn:
        conn.execute("alter table version disable trigger user")
        conn.execute("update version set manifest = %s", (Jsonb(manifest),))
        conn.execute("delete from dataset")
        found = lineage.of_version(conn, parse_ref("m:1"))["dataset"]
    assert (found["digest"], found["sources"][0]["licence"]) == (made.digest, "CC0-1.0")
    (folder / "data.json").chmod(0o600)
    (folder / "data.json").write_text('{"counts": 3}')
    with transaction() as conn:
        assert "sources" not in lineage.of_version(conn, parse_ref("m:1"))["dataset"], "an import may say anything"


def test_what_an_adapter_has_learned_from_is_that_of_its_parents_too(database: Settings) -> None:
    first, second = keep("m", train=[row("a")]), keep("m", train=[row("b")])
    add("m", 1, "sha256:1", first)
    add("m", 2, "sha256:2", second, began_from="sha256:1")
    add("m", 3, "sha256:3", second, began_from="sha256:2")
    add("m", 4, "sha256:4", keep("m", train=[row("c")]))
    with transaction() as conn:
        found = [{each.digest for each in lineage.learned(conn, bundle)} for bundle in ("sha256:3", "sha256:1", None)]
    assert found == [{first.digest, second.digest}, {first.digest}, set()]


def test_what_an_adapter_made_elsewhere_has_learned_is_known_to_be_unknown(database: Settings) -> None:
    add("m", 1, "sha256:1", None)  # imported
    add("m", 2, "sha256:2", keep("m", train=[row("a")]), began_from="sha256:1")
    add("m", 3, "sha256:3", keep("m", train=[row("b")]), began_from="sha256:gone")
    wanted = {"sha256:2": ["m:1"], "sha256:1": ["m:1"], "sha256:3": ["sha256:gone"], None: [], "sha256:x": ["sha256:x"]}
    with transaction() as conn:
        assert {bundle: lineage.untold(conn, bundle) for bundle in wanted} == wanted
        made = lineage.learned(conn, "sha256:2")[0]
    found = of_dataset(made, untold=["m:1"])
    told = decide([], {"metrics": {}, "slices": {}, "contamination": found}, on_underpowered="refuse", first=True)
    assert told.decision == "pass"
    assert told.reasons[0].endswith("; what m:1 learned, from which it began, is not known here")


def test_a_data_set_without_an_index_is_read_through(database: Settings) -> None:
    rows = [row(str(n)) for n in range(50)]
    made = keep("m", train=rows[:30], validation=rows[30:40], test=rows[40:])
    wanted = [rows[3].id, rows[35].id, rows[49].id, "f" * 16]
    by_index = datasets.find_rows(made.folder, wanted)
    assert sorted(by_index) == [("test", 10, rows[49].id), ("train", 4, rows[3].id), ("validation", 6, rows[35].id)]
    for split, line, row_id in by_index:
        assert made.rows(split)[line - 1].id == row_id
    (made.folder / datasets.INDEX).unlink()
    assert sorted(datasets.find_rows(made.folder, wanted)) == sorted(by_index)


def test_a_row_among_a_million_is_found(tmp_path: Path) -> None:
    ids = sorted(f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}" for n in range(1_000_000))
    (tmp_path / datasets.INDEX).write_text("".join(f"{each} t {line:09}\n" for line, each in enumerate(ids, 1)))
    for place in (0, 1, 123_456, 999_998, 999_999):
        assert datasets.find_rows(tmp_path, [ids[place]]) == [("train", place + 1, ids[place])]
    assert datasets.find_rows(tmp_path, ["0" * 15 + "1", "f" * 16]) == []


def test_a_line_of_a_file_is_the_row_that_was_made_of_it(database: Settings, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "yes"}\n\n{"prompt": "ask ann@example.com", "completion": "no"}\n{\n'
    )
    assert row_ids(f"{path}:1") == [row("a").id]
    plain, redacted = row_ids(f"{path}:3")
    assert plain != redacted
    assert row_ids(row("a").id) == row_ids(f"sha256:{row('a').id}") == [row("a").id]
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion\na,yes\n")
    assert row_ids(f"{table}:2") == [row("a").id]
    for text, error, words in (
        (f"{path}:2", NotFound, "No row begins at line 2"),
        (f"{path}:4", UsageError, "is no row: is not JSON"),
        (f"{path}:9", NotFound, "No row begins at line 9"),
        (f"{tmp_path}/none.jsonl:1", NotFound, "is no row"),
        ("xyz", NotFound, "is no row"),
    ):
        with pytest.raises(error, match=words):
            row_ids(text)


def test_how_far_two_adapters_are_apart(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(4, 9)), random.normal(size=(7, 4))

    def save(name: str, down: np.ndarray, up: np.ndarray) -> Path:
        (tmp_path / name).mkdir()
        tensors = {"x.lora_A.weight": down.astype(np.float32), "x.lora_B.weight": up.astype(np.float32)}
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        return tmp_path / name

    then = save("then", a, b)
    assert apart(then, then) == (True, 0.0)
    identical, distance = apart(then, save("half", a, b / 2))
    assert (identical, distance) == (False, pytest.approx(0.5, abs=1e-6))
    assert apart(then, save("same", 2 * a, b / 2))[1] == pytest.approx(0, abs=1e-3)  # other numbers, the same weights
    c, d = random.normal(size=(4, 9)), random.normal(size=(7, 4))
    expected = np.linalg.norm(d @ c - b @ a) / np.linalg.norm(b @ a)
    assert apart(then, save("other", c, d))[1] == pytest.approx(expected, rel=1e-4)
    assert apart(then, save("wider", np.vstack([a, a]), np.hstack([b, b])))[1] == np.inf


def test_an_environment_is_what_is_installed() -> None:
    now = lock()
    assert now["packages"]["numpy"] == np.__version__
    assert differences(now, now) == {}
    then = {**now, "python": "3.0", "packages": {**now["packages"], "numpy": "1.0", "gone": "2"}}
    changed = differences(then, now)
    assert changed.keys() == {"python", "numpy", "gone"}
    assert changed["gone"] == {"then": "2", "now": None}
