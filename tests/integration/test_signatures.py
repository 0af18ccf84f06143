"""Signed bundles: checked by the format's own package too; without a trusted key's signature nothing takes traffic."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from drafts import make_draft, make_version

from infra import storage
from infra.db import transaction
from infra.errors import Refused, UsageError
from infra.settings import get_settings
from registry import bases, bundle, commands, deployments, signatures, versions, views
from registry.exchange import export_version, fetched_from_mlflow, import_version
from registry.names import Ref
from registry.verification import verify_version
from registry.versions import Version

WHO = {"actor": "os:ann@here", "reason": "because"}


def make_key(folder: Path, name: str, password: str | None = None) -> tuple[Path, Path]:
    """A private key and its public one."""
    key = ec.generate_private_key(ec.SECP256R1())
    lock = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pem").write_bytes(public)
    return folder / f"{name}.key", folder / f"{name}.pem"


Setting = Callable[..., None]


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Sets what signs and what is trusted."""

    def of(**values: object) -> None:
        for name in ("SIGNING_KEY", "SIGNING_KEY_PASSWORD", "TRUSTED_KEYS"):
            value = values.get(name.lower())
            if value is None:
                monkeypatch.delenv(f"TUNESMITH_{name}", raising=False)
            else:
                monkeypatch.setenv(f"TUNESMITH_{name}", str(value))
        get_settings.cache_clear()

    return of


def state(version: Version) -> tuple[str, str]:
    check = next(c for c in verify_version(version.model, version.number) if c.name == "signature")
    return check.state, check.detail


def test_what_is_signed_is_checked_here_and_by_the_formats_own_tool(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str, tmp_path: Path, setting: Setting
) -> None:
    private, public = make_key(tmp_path, "ours", "secret")
    setting(signing_key=private, signing_key_password="secret")
    version = make_version(make_draft(model, base, adapter))
    assert state(version)[0] == "ok"
    export_version(version, tmp_path / "out")
    tool = [sys.executable, "-m", "model_signing", "verify", "key", str(tmp_path / "out")]
    tool += ["--signature", str(tmp_path / "out/model.sig"), "--public_key", str(public)]
    assert subprocess.run(tool, check=False, timeout=120).returncode == 0
    weights = tmp_path / "out" / bundle.ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert subprocess.run(tool, check=False, timeout=120, capture_output=True).returncode != 0
    with pytest.raises(Refused, match="is not of these files"):
        signatures.check(tmp_path / "out")
    with transaction() as conn:
        signed_by = views.describe(conn, Ref(model=model, number=version.number))["signed_by"]
    setting()  # elsewhere, where nobody is trusted
    assert state(version) == ("none", f"not checked, since no key is trusted here: it says it is by {signed_by}")


def test_only_what_a_trusted_key_signed_takes_traffic(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str, tmp_path: Path, setting: Setting
) -> None:
    (tmp_path / "trusted").mkdir()
    private, _ = make_key(tmp_path / "trusted", "ours")
    other, _ = make_key(tmp_path, "other")
    first = make_version(make_draft(model, base, adapter))
    with transaction() as conn:
        deployments.promote(conn, model, first.number, **WHO)
    setting(signing_key=other)
    second = make_version(make_draft(model, base, adapter, seed=2))
    setting(trusted_keys=tmp_path / "trusted")
    for version, why in ((first, "is not signed"), (second, "is not trusted here")):
        assert state(version)[0] == "failed"
        with transaction() as conn, pytest.raises(Refused, match=why):
            deployments.canary(conn, model, version.number, share=0.5, force=True, **WHO)
    with transaction() as conn, pytest.raises(Refused, match="is not trusted here"):
        deployments.promote(conn, model, second.number, force=True, **WHO)
    with transaction() as conn, pytest.raises(Refused, match="is not trusted here"):
        deployments.shadow(conn, model, second.number, **WHO)
    with pytest.raises(UsageError, match="no key to sign with"):
        versions.sign(model, second.number)
    setting(signing_key=private, trusted_keys=tmp_path / "trusted")
    assert CliRunner().invoke(commands.sign, [second.name]).exit_code == 0
    assert state(second)[0] == "ok"
    with transaction() as conn:
        assert deployments.promote(conn, model, second.number, **WHO).deployment.champion == second.number
        # What has served comes back whatever is demanded by now
        assert deployments.rollback(conn, model, **WHO).deployment.champion == first.number


def test_a_signature_travels_with_its_bundle_and_strangers_stay_out(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str, tmp_path: Path, setting: Setting
) -> None:
    private, public = make_key(tmp_path, "staging")
    _, stranger = make_key(tmp_path, "stranger")
    setting(signing_key=private)
    version = make_version(make_draft(model, base, adapter))
    export_version(version, tmp_path / "out")
    setting(trusted_keys=public)  # production signs nothing
    (version.folder() / bundle.SIGNATURE).unlink()
    # One and the same name and base: the same bundle, which the store has already, and now with its signature again
    assert import_version(tmp_path / "out", model).bundle_digest == version.bundle_digest
    assert state(version)[0] == "ok"
    setting(trusted_keys=stranger)
    with pytest.raises(Refused, match="is not trusted here"):
        import_version(tmp_path / "out", f"{model}-b")
    setting(trusted_keys=public)
    (tmp_path / "out/version.json").write_bytes((tmp_path / "out/version.json").read_bytes() + b"\n")
    with pytest.raises(Refused, match="is not of these files"):
        import_version(tmp_path / "out", model)
    for nonsense in (b"", b"{}", b"[1]", json.dumps({"verificationMaterial": {"publicKey": {"hint": 1}}}).encode()):
        (tmp_path / "out" / bundle.SIGNATURE).write_bytes(nonsense)
        with pytest.raises(Refused, match="is not trusted here"):
            import_version(tmp_path / "out", model)
    (tmp_path / "out" / bundle.SIGNATURE).unlink()
    with pytest.raises(Refused, match="is not signed"):
        import_version(tmp_path / "out", model)


def test_nobody_signs_what_nobody_vouches_for(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str, tmp_path: Path, setting: Setting
) -> None:
    """An operator's import is signed by nobody, so that what it says of itself is worth as much elsewhere as here."""
    private, public = make_key(tmp_path, "staging")
    digest = versions.seal(make_draft(model, base, adapter))  # by whoever has an editor
    setting(signing_key=private)
    forged = import_version(storage.get("bundle", digest), f"{model}-a", vouched=False)
    assert (forged.gate, (forged.folder() / bundle.SIGNATURE).exists()) == (None, False)
    plain = import_version(adapter, f"{model}-p", vouched=False)
    assert not (plain.folder() / bundle.SIGNATURE).exists()
    signed = make_version(make_draft(model, base, adapter, seed=2))
    export_version(signed, tmp_path / "out")
    setting(signing_key=private, trusted_keys=public)
    same = import_version(tmp_path / "out", model, vouched=False)
    assert same.gate == signed.gate, "a trusted key vouches"
    other = import_version(tmp_path / "out", f"{model}-b", vouched=False)
    assert (other.gate, (other.folder() / bundle.SIGNATURE).exists()) == (None, False), "not for another model"
    admins = import_version(tmp_path / "out", f"{model}-c")
    assert (admins.gate, (admins.folder() / bundle.SIGNATURE).exists()) == (signed.gate, True)


def test_a_later_signature_reaches_mlflow_too(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str, tmp_path: Path, setting: Setting
) -> None:
    private, public = make_key(tmp_path, "staging")
    version = make_version(make_draft(model, base, adapter))
    setting(signing_key=private)
    versions.sign(model, version.number)
    setting(trusted_keys=public)
    with fetched_from_mlflow(mlflow_server, model, version.number) as path:
        assert signatures.demand("it", path) is not None


def test_keys_that_cannot_be_used_are_one_sentence(tmp_path: Path, setting: Setting) -> None:
    private, public = make_key(tmp_path, "ours", "secret")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pem").write_text("no key")
    (tmp_path / bundle.SIGNATURE).write_text("{}")
    for values, words in (
        ({"signing_key": private}, "names .*ours.key, which is no private"),  # its password is missing
        ({"signing_key": private, "signing_key_password": "wrong"}, "which is no private"),
        ({"signing_key": public}, "which is no private"),
        ({"signing_key": tmp_path / "none"}, "which is no private"),
    ):
        setting(**values)
        with pytest.raises(UsageError, match=words):
            signatures.sign(tmp_path)
    for place, words in (("empty", "holds no .pem file"), ("text.pem", "no public"), ("none", "no public")):
        setting(trusted_keys=tmp_path / place)
        with pytest.raises(UsageError, match=words):
            signatures.check(tmp_path)
