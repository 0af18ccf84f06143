"""The control API under ``/api/v1``: what the registry's commands do, over HTTP, as the key's person.

Every route names the role it needs. A deployment's generation is its ETag; `PATCH` compares it by ``If-Match``.
Endpoints are plain functions, so that the framework runs them in threads beside the loop that answers requests.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypedDict

from fastapi import Depends, FastAPI, File, Header, Query, Request, UploadFile
from fastapi import Path as PathParam
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Mount

from deploy import auth
from deploy.auth import Identity, Needed, Role, check_force, require
from deploy.errors import crashed, explain, json_response
from infra import storage
from infra.db import transaction
from infra.errors import NotFound, TunesmithError, UsageError
from registry import (
    approvals,
    bundle,
    deletion,
    deployments,
    exchange,
    lineage,
    rollouts,
    verification,
    versions,
    views,
)
from registry.deployments import Change
from registry.names import Ref, parse_ref, parse_version

_PAGE = Path(__file__).with_suffix(".html")
Reason = Annotated[str, Field(description="why, at most 2000 characters; it stays in the ledger")]
Number = Annotated[int, Field(ge=1, le=999_999_999)]
Generation = Annotated[int | None, Field(ge=0, description="refuse with 412 if the deployment is at another one")]


class PreconditionRequired(TunesmithError):
    """A change without saying what it is a change of."""

    http_status: ClassVar[int] = 428
    code: ClassVar[str] = "precondition_required"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Promotion(_Body):
    version: Number
    reason: Reason
    expect_generation: Generation = None
    force: bool = Field(default=False, description="override the gate, on the record; needs the admin role")


class Approving(_Body):
    reason: Annotated[str, Field(min_length=1, max_length=2000, description="why; it stays on the record")]
    gate: str | None = Field(default=None, description="the digest of the gate decision that was read; else the last")


class Rollback(_Body):
    reason: Reason
    to: Number | None = Field(default=None, description="that version; else the one before the last promotion")
    expect_generation: Generation = None


class Patch(_Body):
    """One slot's change: exactly one of champion, challenger and shadow; null empties a slot."""

    champion: Number | None = None
    challenger: Number | None = None
    challenger_share: float | None = Field(default=None, gt=0, le=1)
    shadow: Number | None = None
    reason: Reason = ""
    force: bool = False

    @model_validator(mode="after")
    def _one_slot(self) -> Patch:
        named = self.model_fields_set & {"champion", "challenger", "shadow"}
        if len(named) != 1:
            raise ValueError("name exactly one of champion, challenger and shadow")
        if self.champion is None and "champion" in named:
            raise ValueError("a champion is replaced or rolled back, never taken away")
        if (self.challenger is not None) != (self.challenger_share is not None):
            raise ValueError("challenger and challenger_share go together")
        return self


class PlanWish(_Body):
    """What is left out is as usual."""

    steps: list[float] | None = Field(default=None, max_length=100)
    min_requests: int | None = Field(default=None, le=10**9)
    min_minutes: float | None = Field(default=None, allow_inf_nan=False)
    max_hours: float | None = Field(default=None, allow_inf_nan=False)
    alpha: float | None = Field(default=None, allow_inf_nan=False)
    ignore: list[str] | None = Field(default=None, max_length=10)


class Beginning(_Body):
    version: Number
    plan: PlanWish = PlanWish()
    reason: Reason = ""
    expect_generation: Generation = None


class _Common(TypedDict):
    actor: str
    reason: str
    expect_generation: int


class KeyWish(_Body):
    name: Annotated[str, Field(min_length=1, max_length=100)]
    role: Role
    person: Annotated[str | None, Field(max_length=100)] = None


def _as(role: Needed) -> Any:
    """The parameter that is the key's person, of at least this role."""

    def who(request: Request) -> Identity:
        return require(request, role)

    return Depends(who)


Viewer = Annotated[Identity, _as("viewer")]
Operator = Annotated[Identity, _as("operator")]
Admin = Annotated[Identity, _as("admin")]


class _Route(APIRoute):
    """FastAPI reads a body before it asks who sends it; here, whoever may change nothing is turned away first."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def authorised(request: Request) -> Response:
            if request.method not in ("GET", "HEAD"):
                require(request, "operator")
            return await handle(request)

        return authorised


def control_api() -> Mount:
    """The mounted application."""
    app = FastAPI(
        title="Tunesmith control API",
        version="1",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        description="Send `Authorization: Bearer <key>`. Errors are `{error: {code, message, hint}}`.",
    )
    app.add_exception_handler(TunesmithError, explain)
    app.add_exception_handler(HTTPException, explain)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, crashed)
    app.router.route_class = _Route
    _models(app)
    _changes(app)
    _keys(app)
    _pages(app)
    return Mount("/api/v1", app)


async def _invalid(request: Request, error: Exception) -> Response:
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    said = "; ".join(f"{'.'.join(str(part) for part in p['loc'][1:]) or 'body'}: {p['msg']}" for p in problems)
    return await explain(request, UsageError(f"The request is not valid: {said[:1000]}."))


def _models(app: FastAPI) -> None:
    @app.get("/models", summary="Models and what serves")
    def list_models(who: Viewer) -> Response:
        with transaction() as conn:
            return json_response({"models": versions.list_models(conn)})

    @app.get("/models/{model}/versions", summary="A model's versions")
    def list_versions(model: str, who: Viewer) -> Response:
        with transaction() as conn:
            return json_response(views.list_versions(conn, model))

    @app.get("/models/{model}/versions/{which}", summary="One version, by number or slot, with what was measured")
    def show_version(model: str, which: str, who: Viewer) -> Response:
        with transaction() as conn:
            return json_response(views.describe(conn, _ref(model, which)))

    @app.get("/models/{model}/versions/{number}/verification", summary="Whether it still is what was judged")
    def verify_version(model: str, number: int, who: Operator) -> Response:
        return json_response(verification.report(*parse_version(f"{model}:{number}")))

    @app.get("/models/{model}/versions/{number}/files/{name:path}", summary="A file of its bundle")
    def read_file(model: str, number: int, name: str, who: Operator) -> Response:
        with transaction() as conn:
            found = versions.get(conn, *parse_version(f"{model}:{number}"))
        if name not in (bundle.MANIFEST, bundle.SIGNATURE) and name not in found.parsed.files:
            raise NotFound(f"{found.name} has no file of that name.", hint="version.json names all of them.")
        if not (path := found.folder() / name).is_file():
            raise NotFound(f"{found.name} has no {name}.", hint="It is not signed.")
        return FileResponse(path, media_type="application/octet-stream")

    @app.get("/models/{model}/versions/{which}/lineage", summary="All that it was made of")
    def read_lineage(model: str, which: str, who: Viewer) -> Response:
        with transaction() as conn:
            return json_response(lineage.of_version(conn, _ref(model, which)))

    @app.get("/rows", summary="Which data sets hold a row, by its id, and which versions saw it")
    def find_row(row_id: Annotated[list[str], Query(alias="id", max_length=8)], who: Viewer) -> Response:
        ids = [lineage.check_row_id(each) for each in row_id]
        with transaction() as conn:
            return json_response(lineage.of_row(conn, ids))

    @app.get("/compare", summary="Two versions side by side: MODEL:N, MODEL@SLOT or MODEL")
    def compare(a: str, b: str, who: Viewer) -> Response:
        first, second = parse_ref(a), parse_ref(b)
        with transaction() as conn:
            return json_response(views.compare(conn, first, second))

    @app.get("/models/{model}/deployment", summary="Which versions hold the slots; the ETag is the generation")
    def read_deployment(model: str, who: Viewer) -> Response:
        with transaction() as conn:
            now = deployments.read(conn, model)
        return json_response(now.to_json(), headers={"etag": f'"{now.generation}"'})

    @app.get("/models/{model}/rollout", summary="The canary in steps that runs, or the last one that did")
    def read_rollout(model: str, who: Viewer) -> Response:
        with transaction() as conn:
            return json_response(rollouts.newest(conn, model).to_json())

    @app.get("/models/{model}/history", summary="The ledger, oldest first; with `at`, up to that time")
    def history(model: str, who: Viewer, at: datetime | None = None) -> Response:
        if at is not None and at.tzinfo is None:
            raise UsageError("`at` needs a time zone.", hint="Such as 2026-01-31T12:00:00Z.")
        with transaction() as conn:
            return json_response(views.history(conn, model, at))


def _ref(model: str, which: str) -> Ref:
    return parse_ref(f"{model}:{which}" if which[:1].isdigit() else f"{model}@{which}")


def _changes(app: FastAPI) -> None:
    def change(act: Callable[[Any], Change]) -> Response:
        with transaction() as conn:
            done = act(conn)
        return json_response(done.to_json(), headers={"etag": f'"{done.deployment.generation}"'})

    @app.patch("/models/{model}/deployment", summary="Change one slot, compared with If-Match")
    def patch(
        model: str,
        body: Patch,
        who: Operator,
        if_match: Annotated[str | None, Header(description="the generation this is a change of")] = None,
    ) -> Response:
        check_force(who, body.force)
        if if_match is None:
            raise PreconditionRequired("If-Match is missing.", hint="Send the generation that you read.")
        text = if_match.strip().removeprefix("W/").strip('"')  # weak, where a proxy compressed the answer
        if not (text.isascii() and text.isdigit() and len(text) < 18):
            raise UsageError("If-Match must be a generation.", hint="Send the ETag of GET .../deployment.")
        common = _Common(actor=who.actor, reason=body.reason, expect_generation=int(text))
        slot: Literal["challenger", "shadow"] = "shadow" if "shadow" in body.model_fields_set else "challenger"

        def act(conn: Any) -> Change:
            if body.champion is not None:
                return deployments.promote(conn, model, body.champion, force=body.force, **common)
            if body.challenger is not None and body.challenger_share is not None:
                share = body.challenger_share
                return deployments.canary(conn, model, body.challenger, share=share, force=body.force, **common)
            if body.shadow is not None:
                return deployments.shadow(conn, model, body.shadow, **common)
            return deployments.stop(conn, model, slot, **common)

        return change(act)

    @app.post("/models/{model}/rollout", summary="Begin a canary in steps: more and more traffic, by what it shows")
    def begin_rollout(model: str, body: Beginning, who: Operator) -> Response:
        plan = rollouts.Plan.from_json(body.plan.model_dump(exclude_none=True))
        return change(
            lambda conn: rollouts.begin(
                conn,
                model,
                body.version,
                plan,
                actor=who.actor,
                reason=body.reason,
                expect_generation=body.expect_generation,
            )
        )

    @app.post("/models/{model}/promote", summary="Make a version the champion")
    def promote(model: str, body: Promotion, who: Operator) -> Response:
        check_force(who, body.force)
        return change(
            lambda conn: deployments.promote(
                conn,
                model,
                body.version,
                actor=who.actor,
                reason=body.reason,
                expect_generation=body.expect_generation,
                force=body.force,
            )
        )

    @app.post("/models/{model}/versions", summary="Import an exported version, or a PEFT adapter: its files, by name")
    def import_version(
        model: str,
        who: Operator,
        file: Annotated[list[UploadFile], File(max_length=64, description="named as in their folder")],
        base: Annotated[str | None, Query(description="where the adapter's config does not name it well")] = None,
    ) -> Response:
        with storage.scratch("bundle") as folder:
            for part in file:
                _put(folder, part)
            try:
                made = exchange.import_version(
                    folder, model, base=base, by=who.actor, fetch=False, vouched=who.may("admin")
                )
            except TunesmithError as error:
                error.message = error.message.replace(str(folder), "what was sent")
                raise
        return json_response(made.outline(), 201)

    @app.post("/models/{model}/versions/{number}/sign", summary="Sign its files with this home's key")
    def sign(model: str, number: Annotated[int, PathParam(ge=1, le=999_999_999)], who: Admin) -> Response:
        return json_response({"model": model, "version": number, "signed_by": versions.sign(model, number)})

    @app.post("/models/{model}/versions/{number}/approve", summary="Agree, as one person, that a version may serve")
    def approve(model: str, number: int, body: Approving, who: Operator) -> Response:
        with transaction() as conn:
            new, now = approvals.approve(
                conn, model, number, actor=who.actor, role=who.role, reason=body.reason, gate=body.gate
            )
        return json_response({"model": model, "version": number, "changed": new, **now.to_json()})

    @app.delete("/models/{model}/versions/{number}", summary="Delete a version that never held a slot")
    def delete(
        model: str,
        number: Annotated[int, PathParam(ge=1, le=999_999_999)],
        who: Admin,
        reason: Annotated[str, Query(min_length=1, max_length=2000, description="why; it stays on the record")],
    ) -> Response:
        new, record = deletion.delete(model, number, actor=who.actor, reason=reason)
        return json_response({"changed": new, **record.to_json()})

    @app.post("/models/{model}/rollback", summary="Take the last promotion back")
    def rollback(model: str, body: Rollback, who: Operator) -> Response:
        return change(
            lambda conn: deployments.rollback(
                conn, model, actor=who.actor, reason=body.reason, to=body.to, expect_generation=body.expect_generation
            )
        )


def _put(folder: Path, part: UploadFile) -> None:
    """Write a part of a form under its name, which may lead nowhere else."""
    name = part.filename or ""
    if not re.fullmatch(r"(?:[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}/){0,3}[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name):
        raise UsageError(f"{name[:80]!a} cannot be a file's name.", hint="Send each file under its name in the folder.")
    target = folder / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as copy:
            shutil.copyfileobj(part.file, copy)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{name!r} was sent twice, or is a folder of another file.", hint="Send each once.") from error


def _keys(app: FastAPI) -> None:
    @app.get("/keys", summary="All keys, without their secrets")
    def list_keys(who: Admin) -> Response:
        with transaction() as conn:
            return json_response({"keys": [asdict(key) for key in auth.list_keys(conn)]})

    @app.post("/keys", summary="Make a key; its secret is in this answer and nowhere else")
    def create_key(body: KeyWish, who: Admin) -> Response:
        with transaction() as conn:
            made = auth.create_key(conn, name=body.name, role=body.role, person=body.person)
        return json_response(asdict(made), 201)

    @app.delete("/keys/{key_id}", summary="Revoke a key and end its sessions")
    def revoke_key(key_id: str, who: Admin) -> Response:
        if not key_id.isalnum() or len(key_id) > 64:
            raise NotFound("There is no such key.", hint="See GET /api/v1/keys.")
        with transaction() as conn:
            return json_response(asdict(auth.revoke_key(conn, key_id)))


def _pages(app: FastAPI) -> None:
    @app.get("/openapi.json", include_in_schema=False)
    def schema(request: Request) -> Response:
        require(request, "any")
        return json_response(_schema(app))

    @app.get("/docs", include_in_schema=False)
    def docs(request: Request) -> Response:
        """The schema as a page, without a script and without anything from elsewhere."""
        require(request, "any")
        from jinja2 import Environment

        page = Environment(autoescape=True).from_string(_PAGE.read_text()).render(schema=_schema(app))
        return HTMLResponse(page)


def _schema(app: FastAPI) -> dict[str, Any]:
    made = app.openapi()
    made["servers"] = [{"url": "/api/v1"}]
    made["components"].setdefault("securitySchemes", {})["key"] = {"type": "http", "scheme": "bearer"}
    made["security"] = [{"key": []}]
    return made
