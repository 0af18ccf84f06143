"""Where the registry's commands are carried out: here on the database, or, with ``TUNESMITH_URL`` and
``TUNESMITH_API_KEY``, by the control API at that address, as the key's person.

Both desks give the same JSON and raise the same errors. Whoever has the database is an administrator, and the ledger
names them ``os:user@host``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import quote, urlencode

from infra.db import transaction
from infra.errors import Conflict, Refused, TunesmithError, Unreachable, UsageError
from infra.settings import get_settings
from registry import deployments
from registry.names import Ref, check_model_name

Json = dict[str, Any]


class Desk(Protocol):
    """All raise NotFound, and Unreachable when database or API do not answer. Changes are ``Change.to_json``; they
    raise Conflict and Refused as those of `deployments` do."""

    def models(self) -> Json: ...
    def versions(self, model: str) -> Json: ...
    def show(self, ref: Ref) -> Json: ...
    def compare(self, first: Ref, second: Ref) -> Json: ...
    def history(self, model: str, at: datetime | None) -> Json: ...
    def verify(self, model: str, number: int) -> Json: ...
    def lineage(self, ref: Ref) -> Json: ...
    def row(self, ids: Sequence[str]) -> Json: ...

    def export(self, ref: Ref, path: Path) -> Json:
        """Write a version's files to a new folder: its model, number and bundle. Raises UsageError, Refused."""

    def import_(self, path: Path, model: str, *, base: str | None) -> Json:
        """Make what stands in a folder the model's next version: its model, number, method and bundle. Raises
        UsageError, Refused."""

    def sign(self, model: str, number: int) -> Json:
        """Sign a version's files with the key where they are: its model, number and that key. Raises UsageError."""

    def approve(self, model: str, number: int, *, reason: str, gate: str | None = None) -> Json:
        """Agree that a version may serve: ``{"changed"}`` and how its approvals stand. `gate` is the digest of the
        decision that was read. Raises Refused, UsageError."""

    def delete(self, model: str, number: int, *, reason: str) -> Json:
        """Delete a version that never held a slot: ``{"changed"}`` and the record of it. Raises Refused, UsageError."""

    def promote(self, model: str, number: int, *, reason: str, expect: int | None, force: bool) -> Json: ...
    def rollback(self, model: str, *, reason: str, to: int | None, expect: int | None) -> Json: ...
    def canary(
        self, model: str, number: int, *, share: float, reason: str, expect: int | None, force: bool
    ) -> Json: ...
    def shadow(self, model: str, number: int, *, reason: str, expect: int | None) -> Json: ...

    def begin_rollout(self, model: str, number: int, plan: Json, *, reason: str, expect: int | None) -> Json:
        """Begin a canary in steps; `plan` has what is not to be as usual."""

    def rollout(self, model: str) -> Json:
        """The canary in steps that runs, or the last one that did."""

    def stop(self, model: str, slot: Literal["challenger", "shadow"], *, reason: str, expect: int | None) -> Json: ...


def desk() -> Desk:
    """The desk that the settings name. Raises UsageError for an address without a key."""
    settings = get_settings()
    if settings.url is None:
        return Here()
    if settings.api_key is None:
        raise UsageError(
            "TUNESMITH_URL is set, but TUNESMITH_API_KEY is not.",
            hint="Set it to a key of `tunesmith keys create`, or unset TUNESMITH_URL to use the database.",
        )
    return There(settings.url, settings.api_key.get_secret_value())


def only_here(command: str) -> None:
    """For a command that works on the database and the artifacts themselves. Raises UsageError where the settings name
    another desk, whose versions it would not be about."""
    if get_settings().url is not None:
        raise UsageError(
            f"`{command}` does not go over the control API, and TUNESMITH_URL names one.",
            hint="Run it where the stack runs, without TUNESMITH_URL.",
        )


class Here:
    """The database that the settings name, with an administrator's rights."""

    def models(self) -> Json:
        from registry import versions

        with transaction() as conn:
            return {"models": versions.list_models(conn)}

    def versions(self, model: str) -> Json:
        from registry import views

        with transaction() as conn:
            return views.list_versions(conn, model)

    def show(self, ref: Ref) -> Json:
        from registry import views

        with transaction() as conn:
            return views.describe(conn, ref)

    def compare(self, first: Ref, second: Ref) -> Json:
        from registry import views

        with transaction() as conn:
            return views.compare(conn, first, second)

    def history(self, model: str, at: datetime | None) -> Json:
        from registry import views

        with transaction() as conn:
            return views.history(conn, model, at)

    def verify(self, model: str, number: int) -> Json:
        from registry.verification import report

        return report(model, number)

    def lineage(self, ref: Ref) -> Json:
        from registry import lineage

        with transaction() as conn:
            return lineage.of_version(conn, ref)

    def row(self, ids: Sequence[str]) -> Json:
        from registry import lineage

        with transaction() as conn:
            return lineage.of_row(conn, ids)

    def export(self, ref: Ref, path: Path) -> Json:
        from registry import versions
        from registry.exchange import export_version

        with transaction() as conn:
            found = versions.find(conn, ref)
        export_version(found, path)
        return {"model": found.model, "version": found.number, "bundle": found.bundle_digest}

    def import_(self, path: Path, model: str, *, base: str | None) -> Json:
        from registry.exchange import import_version

        return import_version(path, model, base=base, by=deployments.actor_here()).outline()

    def sign(self, model: str, number: int) -> Json:
        from registry import versions

        return {"model": model, "version": number, "signed_by": versions.sign(model, number)}

    def approve(self, model: str, number: int, *, reason: str, gate: str | None = None) -> Json:
        from registry import approvals

        with transaction() as conn:
            new, now = approvals.approve(
                conn, model, number, actor=deployments.actor_here(), role="admin", reason=reason, gate=gate
            )
        return {"model": model, "version": number, "changed": new, **now.to_json()}

    def delete(self, model: str, number: int, *, reason: str) -> Json:
        from registry import deletion

        new, record = deletion.delete(model, number, actor=deployments.actor_here(), reason=reason)
        return {"changed": new, **record.to_json()}

    def promote(self, model: str, number: int, *, reason: str, expect: int | None, force: bool) -> Json:
        with transaction() as conn:
            return deployments.promote(
                conn,
                model,
                number,
                actor=deployments.actor_here(),
                reason=reason,
                expect_generation=expect,
                force=force,
            ).to_json()

    def rollback(self, model: str, *, reason: str, to: int | None, expect: int | None) -> Json:
        with transaction() as conn:
            return deployments.rollback(
                conn, model, actor=deployments.actor_here(), reason=reason, to=to, expect_generation=expect
            ).to_json()

    def canary(self, model: str, number: int, *, share: float, reason: str, expect: int | None, force: bool) -> Json:
        with transaction() as conn:
            return deployments.canary(
                conn,
                model,
                number,
                share=share,
                actor=deployments.actor_here(),
                reason=reason,
                expect_generation=expect,
                force=force,
            ).to_json()

    def shadow(self, model: str, number: int, *, reason: str, expect: int | None) -> Json:
        with transaction() as conn:
            return deployments.shadow(
                conn, model, number, actor=deployments.actor_here(), reason=reason, expect_generation=expect
            ).to_json()

    def begin_rollout(self, model: str, number: int, plan: Json, *, reason: str, expect: int | None) -> Json:
        from registry import rollouts

        with transaction() as conn:
            return rollouts.begin(
                conn,
                model,
                number,
                rollouts.Plan.from_json(plan),
                actor=deployments.actor_here(),
                reason=reason,
                expect_generation=expect,
            ).to_json()

    def rollout(self, model: str) -> Json:
        from registry import rollouts

        with transaction() as conn:
            return rollouts.newest(conn, model).to_json()

    def stop(self, model: str, slot: Literal["challenger", "shadow"], *, reason: str, expect: int | None) -> Json:
        with transaction() as conn:
            return deployments.stop(
                conn, model, slot, actor=deployments.actor_here(), reason=reason, expect_generation=expect
            ).to_json()


_EXITS = {error.code: error.exit_code for error in (UsageError, Refused, Conflict, Unreachable)} | {
    "config": UsageError.exit_code,
    "not_found": 5,
    "not_authenticated": Refused.exit_code,
    "not_allowed": Refused.exit_code,
}


class There:
    """The control API at an address, with the rights of a key."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/")
        self._head = {"authorization": f"Bearer {key}", "accept": "application/json"}

    def models(self) -> Json:
        return self._call("GET", "/models")

    def versions(self, model: str) -> Json:
        return self._call("GET", f"{_of(model)}/versions")

    def show(self, ref: Ref) -> Json:
        return self._call("GET", f"{_of(ref.model)}/versions/{ref.number or ref.slot}")

    def compare(self, first: Ref, second: Ref) -> Json:
        return self._call("GET", f"/compare?{urlencode({'a': str(first), 'b': str(second)})}")

    def history(self, model: str, at: datetime | None) -> Json:
        asked = f"?{urlencode({'at': at.isoformat()})}" if at else ""
        return self._call("GET", f"{_of(model)}/history{asked}")

    def verify(self, model: str, number: int) -> Json:
        return self._call("GET", f"{_of(model)}/versions/{number}/verification", seconds=600)

    def lineage(self, ref: Ref) -> Json:
        return self._call("GET", f"{_of(ref.model)}/versions/{ref.number or ref.slot}/lineage")

    def row(self, ids: Sequence[str]) -> Json:
        return self._call("GET", f"/rows?{urlencode([('id', row_id) for row_id in ids])}")

    def export(self, ref: Ref, path: Path) -> Json:
        from registry.exchange import export_files

        found = self.show(ref)
        place = f"{_of(found['model'])}/versions/{found['version']}/files/"
        export_files(
            path,
            found["bundle"],
            lambda name: self._ask("GET", place + quote(name), seconds=600),
            signed=found["signed_by"] is not None,
        )
        return {"model": found["model"], "version": found["version"], "bundle": found["bundle"]}

    def import_(self, path: Path, model: str, *, base: str | None) -> Json:
        from registry.exchange import files_of

        files = files_of(path)
        place = f"{_of(model)}/versions" + (f"?{urlencode({'base': base})}" if base else "")
        return self._send(place, files)

    def sign(self, model: str, number: int) -> Json:
        return self._call("POST", f"{_of(model)}/versions/{number}/sign")

    def approve(self, model: str, number: int, *, reason: str, gate: str | None = None) -> Json:
        body = {"reason": reason} | ({"gate": gate} if gate is not None else {})
        return self._call("POST", f"{_of(model)}/versions/{number}/approve", body)

    def delete(self, model: str, number: int, *, reason: str) -> Json:
        return self._call("DELETE", f"{_of(model)}/versions/{number}?{urlencode({'reason': reason})}")

    def promote(self, model: str, number: int, *, reason: str, expect: int | None, force: bool) -> Json:
        body = {"champion": number, "reason": reason, "force": force}
        return self._patch(model, body, expect, {"champion": number})

    def rollback(self, model: str, *, reason: str, to: int | None, expect: int | None) -> Json:
        body = {"reason": reason, "to": to, "expect_generation": expect}
        return self._call("POST", f"{_of(model)}/rollback", body)

    def canary(self, model: str, number: int, *, share: float, reason: str, expect: int | None, force: bool) -> Json:
        wanted = {"challenger": number, "challenger_share": share}
        return self._patch(model, {**wanted, "reason": reason, "force": force}, expect, wanted)

    def shadow(self, model: str, number: int, *, reason: str, expect: int | None) -> Json:
        return self._patch(model, {"shadow": number, "reason": reason}, expect, {"shadow": number})

    def begin_rollout(self, model: str, number: int, plan: Json, *, reason: str, expect: int | None) -> Json:
        body = {"version": number, "plan": plan, "reason": reason, "expect_generation": expect}
        return self._call("POST", f"{_of(model)}/rollout", body)

    def rollout(self, model: str) -> Json:
        return self._call("GET", f"{_of(model)}/rollout")

    def stop(self, model: str, slot: Literal["challenger", "shadow"], *, reason: str, expect: int | None) -> Json:
        return self._patch(model, {slot: None, "reason": reason}, expect, {slot: None})

    def _patch(self, model: str, body: Json, expect: int | None, wanted: Json) -> Json:
        """Change a slot of the generation that was named, or else of the one that is there now."""
        place = f"{_of(model)}/deployment"
        seen = self._call("GET", place)["generation"] if expect is None else expect
        try:
            return self._call("PATCH", place, body, {"if-match": f'"{seen}"'})
        except TunesmithError as error:
            if expect is not None or error.code != Conflict.code:
                raise
            now = self._call("GET", place)
            if any(now[name] != value for name, value in wanted.items()):
                raise
            return {"changed": False, **now, "entry": None}  # somebody did the very same meanwhile

    def _call(
        self, method: str, path: str, body: Json | None = None, head: dict[str, str] | None = None, seconds: float = 60
    ) -> Json:
        import orjson

        found: Json = orjson.loads(self._ask(method, path, body, head, seconds))
        return found

    def _send(self, path: str, files: Mapping[str, Path]) -> Json:
        """POST files as a form, each under its name; they are read as they are sent."""
        import httpx
        import orjson

        from infra import web

        url = f"{self._url}/api/v1{path}"
        with ExitStack() as opened:
            parts = [("file", (name, opened.enter_context(file.open("rb")))) for name, file in files.items()]
            try:
                with httpx.Client(timeout=600, trust_env=not web.on_loopback(url)) as client:
                    answer = client.post(url, files=parts, headers=self._head)
            except httpx.HTTPError as error:
                raise self._silent(error) from error
        if answer.status_code >= 300:
            raise _told(answer.status_code, answer.content, self._url)
        found: Json = orjson.loads(answer.content)
        return found

    def _silent(self, error: Exception) -> Unreachable:
        return Unreachable(f"The control API does not answer at {self._url}: {error}.", hint="Check TUNESMITH_URL.")

    def _ask(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        head: dict[str, str] | None = None,
        seconds: float = 60,
    ) -> bytes:
        from http.client import HTTPException

        from infra import web

        try:
            status, content = web.ask(
                method, f"{self._url}/api/v1{path}", body, headers={**self._head, **(head or {})}, seconds=seconds
            )
        except (OSError, HTTPException, ValueError) as error:
            raise self._silent(error) from error
        if status >= 300:
            raise _told(status, content, self._url)
        return content


def _of(model: str) -> str:
    return f"/models/{check_model_name(model)}"


def _told(status: int, content: bytes, url: str) -> TunesmithError:
    """The error that the API answered, as if it had come up here."""
    import orjson

    try:
        said = orjson.loads(content)["error"]
        code, message, hint = said["code"], said["message"], said["hint"]
    except (ValueError, KeyError, TypeError):
        return Unreachable(f"{url} answered {status}, and not as a control API.", hint="Check TUNESMITH_URL.")
    more = {k: v for k, v in said.items() if k not in ("code", "message", "hint", "type", "param")}
    error = TunesmithError(message, hint=hint, details=more)
    vars(error).update(code=code, exit_code=_EXITS.get(code, 1))
    return error
