"""From the text in a request's ``model`` to the version that answers. Pure and in memory.

A `Table` is one immutable picture of what is ready to serve; the follower replaces it as a whole, so a request
sees one picture from its beginning to its end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

from infra.errors import NoModel, Unreachable, UsageError

if TYPE_CHECKING:
    from registry.bundle import Hosted
    from registry.pricing import Price
    from registry.profile import Extractor
    from registry.upstreams import Upstream

Slot = Literal["champion", "challenger", "shadow", "pinned"]
_MODEL = re.compile(r"([a-z0-9][a-z0-9-]{0,62})(?:@(champion|challenger)|:([1-9][0-9]{0,8}))?")
_PATTERN_HINT = "Write `name`, `name@champion`, `name@challenger` or `name:7`; names match ^[a-z0-9][a-z0-9-]{0,62}$."


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a request asked for: a model, and at most one of slot and number."""

    model: str
    slot: Literal["champion", "challenger"] | None = None
    number: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a version is asked: an engine of its base, or a hosted model at an upstream. `name` is the engine's
    address, or ``upstream/model``; `seconds` is how long an answer may take, None: as long as an engine's may."""

    name: str
    url: str
    model: str
    hosted: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    key_env: str | None = None
    seconds: float | None = None
    copy: bool = False  # whether what is asked there is nobody's request

    @property
    def who(self) -> str:
        return f"The upstream {self.name}" if self.hosted else "The engine"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Served:
    """A version that passed its checks, with all that answering and recording need. `hosted` is what answers in
    the base's place."""

    model: str
    number: int
    base_digest: str
    adapter: str  # the engine's name for it: <model>-v<number>, or `base` without an adapter
    adapter_path: str | None
    system: str | None
    generation: Mapping[str, Any]
    extractor: Extractor
    price: Price
    keep_text: bool
    created: int  # seconds since 1970
    hosted: Hosted | None = None
    digests: Mapping[str, str] = field(default_factory=dict)  # of the adapter's files, by name

    @property
    def name(self) -> str:
        return f"{self.model}:{self.number}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """One model's slots, as far as they are ready."""

    model: str
    generation: int
    champion: Served | None = None
    challenger: Served | None = None
    share: float = 0.0
    shadow: Served | None = None
    message: str = ""  # why the wanted generation is not served yet


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """What serves. `resident` holds every version that is loaded, in a slot or not; `engines` maps a base's
    digest to the addresses of its engines, `holders` a version to those that have it loaded, `upstreams` a name to
    where hosted models are asked."""

    routes: Mapping[str, Route] = field(default_factory=dict)
    resident: Mapping[tuple[str, int], Served] = field(default_factory=dict)
    engines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    holders: Mapping[tuple[str, int], tuple[str, ...]] = field(default_factory=dict)
    upstreams: Mapping[str, Upstream] = field(default_factory=dict)

    def places(self, served: Served) -> tuple[Place, ...]:
        """Where a version is asked: any engine that has it loaded (of its base, where none has), or its hosted models
        in their order."""
        if not served.hosted:
            held = self.holders.get((served.model, served.number))
            urls = held or self.engines.get(served.base_digest, ())
            return tuple(Place(name=url, url=url, model=served.adapter) for url in urls)
        return tuple(
            Place(
                name=f"{there.name}/{each.model}",
                url=there.url,
                model=each.model,
                hosted=True,
                options=each.options,
                key_env=there.key_env,
                seconds=there.timeout_seconds,
            )
            for each in served.hosted.models
            if (there := self.upstreams.get(each.upstream)) is not None
        )


def parse(model: object) -> Wanted:
    """The request's ``model``. Raises UsageError with the allowed forms; never repeats hostile text."""
    if not isinstance(model, str):
        raise UsageError("`model` must be a string.", hint=_PATTERN_HINT, details={"param": "model"})
    found = _MODEL.fullmatch(model)
    if found is None:
        raise UsageError("`model` is not a valid name.", hint=_PATTERN_HINT, details={"param": "model"})
    name, slot, number = found.groups()
    return Wanted(model=name, slot=slot, number=int(number) if number else None)  # type: ignore[arg-type]


def pick(table: Table, wanted: Wanted, sticky: str) -> tuple[Served, Slot] | None:
    """The version that answers, and in which role; None when a pinned number is not resident yet.

    `sticky` is the request's user: the same one gets the same version while a challenger stands, and keeps it when the
    share grows. A request without one has its own id: by the key, one application would be all of a share or none.

    Raises NoModel for an unknown model or an empty slot, Unreachable while its champion is not ready.
    """
    if wanted.number is not None:
        pinned = table.resident.get((wanted.model, wanted.number))
        return (pinned, "pinned") if pinned else None
    route = table.routes.get(wanted.model)
    if route is None:
        raise NoModel(f"The model {wanted.model} does not exist or serves nothing.", hint="See GET /v1/models.")
    if wanted.slot == "challenger":
        if route.challenger is None:
            raise NoModel(f"The model {wanted.model} has no challenger that is ready.", hint="See its deployment.")
        return route.challenger, "pinned"  # whoever names it is no sample of the traffic, which a canary is judged by
    if (
        wanted.slot is None
        and route.challenger is not None
        and share_of(sticky, f"{route.challenger.number}:{route.model}") < route.share
    ):
        return route.challenger, "challenger"
    if route.champion is None:
        raise Unreachable(
            f"The model {wanted.model} has no version that is ready.", hint=route.message or "Promote a version."
        )
    return route.champion, "champion" if wanted.slot is None else "pinned"


def share_of(sticky: str, salt: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments, uniform over `sticky`."""
    digest = blake2b(sticky.encode("utf-8", "replace"), key=salt.encode()[:64], digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
