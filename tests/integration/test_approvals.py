"""Who must agree before a version serves: other people than its author, each once, on the record for ever."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import psycopg
import pytest
from fastapi.testclient import TestClient
from version_rows import add_version

from deploy import auth
from deploy.auth import NewKey, Role, create_key
from deploy.gateway import create_app
from infra import db
from infra.db import transaction
from infra.errors import Conflict, NotFound, Refused, UsageError
from infra.settings import Settings
from monitoring.console.app import console_routes
from registry import approvals, deployments, judgements
from registry.evidence import evidence
from registry.gates import Decision

ANN, BOB = "key:ann1 (Ann)", "key:bob2 (Bob)"
AUTHOR = "os:eve@laptop"


@pytest.fixture
def version(database: Settings) -> None:
    """m:1, which passed its gate and needs two approvals."""
    with transaction() as conn:
        add_version(conn, "m", 1, approvals=2, author=AUTHOR)
        for id, name in (("ann1", "Ann"), ("bob2", "Bob"), ("cy3", "Cy"), ("ci4", None)):
            values = {"id": id, "name": id, "role": "operator", "hash": id.encode(), "person": name, "watched": True}
            conn.execute(auth.SQL["insert_key"], values)


def approve(actor: str, *, role: str = "operator", reason: str = "read it") -> tuple[bool, approvals.Approvals]:
    with transaction() as conn:
        return approvals.approve(conn, "m", 1, actor=actor, role=role, reason=reason)


def promote(*, force: bool = False) -> deployments.Entry:
    with transaction() as conn:
        change = deployments.promote(conn, "m", 1, actor="os:op@here", reason="time", force=force)
    assert change.entry is not None
    return change.entry


@pytest.mark.usefixtures("version")
def test_two_people_who_are_not_the_author_open_the_way_and_stand_in_the_evidence() -> None:
    with pytest.raises(
        Refused, match=f"it needs 2 approvals and has none: 2 more people .* other than its author {AUTHOR}"
    ):
        promote()
    assert approve(ANN)[0] is True
    # The same key under another name is the same person
    new, now = approve("key:ann1 (Somebody Else)")
    assert (new, now.missing, [a.actor for a in now.given]) == (False, 1, [ANN])
    with pytest.raises(
        Refused, match=r"has 1 \(key:ann1 \(Ann\)\): 1 more person .* `tunesmith approve m:1 --reason TEXT`"
    ):
        promote()
    with pytest.raises(Refused, match="is the author of m:1"):
        approve(AUTHOR)
    with pytest.raises(Refused, match=r"key:ci4 \(CI\) was made for nobody"):
        approve("key:ci4 (CI)")
    with pytest.raises(Refused, match="The role viewer may not approve"):
        approve("key:cy3 (Cy)", role="viewer")
    with pytest.raises(UsageError):
        approve(BOB, reason="  ")
    assert approve(BOB, role="admin", reason="tried it on our worst cases")[1].missing == 0
    entry = promote()
    assert entry.forced is False
    with transaction() as conn:
        kept = evidence(conn, entry.evidence)
        assert deployments.verify_chain(conn, "m") == []
    assert kept is not None
    assert (kept["decision"], kept["approved"]["author"], kept["approved"]["needed"]) == ("pass", AUTHOR, 2)
    assert [(a["actor"], a["role"], a["reason"]) for a in kept["approved"]["given"]] == [
        (ANN, "operator", "read it"),
        (BOB, "admin", "tried it on our worst cases"),
    ]


@pytest.mark.usefixtures("version")
def test_forcing_past_missing_approvals_is_marked_and_needs_a_reason() -> None:
    approve(ANN)
    with pytest.raises(UsageError, match="needs a reason"), transaction() as conn:
        deployments.promote(conn, "m", 1, actor="os:op@here", reason=" ", force=True)
    entry = promote(force=True)
    assert entry.forced is True
    with transaction() as conn:
        kept = evidence(conn, entry.evidence)
        (listed,) = deployments.history(conn, "m")
    assert kept is not None
    assert (kept["approved"]["missing"], listed.forced) == (1, True)


@pytest.mark.usefixtures("version")
def test_what_was_approved_cannot_be_taken_back() -> None:
    approve(ANN)
    for statement in ("update approval set reason = 'x'", "delete from approval", "truncate approval"):
        with pytest.raises(psycopg.errors.RaiseException, match="append-only"), transaction() as conn:
            conn.execute(statement)
    with pytest.raises(NotFound), transaction() as conn:
        approvals.approve(conn, "m", 9, actor=ANN, role="operator", reason="x")


def test_two_keys_of_one_person_are_one_and_an_authors_key_is_the_author(version: None, database: Settings) -> None:
    with transaction() as conn:
        add_version(conn, "m", 2, approvals=2, author="os:carl@desk")
        keys = [
            create_key(conn, name=name, role="operator", person=person)
            for name, person in (("laptop", "ann"), ("phone", "ann"), ("bob's", "bob"), ("carl's", "carl"))
        ]

        def approve(key: NewKey) -> approvals.Approvals:
            actor = f"key:{key.id} ({key.name})"
            return approvals.approve(conn, "m", 2, actor=actor, role="operator", reason="read it")[1]

        assert approve(keys[0]).missing == 1
        assert approve(keys[1]).missing == 1, "her phone is no second person"
        by_hand = approvals.approve(conn, "m", 2, actor="os:ann@server", role="admin", reason="read it")[1]
        assert by_hand.missing == 1
        with pytest.raises(Refused, match="is the author of m:2"), conn.transaction():
            approve(keys[3])
        assert approve(keys[2]).missing == 0


@pytest.mark.usefixtures("version")
def test_what_was_agreed_to_before_a_version_was_judged_again_counts_no_more() -> None:
    assert (approve(ANN)[1].missing, approve(BOB)[1].missing) == (1, 0)
    said = Decision(decision="pass", reasons=[], gates=[], approvals=2, author=AUTHOR)
    with transaction() as conn:
        judgements.keep(conn, "m", 1, {"metrics": {}}, said, actor="os:eve@laptop", reason="another champion")
        assert approvals.of(conn, "m", 1).missing == 2
    with pytest.raises(Refused, match="has none"):
        promote()
    new, now = approve(ANN, reason="read the new one")
    assert (new, now.missing, [a.reason for a in now.given]) == (True, 1, ["read the new one"])
    assert approve(ANN)[0] is False
    with transaction() as conn:
        assert db.one(conn, "select count(*) as n from approval")["n"] == 3, "nothing is taken away"
        first, last = (row["gate"] for row in conn.execute(
            "select gate from version union all select gate from judgement"))  # fmt: skip
        with pytest.raises(Conflict, match="m:1 was judged again since you read its evaluation"), conn.transaction():
            approvals.approve(conn, "m", 1, actor=BOB, role="operator", reason="read it", gate=first)
        assert approvals.approve(conn, "m", 1, actor=BOB, role="operator", reason="read it", gate=last)[1].missing == 0
    for statement in ("delete from judgement", "truncate judgement", "update judgement set decision = 'pass'"):
        with pytest.raises(psycopg.errors.RaiseException, match="judgements are kept"), transaction() as conn:
            conn.execute(statement)


def test_who_brought_a_version_is_no_one_else_however_they_are_written(version: None, database: Settings) -> None:
    with transaction() as conn:
        add_version(conn, "m", 2, approvals=1, author="os:carl@desk", imported_by="os:Dora@laptop")
        key = create_key(conn, name="laptop", role="operator", person="DORA")
        for actor, why in ((f"key:{key.id} (laptop)", "brought m:2 here"), ("os:CARL@server", "is the author of m:2")):
            with pytest.raises(Refused, match=why), conn.transaction():
                approvals.approve(conn, "m", 2, actor=actor, role="operator", reason="fine")
        assert approvals.approve(conn, "m", 2, actor="os:ann@a", role="operator", reason="read it")[1].missing == 0


def test_one_user_is_one_person_on_all_machines_and_at_any_moment(version: None, database: Settings) -> None:
    with transaction() as conn:
        add_version(conn, "m", 2, approvals=2, author="os:carl@desk")
        key = create_key(conn, name="laptop", role="operator", person="ann")
        with pytest.raises(Refused, match="is the author of m:2"), conn.transaction():
            approvals.approve(conn, "m", 2, actor="os:carl@server", role="admin", reason="mine")
    words = [f"key:{key.id} (laptop)", *(f"os:ann@{host}" for host in ("a", "b", "c"))]
    ready = threading.Barrier(len(words))

    def say(actor: str) -> bool:
        ready.wait()
        with transaction() as conn:
            return approvals.approve(conn, "m", 2, actor=actor, role="admin", reason="read it")[0]

    with ThreadPoolExecutor(len(words)) as pool:
        assert sum(pool.map(say, words)) == 1
    with transaction() as conn:
        assert approvals.of(conn, "m", 2).missing == 1


def test_who_acts_here_is_not_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    before = deployments.actor_here()
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "mallory")
    assert deployments.actor_here() == before


def test_nobody_needs_to_agree_where_no_one_asked(database: Settings) -> None:
    with transaction() as conn:
        add_version(conn, "m", 1)
        gate = db.one(conn, "select gate from version where model = 'm'")["gate"]
    assert promote().evidence == gate


def test_people_agree_by_the_api_and_in_the_console(version: None, database: Settings) -> None:
    def key(name: str, role: Role) -> str:
        with transaction() as conn:
            return create_key(conn, name=name, role=role, person=name.lower()).key

    site = "http://tunesmith.test"
    with TestClient(create_app(database, routes=console_routes()), base_url=site, follow_redirects=False) as client:

        def ask(path: str, bearer: str, **body: object) -> httpx.Response:
            return client.post(f"/api/v1/models/m/{path}", json=body, headers={"authorization": f"Bearer {bearer}"})

        ann, viewer = key("Ann", "operator"), key("Vic", "viewer")
        assert ask("versions/1/approve", viewer, reason="x").status_code == 403
        assert ask("promote", ann, version=1, reason="now").json()["error"]["approvals"]["missing"] == 2
        first = ask("versions/1/approve", ann, reason="<b>read</b>").json()
        assert (first["changed"], first["missing"], first["given"][0]["role"]) == (True, 1, "operator")
        assert ask("versions/1/approve", ann, reason="again").json()["changed"] is False
        assert ask("promote", ann, version=1, reason="now", force=True).status_code == 403  # an admin's to force

        browser = {"origin": site, "sec-fetch-site": "same-origin"}
        client.post("/login", data={"key": key("Bob", "operator"), "next": "/"}, headers=browser)
        page = client.get("/models/m/versions/1").text
        assert "1 of 2" in page
        assert "&lt;b&gt;read&lt;/b&gt;" in page
        assert "Approve v1" in page
        assert "1 approval missing" in client.get("/models/m/promote/1").text
        (gate,) = re.findall(r'name="gate" value="(sha256:\w+)"', page)
        said = {"reason": "so did I", "gate": gate}
        approved = client.post("/models/m/versions/1/approve", data=said, headers=browser)
        assert approved.status_code == 303
        assert "Approve v1" not in client.get("/models/m/versions/1").text
        assert ask("promote", ann, version=1, reason="now").json()["champion"] == 1
        shown = client.get("/api/v1/models/m/versions/1", headers={"authorization": f"Bearer {viewer}"}).json()
        assert [given["reason"] for given in shown["approvals"]["given"]] == ["<b>read</b>", "so did I"]
