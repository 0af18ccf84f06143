"""The processes of this package: the gateway with its pages, and the watcher."""

from __future__ import annotations

import click


@click.command()
@click.option("--host", help="Where to listen; by default as in the settings.")
@click.option("--port", type=click.IntRange(1, 65535), help="By default as in the settings (8080).")
def serve(host: str | None, port: int | None) -> None:
    """The gateway and the console, one process, until SIGTERM."""
    from deploy import gateway
    from infra import log
    from infra.db import refuse_other_schema
    from infra.settings import get_settings
    from monitoring.console.app import console_routes
    from monitoring.routes import routes

    log.setup()
    refuse_other_schema()
    settings = get_settings()
    changes = {"host": host or settings.host, "port": port or settings.port}
    settings = settings.model_copy(update=changes)
    gateway.serve(gateway.create_app(settings, routes=[*routes(), *console_routes()]), settings)


@click.command()
def watch() -> None:
    """The watcher, one process, until SIGTERM. A second one stands by to take over."""
    import signal
    import threading

    from infra import log
    from infra.db import refuse_other_schema
    from monitoring import watch as watcher

    log.setup()
    refuse_other_schema()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    watcher.run(stop)
