"""Imports over the control API: as the key's person, checked as strictly, of bases that are here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from drafts import make_draft, make_version
from serving import Stand, make_stand, wait_for

from infra.db import transaction
from infra.errors import NotFound, Refused, TunesmithError, UsageError
from infra.settings import Settings, get_settings
from registry import bases, bundle, versions
from registry.desk import There
from registry.exchange import export_version


@pytest.fixture
def stand(mlflow_server: str, database: Settings) -> Iterator[Stand]:
    with make_stand(database.home) as stand, stand.running_gateway():
        wait_for(lambda: stand._status() in (200, 503), what="for the gateway")
        yield stand


def there(stand: Stand, role: str = "operator") -> There:
    return There(stand.url, stand.keys[role])


def who(model: str, number: int) -> str | None:
    """Whom MLflow names."""
    url = f"{get_settings().need('mlflow_url')}/api/2.0/mlflow/model-versions/get"
    found = httpx.get(url, params={"name": model, "version": str(number)}, trust_env=False, timeout=60).json()
    return {tag["key"]: tag["value"] for tag in found["model_version"]["tags"]}.get("tunesmith.imported_by")


def test_a_version_and_an_adapter_are_imported_from_afar(
    stand: Stand, base: bases.Base, adapter: Path, model: str, tmp_path: Path
) -> None:
    first = make_version(make_draft(model, base, adapter))
    export_version(first, tmp_path / "out")
    made = there(stand).import_(tmp_path / "out", f"{model}-b", base=None)
    with transaction() as conn:
        came = versions.get(conn, f"{model}-b", 1)
    assert made == came.outline()
    assert (came.metrics, came.evaluation) == (first.metrics, first.evaluation)
    assert str(who(f"{model}-b", 1)).endswith("(the operator)")
    assert there(stand).import_(tmp_path / "out", f"{model}-b", base=None) == made  # the same again is the same
    plain = there(stand, "admin").import_(adapter, f"{model}-b", base=None)
    assert (plain["version"], plain["method"]) == (2, "imported")
    # Who may not force a version over its gate cannot bring the gate's decision either
    assert (first.gate is not None, came.gate) == (True, None)
    with pytest.raises(TunesmithError, match="never judged") as refused:
        there(stand).promote(f"{model}-b", 1, reason="my own gate says so", expect=None, force=False)
    assert refused.value.exit_code == 3
    brought = there(stand, "admin").import_(tmp_path / "out", f"{model}-b", base=None)
    with transaction() as conn:
        assert versions.get(conn, f"{model}-b", brought["version"]).gate == first.gate


def test_what_may_not_come_in_stays_out(
    stand: Stand, base: bases.Base, adapter: Path, model: str, tmp_path: Path
) -> None:
    export_version(make_version(make_draft(model, base, adapter)), tmp_path / "out")
    with pytest.raises(TunesmithError) as refused:
        there(stand, "viewer").import_(tmp_path / "out", model, base=None)
    assert refused.value.code == "not_allowed"
    with pytest.raises(TunesmithError, match=r"^No base /etc is here\."):
        there(stand).import_(adapter, model, base="/etc")
    shutil.copytree(adapter, tmp_path / "strange")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "strange/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "a/b"}))
    with pytest.raises(TunesmithError, match=r"^No base a/b is here\."):
        there(stand).import_(tmp_path / "strange", model, base=None)
    (tmp_path / "strange/weights.bin").write_bytes(b"x")
    with pytest.raises(Refused, match="can execute code"):  # before it is sent
        there(stand).import_(tmp_path / "strange", model, base=None)
    weights = tmp_path / "out" / bundle.ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(TunesmithError, match=r"^The bundle in what was sent is refused: .* has digest "):
        there(stand).import_(tmp_path / "out", model, base=None)
    (tmp_path / "empty").mkdir()
    for path, error in ((tmp_path / "none", NotFound), (tmp_path / "empty", UsageError)):
        with pytest.raises(error):
            there(stand).import_(path, model, base=None)

    def post(*names: str, content: bytes = b"{}") -> httpx.Response:
        parts = [("file", (name, content)) for name in names]
        place = f"{stand.url}/api/v1/models/{model}/versions"
        return stand.http.post(place, files=parts or {"other": b"x"}, headers=stand.header("operator"))

    for names in (["../x.json"], ["/x.json"], ["a/../x.json"], [".x"], ["a/b/c/d/e.json"], ["x.json", "x.json"],
                  ["x.json", "x.json/y.json"], ["x\\y.json"], [], ["x.json"] * 65):  # fmt: skip
        answer = post(*names)
        assert (answer.status_code, "error" in answer.json()) == (400, True), names
    with transaction() as conn:
        assert [row["version"] for row in versions.list_versions(conn, model)] == [1]
    assert not list((stand.home / "artifacts/bundle").glob(".new-*"))
