"""One typed Settings, from (strongest first) the environment, ``*_FILE`` secrets, ``.env``, the running
stack of this home (``stack.json``), defaults."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from infra.errors import Unreachable, UsageError


def default_home() -> Path:
    """``TUNESMITH_HOME``, or ``~/.tunesmith``; for root ``/var/lib/tunesmith``, since PostgreSQL then runs as
    another user who must be able to reach its files, and root's own home is closed to others."""
    if home := os.environ.get("TUNESMITH_HOME"):
        return Path(home).expanduser().absolute()
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/tunesmith")
    return Path("~/.tunesmith").expanduser()


class _SecretFiles(PydanticBaseSettingsSource):
    """``TUNESMITH_DATABASE_URL_FILE=/run/secrets/db`` gives ``database_url``, and so for every setting."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        name = f"TUNESMITH_{field_name.upper()}_FILE"
        path = os.environ.get(name)
        try:
            return (Path(path).read_text().strip() if path else None), field_name, False
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{name} names {path}, which cannot be read: {error}.") from error

    def __call__(self) -> dict[str, Any]:
        values = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


class _RunningStack(PydanticBaseSettingsSource):
    """What ``tunesmith up`` wrote about the stack that runs on this home: ``stack.json``, key "settings"."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        home = Path(self.current_state.get("home") or default_home())  # a stronger source, such as .env, may name it
        try:
            return dict(json.loads((home.expanduser() / "stack.json").read_text())["settings"])
        except (FileNotFoundError, NotADirectoryError, KeyError, json.JSONDecodeError):
            return {}
        except PermissionError as error:
            raise UsageError(
                f"{error.filename} may not be read: the stack there is another user's.",
                hint="Set TUNESMITH_HOME to a folder of yours.",
            ) from error


_HTTP = r"^https?://[^/\s]+"


class Settings(BaseSettings):
    """All that can be set, each as ``TUNESMITH_<NAME>``. Money is in US dollars, times in seconds or days."""

    model_config = SettingsConfigDict(
        env_prefix="TUNESMITH_", env_file=".env", extra="ignore", frozen=True, populate_by_name=True
    )

    home: Path = Field(default_factory=default_home)
    artifacts: Path | None = Field(default=None, description="unset: artifacts in the home")
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=1, le=65535)
    database_url: SecretStr | None = Field(default=None, description="PostgreSQL 15-18; unset: the embedded one")
    database_prefix: str = Field(
        default="", pattern=r"^[a-z0-9_]*$", description="put before the four databases' names"
    )
    mlflow_url: str | None = Field(
        default=None,
        pattern=_HTTP,
        validation_alias=AliasChoices("MLFLOW_TRACKING_URI", "TUNESMITH_MLFLOW_URL", "mlflow_url"),
    )
    prefect_url: str | None = Field(
        default=None,
        pattern=_HTTP,
        validation_alias=AliasChoices("PREFECT_API_URL", "TUNESMITH_PREFECT_URL", "prefect_url"),
        description="ends in /api",
    )
    gateway_url: str | None = Field(default=None, description="where this home's gateway answers")
    public_url: str | None = Field(
        default=None, description="where people reach it, for links in messages; unset: where it answers"
    )
    url: str | None = Field(default=None, pattern=_HTTP, description="a control API that registry commands go over")
    api_key: SecretStr | None = Field(default=None, description="whose person they then are")
    engine_secret: SecretStr | None = Field(default=None, description="shared by gateway and engines")
    webhook_url: str | None = Field(default=None, pattern=_HTTP, description="is told of deployment changes and alerts")
    slack_url: str | None = Field(default=None, pattern=_HTTP, description="an incoming webhook of Slack's form")
    webhook_secret: SecretStr | None = Field(default=None, min_length=16, description="signs what it is told")
    allow_private_webhooks: bool = Field(default=False, description="also addresses that are not public")
    signing_key: Path | None = Field(default=None, description="private key, PEM, that versions are signed with")
    signing_key_password: SecretStr | None = None
    trusted_keys: Path | None = Field(
        default=None, description="public key, or a folder of *.pem: only what they signed is imported or takes traffic"
    )
    work_pool: str = "tunesmith"
    search_workers: int = Field(default=0, ge=0, description="0: one a GPU, else one a core")
    worker_memory_gb: float | None = Field(default=None, gt=0, description="unset: an equal part of 80 %")
    max_engines: int = Field(default=2, ge=1)
    max_lora_rank: int = Field(
        default=256, ge=1, le=256, description="as vLLM's --max-lora-rank; no higher one is served"
    )
    machine_usd_per_hour: float = Field(default=0.10, ge=0, description="price of one machine for cost per second")
    machine_watts: float = Field(default=100.0, ge=0, description="what one machine draws while its engine works")
    event_retention_days: int = Field(default=30, ge=1)

    @field_validator("database_url")
    @classmethod
    def _is_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            import psycopg
            from psycopg.conninfo import conninfo_to_dict

            url = value.get_secret_value()
            try:
                ports = str(conninfo_to_dict(url).get("port", "")).split(",")
                known = urlsplit(url).scheme in ("postgresql", "postgres")
                known = known and all(port.isdigit() or not port for port in ports)
            except (psycopg.ProgrammingError, ValueError):
                known = False
            if not known:
                # Never what was given: it holds a password
                raise PydanticCustomError("url", "is no URL such as postgresql://user:password@host:5432")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            init_settings,
            env_settings,
            _SecretFiles(settings_cls),
            dotenv_settings,
            _RunningStack(settings_cls),
        )

    def database(self, name: str = "tunesmith") -> str:
        """The connection URL of one of the four databases: tunesmith, mlflow, optuna, prefect.

        Raises Unreachable when neither ``TUNESMITH_DATABASE_URL`` is set nor a stack runs on this home.
        """
        return self.server(self.database_prefix + name)

    def server(self, database: str = "postgres") -> str:
        """The connection URL of any database of the server; by default the one that is always there."""
        if self.database_url is None:
            raise _stack_down(self.home)
        parts = urlsplit(self.database_url.get_secret_value())
        return urlunsplit(parts._replace(path=f"/{database}"))

    def need(self, what: str) -> str:
        """The value of ``mlflow_url``, ``prefect_url``, ``gateway_url`` or ``engine_secret``; Unreachable if unset."""
        value = getattr(self, what)
        if value is None:
            raise _stack_down(self.home)
        return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def _stack_down(home: Path) -> Unreachable:
    return Unreachable(f"No Tunesmith stack runs on {home}.", hint="Start it with `tunesmith up --detach`.")


class _OwnSettings(Settings):
    """Without those of a running stack."""

    @classmethod
    def settings_customise_sources(cls, *args: Any, **kwargs: Any) -> tuple[PydanticBaseSettingsSource, ...]:
        return super().settings_customise_sources(*args, **kwargs)[:-1]


def own_settings(**given: Any) -> Settings:
    """What was set for this process, by `given`, environment, secrets and ``.env``, whatever stack runs or ran."""
    return _read(_OwnSettings, given)


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The process's settings, read once. Tests that change the environment call ``get_settings.cache_clear()``.

    Raises UsageError for a value that is not of its setting's kind.
    """
    return _read(Settings, {})


def _read(kind: type[Settings], given: dict[str, Any]) -> Settings:
    try:
        return kind(**given)
    except ValidationError as error:
        names = [str(problem["loc"][-1]).upper() for problem in error.errors()]
        names = [name if name.startswith(("MLFLOW_", "PREFECT_")) else f"TUNESMITH_{name}" for name in names]
        problems = "; ".join(f"{name}: {problem['msg']}" for name, problem in zip(names, error.errors(), strict=True))
        raise UsageError(
            f"Wrong settings: {problems}.", hint="Settings come from the environment and `.env`."
        ) from None
