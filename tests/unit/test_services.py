"""What children are told, and the logs they write."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from infra import ports, services
from infra.errors import UsageError
from infra.settings import own_settings
from infra.stack import rotate


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        ("psycopg", "postgresql+psycopg://u:p%40w@h:1/mlflow?sslmode=require"),
        ("asyncpg", "postgresql+asyncpg://u:p%40w@h:1/mlflow?ssl=require"),
    ],
)
def test_a_libpq_url_as_sqlalchemy_wants_it(driver: str, expected: str) -> None:
    assert services.sqlalchemy_url("postgresql://u:p%40w@h:1/mlflow?sslmode=require", driver) == expected


def test_children_get_settings_no_proxy_for_loopback_and_no_telemetry(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "corp.example")
    settings = services.resolve(own_settings(port=8099), {"gateway": 8099, "mlflow": 1, "prefect": 2}, None)
    env = services.environment(settings, "mark")
    assert env["NO_PROXY"] == env["no_proxy"] == "corp.example,127.0.0.1,localhost,::1"
    assert env["HTTPS_PROXY"] == "http://proxy.example:3128"
    assert env["TUNESMITH_PORT"] == "8099"
    assert env["TUNESMITH_HOME"] == str(home)
    assert "TUNESMITH_DATABASE_URL" not in env
    assert {env[name] for name in ("DO_NOT_TRACK", "OMP_NUM_THREADS", "PYTHONSAFEPATH")} == {"1"}
    assert env["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert env["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_the_watcher_alone_is_told_of_a_collector(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector.example:4318")
    monkeypatch.setenv("TUNESMITH_DATABASE_URL", "postgresql://u:p@h:1")
    chosen = {"gateway": 8099, "mlflow": 1, "prefect": 2}
    settings = services.resolve(own_settings(), chosen, None)
    told = {
        service.name
        for service in [
            *services.fixed(settings, chosen, None, "mark"),
            services.engine(settings, "sha256:b", 3, "mark"),
        ]
        if "OTEL_EXPORTER_OTLP_ENDPOINT" in service.start.args[1]  # type: ignore[attr-defined]
    }
    assert told == {"watcher"}


def test_a_taken_port_is_refused_when_asked_for_and_avoided_when_not(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        assert not ports.is_free(taken)
        with pytest.raises(UsageError, match=f"Port {taken} .* is taken"):
            services.choose_ports(own_settings(port=taken), {})
        monkeypatch.setitem(services.PREFERRED, "gateway", taken)
        chosen, notes = services.choose_ports(own_settings(), {})
    assert chosen["gateway"] != taken
    assert any(f"Port {taken} is taken: gateway listens on {chosen['gateway']}." == note for note in notes)
    assert len(set(chosen.values())) == 4


def test_a_log_is_cut_while_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    with path.open("ab", buffering=0) as writer:
        for generation in range(6):
            writer.write(f"{generation}".encode() * 100)
            rotate(path, size=50, kept=3)
        writer.write(b"end")
    assert path.read_text() == "end"
    kept = {p.name: p.read_text()[0] for p in tmp_path.glob("*.log.*")}
    assert kept == {"engine.log.1": "5", "engine.log.2": "4", "engine.log.3": "3"}
