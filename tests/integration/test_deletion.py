"""Deleting versions: only those that never held a slot, on the record, and never beside a promotion of the same."""

from __future__ import annotations

import threading
from typing import Any

import psycopg
import pytest
from fastapi.testclient import TestClient
from version_rows import DIGEST, add_version, add_versions

from deploy.auth import create_key
from deploy.gateway import create_app
from infra.db import transaction
from infra.errors import NotFound, Refused, Unreachable, UsageError
from infra.settings import Settings, get_settings
from registry import deletion, deployments, studies, versions

WHO = {"actor": "os:ann@here", "reason": "trained on rows of a customer who left"}
MODEL = "gone"


@pytest.fixture
def three(mlflow_server: str) -> None:
    """Versions 1 to 3 of a model; 1 served before 2, which serves."""
    add_versions(MODEL, "pass", "pass", "pass")
    with transaction() as conn:
        for number in (1, 2):
            deployments.promote(conn, MODEL, number, actor="os:ann@here", reason="good")


@pytest.mark.usefixtures("three")
def test_what_never_served_is_deleted_on_the_record_and_what_did_stays() -> None:
    for number in (1, 2):
        with pytest.raises(Refused, match=f"{MODEL}:{number} is not deleted: it serves or served"):
            deletion.delete(MODEL, number, **WHO)
    with pytest.raises(UsageError, match="needs a reason"):
        deletion.delete(MODEL, 3, actor="os:ann@here", reason=" ")
    with pytest.raises(NotFound, match=f"no version {MODEL}:9"):
        deletion.delete(MODEL, 9, **WHO)
    new, record = deletion.delete(MODEL, 3, **WHO)
    assert (new, record.actor, record.reason, record.bundle_digest) == (True, *WHO.values(), DIGEST)
    assert deletion.delete(MODEL, 3, actor="os:bob@here", reason="again") == (False, record)
    with transaction() as conn:
        assert [row["version"] for row in versions.list_versions(conn, MODEL)] == [1, 2]
        with pytest.raises(NotFound, match=r"os:ann@here deleted it \(trained on rows of a customer who left\)"):
            versions.get(conn, MODEL, 3)
        assert deployments.verify_chain(conn, MODEL) == []
    with pytest.raises(psycopg.errors.RaiseException, match="append-only"), transaction() as conn:
        conn.execute("delete from deletion")


@pytest.mark.usefixtures("three")
def test_what_a_running_search_starts_from_stays() -> None:
    with transaction() as conn:
        studies.create(conn, "s", MODEL, {"init_bundle": DIGEST})
    with pytest.raises(Refused, match="the search s starts from it"):
        deletion.delete(MODEL, 3, **WHO)
    with transaction() as conn:
        studies.stop(conn, "s")
    assert deletion.delete(MODEL, 3, **WHO)[0] is True


def test_of_a_promotion_and_a_deletion_at_once_one_wins(mlflow_server: str) -> None:
    for number in range(1, 16):
        with transaction() as conn:
            add_version(conn, MODEL, number)
        ready, failed = threading.Barrier(2), list[str]()

        def promote(number: int = number, ready: threading.Barrier = ready, failed: list[str] = failed) -> None:
            ready.wait()
            try:
                with transaction() as conn:
                    deployments.promote(conn, MODEL, number, actor="os:bob@here", reason="now")
            except NotFound:
                failed.append("promote")

        other = threading.Thread(target=promote)
        other.start()
        ready.wait()
        try:
            deletion.delete(MODEL, number, **WHO)
        except Refused:
            failed.append("delete")
        other.join()
        with transaction() as conn:
            serves = deployments.read(conn, MODEL).champion == number
            there = conn.execute(
                "select from version where model = %s and number = %s", (MODEL, number)
            ).fetchone() is not None  # fmt: skip
            assert deployments.verify_chain(conn, MODEL) == []
        assert failed == (["delete"] if serves else ["promote"])
        assert there == serves


@pytest.mark.usefixtures("three")
def test_a_deletion_that_mlflow_did_not_hear_of_is_finished_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    address = get_settings().mlflow_url
    assert address is not None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    get_settings.cache_clear()
    with pytest.raises(Unreachable, match=f"{MODEL}:3 is deleted, but MLflow, which still has a copy"):
        deletion.delete(MODEL, 3, **WHO)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    get_settings.cache_clear()
    assert deletion.delete(MODEL, 3, **WHO)[0] is False


@pytest.mark.usefixtures("three")
def test_over_the_control_api_only_an_admin_deletes(database: Settings) -> None:
    with transaction() as conn:
        operator, admin = (create_key(conn, name=role, role=role).key for role in ("operator", "admin"))
    with TestClient(create_app(database), base_url="http://tunesmith.test") as client:

        def delete(number: int, key: str, reason: str) -> tuple[int, dict[str, Any]]:
            answer = client.delete(
                f"/api/v1/models/{MODEL}/versions/{number}", params={"reason": reason},
                headers={"authorization": f"Bearer {key}"},
            )  # fmt: skip
            return answer.status_code, answer.json()

        assert delete(3, operator, "x")[0] == 403
        assert delete(3, admin, "")[0] == 400
        assert delete(10**12, admin, "x")[0] == 400
        assert delete(2, admin, "x")[1]["error"]["code"] == "refused"
        status, done = delete(3, admin, "a wish")
        assert (status, done["changed"], done["version"], done["reason"]) == (200, True, 3, "a wish")
        assert str(done["actor"]).startswith("key:")
