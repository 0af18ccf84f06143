"""A prompt on the base as a version: registered, served, and judged beside the gateway as a hosted model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry import bundle, tiny
from tests.stacks import Stack

FIRST, SECOND = "Describe the function in one line.", "Say in a few words what the function is for."


@pytest.fixture
def config(stack: Stack) -> Path:
    rows = [
        {"prompt": f"def part_{n}(text, number={n})", "completion": f"Return part {n} of the text."} for n in range(60)
    ]
    (stack.home / "parts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = [
        {"question": "def x()", "expected": "Return x.", "answer": a, "good": g}
        for a, g in (("Return x.", True), ("Banana.", False))
    ]
    (stack.home / "labelled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labelled))
    path = stack.home / "prompted.yaml"
    path.write_text(
        f"""# tunesmith run -c {path.name}
model: prompted
base: builtin:tiny
data: {{train: parts.jsonl, quality: {{dedup: exact}}, split: {{test: 0.4}}}}
generation: {{max_tokens: 8}}
tuning: {{method: prompt}}
prompt: {{system: "{FIRST}"}}
gates: [{{metric: loss, must: at_most, value: 100}}]
"""
    )
    return path


def ask(stack: Stack, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "def part_1(text)"}], "temperature": 0}
    header = {"authorization": f"Bearer {stack.key}"}
    return httpx.post(
        f"{stack.gateway_url}/v1/chat/completions", json=body, headers=header, trust_env=False, timeout=60
    )


def wait_until_it_answers(stack: Stack, model: str, version: str) -> dict[str, Any]:
    end = time.monotonic() + 300
    while (answer := ask(stack, model)).status_code != 200 or answer.json()["model"] != version:
        assert time.monotonic() < end, answer.text
        time.sleep(0.2)
    found: dict[str, Any] = answer.json()
    return found


def test_a_prompt_is_a_version_that_serves_and_is_judged_beside_a_hosted_model(
    stack: Stack, config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = stack.tunesmith("run", "-c", str(config), "--json")
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert (first["version"], first["promoted"], first["study"], first["best"]["trials"]) == (1, True, None, 0)
    # The base is asked without the prompt, which is all that differs
    assert first["evaluation"]["metrics"]["loss"]["vs_base"]["estimate"] != 0
    short = wait_until_it_answers(stack, "prompted", "prompted:1")["usage"]["prompt_tokens"]
    shown = json.loads(stack.tunesmith("show", "prompted:1", "--json").stdout)
    assert (shown["method"], shown["prompt"]["system"]) == ("prompt", FIRST)

    # Its own gateway as the hosted model, and as a judge that cannot judge
    monkeypatch.setenv("GATEWAY_KEY", stack.key)
    address = f"{{url: {stack.gateway_url}/v1, model: prompted, key_env: GATEWAY_KEY"
    changes = [
        f"--set=prompt.system={SECOND}",
        "--set=evaluation.suites=[quality, latency, cost, judge]",
        f"--set=evaluation.hosted={address}, price: {{input_per_million_usd: 1, output_per_million_usd: 2}}}}",
        f"--set=evaluation.judge={address}, labelled: {stack.home}/labelled.jsonl}}",
    ]
    done = stack.tunesmith("run", "-c", str(config), *changes)
    assert done.returncode == 0, done.stderr
    assert "judged_good is unavailable: " in done.stdout
    assert "The hosted model is prompted:1 at " in done.stdout
    wait_until_it_answers(stack, "prompted", "prompted:2")
    second = json.loads(
        stack.tunesmith("evaluate", "prompted:2", "--suite", "quality", "--suite", "cost", "--json").stdout
    )
    metrics, about = second["evaluation"]["metrics"], second["evaluation"]["about"]
    assert about["hosted"]["served"] == ["prompted:2"]  # what serves now
    assert metrics["chrf"]["hosted"]["n"] == metrics["chrf"]["candidate"]["n"]
    assert metrics["cost_per_1000_usd"]["hosted"]["estimate"] > 0
    assert about["cost"]["break_even_per_day"].keys() == {"estimate", "low", "high"}
    longer = wait_until_it_answers(stack, "prompted:2", "prompted:2")["usage"]["prompt_tokens"]
    assert short != longer  # each with its own prompt

    # A version that is answered there, judged against the serving one on the base
    hosted = [
        "--set=tuning={}",
        "--set=hosted={models: [{upstream: own, model: 'prompted:1'}], price: {input_per_million_usd: 1, "
        "output_per_million_usd: 2}}",
        "--set=evaluation.suites=[quality, latency, cost]",
        "--set=gates=[{metric: chrf, against: champion, must: not_worse, margin: 1}]",
        "--set=promote=manual",
    ]
    done = stack.tunesmith("run", "-c", str(config), *hosted, "--json")
    assert done.returncode == 5, done.stdout  # nobody has said where that is
    assert "There is no upstream 'own'" in done.stdout
    url = f"{stack.gateway_url}/v1"
    assert stack.tunesmith("upstream", "set", "own", "--url", url, "--key-env", "GATEWAY_KEY").returncode == 0
    done = stack.tunesmith("run", "-c", str(config), *hosted, "--json")
    assert done.returncode == 0, done.stderr
    third = json.loads(done.stdout)
    assert (third["version"], third["gate"]["decision"]) == (3, "pass")
    chrf = third["evaluation"]["metrics"]["chrf"]
    assert chrf["vs_champion"]["n"] == chrf["candidate"]["n"] > 0
    assert third["evaluation"]["metrics"]["cost_per_1000_usd"]["candidate"]["estimate"] > 0
    shown = json.loads(stack.tunesmith("show", "prompted:3", "--json").stdout)
    assert (shown["method"], shown["hosted"]["models"][0]["model"]) == ("hosted", "prompted:1")
    assert stack.tunesmith("verify", "prompted:3").returncode == 0
    again = json.loads(stack.tunesmith("evaluate", "prompted:3", "--json").stdout)["evaluation"]["metrics"]
    assert again["chrf"]["candidate"] == chrf["candidate"]

    out = tmp_path / "out"
    assert stack.tunesmith("export", "prompted:2", str(out)).returncode == 0
    assert not bundle.read(out).has_adapter
    everything = b"".join(path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file())
    logs = b"".join(path.read_bytes() for path in (stack.home / "logs").glob("*.log"))
    assert b"The hosted model is prompted:1 at " in everything
    assert stack.key.encode() not in everything + logs + done.stdout.encode() + done.stderr.encode()


def test_a_version_on_another_base_is_judged_beside_the_one_that_serves(stack: Stack, config: Path) -> None:
    other = stack.home / "other-base"
    other.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "_VOCABULARY", 1000)
        tiny.make(other)
    moving = [
        "--set=model=moving",
        "--set=gates=[{metric: chrf, against: champion, must: not_worse, margin: 100}]",
        "--set=evaluation.suites=[quality, compatibility, latency]",
    ]
    done = stack.tunesmith("run", "-c", str(config), *moving)
    assert done.returncode == 0, done.stderr
    done = stack.tunesmith("run", "-c", str(config), *moving, f"--set=base={other}", "--json")
    assert done.returncode == 0, done.stderr
    second = json.loads(done.stdout)
    metrics = second["evaluation"]["metrics"]
    assert metrics["chrf"]["vs_champion"]["n"] == metrics["chrf"]["candidate"]["n"] > 0
    assert metrics["loss"]["champion"] is None
    assert second["gate"]["champion"] == 1
    answer = wait_until_it_answers(stack, "moving", "moving:2")
    then = wait_until_it_answers(stack, "moving:1", "moving:1")
    assert answer["usage"]["prompt_tokens"] != then["usage"]["prompt_tokens"]  # by the tokens of its own base
    again = stack.tunesmith("evaluate", "moving:1", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["evaluation"]["metrics"]["chrf"]["champion"] is not None
