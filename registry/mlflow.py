"""MLflow's runs, curves and versions; registry/aliases.py has what follows our deployments there.

MLflow is a projection that people browse; nothing that serves depends on it. Its loaders execute code, so nothing
is ever loaded through them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from infra import web
from infra.errors import NotFound, TunesmithError, Unreachable
from infra.settings import get_settings
from registry.names import check_model_name
from registry.notifications import page

if TYPE_CHECKING:
    import httpx
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_ENVIRONMENT = {  # read by MLflow's client at import or at each call; what the user set stays
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_OTLP_EXPORTER": "false",  # a collector that is named is the watcher's (monitoring/otlp.py)
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",  # about 8 seconds: a server that restarts, not one that is down
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}
_BATCH = 1000  # MLflow's limit of metrics in one log_batch
_PARAMS = 100  # and of params
_TEXT = 5000  # MLflow keeps 6000 characters of a param, 5000 of a tag


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version as MLflow has it: its number and the logged model that holds the files."""

    number: int
    model_id: str


def experiment_of(model: str) -> str:
    """The name of a model's experiment."""
    return f"tunesmith/{check_model_name(model)}"


def start_run(
    experiment: str,
    name: str,
    *,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> str:
    """Begin a run (nested under `parent`) and return its id; the experiment is made when missing.

    With a `key`, a run of the experiment that was begun with the same one is resumed instead (idempotent).
    Raises Unreachable, as every function here, when MLflow does not answer.
    """
    with _answers():
        client = _client()
        number = _experiment(client, experiment)
        if key is not None:
            found = client.search_runs([number], f"tags.`tunesmith.key` = '{_quoted(key)}'", max_results=1)
            if found:
                run_id = str(found[0].info.run_id)
                client.update_run(run_id, status="RUNNING")
                return run_id
        return _create(client, number, name, parent=parent, tags=tags, params=params, key=key)


class Nested:
    """The runs nested in one, each begun once by its key: asked for together, since each call is some milliseconds."""

    def __init__(self, parent: str) -> None:
        with _answers():
            client = _client()
            self.parent, self.experiment = parent, str(client.get_run(parent).info.experiment_id)
            self.known: dict[str, str] = {}
            page: str | None = ""
            while page is not None:
                nested = f"tags.`mlflow.parentRunId` = '{_quoted(parent)}'"
                found = client.search_runs([self.experiment], nested, page_token=page or None)
                self.known |= {run.data.tags.get("tunesmith.key", ""): str(run.info.run_id) for run in found}
                page = found.token or None

    def start_run(self, name: str, *, tags: Mapping[str, str], params: Mapping[str, Any], key: str) -> str:
        """Begin a run, or resume the one with this key."""
        with _answers():
            client, run_id = _client(), self.known.get(key)
            if run_id is not None:
                client.update_run(run_id, status="RUNNING")
                return run_id
            return _create(client, self.experiment, name, parent=self.parent, tags=tags, params=params, key=key)


def _create(
    client: MlflowClient, experiment: str, name: str, *, parent: str | None, tags: Mapping[str, str] | None,
    params: Mapping[str, Any] | None, key: str | None,
) -> str:  # fmt: skip
    all_tags = {"mlflow.source.name": "tunesmith", "mlflow.source.type": "JOB", **(tags or {})}
    if parent is not None:
        all_tags["mlflow.parentRunId"] = parent
    if key is not None:
        all_tags["tunesmith.key"] = key
    run_id = str(client.create_run(experiment, tags=_texts(all_tags), run_name=name).info.run_id)
    log_params(run_id, params or {})
    return run_id


def log_points(
    run_id: str,
    points: Iterable[tuple[str, float, int]],
    *,
    at_ms: int | None = None,
    tags: Mapping[str, Any] | None = None,
) -> None:
    """Log (key, value, step) points, a thousand a call, and tags with the last of them. Points that are not finite are
    dropped, with a warning.

    Sending a point again with the same `at_ms` (Unix milliseconds; now, if not given) adds nothing.
    """
    from_now = int(time.time() * 1000) if at_ms is None else at_ms
    points = list(points)
    finite = [point for point in points if math.isfinite(point[1])]
    if len(finite) < len(points):
        log.warning("%d points of run %s are not finite and were not logged", len(points) - len(finite), run_id)
    with _answers():
        from mlflow.entities import Metric, RunTag

        client, last = _client(), [RunTag(key, value) for key, value in _texts(tags or {}).items()]
        for start in range(0, len(finite), _BATCH):
            part = [Metric(key, float(value), from_now, step) for key, value, step in finite[start : start + _BATCH]]
            client.log_batch(run_id, metrics=part, tags=last if start + _BATCH >= len(finite) else ())
    if not finite:
        set_tags(run_id, tags or {})


def log_params(run_id: str, params: Mapping[str, Any]) -> None:
    """Log params, cut to MLflow's length; the same values again are harmless."""
    with _answers():
        from mlflow.entities import Param

        items = [Param(key, value) for key, value in _texts(params).items()]
        for start in range(0, len(items), _PARAMS):
            _client().log_batch(run_id, params=items[start : start + _PARAMS])


def set_tags(run_id: str, tags: Mapping[str, Any]) -> None:
    """Set tags of a run; the last write wins."""
    if not tags:
        return
    with _answers():
        from mlflow.entities import RunTag

        _client().log_batch(run_id, tags=[RunTag(key, value) for key, value in _texts(tags).items()])


def log_file(run_id: str, path: Path, artifact_path: str | None = None) -> None:
    """Upload one file under its own name; an HTML file is shown by MLflow's page."""
    with _answers():
        _client().log_artifact(run_id, str(path), artifact_path)


def log_folder(run_id: str, path: Path, artifact_path: str | None = None) -> None:
    """Upload all files below a folder."""
    with _answers():
        _client().log_artifacts(run_id, str(path), artifact_path)


def end_run(run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
    """Say that a run is over; saying it again is harmless."""
    with _answers():
        _client().set_terminated(run_id, status)


def register_version(
    model: str,
    *,
    run_id: str,
    folder: Path,
    bundle_digest: str,
    key: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, Any],
    params: Mapping[str, Any],
    card: str,
) -> Registered:
    """Register a sealed bundle as the model's next version, with its files, headline metrics and lineage tags.

    Idempotent by `key` (the pipeline run): a version that an interrupted attempt registered with the same bundle is
    returned, one with another bundle is replaced, which leaves a gap in the numbers. An upload that breaks leaves a
    logged model that is never READY, and no version.
    """
    check_model_name(model)
    with _answers():
        from mlflow.entities import LoggedModelOutput, Metric

        client = _client()
        _registered_model(client, model)
        for found in client.search_model_versions(f"name = '{model}' and tag.`tunesmith.run` = '{_quoted(key)}'"):
            if found.tags.get("tunesmith.bundle") == bundle_digest:
                return Registered(number=int(found.version), model_id=str(found.model_id))
            log.warning("version %s:%s of an interrupted attempt is replaced in MLflow", model, found.version)
            client.delete_model_version(model, str(found.version))
        all_tags = _texts({"tunesmith.run": key, "tunesmith.bundle": bundle_digest, **tags})
        logged = client.create_logged_model(
            client.get_run(run_id).info.experiment_id,
            name=model,
            source_run_id=run_id,
            params=_texts(params),
            tags=all_tags,
            model_type="lora-adapter",
        )
        try:
            client.log_model_artifacts(logged.model_id, str(folder))
        except BaseException:
            client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        client.finalize_logged_model(logged.model_id, "READY")
        now = int(time.time() * 1000)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if finite:
            client.log_batch(
                run_id, metrics=[Metric(f"test/{k}", v, now, 0, model_id=logged.model_id) for k, v in finite.items()]
            )
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        # The version's own metrics stay empty in MLflow, so the headline ones are tags too.
        shown = {f"metric.{name}": f"{value:.6g}" for name, value in finite.items()}
        made = client.create_model_version(
            model,
            f"models:/{logged.model_id}",
            run_id=run_id,
            model_id=logged.model_id,
            tags={**all_tags, **shown},
            description=_without_front_matter(card)[:_TEXT],
            await_creation_for=None,
        )
        if (there := page(f"/models/{model}/versions/{made.version}")) is not None:
            told = f"[This version in Tunesmith's console]({there})\n\n{made.description or ''}"
            client.update_model_version(model, str(made.version), told[:_TEXT])
        return Registered(number=int(made.version), model_id=str(logged.model_id))


def add_to_model(model_id: str, path: Path) -> None:
    """Put one more file beside those of a logged model, or in the place of one of that name."""
    with _answers():
        _client().log_model_artifact(model_id, str(path))


def _without_front_matter(card: str) -> str:
    """A card's prose: its YAML head is for model hubs, and MLflow's page would show it as a heap of lists."""
    return card.split("\n---\n", 1)[-1].lstrip() if card.startswith("---\n") else card


def delete_version(model: str, number: int, model_id: str | None) -> None:
    """Delete a version and the logged model behind it, as MLflow does it: neither is listed any more, and its number
    is given to no other. What is not there is no error. Raises Unreachable."""
    check_model_name(model)
    with rest_client() as rest:
        for path, body in (
            ("model-versions/delete", {"name": model, "version": str(number)}),
            *([(f"logged-models/{model_id}", {})] if model_id else []),
        ):
            with contextlib.suppress(NotFound):
                call(rest, "DELETE", path, body)


def download_version(model: str, number: int, folder: Path) -> Path:
    """A copy of what MLflow holds as that version, without loading any of it. Raises NotFound when it was deleted."""
    check_model_name(model)
    with _answers():
        import mlflow
        from mlflow.artifacts import download_artifacts

        url = _url()
        mlflow.set_tracking_uri(url)  # a logged model's address is resolved by this one, whatever is passed
        found = _client().get_model_version(model, str(number))
        source = f"models:/{found.model_id}" if found.model_id else found.source
        return Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=url))


def download_from(url: str, model: str, number: int, folder: Path) -> Path:
    """A copy of what the registry of another MLflow server holds as a version, without loading any of it.

    `model` is a name as that server allows it. A log-in stands in the address; that of MLflow's own variables is sent
    to our own server alone. Raises NotFound.
    """
    _client_of(url)  # sets the environment before anything of MLflow is imported
    import mlflow
    from mlflow.artifacts import download_artifacts

    before = mlflow.get_tracking_uri()
    with _answers(url), _our_login_kept_from(url):
        try:
            mlflow.set_tracking_uri(url)  # a logged model's address is resolved by this one, whatever is passed
            found = _client_of(url).get_model_version(model, str(number))
            source = f"models:/{found.model_id}" if found.model_id else found.source
            return Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=url))
        finally:
            mlflow.set_tracking_uri(before)


def run_url(run_id: str) -> str:
    """The address of a run's page."""
    with rest_client() as rest:
        info = call(rest, "GET", "runs/get", {"run_id": run_id})["run"]["info"]
        return f"{_url()}/#/experiments/{info['experiment_id']}/runs/{run_id}"


def version_url(model: str, number: int) -> str:
    """The address of a version's page."""
    return f"{_url()}/#/models/{check_model_name(model)}/versions/{number}"


def _url() -> str:
    return get_settings().need("mlflow_url").rstrip("/")


def _client() -> MlflowClient:
    return _client_of(_url())


@lru_cache(maxsize=4)
def _client_of(url: str) -> MlflowClient:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if web.on_loopback(url):  # MLflow's client reads proxies from the environment, for loopback too
        for name in ("NO_PROXY", "no_proxy"):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=url, registry_uri=url)


@contextmanager
def _answers(url: str | None = None) -> Iterator[None]:
    """Turn what MLflow's client raises into our errors; `url` is the server's, where it is not ours."""
    _client_of(url or _url())  # sets the environment before anything of MLflow is imported
    import requests
    from mlflow.exceptions import MlflowException, RestException

    try:
        yield
    except RestException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise NotFound(f"MLflow has no such thing: {_line(error)}") from error
        raise TunesmithError(f"MLflow refused: {_line(error)}", hint="See its log in the stack's logs.") from error
    except (MlflowException, requests.RequestException) as error:
        cause = error.__cause__ or error.__context__ or error
        if isinstance(cause, requests.RequestException) or "API request to" in str(error):
            raise _unreachable(error, url) from error
        raise TunesmithError(f"MLflow failed: {_line(error)}") from error


@contextmanager
def _our_login_kept_from(url: str) -> Iterator[None]:
    if urlsplit(url)[:2] == urlsplit(get_settings().mlflow_url or "")[:2]:
        yield
        return
    login = {name: os.environ.pop(name) for name in _LOGIN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(login)


@contextmanager
def rest_client(seconds: float = 10) -> Iterator[httpx.Client]:
    import httpx

    url = _url()
    # The variables and their order are those of MLflow's own client
    user, password, token = (os.environ.get(name) for name in _LOGIN)
    login = (user, password) if user and password else None
    headers = {"authorization": f"Bearer {token}"} if token and not login else None
    with httpx.Client(
        base_url=f"{url}/api/2.0/mlflow/",
        timeout=seconds,
        trust_env=not web.on_loopback(url),
        auth=login,
        headers=headers,
    ) as rest:
        yield rest


def call(rest: httpx.Client, method: str, path: str, body: Mapping[str, str]) -> dict[str, Any]:
    """One REST call, tried three times when the connection breaks; all calls made here may be repeated."""
    import httpx

    for attempt in range(3):
        try:
            if method == "GET":
                answer = rest.get(path, params=dict(body))
            else:
                answer = rest.request(method, path, json=dict(body))
        except httpx.TransportError as error:
            if attempt == 2:
                raise _unreachable(error) from error
            time.sleep(0.2 * 2**attempt)
            continue
        if answer.status_code == 404 or "RESOURCE_DOES_NOT_EXIST" in answer.text[:200]:
            raise NotFound(f"MLflow has no such thing: {answer.text[:300]}")
        if answer.status_code >= 500:
            raise Unreachable(f"MLflow answered {answer.status_code} to {path}.", hint="See `tunesmith status`.")
        if answer.status_code >= 400:
            raise TunesmithError(f"MLflow refused {path}: {answer.text[:300]}")
        result: dict[str, Any] = answer.json() if answer.content else {}
        return result
    raise AssertionError("the loop returns or raises")


def _unreachable(error: BaseException, url: str | None = None) -> Unreachable:
    hint = "Check --mlflow." if url else "See `tunesmith status`."
    return Unreachable(f"MLflow does not answer at {url or _url()} ({type(error).__name__}).", hint=hint)


def _experiment(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another process was first; any other trouble shows in the next line
            found = client.get_experiment_by_name(name)
    if found is None:
        raise TunesmithError(f"MLflow neither has nor makes the experiment {name}.")
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _registered_model(client: MlflowClient, model: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value)[:_TEXT] for key, value in values.items() if value is not None}


def _quoted(text: str) -> str:
    if "'" in text or "\\" in text:
        raise TunesmithError(f"A key has no quotes: {text!r}.")
    return text


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300]
