"""The registry's commands as scripts have them: exit codes, JSON, and plain text (the contract)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from version_rows import add_version, add_versions

from infra import ports
from infra.db import transaction
from infra.settings import Settings
from pipelines.cli import main
from registry import deployments


def _run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", "from pipelines.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def _json(*arguments: str) -> tuple[int, Any]:
    code, out, err = _run(*arguments, "--json")
    assert err == ""
    return code, json.loads(out)


def test_a_version_is_promoted_taken_back_and_looked_up(database: Settings) -> None:
    add_versions("m", "pass", "pass", "fail")
    code, change = _json("promote", "m:1", "--reason", "first")
    assert (code, change["changed"], change["champion"], change["generation"]) == (0, True, 1, 1)
    assert change["entry"]["actor"].startswith("os:")
    code, change = _json("promote", "m:1", "--reason", "again")
    assert (code, change["changed"], change["entry"]) == (0, False, None)
    code, error = _json("promote", "m:3", "--reason", "bad")
    assert (code, error["error"]["code"]) == (3, "refused")
    assert "exact_match: said fail" in error["error"]["hint"]
    code, error = _json("promote", "m:2", "--reason", "late", "--expect-generation", "0")
    assert (code, error["error"]["code"], error["error"]["generation"]) == (4, "conflict", 1)
    assert _json("canary", "m:2", "--share", "10%")[1]["challenger_share"] == 0.1
    assert _json("canary", "m", "--stop")[1]["challenger"] is None
    assert _json("promote", "m:3", "--reason", "known bad", "--force")[1]["entry"]["forced"] is True
    code, change = _json("rollback", "m", "--reason", "was bad")
    assert (code, change["champion"]) == (0, 1)
    assert _json("rollback", "m", "--reason", "again")[0] == 3

    code, history = _json("history", "m")
    entries = history["entries"]
    assert [entry["action"] for entry in entries] == ["promote", "canary", "stop", "promote", "rollback"]
    keys = {"generation", "at", "actor", "action", "slot", "from", "to", "reason", "forced", "evidence", "hash"}
    assert all(keys <= entry.keys() for entry in entries)
    assert entries[0]["at"].endswith("Z")
    assert (entries[-1]["from"], entries[-1]["to"]) == (3, 1)
    assert _json("history", "m", "--at", entries[3]["at"])[1]["serving"]["champion"] == 3

    code, listed = _json("versions", "m")
    first = listed["versions"][0]
    assert (code, listed["model"], first["version"], first["serving"], first["base"]) == (0, "m", 1, "champion", "b")
    assert first["metrics"] == {"exact_match": 0.5}
    assert _json("models")[1]["models"][0]["champion"] == 1


def test_a_version_that_needs_approvals_says_who_must_do_what(database: Settings) -> None:
    me = deployments.actor_here()
    with transaction() as conn:
        add_version(conn, "m", 1, approvals=1, author="os:eve@laptop")
        add_version(conn, "m", 2, approvals=1, author=me)
    code, _, err = _run("promote", "m:1", "--reason", "now")
    assert code == 3
    assert "m:1 is not promoted: it needs 1 approval and has none: 1 more person with the operator role" in err
    assert "`tunesmith approve m:1 --reason TEXT`" in err
    assert "not to be promoted yet: it needs 1 approval" in _run("show", "m:1")[1]
    code, given = _json("approve", "m:1", "--reason", "read its worst answers")
    assert (code, given["changed"], given["missing"], given["given"][0]["person"]) == (0, True, 0, me)
    assert _json("approve", "m:1", "--reason", "again")[1]["changed"] is False
    assert "read its worst answers" in _run("show", "m:1")[1]
    assert _json("show", "m:1")[1]["approvals"] == {
        k: given[k] for k in ("needed", "missing", "author", "given", "outstanding")
    }
    assert _json("promote", "m:1", "--reason", "now")[1]["champion"] == 1
    code, error = _json("approve", "m:2", "--reason", "mine is good")
    assert (code, error["error"]["code"]) == (3, "refused")
    assert _json("promote", "m:2", "--reason", "now")[0] == 3
    assert _json("promote", "m:2", "--reason", "tonight", "--force")[1]["entry"]["forced"] is True


MISTAKES = (
    ("promote m:9 --reason x", 5),
    ("promote unknown:1 --reason x", 5),
    ("versions unknown", 5),
    ("show m", 5),  # nothing serves
    ("verify m:9", 5),
    ("approve m:9 --reason x", 5),
    ("approve m:1", 2),
    ("import /nonexistent --model m", 5),
    ("promote m --reason x", 2),
    ("promote m:1", 2),
    ("promote ../x:1 --reason x", 2),
    ("promote m:1 --reason \t", 2),
    ("canary m:1", 2),
    ("canary m:1 --share 1", 2),
    ("canary m:1 --stop", 2),
    ("history m --at yesterday", 2),
    ("rollback m --reason x", 3),
    ("canary m:1 --share 10%", 3),
)


def test_each_mistake_has_its_exit_code_and_changes_nothing(
    database: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the command runs in this process, whose handlers stay
    add_versions("m", "pass")
    for line, code in MISTAKES:
        monkeypatch.setattr(sys, "argv", ["tunesmith", *line.split(" "), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        answer = json.loads(capsys.readouterr().out)
        assert (ended.value.code, set(answer)) == (code, {"error"}), line
        assert answer["error"]["message"], line
    assert _json("history", "m")[1]["entries"] == []


def test_without_a_database_the_exit_code_says_so(home: Path) -> None:
    for arguments in (["models"], ["promote", "m:1", "--reason", "x"]):
        code, answer = _json(*arguments)
        assert (code, answer["error"]["code"]) == (6, "unreachable")
    code, out, err = _run("models", TUNESMITH_DATABASE_URL="postgresql://x:y@127.0.0.1:9/postgres")
    assert (code, out) == (6, "")
    assert "PostgreSQL does not answer" in err


def test_why_the_database_cannot_be_used_is_said_at_once_and_once(database: Settings) -> None:
    right = database.server()
    wrong = right.replace(f":{urlsplit(right).password}@", ":s3cret@")
    assert wrong != right
    closed = f"postgresql://me:s3cret@127.0.0.1:{ports.free()}/postgres"
    for url, code, words in (
        (wrong, 6, "password authentication failed"),
        (closed, 6, "Connection refused"),
        (closed.replace("127.0.0.1", "localhost"), 6, "Connection refused"),
        ("postgresql://me:s3cret@nowhere.invalid/postgres", 6, "nowhere.invalid"),
        ("me:s3cret@nowhere", 2, "TUNESMITH_DATABASE_URL: is no URL such as"),
        ("postgresql://me:s3cret@here:port", 2, "TUNESMITH_DATABASE_URL: is no URL such as"),
        ("mysql://me:s3cret@here", 2, "TUNESMITH_DATABASE_URL: is no URL such as"),
    ):
        begun = time.monotonic()
        found, out, err = _run("models", TUNESMITH_DATABASE_URL=url)
        assert (found, out) == (code, ""), (url, err)
        assert words in err, url
        assert "s3cret" not in err
        assert [line[:7] for line in err.splitlines()] == ["error: ", " " * 7], err
        assert time.monotonic() - begun < 9, url


def test_long_values_are_not_poured_out(database: Settings) -> None:
    code, out, err = _run("keys", "revoke", "x" * 100_000)
    assert (code, out) == (5, "")
    assert len(err) < 1000


def test_text_is_plain_and_escapes_what_would_act_on_a_terminal(database: Settings) -> None:
    add_versions("m", "pass")
    assert _run("promote", "m:1", "--reason", "\x1b[31mred\u202e [bold]x[/bold]")[0] == 0
    code, out, _ = _run("history", "m")
    assert code == 0
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert r"\x1b[31mred\u202e [bold]x[/bold]" in out
    assert out.splitlines()[0].split()[:3] == ["generation", "at", "actor"]


def test_an_empty_registry_says_what_to_do(database: Settings) -> None:
    with transaction() as conn:
        conn.execute("insert into model (name) values ('refused')")  # as a run leaves it that registered no version
    code, out, _ = _run("models")
    assert code == 0
    assert "tunesmith run" in out
    assert _json("models") == (0, {"models": []})


def test_registry_commands_import_nothing_heavy(database: Settings) -> None:
    code = (
        "import sys; sys.argv = ['tunesmith', 'models', '--json']\n"
        "from pipelines.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'prefect', 'optuna', 'scipy', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
