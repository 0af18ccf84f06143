"""Who may do what: API keys, console sessions, and the guard in front of every route.

A key is ``ts_<id>_<secret>``; the database holds SHA-256 of the secret (256 random bits need neither salt nor
stretching). A console session is a key exchanged for an HttpOnly, SameSite=Strict cookie. Both are checked
against a copy in memory that is read again every second, so a revoked key stops within seconds and a request
never waits for the database. While the database is away the last copy goes on being used, for fifteen minutes.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args
from urllib.parse import quote, urlsplit

import orjson
import psycopg
from starlette.requests import HTTPConnection, Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.db import Connection, load_queries, one, transaction
from infra.errors import NotFound, TunesmithError, Unreachable, UsageError

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)

Role = Literal["viewer", "service", "operator", "admin"]
# viewer < operator < admin; service keys ask models and do nothing else, viewers look and cost nothing.
_MAY: Mapping[str, frozenset[str]] = {
    "viewer": frozenset({"viewer", "operator", "admin"}),
    "service": frozenset({"service", "operator", "admin"}),
    "operator": frozenset({"operator", "admin"}),
    "admin": frozenset({"admin"}),
    "any": frozenset(get_args(Role)),
}
Needed = Literal["viewer", "service", "operator", "admin", "any"]

COOKIE = "tunesmith_session"
SESSION_SECONDS = 12 * 3600
PUBLIC_PATHS = frozenset({"/healthz", "/readyz", "/login", "/favicon.ico"})
PUBLIC_PREFIX = "/static/"
_REFRESH_SECONDS = 1.0
_UNKNOWN_SECONDS = 0.1  # unknown keys make the copy be read again at most ten times a second
_STALE_SECONDS = 900.0
_WAIT_SECONDS = 3.0
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_SECURITY_HEADERS = (
    (b"content-security-policy", _CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
)


class NotAuthenticated(TunesmithError):
    """No key, an unknown key, or a revoked one."""

    http_status: ClassVar[int] = 401
    code: ClassVar[str] = "not_authenticated"


class NotAllowed(TunesmithError):
    """The key's role may not do this, or the request came from another site."""

    http_status: ClassVar[int] = 403
    code: ClassVar[str] = "not_allowed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Whoever holds a key. `by_cookie` tells a browser from a program."""

    key_id: str
    name: str
    role: Role
    by_cookie: bool = False
    watched: bool = True  # whether what it asks is traffic; what we ask ourselves is not

    @property
    def actor(self) -> str:
        """How the ledger names this person."""
        return f"key:{self.key_id} ({self.name})"

    def may(self, needed: Needed) -> bool:
        return self.role in _MAY[needed]


@dataclass(frozen=True, kw_only=True)
class NewKey:
    """A key as shown once, at its making; afterwards only its hash exists."""

    id: str
    key: str
    role: Role
    name: str


@dataclass(frozen=True, kw_only=True)
class Key:
    id: str
    name: str
    role: Role
    person: str | None
    created_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class Session:
    """A log-in; `token` is the cookie's value."""

    token: str
    identity: Identity


# ---------------------------------------------------------------- keys


def create_key(conn: Connection, *, name: str, role: str, person: str | None = None, watched: bool = True) -> NewKey:
    """Make a key, of a `person` by their user name, if it is anybody's. What it asks is no traffic unless it is
    `watched`; of a name there is one such key, and making it anew ends the secret that it had. Raises UsageError for an
    unknown role, or for names that are empty, long or not printable."""
    if role not in get_args(Role):
        raise UsageError(f"There is no role {role!r}.", hint=f"Roles: {', '.join(get_args(Role))}.")
    if not name.strip() or len(name) > 100 or not name.isprintable():
        raise UsageError("A key's name is 1 to 100 printable characters.", hint="Name who or what uses the key.")
    if person is not None and (not person.strip() or len(person) > 100 or not person.isprintable()):
        raise UsageError("A person is named by 1 to 100 printable characters.", hint="Give their user name.")
    made, secret = {"name": name, "role": role, "person": person, "watched": watched}, secrets.token_hex(32)
    key_id = one(conn, SQL["insert_key"], {**made, "id": secrets.token_hex(6), "hash": _hash(secret)})["id"]
    return NewKey(id=key_id, key=f"ts_{key_id}_{secret}", role=cast(Role, role), name=name)


def list_keys(conn: Connection) -> list[Key]:
    """All keys, also revoked ones, oldest first."""
    return [Key(**row) for row in conn.execute(SQL["list_keys"])]


def revoke_key(conn: Connection, key_id: str) -> Key:
    """End a key and its sessions; revoking again changes nothing. Raises NotFound."""
    row = conn.execute(SQL["revoke_key"], {"id": key_id}).fetchone()
    if row is None:
        raise NotFound(f"There is no key {key_id!r}.", hint="See `tunesmith keys list`.")
    conn.execute(SQL["end_sessions_of_key"], {"id": key_id})
    return Key(**row)


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


# ---------------------------------------------------------------- who is asking


@dataclass(frozen=True, slots=True)
class _Copy:
    keys: Mapping[str, tuple[bytes, Identity]]
    sessions: Mapping[bytes, str]
    read_at: float


class Auth:
    """The keys and sessions in memory. One a process; belongs to the event loop that runs `run`."""

    def __init__(self) -> None:
        self._copy = _Copy({}, {}, float("-inf"))
        # A thread of its own: a database that hangs must not use up the threads that others wait for.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="auth")
        self._reading: asyncio.Future[_Copy] | None = None

    async def run(self) -> None:
        """Keep the copy fresh until cancelled; a database that is away is waited for."""
        silent = False
        while True:
            try:
                await self._refresh()
                silent = False
            except (TunesmithError, psycopg.Error, OSError) as error:
                if not silent:
                    log.warning("keys cannot be read, the last ones stay valid for now: %s", error)
                silent = True
            except Exception:  # whatever it is, a copy that is never read again would keep revoked keys valid
                log.exception("keys could not be read")
            await asyncio.sleep(_REFRESH_SECONDS)

    async def authenticate(self, authorization: str | None, cookie: str | None) -> Identity | None:
        """Who holds this ``Authorization`` header or session cookie; None for nobody. The header goes first.

        Raises Unreachable when the key is unknown here and the database cannot be asked.
        """
        if authorization is not None:
            scheme, _, token = authorization.partition(" ")
            if scheme.lower() != "bearer":
                return None
            return await self._current(lambda copy: _by_key(copy, token.strip()))
        if cookie:
            digest = _hash(cookie)
            return await self._current(lambda copy: _by_session(copy, digest))
        return None

    async def login(self, key: str) -> Session:
        """Exchange a key for a session. Raises NotAuthenticated; NotAllowed for a key of role service."""
        identity = await self.authenticate(f"Bearer {key.strip()}", None)
        if identity is None:
            raise NotAuthenticated("This key is unknown or revoked.", hint="`tunesmith keys create` makes one.")
        if not identity.may("viewer"):
            raise NotAllowed(
                "A service key asks models and cannot log in.", hint="Use a viewer, operator or admin key."
            )
        token = secrets.token_urlsafe(32)
        await asyncio.to_thread(_insert_session, _hash(token), identity.key_id)
        await self._refresh()
        return Session(token=token, identity=identity)

    async def logout(self, request: HTTPConnection) -> None:
        """End the session of this request's cookie, if it has one."""
        if token := request.cookies.get(COOKIE):
            await asyncio.to_thread(_delete_session, _hash(token))
            await self._refresh()

    async def _current(self, look: Callable[[_Copy], Identity | None]) -> Identity | None:
        found = look(self._copy)
        if found is None:
            await self._refresh(_UNKNOWN_SECONDS)
            found = look(self._copy)
        elif time.monotonic() - self._copy.read_at > _STALE_SECONDS:
            raise Unreachable("Keys could not be checked for a while.", hint="See `tunesmith status`.")
        return found

    async def _refresh(self, apart: float = 0.0) -> None:
        """Read the copy anew, from now on, but not within `apart` seconds of the reading before.

        Raises Unreachable when the database does not answer within seconds; its answer is taken when it comes.
        """
        asked = time.monotonic()
        while self._copy.read_at < asked:
            if self._reading is None or self._reading.done():
                await asyncio.sleep(max(0.0, self._copy.read_at + apart - time.monotonic()))
            if self._reading is None or self._reading.done():  # still: others waited too
                self._reading = asyncio.get_running_loop().run_in_executor(self._thread, _read)
            reading = self._reading  # whoever wakes first may have begun the next one
            done, _ = await asyncio.wait({reading}, timeout=_WAIT_SECONDS)
            if not done:
                raise Unreachable("PostgreSQL does not answer.", hint="See `tunesmith status`.")
            if reading.result().read_at > self._copy.read_at:
                self._copy = reading.result()


def _read() -> _Copy:
    now = time.monotonic()
    with transaction() as conn:
        keys = {
            row["id"]: (
                bytes(row["hash"]),
                Identity(key_id=row["id"], name=row["name"], role=row["role"], watched=row["watched"]),
            )
            for row in conn.execute(SQL["valid_keys"])
        }
        sessions = {bytes(row["hash"]): str(row["key_id"]) for row in conn.execute(SQL["valid_sessions"])}
    return _Copy(keys, sessions, now)


def _by_key(copy: _Copy, token: str) -> Identity | None:
    prefix, _, rest = token.partition("_")
    key_id, _, secret = rest.partition("_")
    stored, identity = copy.keys.get(key_id, (bytes(32), None))
    equal = hmac.compare_digest(stored, _hash(secret))
    return identity if equal and prefix == "ts" else None


def _by_session(copy: _Copy, digest: bytes) -> Identity | None:
    # Looked up by the hash of 256 random bits: timing tells nothing that could be used.
    held = copy.keys.get(copy.sessions.get(digest, ""))
    if held is None:
        return None
    return Identity(key_id=held[1].key_id, name=held[1].name, role=held[1].role, by_cookie=True)


def _insert_session(digest: bytes, key_id: str) -> None:
    with transaction() as conn:
        conn.execute(SQL["delete_expired_sessions"])
        conn.execute(SQL["insert_session"], {"hash": digest, "key_id": key_id, "seconds": SESSION_SECONDS})


def _delete_session(digest: bytes) -> None:
    with transaction() as conn:
        conn.execute(SQL["delete_session"], {"hash": digest})


# ---------------------------------------------------------------- for routes


def identify(request: HTTPConnection) -> Identity | None:
    """Who asks, as the guard found out; None on public routes without a key."""
    return cast("Identity | None", request.scope.get("identity"))


def require(request: HTTPConnection, role: Needed) -> Identity:
    """Who asks. Raises NotAuthenticated without a key, NotAllowed when the key's role is not enough."""
    identity = identify(request)
    if identity is None:
        raise NotAuthenticated("A key is needed.", hint="Send `Authorization: Bearer <key>`, or log in.")
    if not identity.may(role):
        raise NotAllowed(
            f"The key {identity.name} has the role {identity.role}; this needs {role}.",
            hint="Ask an admin for another key.",
        )
    return identity


def check_force(who: Identity | None, force: bool) -> None:
    """Overriding a gate is for admins, by whatever way it is asked. Raises NotAllowed."""
    if force and not (who and who.may("admin")):
        raise NotAllowed("Overriding a gate needs the admin role.", hint="Ask an admin.")


Endpoint = Callable[[Request], Awaitable[Response]]


def needs(role: Needed) -> Callable[[Endpoint], Endpoint]:
    """For Starlette endpoints: ``@needs("operator")`` answers 401 or 403 to whom `require` turns away."""

    def wrap(endpoint: Endpoint) -> Endpoint:
        @functools.wraps(endpoint)
        async def guarded(request: Request) -> Response:
            require(request, role)
            return await endpoint(request)

        return guarded

    return wrap


def set_session(response: Response, session: Session, request: Request) -> None:
    """Put the session's cookie on a response."""
    response.set_cookie(
        COOKIE,
        session.token,
        max_age=SESSION_SECONDS,
        path="/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def clear_session(response: Response) -> None:
    """Take the session's cookie away."""
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")


def error_json(error: TunesmithError) -> dict[str, Any]:
    """The error object of every HTTP answer: the contract's, with the fields OpenAI's clients read."""
    body = error.as_json()
    kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    return {"error": {"type": kind, "param": None, **body["error"]}}


# ---------------------------------------------------------------- the guard


class Guard:
    """ASGI middleware around the whole application: nothing but the public paths answers without a key, writes
    by cookie must come from our own pages, and every answer carries the security headers.

    A browser that asks for a page without a session is sent to ``/login?next=...``.
    """

    def __init__(self, app: ASGIApp, auth: Auth, on_refused: Callable[[], None] = lambda: None) -> None:
        self.app = app
        self.auth = auth
        self.on_refused = on_refused  # called for each request without a valid key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # No route speaks websocket; lifespan has nobody to ask.
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message.get("headers", ())}
                extra = [pair for pair in _SECURITY_HEADERS if pair[0] not in there]
                if b"cache-control" not in there:
                    extra.append((b"cache-control", b"no-store"))
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        headers = _pick(scope["headers"])
        try:
            identity = await self.auth.authenticate(headers.get(b"authorization"), _cookie(headers.get(b"cookie")))
        except TunesmithError as error:
            identity = None
            if not _is_public(scope["path"]):
                await _refuse(error)(scope, receive, send_hardened)
                return
        unsafe = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        by_browser = identity.by_cookie if identity else _is_public(scope["path"])
        if unsafe and by_browser and not _same_origin(headers):
            await _refuse(NotAllowed("The request came from another site."))(scope, receive, send_hardened)
            return
        if identity is None and not _is_public(scope["path"]):
            self.on_refused()
            response: Response
            if not unsafe and "text/html" in (headers.get(b"accept") or ""):
                target = scope["path"] + (
                    "?" + scope["query_string"].decode("latin-1") if scope["query_string"] else ""
                )
                response = RedirectResponse("/login?next=" + quote(target, safe="/"), status_code=303)
            else:
                response = _refuse(
                    NotAuthenticated(
                        "No key, or one that is unknown or revoked.", hint="Send `Authorization: Bearer <key>`."
                    )
                )
            await response(scope, receive, send_hardened)
            return
        scope["identity"] = identity
        await self.app(scope, receive, send_hardened)


_WANTED = frozenset({b"authorization", b"cookie", b"accept", b"origin", b"sec-fetch-site", b"host"})


def _pick(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, str]:
    return {name: value.decode("latin-1") for name, value in headers if name in _WANTED}


def _cookie(header: str | None) -> str | None:
    if not header or COOKIE not in header:
        return None
    try:
        morsel = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return None
    return morsel.value if morsel else None


def _is_public(path: str) -> bool:
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIX)


def _same_origin(headers: Mapping[bytes, str]) -> bool:
    """Browsers send Sec-Fetch-Site, older ones Origin with every write; neither means it is no browser of ours."""
    if (site := headers.get(b"sec-fetch-site")) is not None:
        return site in ("same-origin", "none")
    origin = headers.get(b"origin")
    return bool(origin) and urlsplit(origin or "").netloc == headers.get(b"host")


def _refuse(error: TunesmithError) -> Response:
    headers = {"www-authenticate": "Bearer"} if error.http_status == 401 else {}
    return Response(orjson.dumps(error_json(error)), error.http_status, headers, "application/json")
