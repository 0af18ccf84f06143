"""How long after a promotion does the new version answer? And does anybody notice?

    .venv/bin/python tests/benchmarks/rollover.py [--short]

Two versions of builtin:tiny, each trained to answer one word, behind `tunesmith engine` and `tunesmith serve`, and
clients that ask without a pause. (a) From the last moment before the ledger's entry is committed, in the database's
time, to the first byte of an answer by the new version, which is resident (of a stream, which begins with its first
token): promotions and rollbacks by turns. (b) The same from the start of the shell command `tunesmith promote`. (c)
10,000 requests while versions are promoted and rolled back 50 times: none may fail, and text and version header must
agree in every answer; every one must be recorded. (d) Four times as many requests a second as are answered at the most:
what is served then, and that the rest is refused and recorded. No time is asserted: figures are printed, with the
targets they have. Run it alone.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from _home import Home, started, temporary_home
from serving import add_version

from deploy.auth import create_key
from infra import ports
from infra.db import one, transaction
from infra.web import answers
from registry import bases, deployments, prompts

WORDS = {1: "amber", 2: "cobalt"}
QUESTIONS = ("Which colour?", "Say the word.", "What now?", "Once more, please.")
CLIENTS = 4
LOAD = Path(__file__).with_name("gateway_peer.py")


@dataclass(frozen=True, kw_only=True)
class Size:
    flips: int
    commands: int
    requests: int
    changes: int
    overloads: int


LONG = Size(flips=40, commands=15, requests=10_000, changes=50, overloads=5)
SHORT = Size(flips=6, commands=2, requests=600, changes=6, overloads=1)


@dataclass(frozen=True, kw_only=True)
class Answer:
    first_byte: float  # time.time()
    status: int
    version: str
    text: str


@dataclass(kw_only=True)
class Clients:
    """They ask from when they are started until `stop`; `asked` counts what all had answered."""

    asked: ClassVar[int] = 0

    port: int
    key: str
    stream: bool = False
    answers: list[Answer] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> Clients:
        self.threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(CLIENTS)]
        for thread in self.threads:
            thread.start()
        return self

    def stop(self) -> list[Answer]:
        self.stopping.set()
        for thread in self.threads:
            thread.join()
        Clients.asked += sum(answer.status == 200 for answer in self.answers)
        return self.answers

    def until(self, version: str, since: float) -> float:
        """When the first byte of a version's answer came, since a time."""
        limit = time.monotonic() + 60
        seen = 0
        while time.monotonic() < limit:
            known = len(self.answers)
            for answer in self.answers[seen:known]:
                if answer.version == version and answer.first_byte > since:
                    return answer.first_byte
            seen = known
            time.sleep(0.001)
        raise SystemExit(f"{version} never answered")

    def _ask(self, number: int) -> None:
        question = {"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}
        body = json.dumps(
            {"model": "demo", "messages": [question], "temperature": 0, "max_tokens": 8, "stream": self.stream}
        )
        head = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        while not self.stopping.is_set():
            connection.request("POST", "/v1/chat/completions", body, head)
            response = connection.getresponse()
            first = time.time()
            said = response.read()
            text = said.decode()
            if response.status == 200 and not self.stream:
                text = json.loads(said)["choices"][0]["message"]["content"]
            version = response.getheader("x-tunesmith-version") or ""
            self.answers.append(Answer(first_byte=first, status=response.status, version=version, text=text))
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="less of everything")
    size = SHORT if parser.parse_args().short else LONG
    with temporary_home() as home, served(home) as (port, key):
        flips(size, port, key)
        commands(size, port, key)
        nobody_notices(size, port, key)
        overload(size, port, key)


def flips(size: Size, port: int, key: str) -> None:
    clients = Clients(port=port, key=key, stream=True).start()
    taken = []
    for turn in range(size.flips):
        since, version = change(turn)
        taken.append(1000 * (clients.until(version, since) - since))
        time.sleep(0.25)
    clients.stop()
    figures("(a) ledger to first byte, resident", taken, 24)


def commands(size: Size, port: int, key: str) -> None:
    clients = Clients(port=port, key=key, stream=True).start()
    command = [sys.executable, "-m", "pipelines.cli", "promote"]
    taken = []
    for turn in range(size.commands):
        number = 2 if serving() == 1 else 1
        since = time.time()
        with subprocess.Popen(
            [*command, f"demo:{number}", "--reason", f"turn {turn}", "--force"], stdout=subprocess.DEVNULL
        ) as process:
            taken.append(1000 * (clients.until(f"demo:{number}", since) - since))
            if process.wait() != 0:
                raise SystemExit("the command failed")
        time.sleep(0.25)
    clients.stop()
    figures("(b) shell command to first byte", taken, 500)


def nobody_notices(size: Size, port: int, key: str) -> None:
    settle()
    before = recorded()
    begun = time.monotonic()
    clients = Clients(port=port, key=key).start()
    for turn in range(size.changes):
        while len(clients.answers) < (turn + 1) * size.requests // (size.changes + 1):
            time.sleep(0.005)
        change(turn)
    while len(clients.answers) < size.requests:
        time.sleep(0.005)
    found = clients.stop()
    seconds = time.monotonic() - begun
    failed = [a for a in found if a.status != 200]
    words = {f"demo:{number}": word for number, word in WORDS.items()}
    wrong = [a for a in found if a.status == 200 and a.text.strip() != words.get(a.version)]
    settle()
    by = {name: sum(a.version == name for a in found) for name in words}
    print(
        f"(c) {len(found)} requests in {seconds:.0f} s, {size.changes} promotions and rollbacks: {len(failed)} failed, "
        f"{len(wrong)} with another version's text, {recorded() - before} recorded; {by}"
    )
    if failed or wrong or recorded() - before != len(found):
        raise SystemExit(f"That must not be: {(failed or wrong)[:3]}")


def overload(size: Size, port: int, key: str) -> None:
    """The peak with 32 connections that ask without a pause, then as many requests as four times that, when they are
    due, over 512."""
    shares = []
    before = recorded(), recorded(429)
    answered = refused = 0
    for _ in range(size.overloads):
        most = load(port, key, 32, 0.0)
        peak = most["answered"] / most["seconds"]
        over = load(port, key, 512, 4 * peak)
        shares.append(over["answered"] / over["seconds"] / peak)
        answered += most["answered"] + over["answered"]
        refused += most["refused"] + over["refused"]
        print(
            f"(d) peak {peak:.0f}/s; of {4 * peak:.0f}/s: {over['answered'] / over['seconds']:.0f}/s served, "
            f"{over['refused'] / over['seconds']:.0f}/s refused, {over['failed']} failed",
            flush=True,
        )
        if over["failed"]:
            raise SystemExit(f"That must not be: {over['why']}")
    until = time.monotonic() + 60
    while (now := (recorded() - before[0], recorded(429) - before[1])) != (
        answered,
        refused,
    ) and time.monotonic() < until:
        time.sleep(0.2)
    print(
        f"(d) at four times the peak {statistics.median(shares):.0%} of the peak is served (target 90 % or more); "
        f"{answered} answered and {refused} refused, {now[0]} and {now[1]} recorded"
    )
    if now != (answered, refused):
        raise SystemExit("That must not be.")


def settle() -> None:
    """Until all that was answered is recorded."""
    until = time.monotonic() + 60
    while recorded() != Clients.asked and time.monotonic() < until:
        time.sleep(0.2)


def load(port: int, key: str, connections: int, rate: float) -> dict[str, Any]:
    message = {"role": "user", "content": QUESTIONS[0]}
    body = {"model": "demo", "messages": [message], "temperature": 0, "max_tokens": 8}
    asked = {"headers": {"authorization": f"Bearer {key}"}, "body": body, "words": '"model":"demo:'}
    arguments = [sys.executable, str(LOAD), "load", f"http://127.0.0.1:{port}/v1/chat/completions"]
    done = subprocess.run(
        [*arguments, "8", str(connections), str(rate)], input=json.dumps(asked), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def change(turn: int) -> tuple[float, str]:
    """Promote the other version, or roll back to it; when that was all but committed, and who serves from then on."""
    number = 2 if serving() == 1 else 1
    with transaction() as conn:
        if turn % 2 == 0:
            deployments.promote(conn, "demo", number, actor="benchmark", reason="a turn", force=True)
        else:
            deployments.rollback(conn, "demo", actor="benchmark", reason="a turn")
        champion = deployments.read(conn, "demo").champion
        # The entry's own time is that of its transaction's beginning, before anybody could know of it
        at = one(conn, "select clock_timestamp() as at")["at"]
    return at.timestamp(), f"demo:{champion}"


def serving() -> int | None:
    with transaction() as conn:
        return deployments.read(conn, "demo").champion


def recorded(status: int = 200) -> int:
    with transaction() as conn:
        row = conn.execute("select count(*) as n from request_event where status = %s", (status,)).fetchone()
    assert row is not None
    return int(row["n"])


def figures(what: str, taken: list[float], target: float) -> None:
    taken.sort()
    print(
        f"{what}: median {statistics.median(taken):.1f} ms, 90 % within {taken[int(0.9 * (len(taken) - 1))]:.1f}, "
        f"longest {taken[-1]:.1f} ({len(taken)} times; target {target:g})",
        flush=True,
    )


# ---------------------------------------------------------------- what serves


@contextmanager
def served(home: Home) -> Iterator[tuple[int, str]]:
    """An engine, a gateway, and a key for it; both versions have answered."""
    base = bases.resolve("builtin:tiny")
    for number, word in WORDS.items():
        folder = home.folder / f"adapter-{number}"
        train(base.folder, folder, word)
        add_version("demo", number, base=base.digest, adapter=folder)
    with transaction() as conn:
        key = create_key(conn, name="bench", role="service").key
        for number in WORDS:
            deployments.promote(conn, "demo", number, actor="benchmark", reason="benchmark", force=True)
    os.environ |= {"TUNESMITH_ENGINE_SECRET": "benchmark", "OMP_NUM_THREADS": "1"}
    engine, gateway = ports.free(), 0
    gateway = ports.free(but=[engine])
    with ExitStack() as stack:
        for name, port, arguments in (
            ("engine", engine, ["engine", "--base", base.digest, "--port", str(engine)]),
            ("gateway", gateway, ["serve", "--port", str(gateway)]),
        ):
            log = home.folder / f"{name}.log"
            path = "/health" if name == "engine" else "/readyz"
            ready = partial(answers, f"http://127.0.0.1:{port}{path}")
            if name == "engine":
                ready = partial(_taken, port)
            stack.enter_context(started(partial(_child, arguments, log), ready, f"The {name}", log))
        warm = Clients(port=gateway, key=key).start()
        time.sleep(2)
        warm.stop()
        yield gateway, key


def _taken(port: int) -> bool:
    return not ports.is_free(port)


def _child(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *arguments], stdout=file, stderr=file, start_new_session=True
        )


def train(base: Path, folder: Path, word: str) -> None:
    """A LoRA adapter of PEFT's that answers one word, whatever it is asked."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = bases.load_tokenizer(base)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(bases.load_model(base, "float32"), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows: list[Any] = []
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": word}]
        ids, length = prompts.encode_pair(tokenizer, turns)
        labels = [-100] * length + ids[length:]
        rows.append((torch.tensor([ids]), torch.tensor([labels])))
    for _ in range(400):
        outputs = [model(input_ids=ids, labels=labels) for ids, labels in rows]
        said = [o.logits[0, :-1].argmax(-1) for o in outputs]
        if all(
            (labels[0, 1:] == -100).logical_or(labels[0, 1:] == s).all()
            for s, (_, labels) in zip(said, rows, strict=True)
        ):
            break
        sum(o.loss for o in outputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        raise SystemExit(f"The adapter for {word} did not learn it.")
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
