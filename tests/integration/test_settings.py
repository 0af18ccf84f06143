"""Where a setting comes from, strongest first: environment, *_FILE, .env, the running stack, defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.errors import Unreachable, UsageError
from infra.settings import get_settings, own_settings


@pytest.fixture
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stack_says(home: Path, **settings: object) -> None:
    (home / "stack.json").write_text(json.dumps({"pid": 1, "services": [], "settings": settings}))


def read(name: str) -> object:
    get_settings.cache_clear()
    value = getattr(get_settings(), name)
    return value.get_secret_value() if hasattr(value, "get_secret_value") else value


def test_each_source_hides_the_next(home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("engine_secret") is None
    stack_says(home, engine_secret="stack")
    assert read("engine_secret") == "stack"
    (folder / ".env").write_text("TUNESMITH_ENGINE_SECRET=dotenv\n")
    assert read("engine_secret") == "dotenv"
    (folder / "secret").write_text("file\n")
    monkeypatch.setenv("TUNESMITH_ENGINE_SECRET_FILE", str(folder / "secret"))
    assert read("engine_secret") == "file"
    monkeypatch.setenv("TUNESMITH_ENGINE_SECRET", "environment")
    assert read("engine_secret") == "environment"


def test_up_does_not_take_its_own_past_for_a_setting(home: Path, folder: Path) -> None:
    stack_says(home, port=9999, database_url="postgresql://old")
    assert read("port") == 9999
    own = own_settings()
    assert own.port == 8080
    assert own.database_url is None
    assert "port" not in own.model_fields_set
    assert "port" in own_settings(port=8080).model_fields_set


def test_the_home_that_dotenv_names_is_the_one_whose_stack_counts(
    home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack_says(home, port=7777)
    monkeypatch.delenv("TUNESMITH_HOME")
    (folder / ".env").write_text(f"TUNESMITH_HOME={home}\n")
    assert read("port") == 7777


def test_usual_names_of_other_tools_are_heard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.example/api")
    assert (read("mlflow_url"), read("prefect_url")) == ("http://mlflow.example", "http://prefect.example/api")


def test_bad_values_get_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_PORT", "eighty")
    with pytest.raises(UsageError, match="TUNESMITH_PORT"):
        read("port")
    monkeypatch.delenv("TUNESMITH_PORT")
    monkeypatch.setenv("TUNESMITH_DATABASE_URL_FILE", str(folder / "missing"))
    with pytest.raises(UsageError, match=r"TUNESMITH_DATABASE_URL_FILE names .*missing"):
        read("database_url")


def test_secrets_are_not_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_DATABASE_URL", "postgresql://user:hidden@host/x")
    assert "hidden" not in repr(own_settings())
    assert own_settings().database("mlflow") == "postgresql://user:hidden@host/mlflow"


def test_without_a_stack_the_sentence_says_how_to_start_one(folder: Path) -> None:
    get_settings.cache_clear()
    for question in (get_settings().database, lambda: get_settings().need("mlflow_url")):
        with pytest.raises(Unreachable) as caught:
            question()
        assert "tunesmith up" in caught.value.hint
