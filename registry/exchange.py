"""Versions in and out: a PEFT adapter made elsewhere, or a bundle that another Tunesmith exported."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from infra import storage
from infra.db import transaction
from infra.errors import NotFound, Refused, TunesmithError, UsageError
from registry import bundle, mlflow, servable, signatures, versions
from registry.evidence import check_evaluation
from registry.names import check_model_name
from registry.versions import Version, VersionDraft

if TYPE_CHECKING:
    from registry.bases import Base

_NAMESPACE = uuid.UUID("6d1b3c1e-7a0f-5d55-9b58-3c8a6f1c2b47")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_EXECUTABLE = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".py", ".so", ".h5"})


def export_version(version: Version, target: Path) -> None:
    """Copy a version's bundle, verified, to a folder that is not there yet; it appears whole or not at all. Its
    signature goes with it.

    Raises UsageError when there is something at `target`, Refused when the kept bundle is damaged.
    """
    folder = version.folder()
    manifest = bundle.verify(folder, version.bundle_digest)
    with _new_folder(target) as copy:
        _copy(folder, copy, [*manifest.files, bundle.MANIFEST])
        if (folder / bundle.SIGNATURE).is_file():
            _copy(folder, copy, [bundle.SIGNATURE])
        bundle.verify(copy, version.bundle_digest)


def export_files(target: Path, digest: str, fetch: Callable[[str], bytes], *, signed: bool) -> None:
    """The same of a bundle from elsewhere: `fetch` gives a file's content by its name in the bundle."""
    with _new_folder(target) as copy:
        (copy / bundle.MANIFEST).write_bytes(fetch(bundle.MANIFEST))
        if (found := storage.file_digest(copy / bundle.MANIFEST)) != digest:
            raise Refused(f"What was sent as {bundle.MANIFEST} has digest {found}, not {digest}.")
        for name in bundle.read(copy).files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise Refused(f"What was sent names the file {name[:200]!r}.", hint="Nothing of it was written.")
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(fetch(name))
        if signed:
            (copy / bundle.SIGNATURE).write_bytes(fetch(bundle.SIGNATURE))
        bundle.verify(copy, digest)


def for_hub(exported: Path, target: Path) -> None:
    """Of an exported bundle what a Hugging Face repository of an adapter has, at the root of a new folder, from where
    PEFT's ``from_pretrained`` takes it: adapter_config.json, adapter_model.safetensors, and the model card, README.md.

    Raises UsageError for a version without an adapter, or when there is something at `target`.
    """
    if not bundle.read(exported).has_adapter:
        raise UsageError("This version has no adapter that PEFT could load.", hint="Export it without --hub.")
    with _new_folder(target) as copy:
        for name in (bundle.ADAPTER_CONFIG, bundle.ADAPTER_WEIGHTS, "README.md"):
            if (exported / name).is_file():
                shutil.copyfile(exported / name, copy / PurePosixPath(name).name)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which then becomes `target`."""
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists already.", hint="Name a folder that does not.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as scratch:
            copy = Path(scratch, "bundle")
            copy.mkdir()
            yield copy
            copy.rename(target)
    except OSError as error:
        raise TunesmithError(
            f"Writing {target} failed: {error.strerror or error}.", hint="Make room there, or name another folder."
        ) from error


def _copy(source: Path, target: Path, names: Iterable[str]) -> None:
    # Not copytree, which puts off what fails and then tells all of it as a list
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def import_version(
    path: Path, model: str, *, base: str | None = None, by: str | None = None, fetch: bool = True, vouched: bool = True
) -> Version:
    """Register what stands at `path` as the next version of `model`; importing the same thing again, or what a run
    made here, changes nothing.
    MLflow shows who it was `by`. Without `fetch` the base must be one that is here: what strangers name is neither
    read from a folder nor fetched.

    An exported bundle (it has version.json) keeps its evaluation, gate decision and profile; its base, the one it
    names or `base`, must resolve to the very digests it was made on. Its pass counts where one who might force it
    brings it (`vouched`), or a trusted key signed it for this very model; else the version counts as never judged, and
    is not signed here, since a signature vouches elsewhere. A PEFT adapter (adapter_config.json and
    adapter_model.safetensors) has neither; its base is the one its config names, or `base`.

    Raises NotFound, UsageError, and Refused for pickles, code, links, tensors that are not finite, an adapter that
    is not a plain LoRA, another base, or, where keys are trusted, a bundle that none of them signed.
    """
    check_model_name(model)
    if _holds(path) == "adapter":
        digest = _keep_adapter(path, model, base, fetch=fetch, vouched=vouched)
        return versions.register(digest, run_id=_import_id(model, digest), imported_by=by)
    digest, vouched = _keep_bundle(path, model, base, fetch=fetch, vouched=vouched)
    run_id = _import_id(model, digest)
    with transaction() as conn:
        if (own := versions.made_here(conn, model, digest)) is not None:
            return own  # with what was judged since; another version of it would have the first judgement alone
        if not vouched and versions.of_run(conn, model, run_id) is None:  # nobody has vouched for it before
            run_id = _import_id(model, digest, "not vouched for")
    return versions.register(digest, run_id=run_id, imported_by=by, vouched=vouched)


def _import_id(*what: str) -> uuid.UUID:
    return uuid.uuid5(_NAMESPACE, " ".join(what))


@contextmanager
def fetched_from_mlflow(url: str, name: str, number: int) -> Iterator[Path]:
    """What `import_version` takes, of a version in another MLflow server's registry: one that a Tunesmith registered
    there comes with its evidence, any other must hold a plain PEFT LoRA adapter somewhere in its files.

    Raises NotFound, UsageError, and Unreachable when that server does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-import-") as scratch:
        path = mlflow.download_from(url, name, number, Path(scratch))
        if not (path / bundle.MANIFEST).is_file():
            adapters = sorted(found.parent for found in path.rglob("adapter_config.json"))
            if len(adapters) != 1:
                raise UsageError(
                    f"{name} version {number} at {url} holds {len(adapters) or 'no'} PEFT adapters.",
                    hint="A version of Tunesmith's, or one with a single adapter, can be imported.",
                )
            path = adapters[0]
        yield path


def files_of(path: Path) -> dict[str, Path]:
    """The files of what stands at `path` that an import needs, by their names in it. Raises as `import_version`."""
    if _holds(path) == "bundle":
        files = bundle.files(path)  # and not what the manifest names, which may lie anywhere
        if (path / bundle.SIGNATURE).is_file():
            files[bundle.SIGNATURE] = path / bundle.SIGNATURE
        return files
    _check_adapter(path)
    return {name: path / name for name in ("adapter_config.json", "adapter_model.safetensors")}


def _holds(path: Path) -> Literal["bundle", "adapter"]:
    """What stands in a folder. Raises NotFound, UsageError for neither."""
    if not path.is_dir():
        raise NotFound(f"There is no folder {path}.", hint="Name the adapter's, or an exported bundle's, folder.")
    if (path / bundle.MANIFEST).is_file():
        return "bundle"
    if (path / "adapter_config.json").is_file():
        return "adapter"
    raise UsageError(
        f"{path} has neither {bundle.MANIFEST} nor adapter_config.json.",
        hint="Give an exported bundle, or a PEFT adapter's folder.",
    )


def _keep_bundle(path: Path, model: str, base: str | None, *, fetch: bool, vouched: bool) -> tuple[str, bool]:
    """The digest that a bundle has as one of `model`, and whether somebody vouches for what stands in it."""
    from registry import bases

    bundle.files(path)
    found = storage.file_digest(path / bundle.MANIFEST)
    manifest = bundle.verify(path, found)
    _check_file(path / bundle.MANIFEST, path, dict)
    if (began := (manifest.training or {}).get("init_bundle")) is not None and not _DIGEST.fullmatch(str(began)):
        raise Refused(
            f"The bundle in {path} says that training began from {str(began)[:100]!r}, which is no digest.",
            hint="Export the version again.",
        )
    signed_by = signatures.demand(f"The bundle in {path}", path)
    if storage.has("base", manifest.base.digest):
        here = bases.load(manifest.base.digest)
    elif fetch:
        here = bases.resolve(base or manifest.base.id, manifest.base.revision, manifest.base.dtype)
    else:
        here = bases.known(base or manifest.base.id)
    for what in ("digest", "tokenizer_digest", "template_digest"):
        wanted, has = getattr(manifest.base, what), getattr(here, what)
        if wanted != has:
            raise Refused(
                f"The bundle in {path} was made on {manifest.base.id} with {what} {wanted}; here it is {has}.",
                hint="Bring the same base here, and name it with --base where it has another name or folder.",
            )
    with storage.scratch("bundle") as folder:
        _copy(path, folder, manifest.files)
        digest = bundle.write(folder, manifest.model_copy(update={"model": model}))
        bundle.verify(folder, digest)
        for name, check in (("profile.json", _check_profile), ("evaluation.json", _check_judged)):
            _check_file(folder / name, path, check)
        vouched = vouched or (signed_by is not None and digest == found)
        if not (vouched and signatures.sign(folder)) and digest == found and signed_by is not None:
            _copy(path, folder, [bundle.SIGNATURE])
        signatures.adopt(folder, storage.keep("bundle", digest, folder))
    return digest, vouched


def _check_file(file: Path, path: Path, check: Callable[[Any], object]) -> None:
    """Refuse a file that commands and pages could not read later; a version need not have one."""
    if not file.is_file():
        return
    try:
        text = file.read_text(encoding="utf-8")
        if _NUL.search(text):
            raise ValueError("it has the character NUL, which no database takes")
        check(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise Refused(
            f"The {file.name} of the bundle in {path} cannot be read: {error}.",
            hint="Export the version again, with this release or an older one.",
        ) from error


def _check_judged(value: Any) -> None:
    """An evaluation, and a decision that is of it."""
    check_evaluation(value)
    gate = value.get("gate")
    if gate and gate.get("evaluation") is not None:
        judged = {name: part for name, part in value.items() if name != "gate"}
        if storage.text_digest(bundle.canonical_json(judged)) != gate["evaluation"]:
            raise ValueError("the gate's decision in it is of another evaluation")


def _check_profile(value: Any) -> None:
    from registry.profile import Profile

    Profile.from_json(value)


def _check_adapter(path: Path) -> dict[str, Any]:
    """The adapter's config, once nothing beside it executes; its tensors are not looked at."""
    for file in sorted(path.rglob("*")):
        if file.is_symlink():
            raise Refused(f"{file} is a link.", hint="Copy the adapter's files into a folder of their own.")
        if file.suffix.lower() in _EXECUTABLE:
            raise Refused(
                f"{path} holds {file.relative_to(path).as_posix()!r}, which can execute code when it is loaded.",
                hint="Save the adapter as safetensors, into a folder of its own.",
            )
    if not (path / "adapter_model.safetensors").is_file():
        raise UsageError(f"{path} has no adapter_model.safetensors.", hint="Save the adapter as safetensors.")
    return _adapter_config(path / "adapter_config.json")


def _keep_adapter(path: Path, model: str, base: str | None, *, fetch: bool, vouched: bool) -> str:
    from registry import bases
    from registry.profile import build

    config = _check_adapter(path)
    signed_by = signatures.demand(f"The adapter in {path}", path)
    named = base or config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UsageError(f"{path / 'adapter_config.json'} names no base.", hint="Name it with --base.")
    revision = config.get("revision") if base is None else None
    bundle.check_tensors(path / "adapter_model.safetensors", "adapter_model.safetensors")
    exact = revision if isinstance(revision, str) and revision else "main"
    found = bases.resolve(named, exact) if fetch else bases.known(named, None if exact == "main" else exact)
    servable.check(path, found.folder)
    _check_template(path, found)
    draft = VersionDraft(
        model=model,
        method="imported",
        base=found,
        adapter=path,
        params={key: config[key] for key in ("r", "lora_alpha", "lora_dropout", "use_rslora") if key in config},
        profile=build([], []).to_json(),
    )
    return versions.seal(draft, signed=vouched or signed_by is not None)


def _check_template(path: Path, base: Base) -> None:
    """Trainers save the tokenizer beside the adapter: prompts must be written here as they were there. Raises Refused
    for another chat template."""
    template: Any = None
    try:
        if (file := path / "tokenizer_config.json").is_file():
            template = json.loads(file.read_bytes()).get("chat_template")
        if (file := path / "chat_template.jinja").is_file():
            template = file.read_text(encoding="utf-8")
    except (ValueError, AttributeError) as error:
        raise Refused(f"{file} cannot be read: {error}.", hint="Save the adapter and its tokenizer again.") from error
    if isinstance(template, str) and template and storage.text_digest(template) != base.template_digest:
        raise Refused(
            f"The adapter in {path} was made with another chat template than {base.id} has here.",
            hint="Bring the base with that template in its folder, and name it with --base.",
        )


def _adapter_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else None
        raise Refused(f"{path} is not a LoRA adapter's (peft_type is {found!r}).", hint="Only LoRA can be served.")
    if config.get("auto_mapping"):
        raise Refused(f"{path} has auto_mapping, which names code.", hint=servable.PLAIN)
    if (why := servable.beyond_lora(config)) is not None:
        raise Refused(f"The adapter of {path} {why}.", hint=servable.PLAIN)
    return config
