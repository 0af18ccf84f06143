"""`tunesmith up`, `down`, `status`, `doctor`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from infra import log, processes, services, state, web
from infra.console import err, json_option, out, print_json
from infra.errors import TunesmithError, Unreachable, UsageError
from infra.settings import Settings, default_home, own_settings

STANDARD = ("postgres", "mlflow", "prefect", "gateway", "watcher", "runner")


@click.command()
@click.option("--detach", is_flag=True, help="Return when the stack is ready; it runs on in the background.")
@click.option("--port", type=click.IntRange(1, 65535), help="The gateway's port.  [default: 8080, or a free one]")
@click.option("--report", "report_to", type=int, hidden=True)
@json_option
def up(detach: bool, port: int | None, report_to: int | None, as_json: bool) -> None:
    """Start the local stack: PostgreSQL, MLflow, Prefect, gateway, watcher, runner, and the engines as wanted.

    Stays in the foreground until Ctrl-C, unless --detach. On a home whose stack runs it prints the status.
    """
    from infra.postgres import make_home

    own = own_settings(**({} if port is None else {"port": port}))
    make_home(own.home)
    if report_to is not None:
        _as_daemon(own, report_to)
    elif detach:
        _detached(own, port, as_json)
    else:
        _in_foreground(own, as_json)


@click.command()
@json_option
def down(as_json: bool) -> None:
    """Stop the local stack and wait until nothing of it is left."""
    from infra.guard import sweep

    home = own_settings().home
    found = state.read(home)
    running = found is not None and found.supervised() and state.locked(home)
    if found is not None and running and found.pid is not None:
        os.kill(found.pid, signal.SIGTERM)
        limit = time.monotonic() + 120
        while state.locked(home):
            if time.monotonic() > limit:
                raise TunesmithError(
                    f"The stack on {home} has not ended after 120 s; its supervisor is process {found.pid}.",
                    hint=f"See {home / 'logs'}.",
                )
            time.sleep(0.1)
    elif found is not None and not state.locked(home):
        sweep(home, found.mark)  # what a killed supervisor left
    if as_json:
        print_json({"home": str(home), "stopped": running})
    else:
        out.print(f"The stack on {home} is down." if running else f"No stack runs on {home}.")


@click.command()
@json_option
def status(as_json: bool) -> None:
    """What runs, and where. Exit code 6 when something is down."""
    home = own_settings().home
    shown = observe(state.read(home))
    _print_status(home, shown, as_json)
    if any(service["state"] != "ready" for service in shown):
        raise click.exceptions.Exit(Unreachable.exit_code)


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check this machine and say what to mend. Exit code 1 when something keeps Tunesmith from working."""
    from infra.doctor import examine

    findings = examine(own_settings())
    if as_json:
        print_json({"findings": [vars(finding) for finding in findings]})
    else:
        for finding in findings:
            mark = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}[finding.level]
            out.print(f"{mark}  {finding.name:<13}", end="")
            out.print(finding.text, markup=False)
            if finding.hint:
                out.print(f"                  {finding.hint}", markup=False)
    if any(finding.level == "fail" for finding in findings):
        raise click.exceptions.Exit(1)


def observe(found: state.StackState | None) -> list[dict[str, Any]]:
    """Each service's name, state as seen now, and url: ready, starting, restarting, unreachable or stopped."""
    if found is None or not found.supervised():
        names = [service.name for service in found.services] if found is not None and found.services else STANDARD
        return [{"name": name, "state": "stopped", "url": None} for name in names]
    return [{"name": s.name, "state": _seen(s, found), "url": s.url} for s in found.services]


def _seen(service: state.ServiceState, found: state.StackState) -> str:
    if service.state not in ("ready", "external"):
        return service.state
    if service.health is not None:
        return "ready" if web.answers(service.health) else "unreachable"
    if service.name == "postgres":
        parts = urlsplit(found.settings["database_url"])
        try:
            socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 5432), timeout=2).close()
        except OSError:
            return "unreachable"
        return "ready"
    return "ready" if service.pid is not None and processes.alive(service.pid, service.started) else "restarting"


def _print_status(home: Path, shown: list[dict[str, Any]], as_json: bool, **more: Any) -> None:
    if as_json:
        print_json({"services": shown, **more})
        return
    for service in shown:
        colour = {"ready": "green", "stopped": "dim"}.get(service["state"], "yellow")
        out.print(f"{service['name']:<16} [{colour}]{service['state']:<12}[/] {service['url'] or ''}")


def _in_foreground(own: Settings, as_json: bool) -> None:
    from infra.board import Board
    from infra.stack import Supervisor

    lock = state.lock(own.home)
    if lock is None:
        _already(own.home, as_json)
        return
    key: list[dict[str, str]] = []
    with Board() as board, lock:

        def report(event: dict[str, Any]) -> None:
            if event["kind"] == "key":
                key.append({"id": event["id"], "key": event["key"]})
            board.show(event)
            if event["kind"] == "ready":
                _finished(own.home, key, as_json)
                err.print("Ctrl-C stops everything.")

        log.setup()
        number = Supervisor(own=own, report=report).run()
    err.print(f"The stack on {own.home} is down.")
    raise click.exceptions.Exit(130 if number == signal.SIGINT else 0)


def _detached(own: Settings, port: int | None, as_json: bool) -> None:
    from infra.board import Board

    if state.locked(own.home):
        _already(own.home, as_json)
        return
    reader, writer = os.pipe()
    (own.home / "logs").mkdir(exist_ok=True)
    argv = [*services.TUNESMITH, "up", "--report", str(writer), *(["--port", str(port)] if port else [])]
    with (own.home / "logs" / "stack.log").open("ab") as output:
        daemon = subprocess.Popen(
            argv,
            pass_fds=[writer],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=os.environ | {"TUNESMITH_HOME": str(own.home), "PYTHONSAFEPATH": "1"},
        )
    os.close(writer)
    key: list[dict[str, str]] = []
    last: dict[str, Any] = {"kind": "failed", "message": "The supervisor ended without a word."}
    try:
        with Board() as board, os.fdopen(reader) as reports:
            for line in reports:
                last = json.loads(line)
                if last["kind"] == "key":
                    key.append({"id": last["id"], "key": last["key"]})
                board.show(last)
                if last["kind"] in ("ready", "taken", "failed"):
                    break
    except KeyboardInterrupt:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()
        raise
    if last["kind"] == "taken":
        daemon.wait()
        _already(own.home, as_json)
    elif last["kind"] == "ready":
        daemon.returncode = 0  # it is on its own from here
        _finished(own.home, key, as_json)
    else:
        daemon.wait()
        error = {"usage": UsageError, "unreachable": Unreachable}.get(last.get("code", ""), TunesmithError)
        message = last.get("message") or "The supervisor ended without a word."
        raise error(message, hint=last.get("hint") or f"Its log: {own.home / 'logs' / 'stack.log'}")


def _as_daemon(own: Settings, report_to: int) -> None:
    from infra.stack import Supervisor

    pipe = os.fdopen(report_to, "w", buffering=1)
    open_pipe = True

    def report(event: dict[str, Any]) -> None:
        nonlocal open_pipe
        if not open_pipe:
            if event["kind"] in ("service", "note"):
                sys.stderr.write(f"{json.dumps(event)}\n")
            return
        try:
            pipe.write(json.dumps(event) + "\n")
            if event["kind"] in ("ready", "taken", "failed"):
                open_pipe = False
                pipe.close()
        except (BrokenPipeError, ValueError):
            open_pipe = False

    lock = state.lock(own.home)
    if lock is None:
        report({"kind": "taken"})
        return
    with lock:
        log.setup()
        try:
            Supervisor(own=own, report=report).run()
        except TunesmithError as error:
            report({"kind": "failed", "code": error.code, "message": error.message, "hint": error.hint})
            raise
        except Exception as error:
            report({"kind": "failed", "message": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})
            raise


def _already(home: Path, as_json: bool) -> None:
    """Another `up` was first: wait until its stack is ready, and show it."""
    limit = time.monotonic() + 300
    while state.locked(home) and time.monotonic() < limit:
        found = state.read(home)
        if found is not None and found.ready and found.supervised():
            err.print(f"The stack on {home} runs already.")
            _print_status(home, observe(found), as_json)
            return
        time.sleep(0.2)
    raise TunesmithError(
        f"Another `tunesmith up` works on {home} and has not become ready.", hint=f"See {home / 'logs'}."
    )


def _finished(home: Path, key: list[dict[str, str]], as_json: bool) -> None:
    _print_status(home, observe(state.read(home)), as_json, **({"key": key[0]} if key else {}))
    if key and not as_json:
        out.print(f"\nThe first admin key, shown this once:\n  {key[0]['key']}\n", markup=False)
    if home != default_home():
        err.print(f"Home: {home}")
