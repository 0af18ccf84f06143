"""The commands of this package: keys, engine."""

from __future__ import annotations

import click

from infra.console import json_option, out, print_json, safe


@click.group()
def keys() -> None:
    """Create, list and revoke API keys.

    Roles: viewer looks; service asks models and nothing else; operator also promotes and rolls back; admin also
    forces and manages keys.
    """


@keys.command()
@click.option("--role", required=True, type=click.Choice(["viewer", "service", "operator", "admin"]))
@click.option("--name", required=True, help="Who or what will use it.")
@json_option
def create(role: str, name: str, as_json: bool) -> None:
    """Make a key; it is shown this once."""
    from deploy.auth import create_key
    from infra.db import transaction

    with transaction() as conn:
        made = create_key(conn, name=name, role=role)
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
    table = Table("id", "role", "name", "created", "revoked", box=None)
    for key in found:
        created = key.created_at.astimezone(UTC).strftime("%Y-%m-%d %H:%MZ")
        revoked = key.revoked_at.astimezone(UTC).strftime("%Y-%m-%d %H:%MZ") if key.revoked_at else ""
        table.add_row(key.id, key.role, escape(safe(key.name)), created, revoked)
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
