"""Signed bundles, in the format of OpenSSF's model-signing: with ``TUNESMITH_SIGNING_KEY`` whatever is sealed here is
signed, and with ``TUNESMITH_TRUSTED_KEYS`` only what one of those keys signed is imported or takes traffic.

A signature is the file ``model.sig`` in the bundle's folder, over all other files; it is not part of the bundle, whose
digest stays the same, and goes where the folder goes: to MLflow, into exports, to another home. There
``model_signing verify key`` checks it without Tunesmith. The package comes with the extra ``signing``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import Refused, UsageError
from infra.settings import get_settings
from registry.bundle import SIGNATURE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes


def sign(folder: Path) -> str | None:
    """Sign a sealed bundle, instead of whoever signed it before; the key's name, None when none is configured.

    Raises UsageError when the key cannot be read, or the package is not installed.
    """
    settings = get_settings()
    if settings.signing_key is None:
        return None
    _package()
    from model_signing import hashing, signing

    key = _of_private(settings.signing_key)
    password = settings.signing_key_password
    # Named in what is signed, so that whoever checks the folder knows that this file is not part of it
    ignoring = hashing.Config().set_ignored_paths(paths=[SIGNATURE])
    config = signing.Config().set_hashing_config(ignoring)
    config.use_elliptic_key_signer(
        private_key=settings.signing_key.expanduser(),
        password=password.get_secret_value().encode() if password else None,
    )
    new = folder.parent / f".{folder.name}.sig"  # there whole or not at all: the folder may be one of the store's
    config.sign(folder, new)
    new.replace(folder / SIGNATURE)
    return _name(key)


def adopt(folder: Path, kept: Path) -> None:
    """Where the store had a bundle already, give it the signature of the same bundle that was to be kept."""
    with contextlib.suppress(FileNotFoundError):  # not signed, or itself what is kept now
        (folder / SIGNATURE).replace(kept / SIGNATURE)


def signer(folder: Path) -> str | None:
    """The key that a bundle's signature says it is by, unchecked; None when it has none that can be read."""
    try:
        hint = json.loads((folder / SIGNATURE).read_bytes())["verificationMaterial"]["publicKey"]["hint"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return f"sha256:{hint}"


def check(folder: Path) -> str | None:
    """The trusted key (or, where none are configured, our own) that signed exactly these files; None when there is no
    signature, or no key to check it with.

    Raises Refused for a signature by another key or of other files, UsageError for keys that cannot be read.
    """
    keys = _known()
    if not keys or not (folder / SIGNATURE).is_file():
        return None
    named = signer(folder)
    if named not in keys:
        if not demanded():  # another's, or our own from before it was replaced
            return None
        raise Refused(
            f"The bundle in {folder} is signed by the key {named or 'of no name'}, which is not trusted here.",
            hint="Trusted are those that TUNESMITH_TRUSTED_KEYS names.",
        )
    _package()
    from model_signing import verifying

    with tempfile.TemporaryDirectory(prefix="tunesmith-sign-") as scratch:
        public = Path(scratch, "key.pem")
        public.write_bytes(_pem(keys[named]))
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=public).verify(folder, folder / SIGNATURE)
        except Exception as error:  # its own words, cryptography's, or those of a reader that was given nonsense
            why = str(error) or type(error).__name__
            raise Refused(
                f"The signature of the bundle in {folder} is not of these files: {why}.",
                hint="Nothing of it was loaded.",
            ) from error
    return named


def demanded() -> bool:
    """Whether only what a trusted key signed may be used."""
    return get_settings().trusted_keys is not None


def demand(what: str, folder: Path) -> str | None:
    """What `check` gives. Raises Refused also when signatures are demanded and a bundle has none; `what` it is of."""
    key = check(folder)
    if key is None and demanded():
        raise Refused(
            f"{what} is not signed, and here only what a trusted key signed may be used.",
            hint="Sign it with `tunesmith sign` where TUNESMITH_SIGNING_KEY is.",
        )
    return key


def _known() -> dict[str, PublicKeyTypes]:
    """By name, the keys that signatures are checked with."""
    settings = get_settings()
    if settings.trusted_keys is None:
        if settings.signing_key is None:
            return {}
        own = _of_private(settings.signing_key)
        return {_name(own): own}
    place = settings.trusted_keys.expanduser()
    files = sorted(place.glob("*.pem")) if place.is_dir() else [place]
    if not files:
        raise UsageError(
            f"TUNESMITH_TRUSTED_KEYS names {place}, which holds no .pem file.", hint="Put public keys there."
        )
    keys = [_read(file, "TUNESMITH_TRUSTED_KEYS", private=False) for file in files]
    return {_name(key): key for key in keys}


def _of_private(file: Path) -> PublicKeyTypes:
    key: PublicKeyTypes = _read(file, "TUNESMITH_SIGNING_KEY", private=True).public_key()
    return key


def _read(file: Path, setting: str, *, private: bool) -> Any:
    """A key of one of the curves that the format knows. Raises UsageError."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    password = get_settings().signing_key_password
    try:
        content = file.expanduser().read_bytes()
        if private:
            key: Any = load_pem_private_key(content, password.get_secret_value().encode() if password else None)
        else:
            key = load_pem_public_key(content)
        if not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1):
            raise ValueError(f"its curve is {key.curve.name}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        kind = "private" if private else "public"
        raise UsageError(
            f"{setting} names {file}, which is no {kind} elliptic-curve key in PEM that can be used: {error}.",
            hint="Make one: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem",
        ) from error
    return key


def _pem(key: PublicKeyTypes) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _name(key: PublicKeyTypes) -> str:
    """As the format itself names a key: the SHA-256 of its PEM."""
    return f"sha256:{hashlib.sha256(_pem(key)).hexdigest()}"


def _package() -> None:
    try:
        importlib.import_module("model_signing.signing")
    except ImportError as error:
        raise UsageError(
            "Signatures need the package model-signing, which is not installed.",
            hint="pip install 'tunesmith[signing]', or unset TUNESMITH_SIGNING_KEY and TUNESMITH_TRUSTED_KEYS.",
        ) from error
