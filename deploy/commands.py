"""The commands of this package."""

from __future__ import annotations

from typing import Any

import click

from infra.console import json_option, out, print_json, safe


@click.group()
def keys() -> None:
    """Create, list and revoke API keys.

    Roles: viewer looks; service asks models and nothing else; operator also promotes and rolls back; admin also
    forces and manages keys.
    """
    from registry.desk import only_here

    only_here("keys")


@keys.command()
@click.option("--role", required=True, type=click.Choice(["viewer", "service", "operator", "admin"]))
@click.option("--name", required=True, help="Who or what will use it.")
@click.option("--person", metavar="USER", help="Whose it is: all keys of one person approve a version once.")
@json_option
def create(role: str, name: str, person: str | None, as_json: bool) -> None:
    """Make a key; it is shown this once."""
    from deploy.auth import create_key
    from infra.db import transaction

    with transaction() as conn:
        made = create_key(conn, name=name, role=role, person=person)
    if as_json:
        print_json({"id": made.id, "key": made.key, "role": made.role, "name": made.name})
    else:
        out.print(made.key, markup=False)


@keys.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """All keys, also revoked ones; the secrets are not kept."""
    from datetime import UTC

    from rich.markup import escape
    from rich.table import Table

    from deploy.auth import list_keys
    from infra.db import transaction

    with transaction() as conn:
        found = list_keys(conn)
    if as_json:
        print_json({"keys": [vars(key) for key in found]})
        return
    table = Table("id", "role", "name", "person", "created", "revoked", box=None)
    for key in found:
        created = key.created_at.astimezone(UTC).strftime("%Y-%m-%d %H:%MZ")
        revoked = key.revoked_at.astimezone(UTC).strftime("%Y-%m-%d %H:%MZ") if key.revoked_at else ""
        table.add_row(key.id, key.role, escape(safe(key.name)), escape(safe(key.person or "")), created, revoked)
    out.print(table)


@keys.command()
@click.argument("key_id")
@json_option
def revoke(key_id: str, as_json: bool) -> None:
    """End a key and the console sessions made with it, within seconds everywhere."""
    from deploy.auth import revoke_key
    from infra.db import transaction

    with transaction() as conn:
        gone = revoke_key(conn, key_id)
    if as_json:
        print_json(vars(gone))
    else:
        out.print(f"{gone.id} is revoked.")


@click.command()
@click.argument("whose", metavar="key:ID | model:NAME")
@click.option("--requests-per-minute", "requests", type=click.FloatRange(min=0))
@click.option("--tokens-per-minute", "tokens", type=click.FloatRange(min=0), help="Of prompts and answers.")
@click.option("--usd-per-day", "usd", type=click.FloatRange(min=0), help="By the model's price; a day is UTC's.")
@click.option("--usd-per-month", "usd_month", type=click.FloatRange(min=0), help="A calendar month, of UTC.")
@click.option("--concurrent", type=click.IntRange(min=0), help="Requests under way at a time, at each gateway.")
@click.option("--off", is_flag=True, help="Take all its limits away.")
@json_option
def limit(
    whose: str,
    requests: float | None,
    tokens: float | None,
    usd: float | None,
    usd_month: float | None,
    concurrent: int | None,
    off: bool,
    as_json: bool,
) -> None:
    """What a key or a model may use, over all gateways; beyond it they answer 429."""
    from deploy import budgets
    from infra.db import transaction
    from infra.errors import UsageError
    from registry.deployments import actor_here
    from registry.desk import only_here

    only_here("limit")
    scope, name = budgets.parse_whose(whose)
    given: dict[budgets.Kind, float | None] = {
        "requests": requests,
        "tokens": tokens,
        "usd": usd,
        "usd_month": usd_month,
        "concurrent": concurrent,
    }
    amounts = {kind: amount for kind, amount in given.items() if amount is not None}
    if off == bool(amounts):
        raise UsageError("Name a limit, or --off.", hint="Such as --requests-per-minute 60.")
    with transaction() as conn:
        if off:
            budgets.unlimit(conn, scope, name)
        else:
            budgets.limit(conn, scope, name, amounts, actor=actor_here())
        mine = [row for row in budgets.listing(conn) if (row["scope"], row["name"]) == (scope, name)]
    _show_limits(mine, as_json)


@click.command()
@json_option
def limits(as_json: bool) -> None:
    """All limits, and how much of each is taken in this minute, day or month."""
    from deploy import budgets
    from infra.db import transaction

    with transaction() as conn:
        found = budgets.listing(conn)
    _show_limits(found, as_json)


def _show_limits(rows: list[dict[str, Any]], as_json: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    if as_json:
        print_json({"limits": rows})
        return
    if not rows:
        out.print("There is no limit.")
        return
    table = Table("whose", "limit", "taken", "by", box=None)
    for row in rows:
        whose = f"{row['scope']}:{row['name']}" + (f" ({row['key_name']})" if row["key_name"] else "")
        amount, kind = f"{row['amount']:,g}", row["kind"].removesuffix("_month")
        what = f"{amount} {kind} a {row['unit']}" if row["unit"] else f"{amount} requests at a time, at each gateway"
        cells = (whose, what, "" if row["used"] is None else f"{row['used']:,.6g}", row["actor"])
        table.add_row(*(escape(safe(cell)) for cell in cells))
    out.print(table)


@click.group()
def upstream() -> None:
    """Addresses of hosted models, by the names that versions have for them."""
    from registry.desk import only_here

    only_here("upstream")


@upstream.command(name="set")
@click.argument("name")
@click.option("--url", required=True, help="Such as https://api.example.org/v1.")
@click.option(
    "--key-env", metavar="VARIABLE", help="The variable of gateways and runs that holds the key; '' for none."
)
@click.option(
    "--timeout", "seconds", type=click.FloatRange(min=1, max=600),
    help="Seconds of silence after which the next model is asked (60).",
)  # fmt: skip
@json_option
def set_(name: str, url: str, key_env: str | None, seconds: float | None, as_json: bool) -> None:
    """Name an address, or move a name to another; what is not given stays, and gateways follow within seconds."""
    from infra.db import transaction
    from registry import upstreams
    from registry.deployments import actor_here

    with transaction() as conn:
        upstreams.put(conn, name, url, key_env=key_env, timeout_seconds=seconds, actor=actor_here())
        mine = [row for row in upstreams.listing(conn) if row["name"] == name]
    _show_upstreams(mine, as_json)


@upstream.command(name="list")
@json_option
def list_upstreams(as_json: bool) -> None:
    """All of them, and which models are asked there now."""
    from infra.db import transaction
    from registry import upstreams

    with transaction() as conn:
        found = upstreams.listing(conn)
    _show_upstreams(found, as_json)


@upstream.command()
@click.argument("name")
@json_option
def remove(name: str, as_json: bool) -> None:
    """Forget a name at which no version is asked that serves, served or is tried out."""
    from infra.db import transaction
    from registry import upstreams

    with transaction() as conn:
        upstreams.remove(conn, name)
    if as_json:
        print_json({"name": name, "removed": True})
    else:
        out.print(f"{name} is forgotten.")


def _show_upstreams(rows: list[dict[str, Any]], as_json: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    if as_json:
        print_json({"upstreams": rows})
        return
    if not rows:
        out.print("There is no upstream. Name one: tunesmith upstream set NAME --url URL.")
        return
    table = Table("name", "address", "key in", "timeout", "asked for", "by", box=None)
    for row in rows:
        models = ", ".join(row["models"])
        cells = (
            row["name"],
            row["url"],
            row["key_env"] or "none",
            f"{row['timeout_seconds']:g} s",
            models,
            row["actor"],
        )
        table.add_row(*(escape(safe(cell)) for cell in cells))
    out.print(table)


@click.command()
@click.option("--base", required=True, metavar="DIGEST|PATH", help="A kept base's digest, or what `base.path` takes.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0: any free one, named in the log.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--url", help="Where gateways reach it, when not at host and port.")
@click.option("--rows", type=click.IntRange(1, 256), default=16, show_default=True, help="Requests decoded at once.")
def engine(base: str, port: int, host: str, url: str | None, rows: int) -> None:
    """One base and its adapters, one process, until interrupted."""
    from deploy.engine import Limits, run
    from infra import log
    from infra.settings import get_settings

    log.setup()
    limits = Limits(rows=rows, adapter_rank=get_settings().max_lora_rank)
    run(base, host=host, port=port, url=url, limits=limits)
