"""A golden set asked again, of the gateway that serves: what is kept, what is told, and what it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import engine_peer
import pytest
from address_peer import serving
from click.testing import CliRunner
from lora import save_adapter, save_base
from serving import Stand, add_version, child, make_stand, wait_for

from deploy.auth import list_keys
from infra.db import one, transaction
from infra.errors import Conflict, NotFound, Unreachable, UsageError
from infra.settings import Settings, get_settings
from monitoring import alerts, commands, golden, story, watch, windows
from pipelines import rescoring
from pipelines.config_address import Judge
from pipelines.evaluation.address import Client
from pipelines.evaluation.judgement import evaluate
from pipelines.evaluation.suites.judge import Judge as Asking
from pipelines.evaluation.suites.judge import Question
from registry import bases, datasets, deployments, leases
from registry.bundle import Generation
from registry.datasets import Dataset, Row, make_row
from registry.statistics import mean_ci, paired_difference

SAYS = "demo-v1 word0 word1"  # the peer, of version 1


def asks(question: str, answer: str) -> Row:
    return make_row([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], group=question)


def kept(rows: Sequence[Row]) -> Dataset:
    return datasets.keep({"test": rows}, counts={}, sources=[], recipe={})


def judged(rows: Sequence[Row], answers: Sequence[str] | None) -> dict[str, Any]:
    """As much of an evaluation as asking again reads."""
    found = {row.id: answer for row, answer in zip(rows, answers or (), strict=False)}
    return {"metrics": {}, "answers": found} if answers is not None else {"metrics": {}}


def promote(number: int) -> None:
    with transaction() as conn:
        deployments.promote(conn, "demo", number, actor="test", reason="test", force=True)


@pytest.fixture
def stand(database: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    """A gateway before an engine that answers with its adapter's name; nothing serves yet."""
    with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway():
        wait_for(lambda: stand._status() != 0, what="for the gateway")
        monkeypatch.setenv("TUNESMITH_GATEWAY_URL", stand.url)
        get_settings.cache_clear()
        yield stand


def serve(stand: Stand, rows: Sequence[Row], answers: Sequence[str] | None, number: int = 1) -> None:
    """A version that was judged by these rows, with these answers."""
    add_version("demo", number, dataset=kept(rows), evaluation=judged(rows, answers))
    promote(number)
    wait_for(lambda: stand.ask().headers.get("x-tunesmith-version") == f"demo:{number}")


def test_what_serves_is_asked_again_and_held_against_its_judgement(stand: Stand) -> None:
    rows = [asks(f"question {n}", SAYS) for n in range(24)]
    serve(stand, rows, [SAYS] * 20 + ["demo-v1"] * 4)
    done = CliRunner().invoke(rescoring.rescore, ["demo", "--json"])
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert (found["model"], found["version"], found["metric"]) == ("demo", 1, "token_f1")
    assert (found["rows"], found["failed"]) == (24, 0)
    assert found["score"]["estimate"] == 1
    assert found["reference"]["estimate"] == pytest.approx((20 + 4 * 2 / 3) / 24)
    assert found["difference"]["estimate"] == pytest.approx(4 / 3 / 24)
    assert found["difference"]["level"] == golden.LEVEL
    assert (found["changed"]["worse"], found["changed"]["better"]) == (0, 4)
    assert {e["then"] for e in found["changed"]["examples"]} == {"demo-v1"}
    assert {e["now"] for e in found["changed"]["examples"]} == {SAYS}
    with transaction() as conn:
        (row,) = golden.newest(conn, "demo", 1, limit=5)
    assert json.loads(json.dumps(row, default=str)) == found | {"at": str(row["at"])}
    shown = CliRunner().invoke(rescoring.rescore, ["demo"]).stdout
    assert "demo:1 answers 24 golden rows with a token_f1 of 1.000" in shown
    assert "0 are worse, 4 better" in shown
    wait_for(lambda: sum(event["slot"] == "pinned" for event in stand.events()) == 48, what="for the events")
    asked = [event for event in stand.events() if event["slot"] == "pinned"]
    assert {(event["version"], event["status"]) for event in asked} == {(1, 200)}
    assert stand.stats()["bodies"][-1]["temperature"] == 0
    _nobody_takes_it_for_traffic(asked)


def _nobody_takes_it_for_traffic(asked: Sequence[dict[str, Any]]) -> None:
    """But it has a price, and one key however often it is done."""
    with transaction() as conn:
        while windows.close(conn).events:
            pass
        at = [event["at"] for event in asked]
        counted = windows.read(conn, "demo", 1, min(at), max(at))
        ours = [key for key in list_keys(conn) if key.name == "rescore of demo"]
        used = one(conn, "select sum(requests) as n from key_usage where key_id = %(id)s", {"id": ours[0].id})["n"]
    assert counted.slots.get("pinned", 0) == 0
    assert used == 48
    assert len(ours) == 1
    assert ours[0].revoked_at is not None


def test_a_version_whose_judgement_kept_no_answers_is_held_against_its_first_ones(stand: Stand) -> None:
    rows = [asks(f"question {n}", SAYS if n % 2 else f"no {n}") for n in range(12)]
    serve(stand, rows, None)
    first, second = rescoring.again("demo"), rescoring.again("demo")
    assert (first["reference"], first["difference"]) == (None, None)
    assert "later ones are held against these" in golden.in_a_sentence(first)
    assert second["reference"] == first["score"]
    assert (second["difference"]["estimate"], second["changed"]["worse"]) == (0, 0)
    with transaction() as conn:
        conn.execute("update rescoring set at = now() - interval '100 days'")
        golden.drop_old(conn, 90)
        assert golden.first_answers(conn, "demo", 1) is not None
        assert len(golden.newest(conn, "demo", 1, limit=5)) == 1


def test_a_judge_that_gates_stand_on_judges_both_answers_anew(stand: Stand, tmp_path: Path) -> None:
    """So another judge is no other version, and that it is another is told."""
    rows = [asks(f"question {n}", "the right one") for n in range(24)]
    strict = False

    def judge(body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"]
        if "question 3\n" in text:
            return "I cannot tell."
        return f"Verdict: {'good' if 'word1' in text or ('fine' in text and not strict) else 'bad'}"

    with serving(judge, "judge-1") as peer:
        judge_section = {"url": peer.url, "model": "judge", "labelled": str(tmp_path / "labelled.jsonl")}
        config = {
            "evaluation": {"suites": ["quality", "judge"], "judge": judge_section},
            "gates": [{"metric": "loss"}, {"metric": "judged_good"}],
        }
        score = {"estimate": 1.0, "low": 0.86, "high": 1.0, "level": 0.95, "n": 24, "higher_is_better": True}
        known = judged(rows, ["fine"] * 20 + [""] * 4) | {"metrics": {"judged_good": {"candidate": score}}}
        with Client(Judge.model_validate(judge_section)) as client:
            asking = Asking(client, Judge.model_validate(judge_section))
            asking.verdicts([Question(question="q", expected=None, answer="word1")])
        known["about"] = {"judge": {"served": "judge-1", "version": asking.version}}
        add_version("demo", 1, dataset=kept(rows), evaluation=known, config=config)
        promote(1)
        wait_for(lambda: stand.ask().headers.get("x-tunesmith-version") == "demo:1")
        found = rescoring.again("demo")
        assert (found["metric"], found["rows"], found["score"]["n"]) == ("judged_good", 24, 23)
        assert (found["score"]["estimate"], found["changed"]["better"]) == (1.0, 4), "an empty answer is a bad one"
        assert found["reference"]["estimate"] == pytest.approx(19 / 23)
        assert "The judge has changed behind its name: of the answers that it gave 1.000" in golden.in_a_sentence(found)
        strict = True
        again = rescoring.again("demo")
        assert (again["score"]["estimate"], again["reference"]["estimate"]) == (1.0, 0.0)
        assert looked() == [], "the version is not worse"
        peer.model = "judge-2"
        assert "The judge is judge-2; it was judge-1, or was asked otherwise, then." in golden.in_a_sentence(
            rescoring.again("demo")
        )
    with pytest.raises(Unreachable, match="The judge did not judge the golden set"):
        rescoring.again("demo")
    assert golden.judge_in_words(found | {"reference": None}) == [], "as when it is asked again for the first time"
    add_version(
        "demo", 2, dataset=kept(rows), evaluation=known | {"doubted": {"judged_good": "kappa 0"}}, config=config
    )
    promote(2)
    assert rescoring.again("demo")["metric"] == "token_f1", "no judge that people do not agree with"


def looked() -> list[dict[str, Any]]:
    """The open alerts after a watcher's turn."""
    watcher = watch.Watcher("test")
    watcher.turn()
    watcher.release()
    found = json.loads(CliRunner().invoke(commands.alerts, ["demo", "--json"]).stdout)["alerts"]
    return [alert for alert in found if alert["rule"] == alerts.GOLDEN]


def rescored(now: Sequence[float], then: Sequence[float]) -> None:
    """As if version 1 had been asked again."""
    with transaction() as conn:
        golden.keep(
            conn,
            "demo",
            1,
            metric="token_f1",
            rows=len(now),
            failed=0,
            score=mean_ci(now, higher_is_better=True).to_json(),
            reference=mean_ci(then, higher_is_better=True).to_json(),
            difference=paired_difference(now, then, higher_is_better=True, level=golden.LEVEL).to_json(),
            changed={"worse": 0, "better": 0, "examples": []},
            answers=None,
        )


def test_worse_answers_are_an_alert_until_they_are_as_good_again(stand: Stand) -> None:
    rows = [asks(f"question {n}", SAYS if n < 8 else f"yes {n}") for n in range(24)]
    serve(stand, rows, [SAYS] * 8 + [f"no {n}" for n in range(16)])
    rescoring.again("demo")
    assert looked() == [], "it is as good as it was"
    serve(stand, rows, [row.answer for row in rows], number=2)
    rescoring.again("demo")
    (alert,) = looked()
    assert (alert["version"], alert["cause"], alert["severity"]) == (2, "system", "warning")
    assert "24 answers are worse, 0 better" in alert["message"]
    assert alert["details"]["difference"]["high"] < 0
    rescoring.again("demo")
    assert [each["id"] for each in looked()] == [alert["id"]], "one alert, however often it is asked"
    with transaction() as conn:
        told = story.of(conn, conn.execute("select * from alert").fetchone() or {}, datetime.now(UTC))
    assert any("tunesmith rollback demo" in line for line in told.advice)
    promote(1)
    assert looked() == [], "what serves no more"


def test_an_alert_neither_flickers_nor_stays(database: Settings) -> None:
    add_version("demo", 1, dataset=kept([asks("q", "a")]))
    promote(1)
    then = [1.0] * 40
    rescored([0.0] * 12 + [1.0] * 28, then)
    assert len(looked()) == 1
    rescored([0.0] * 5 + [1.0] * 35, then)
    with transaction() as conn:
        (row,) = golden.newest(conn, "demo", 1)
    assert row["difference"]["high"] > 0, "no loss for sure"
    assert len(looked()) == 1, "but not as good as before either"
    rescored([0.0] + [1.0] * 39, [0.0, 1.0, *then[2:]])
    assert looked() == []
    rescored([0.0] * 5 + [1.0] * 35, then)
    assert looked() == [], "which alone opens none"


def test_rows_without_an_answer_count_as_empty_ones_and_many_are_a_failure(stand: Stand) -> None:
    rows = [asks("fail" if n == 0 else f"question {n}", SAYS) for n in range(12)]
    serve(stand, rows, [SAYS] * 12)
    found = rescoring.again("demo")
    assert (found["failed"], found["changed"]["worse"]) == (1, 1)
    assert found["score"]["estimate"] == pytest.approx(11 / 12)
    failing = [asks(f"{n}", SAYS) for n in range(4)] + [asks("fail", SAYS)]
    serve(stand, failing, [SAYS] * 5, number=2)
    with pytest.raises(Unreachable, match="1 of 5 requests have no answer"):
        rescoring.again("demo")


def test_it_says_what_it_lacks(stand: Stand) -> None:
    with pytest.raises(NotFound, match="No version of demo serves"):
        rescoring.again("demo")
    add_version("demo", 1)
    promote(1)
    with pytest.raises(UsageError, match="no test rows"):
        rescoring.again("demo")
    with transaction() as conn:
        leases.acquire(conn, "rescore:demo", "someone")
    with pytest.raises(Conflict, match="someone"):
        rescoring.again("demo")


def test_a_real_model_answers_as_it_was_judged_and_another_adapter_does_not(
    database: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases.resolve(str(save_base(tmp_path / "base")))
    model = bases.load_model(base.folder, "float32")
    adapters = [save_adapter(model, tmp_path / f"adapter{n}", seed=n) for n in (1, 2)]
    questions = [f"the cat sat on mat {n}" for n in range(8)]
    shared: dict[str, Any] = {
        "base": base, "candidate": adapters[0], "champion": None, "system": None, "names": ("quality",),
        "generation": Generation(max_tokens=17),
    }  # fmt: skip
    said = evaluate(rows=[asks(q, "x") for q in questions], **shared).evaluation["answers"]
    rows = [asks(q, said[asks(q, "x").id]) for q in questions]
    evaluation = evaluate(rows=rows, **shared).evaluation
    for number in (1, 2):  # the second was judged as the first, and is another
        add_version(
            "demo", number, base=base.digest, adapter=adapters[number - 1], dataset=kept(rows), evaluation=evaluation
        )
    promote(1)
    with make_stand(database.home) as stand:
        with transaction() as conn:
            conn.execute("delete from engine")
        engine = ("-m", "pipelines.cli", "engine", "--base", base.digest, "--port", stand.engine_url.rsplit(":")[-1])
        environment = {"TUNESMITH_ENGINE_SECRET": engine_peer.SECRET, "OMP_NUM_THREADS": "1"}
        with child(*engine, log=database.home / "engine.log", **environment), stand.running_gateway():
            wait_for(lambda: stand._status() == 200, 120, f"for gateway and engine, see {database.home}")
            monkeypatch.setenv("TUNESMITH_GATEWAY_URL", stand.url)
            get_settings.cache_clear()
            same = rescoring.again("demo")
            promote(2)
            other = rescoring.again("demo")
    assert (same["version"], same["score"]["estimate"], same["changed"]["worse"]) == (1, 1.0, 0)
    assert other["version"] == 2
    assert other["difference"]["high"] < 0
    assert other["changed"]["worse"] == len(rows)
