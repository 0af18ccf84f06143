"""The folder of a version: what is in it, how it is sealed, and what is refused.

    version.json                          the manifest: format number, lineage, every other file's SHA-256
    adapter/adapter_config.json           plain PEFT, as PEFT and vLLM load it
    adapter/adapter_model.safetensors
    environment.json                      the packages it was made with
    data.json                             its data set's row counts and sources, with their licences; no rows
    profile.json  evaluation.json  README.md  report.html

The bundle's digest is the digest of version.json's bytes, which name the digests of all the rest. Nothing in it
executes: only safetensors, JSON, Markdown and HTML, and no links.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from infra.errors import Refused
from infra.storage import file_digest, text_digest
from registry.pricing import TokenPrice
from registry.upstreams import check_options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MANIFEST = "version.json"
SIGNATURE = "model.sig"  # beside the rest and no part of it: registry/signatures.py
ADAPTER_CONFIG = "adapter/adapter_config.json"
ADAPTER_WEIGHTS = "adapter/adapter_model.safetensors"
ENVIRONMENT = "environment.json"
DATA = "data.json"
SUFFIXES = frozenset({".safetensors", ".json", ".md", ".html"})

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseIdentity(_Value):
    """The base a version stands on; an engine serves the version only on exactly these digests."""

    id: str
    revision: str
    digest: Digest
    tokenizer_digest: Digest
    template_digest: Digest
    dtype: str = Field(pattern="^(float32|bfloat16)$")


class Prompt(_Value):
    system: str | None = None


class Generation(_Value):
    """What a request gets that does not say otherwise."""

    max_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)


class HostedModel(_Value):
    """A model at an upstream, which `tunesmith upstream` gives its address. `options` are put into each request's body,
    a null takes a field out of it."""

    upstream: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    model: str = Field(min_length=1, max_length=200)
    options: Annotated[dict[str, Any], AfterValidator(check_options)] = Field(default_factory=dict)


class Hosted(_Value):
    """What answers in the base's place: the first of `models`, and when it fails the next. `price` is that of the
    first; without it the model's own holds."""

    models: tuple[HostedModel, ...] = Field(min_length=1, max_length=8)
    price: TokenPrice | None = None


class Training(BaseModel):
    """What it takes, beside the params, to train a version again: how a manifest's `training` is read."""

    model_config = ConfigDict(frozen=True)

    order_seed: int
    seed: int
    steps: int
    total_steps: int
    max_tokens: int
    validation_rows: int | None
    init_bundle: Digest | None
    loss: float


class Manifest(_Value):
    """version.json. The version's number is not in it: MLflow gives it, and the bundle is sealed before. `training`
    is what it takes beside the params to train it again (pipelines/reproduction.py). Where a `hosted` model answers,
    the base is the one that it was judged beside."""

    format: Literal[1] = 1
    model: str
    method: str
    base: BaseIdentity
    prompt: Prompt = Prompt()
    generation: Generation = Generation()
    dataset: Digest | None = None
    study: str | None = None
    trial: int | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] | None = None
    hosted: Hosted | None = Field(
        default=None, exclude_if=lambda value: value is None
    )  # older bundles have no such key
    code_version: str
    files: dict[str, Digest] = Field(default_factory=dict)

    @property
    def has_adapter(self) -> bool:
        return ADAPTER_WEIGHTS in self.files


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, UTF-8; floats as Python writes them (shortest that reads back).

    What PostgreSQL's jsonb gives back has the same text: a float that is not finite becomes null, minus zero becomes
    zero, and a float beyond 2^53 becomes the integer that it is.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write(folder: Path, manifest: Manifest) -> Digest:
    """Seal a filled folder: fill in `files`, write version.json, return the bundle's digest.

    Raises Refused for a file that may not be in a bundle.
    """
    files = {name: file_digest(path) for name, path in _files(folder) if name != MANIFEST}
    text = canonical_json(manifest.model_copy(update={"files": files}).model_dump(mode="json"))
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return text_digest(text)


def read(folder: Path) -> Manifest:
    """The manifest of a folder, parsed but not verified. Raises Refused when there is none or it is not one."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise _refused(folder, f"it has no {MANIFEST}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or MANIFEST
        raise _refused(folder, f"{MANIFEST} is not a manifest of format 1: {field}: {first['msg']}") from error


def verify(folder: Path, digest: Digest) -> Manifest:
    """The manifest of a bundle that is exactly what was sealed as `digest`.

    In this order, so that nothing is opened that should not be: only allowed kinds of files and no links; the
    manifest's digest; no file missing, extra or changed; the adapter's tensors floating and finite.
    Raises Refused, saying which.
    """
    names = dict(_files(folder))
    manifest_path = names.pop(MANIFEST, None)
    if manifest_path is None:
        raise _refused(folder, f"it has no {MANIFEST}")
    if (found := file_digest(manifest_path)) != digest:
        raise _refused(folder, f"{MANIFEST} has digest {found}, not {digest}")
    manifest = read(folder)
    if missing := sorted(manifest.files.keys() - names.keys()):
        raise _refused(folder, f"{missing[0]} is missing")
    if extra := sorted(names.keys() - manifest.files.keys()):
        raise _refused(folder, f"{extra[0]!r} is not in its manifest")
    for name, expected in sorted(manifest.files.items()):
        if (found := file_digest(names[name])) != expected:
            raise _refused(folder, f"{name} has digest {found}, not {expected}")
    for name, path in names.items():
        if path.suffix == ".safetensors" and check_tensors(path, name) == 0:
            raise _refused(folder, f"{name} holds no tensors")
    return manifest


def files(folder: Path) -> dict[str, Path]:
    """All files below a folder but the signature, by name. Raises Refused for a kind that is not allowed, or a link;
    opens none."""
    return dict(_files(folder))


def check_tensors(path: Path, name: str) -> int:
    """The number of tensors in a safetensors file, all floating and finite. Raises Refused otherwise.

    safetensors itself rejects truncated files and trailing junk, but loads all-NaN tensors without a word. bf16 is
    judged by its bits, since numpy has no such type: all exponent bits set is infinity or NaN.
    """
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as opened:
            keys = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise _refused(path.parent, f"{name} is not a whole safetensors file: {error}") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    raw: NDArray[np.uint8] = (
        np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length) if keys else np.empty(0, np.uint8)
    )
    for key in keys:
        start, end = header[key]["data_offsets"]
        part = raw[start:end]
        dtype = header[key]["dtype"]
        if dtype == "BF16":
            finite = bool(((part.view("<u2") & 0x7F80) != 0x7F80).all())
        elif dtype in ("F16", "F32", "F64"):
            finite = bool(np.isfinite(part.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])).all())
        else:
            raise _refused(path.parent, f"{name}: the tensor {key!r} is {dtype}, not floating")
        if not finite:
            raise _refused(path.parent, f"{name}: the tensor {key!r} holds NaN or infinity")
    return len(keys)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative posix name, path), sorted."""
    if folder.is_symlink() or not folder.is_dir():
        raise _refused(folder, "it is not a folder")
    found: list[tuple[str, Path]] = []
    for parent, folders, files in os.walk(folder, followlinks=False):
        for entry in (*folders, *files):
            path = Path(parent, entry)
            name = PurePosixPath(path.relative_to(folder)).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise _refused(folder, f"{name!r} is a link")
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode):
                raise _refused(folder, f"{name!r} is not a plain file")
            if name == SIGNATURE:
                continue
            if path.suffix not in SUFFIXES:
                raise _refused(folder, f"{name!r} may not be in a bundle (only {', '.join(sorted(SUFFIXES))})")
            found.append((name, path))
    return iter(sorted(found))


def _refused(folder: Path, why: str) -> Refused:
    return Refused(f"The bundle in {folder} is refused: {why}.", hint="Nothing of it was loaded.")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if abs(value) >= 2**53 else value + 0.0
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
