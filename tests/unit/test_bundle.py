"""Fault 11: what was sealed verifies, and everything else is refused, unopened where it must be."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from infra.errors import Refused
from registry import bundle
from registry.bundle import ADAPTER_WEIGHTS, BaseIdentity, Manifest

DIGEST = "sha256:" + "a" * 64
WEIGHTS = {"base_model.model.q.lora_A.weight": np.ones((2, 4), np.float32)}


def _fill(folder: Path, weights: dict[str, Any] | None = None) -> str:
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file(weights or WEIGHTS, folder / ADAPTER_WEIGHTS)
    (folder / "README.md").write_text("# m")
    base = BaseIdentity(
        id="b", revision="r", digest=DIGEST, tokenizer_digest=DIGEST, template_digest=DIGEST, dtype="float32"
    )
    return bundle.write(folder, Manifest(model="m", method="lora", base=base, code_version="1", params={"r": 8}))


def test_a_sealed_bundle_verifies_and_the_same_content_has_the_same_digest(tmp_path: Path) -> None:
    digest = _fill(tmp_path / "a")
    manifest = bundle.verify(tmp_path / "a", digest)
    assert manifest.has_adapter
    assert sorted(manifest.files) == ["README.md", "adapter/adapter_config.json", ADAPTER_WEIGHTS]
    assert _fill(tmp_path / "b") == digest


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("/tmp/opened-a-pickle",)  # noqa: S108


def _flip(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def _link(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_rewrite(ADAPTER_WEIGHTS, lambda data: data[:-8]), "has digest"),
        (_rewrite(ADAPTER_WEIGHTS, _flip), "has digest"),
        (_rewrite("README.md", lambda data: data + b" "), "README.md has digest"),
        (_rewrite("version.json", lambda data: data.replace(b'"r":8', b'"r":9')), "version.json has digest"),
        (lambda folder: (folder / "README.md").unlink(), "README.md is missing"),
        (lambda folder: (folder / "more.json").write_text("{}"), "'more.json' is not in its manifest"),
        (lambda folder: (folder / "x.pkl").write_bytes(pickle.dumps(Bomb())), "'x.pkl' may not be"),
        (lambda folder: (folder / "adapter/adapter_model.bin").write_bytes(b"x"), "may not be"),
        (lambda folder: (folder / "run.py").write_text("1"), "may not be"),
        (_link, "'README.md' is a link"),
        (lambda folder: (folder / "more").symlink_to("/etc"), "'more' is a link"),
        (lambda folder: os.mkfifo(folder / "a.json"), "is not a plain file"),
        (lambda folder: (folder / "version.json").unlink(), "has no version.json"),
    ],
)
def test_a_damaged_bundle_is_refused(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    folder = tmp_path / "bundle"
    digest = _fill(folder)
    damage(folder)
    with pytest.raises(Refused) as caught:
        bundle.verify(folder, digest)
    assert says in caught.value.message
    assert not Path("/tmp/opened-a-pickle").exists()  # noqa: S108


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    """Every byte of every file, a bit each."""
    folder = tmp_path / "bundle"
    digest = _fill(folder)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        for place in range(len(data)):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
            with pytest.raises(Refused, match=f"{path.name} has digest"):
                bundle.verify(folder, digest)
        path.write_bytes(data)
    bundle.verify(folder, digest)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_tensors_that_are_not_finite_are_refused(tmp_path: Path, dtype: Any, bad: float) -> None:
    weights = np.ones((3, 5), dtype)
    weights[2, 4] = bad
    digest = _fill(tmp_path / "bundle", {**WEIGHTS, "x": weights})
    with pytest.raises(Refused, match="'x' holds NaN or infinity"):
        bundle.verify(tmp_path / "bundle", digest)


def _bf16(path: Path, bits: list[int]) -> None:
    raw = np.array(bits, "<u2").tobytes()
    header = json.dumps({"t": {"dtype": "BF16", "shape": [len(bits)], "data_offsets": [0, len(raw)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw)


def test_bf16_is_judged_by_its_bits(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    _bf16(path, [0x0000, 0x3F80, 0xFF7F, 0x7F7F, 0x8000])  # 0, 1, -max, max, -0
    assert bundle.check_tensors(path, "t") == 1
    for bits in (0x7F80, 0xFF80, 0x7FC0, 0xFFFF):  # inf, -inf, NaN, NaN
        _bf16(path, [0x3F80, bits])
        with pytest.raises(Refused, match="NaN or infinity"):
            bundle.check_tensors(path, "t")


@pytest.mark.parametrize("damage", [lambda d: d[:40], lambda d: d + b"junk", lambda d: b"\xff" * 16, lambda d: b""])
def test_a_file_that_is_not_whole_safetensors_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(damage(save(WEIGHTS)))
    with pytest.raises(Refused, match="not a whole safetensors file"):
        bundle.check_tensors(path, "t")


def test_tensors_that_are_no_adapters_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(save({"ids": np.ones(3, np.int64)}))
    with pytest.raises(Refused, match="'ids' is I64, not floating"):
        bundle.check_tensors(path, "t")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers(-(2**40), 2**40) | st.text(st.characters(codec="utf-8")),
        lambda x: st.lists(x) | st.dictionaries(st.text(st.characters(codec="utf-8")), x),
    )
)
def test_canonical_json_is_one_text_for_one_value(value: Any) -> None:
    text = bundle.canonical_json(value)
    assert bundle.canonical_json(json.loads(text)) == text
