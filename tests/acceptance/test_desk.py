"""The registry's commands on the database and over the control API: the same words, the same JSON, the same exit codes,
and another person in the ledger."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving import Stand, add_version, make_stand, wait_for
from version_rows import add_versions

from infra.db import transaction
from infra.settings import Settings
from pipelines.cli import main
from registry import deployments
from tests.conftest import forget

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command as a process would carry it out that has this environment: code, output, errors."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process's handlers stay

    def command(*arguments: str, **environment: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["tunesmith", *arguments])
            forget()
            with pytest.raises(SystemExit) as ended:
                main()
        forget()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(str(ended.value.code)), out, err

    return command


@pytest.fixture
def stand(database: Settings) -> Iterator[Stand]:
    """A gateway, and beside it models a-here and a-over with the same versions: 1 and 2 passed, 3 failed."""
    for model in ("a-here", "a-over"):
        add_versions(model, "pass", "pass", "fail")
    add_version("real", 1)
    with make_stand(database.home) as stand, stand.running_gateway():
        wait_for(lambda: stand._status() in (200, 503), what="for the gateway")
        yield stand


def _over(run: Run, stand: Stand, role: str = "operator") -> Run:
    """Commands as from a machine that has an address and a key, and no database."""
    environment = {
        "TUNESMITH_URL": stand.url,
        "TUNESMITH_API_KEY": stand.keys[role],
        "TUNESMITH_DATABASE_URL": "postgresql://nobody:none@127.0.0.1:9/postgres",
    }
    return lambda *arguments, **more: run(*arguments, **environment | more)


COMMANDS = [
    "versions M",
    "show M",
    "show M:1",
    "show M:9",
    "history M",
    "promote M:1 --reason first",
    "promote M:1 --reason again",
    "promote M:3 --reason bad",
    "promote M:2 --reason late --expect-generation 0",
    "promote M:9 --reason none",
    "promote M:2 --reason better --expect-generation 1",
    "canary M:1 --share 10%",
    "canary M:1 --share 10% --reason twice",
    "canary M:3 --share 10%",
    "canary M --stop",
    "canary M --stop",
    "shadow M:3 --reason look",
    "shadow M:2",
    "history M --at 2100-01-01",
    "shadow M --stop",
    "rollback M --reason worse",
    "rollback M --reason worse",
    "rollback M --to 3 --reason no",
    "rollback M --to 1 --reason same",
    "promote M:2 --reason \u202ered",
    "show M@champion",
    "show M@shadow",
    "compare M:1 M:3",
    "compare M:1 unknown:3",
    "versions unknown",
    "lineage M:2",
    "lineage M:9",
    "lineage --row 0123456789abcdef",
    "lineage --row nothing",
    "promote ../x:1 --reason x",
    "history %2e%2e",
    "promote M:1 --reason _",
    "history M",
    "rollout M",
    "rollout M:3 --reason failed",
    "rollout M:2 --steps 50%,10% --reason falling",
    "rollout M:2 --steps 10%,50% --min-requests 5 --reason stepwise",
    "rollout M:2 --steps 10%,50% --min-requests 5 --reason again",
    "rollout M:2 --reason other",
    "rollout M",
    "canary M --stop",
    "import /nowhere --model ..",
    "import /nowhere --model M",
]


def test_every_command_says_the_same_both_ways(run: Run, stand: Stand) -> None:
    over = _over(run, stand)
    for line in COMMANDS:
        for form in ([], ["--json"]):
            if form and line.split()[0] in ("promote", "canary", "shadow", "rollback", "import"):
                continue  # said once, below
            here = run(*line.replace("M", "a-here").split(" "), *form)
            there = over(*line.replace("M", "a-over").split(" "), *form)
            assert _plain(*there) == _plain(*here), line
            assert here[0] in (0, 2, 3, 4, 5)
    for line in ("promote M:1 --reason x", "promote M:3 --reason x", "canary M:2 --share 0.5", "canary M --stop",
                 "promote M:2 --reason x --expect-generation 0", "rollback M --reason x"):  # fmt: skip
        here = run(*line.replace("M", "a-here").split(" "), "--json")
        there = over(*line.replace("M", "a-over").split(" "), "--json")
        assert _plain(*there) == _plain(*here), line
        assert json.loads(there[1])
    with transaction() as conn:
        ours, theirs = (deployments.history(conn, model) for model in ("a-here", "a-over"))
        assert deployments.verify_chain(conn, "a-over") == []
    assert len(ours) == len(theirs) > 8
    assert all(entry.actor.startswith("os:") and "@" in entry.actor for entry in ours)
    assert {re.sub(r"\w+ \(", "K (", entry.actor) for entry in theirs} == {"key:K (the operator)"}
    both = [run("models", "--json")[1], over("models", "--json")[1]]
    assert both[0] == both[1]
    assert {model["model"] for model in json.loads(both[0])["models"]} == {"a-here", "a-over", "real"}


def _plain(code: int, out: str, err: str) -> tuple[int, list[str], list[str]]:
    """What the two ways must agree in: not the model's name, the times, hashes, the person and the column widths."""

    def words(text: str) -> list[str]:
        text = text.replace("a-over", "a-here")
        text = re.sub(r"key:\w+ \(the operator\)|os:[\w.-]+@[\w.-]+", "WHO", text)
        text = re.sub(r"20\d\d-\d\d-\d\d[T ][\d:.]+Z", "TIME", text)
        text = re.sub(r'("(?:hash|previous_hash)": )"[^"]*"', r'\1"H"', text)
        return [" ".join(line.split()) for line in text.splitlines()]

    return code, words(out), words(err)


def test_files_travel_and_are_checked_on_arrival(run: Run, stand: Stand, tmp_path: Any) -> None:
    over = _over(run, stand)
    assert run("export", "real:1", str(tmp_path / "here"))[0] == 0
    code, out, _ = over("export", "real:1", str(tmp_path / "there"), "--json")
    assert (code, json.loads(out)["path"]) == (0, str(tmp_path / "there"))
    kept = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
            for f in (tmp_path / "here", tmp_path / "there")]  # fmt: skip
    assert kept[0] == kept[1]
    assert over("export", "real:1", str(tmp_path / "there"))[0] == 2
    ways = [way("verify", "real:1", "--json") for way in (run, over)]
    assert ways[0] == ways[1]
    with transaction() as conn:
        from registry import versions

        weights = versions.get(conn, "real", 1).folder() / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    code, _, err = over("export", "real:1", str(tmp_path / "bad"))
    assert (code, (tmp_path / "bad").exists()) == (3, False)
    assert "adapter_model.safetensors has digest" in err
    assert over("verify", "real:1")[0] == 1
    answer = stand.http.get(f"{stand.url}/api/v1/models/real/versions/1/files/../x", headers=stand.header("operator"))
    assert answer.status_code == 404


def test_what_a_key_may_not_do_is_refused(run: Run, stand: Stand) -> None:
    viewer, operator, admin = (_over(run, stand, role) for role in ("viewer", "operator", "admin"))
    assert viewer("versions", "a-over")[0] == 0
    code, out, err = viewer("promote", "a-over:1", "--reason", "x", "--json")
    assert (code, json.loads(out)["error"]["code"], err) == (3, "not_allowed", "")
    assert operator("promote", "a-over:3", "--reason", "x", "--force")[0] == 3
    code, out, _ = admin("promote", "a-over:3", "--reason", "known", "--force", "--json")
    assert (code, json.loads(out)["entry"]["forced"]) == (0, True)
    code, out, _ = operator("models", "--json", TUNESMITH_API_KEY="ts_no_such")
    assert (code, json.loads(out)["error"]["code"]) == (3, "not_authenticated")
    assert stand.keys["operator"] not in operator("models", TUNESMITH_URL="http://127.0.0.1:9")[2]


def test_an_address_that_is_none_is_said_in_a_sentence(run: Run, home: Any) -> None:
    for environment, code, words in (
        ({"TUNESMITH_URL": "http://127.0.0.1:9", "TUNESMITH_API_KEY": "ts_a_b"}, 6, "does not answer at http://127."),
        ({"TUNESMITH_URL": "http://127.0.0.1:9"}, 2, "TUNESMITH_API_KEY is not"),
        ({"TUNESMITH_URL": "here", "TUNESMITH_API_KEY": "ts_a_b"}, 2, "TUNESMITH_URL"),
    ):
        found, out, err = run("models", **environment)
        assert (found, out) == (code, ""), err
        assert words in err
        assert "ts_a_b" not in err
