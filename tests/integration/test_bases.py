"""Bases from every kind of source, raced and interrupted, and what is refused, in one sentence each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from infra import storage
from infra.db import transaction
from infra.errors import NotFound, UsageError
from registry import bases, prompts, tiny
from registry.bases import Base
from registry.embeddings import WordPlaces
from registry.profile import AXES
from tests.lora import save_base


def run(code: str, **env: str) -> subprocess.Popen[str]:
    """Python in a process of its own, with this test's home and database."""
    return subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def rows() -> int:
    with transaction() as conn:
        return len(conn.execute("select 1 from base").fetchall())


def test_the_tiny_base_is_whole_and_is_not_made_again(tiny_base: Base) -> None:
    assert bases.resolve("builtin:tiny") == tiny_base == bases.load(tiny_base.digest)
    assert storage.folder_digest(tiny_base.folder) == tiny_base.digest
    model, tokenizer = bases.load_model(tiny_base.folder, "float32"), bases.load_tokenizer(tiny_base.folder)
    assert tiny_base.parameters == sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    # It has read documentation: real prose is far more likely to it than the same words in another order
    text = "Return the number of bytes written to the file"
    ids = [tokenizer(t, return_tensors="pt").input_ids for t in (text, " ".join(reversed(text.split())))]
    with torch.inference_mode():
        real, shuffled = (float(model(input_ids=i, labels=i).loss) for i in ids)
    assert real < shuffled - 0.5
    assert rows() == 1


def test_the_text_of_the_tiny_base_does_not_depend_on_what_was_imported() -> None:
    code = "from infra import storage; from registry import tiny; print(storage.text_digest(repr(tiny._text())))"
    more = "import email.mime.text, asyncio.subprocess, logging.handlers, unittest.mock, xml.dom.minidom;" + code
    found = {run(c).communicate()[0] for c in (code, more)}
    assert len(found) == 1
    assert "sha256" in found.pop()
    assert not any("<|im_start|>" in part for part in tiny._text())


def test_a_folder_raced_by_processes_is_one_base(database: object, tmp_path: Path) -> None:
    source = save_base(tmp_path / "mine")
    code = f"from registry import bases; print(bases.resolve({str(source)!r}).digest)"
    crew = [run(code) for _ in range(3)]
    said = [process.communicate(timeout=300) for process in crew]
    assert [process.returncode for process in crew] == [0, 0, 0], said
    digests = {out.strip() for out, _ in said}
    assert len(digests) == rows() == 1
    assert [p.name for p in (storage.where("base", digests.pop()).parent).iterdir() if p.name.startswith(".new")] == []
    assert all("shards" not in err and "Loading" not in err for _, err in said)


def test_a_base_of_a_folder_answers_as_its_source(database: object, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = save_base(tmp_path / "mine")
    base = bases.resolve(str(source))
    ids = torch.arange(10, 30)[None]
    with torch.inference_mode():
        mine = bases.load_model(base.folder, "float32")(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, base.dtype))(ids).logits.float()
    assert torch.allclose(mine, theirs, atol=1e-5 if base.dtype == "float32" else 0.05)
    shutil.rmtree(source)  # the source may go: the base stays
    assert bases.load(base.digest).folder.is_dir()


def test_a_killed_conversion_leaves_nothing_and_the_next_one_cleans_up(database: object) -> None:
    parent = storage.where("base", "sha256:" + "0" * 64).parent
    process = run("from registry import bases; bases.resolve('builtin:tiny')")
    until = time.monotonic() + 300
    while not list(parent.glob(".new-*/tokenizer.json")):
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = list(parent.glob(".new-*"))
    assert len(left) == 1
    assert rows() == 0
    assert [p for p in parent.iterdir() if not p.name.startswith(".")] == []
    os.utime(left[0], (0, 0))
    with storage.scratch("dataset"):  # whatever a run keeps first
        assert not left[0].exists()
    with storage.scratch("base") as mine:
        assert list(parent.glob(".new-*")) == [mine]
        os.utime(mine, (0, 0))
        with storage.scratch("base"):
            assert mine.is_dir()  # in use, however old


def model_folder(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"junk")
    return folder


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "is not a causal language model: it has Bert"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "is not a causal language model: it has T5"),
        ({"model_type": "llama"}, "it has no architecture"),
        ({"architectures": ["MyForCausalLM"], "auto_map": {"AutoModel": "x.Y"}}, "brings code of its own"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "has no tokenizer that loads"),
    ],
)
def test_folders_that_are_no_base_are_refused(
    database: object, tmp_path: Path, config: dict[str, object], words: str
) -> None:
    folder = model_folder(tmp_path / "m", **config)
    with pytest.raises(UsageError, match=words) as refused:
        bases.resolve(str(folder))
    assert "\n" not in refused.value.message
    assert rows() == 0


def test_folders_that_lack_a_part_are_refused(database: object, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"has no readable config\.json"):
        bases.resolve(str(tmp_path / "empty"))
    folder = save_base(tmp_path / "broken")
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UsageError, match="does not load as a causal language model"):
        bases.resolve(str(folder))
    weights.unlink()
    with pytest.raises(UsageError, match="has no safetensors file"):
        bases.resolve(str(folder))
    with pytest.raises(UsageError, match=r"There is no builtin:nothing\."):
        bases.resolve("builtin:nothing")
    with pytest.raises(NotFound, match=r"No base sha256:0+ is known"):
        bases.load("sha256:" + "0" * 64)


class Hub(BaseHTTPRequestHandler):
    """The part of a hub's HTTP that a download needs, over one folder. `breaks` cuts weights in the middle."""

    folder: Path
    breaks = False
    sha = "a" * 40
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/team/model/revision/"):
            if path.rpartition("/")[2] not in ("main", self.sha):
                return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            files = [{"rfilename": p.name} for p in sorted(self.folder.iterdir())]
            body = {
                "id": "team/model",
                "sha": self.sha,
                "siblings": files,
                "private": False,
                "tags": [],
                "downloads": 0,
            }
            return self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if path == f"/api/models/team/model/tree/{self.sha}":
            tree = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": storage.text_digest(p.name)[7:47]}
                for p in sorted(self.folder.iterdir())
            ]
            return self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        if path.startswith(f"/team/model/resolve/{self.sha}/"):
            file = self.folder / path.rpartition("/")[2]
            if file.is_file():
                data = file.read_bytes()
                etag = storage.text_digest(file.name)[7:]
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.sha}
                return self._send(200, data, headers, cut=file.suffix == ".safetensors")
        return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut and self.breaks else body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, type[Hub]]]:
    kind = type("OneHub", (Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", kind
    server.shutdown()
    server.server_close()


@pytest.mark.slow  # eight processes, and the hub's client retries with pauses
def test_hub_ids_are_fetched_once_and_their_troubles_told(database: object, tmp_path: Path) -> None:
    """One process a case, since the hub's client reads its settings when it is imported."""
    source = save_base(tmp_path / "source")

    def ask(id: str, revision: str = "main", **env: str) -> str:
        code = (
            "from infra.errors import TunesmithError\nfrom registry import bases\n"
            f"try:\n    b = bases.resolve({id!r}, {revision!r}); print(b.revision, b.digest)\n"
            "except TunesmithError as e:\n    print(type(e).__name__, e.message)"
        )
        cache = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"}
        out, err = run(code, **(cache | env)).communicate(timeout=300)
        assert out.count("\n") == 1, out + err
        return out

    with hub(source) as (address, served):
        assert ask("team/other", HF_ENDPOINT=address).startswith("NotFound There is no folder and no hub repository")
        assert ask("team/model", "v9", HF_ENDPOINT=address).startswith("NotFound team/model has no revision v9")
        served.breaks = True
        assert ask("team/model", HF_ENDPOINT=address).startswith("Unreachable team/model is not whole")
        served.breaks = False
        assert rows() == 0
        commit, digest = ask("team/model", HF_ENDPOINT=address).split()
        assert (commit, digest.startswith("sha256:")) == (served.sha, True)
        encoder = model_folder(tmp_path / "encoder", architectures=["BertModel"])
        served.folder, served.asked, served.sha = encoder, [], "b" * 40
        assert "it has BertModel" in ask("team/model", HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hf2"))
        assert not [path for path in served.asked if path.endswith(".safetensors")]  # not fetched to be refused
    assert ask("team/model", HF_ENDPOINT=address, HF_HUB_OFFLINE="1").split() == [commit, digest]
    assert ask("team/else", HF_ENDPOINT=address, HF_HUB_OFFLINE="1").startswith("Unreachable team/else is not whole")
    assert rows() == 1


MESSAGES = [{"role": "user", "content": "Sort a list\n"}, {"role": "assistant", "content": " Use sorted(). \n"}]


@pytest.mark.parametrize("templated", [True, False])
def test_training_and_serving_have_one_form(tiny_base: Base, templated: bool) -> None:
    tokenizer = bases.load_tokenizer(tiny_base.folder)
    if not templated:
        tokenizer.chat_template = None
    for system in (None, "Be brief."):
        ids, prompt = prompts.encode_pair(tokenizer, MESSAGES, system=system)
        assert ids[:prompt] == prompts.encode(tokenizer, MESSAGES[:-1], system=system)
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[prompt:-1]
        assert tokenizer.decode(ids[prompt:-1]).strip() == "Use sorted()."
        assert ("Be brief." in tokenizer.decode(ids[:prompt])) == (system is not None)
    own = [{"role": "system", "content": "Mine."}, *MESSAGES]
    assert "Be brief." not in prompts.render(tokenizer, own, system="Be brief.")


def test_a_template_that_refuses_says_so(tiny_base: Base) -> None:
    tokenizer = bases.load_tokenizer(tiny_base.folder)
    tokenizer.chat_template = "{{ raise_exception('no system messages here') }}"
    with pytest.raises(ValueError, match="no system messages here"):
        prompts.encode(tokenizer, MESSAGES[:-1], system="Be brief.")


@pytest.mark.slow
def test_smollm2_is_converted_once_and_answers(database: object) -> None:
    base = bases.resolve("builtin:smollm2-135m")
    made = base.folder.stat().st_ino
    assert bases.resolve("builtin:smollm2-135m") == base
    assert base.folder.stat().st_ino == made
    assert 134e6 < base.parameters < 136e6
    model, tokenizer = bases.load_model(base.folder, base.dtype), bases.load_tokenizer(base.folder)
    asked = prompts.encode(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    with torch.inference_mode():
        ids = model.generate(torch.tensor([asked]), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0, len(asked) :])


def test_words_lie_along_the_principal_components_of_the_token_embeddings(base: Base) -> None:
    from sklearn.decomposition import PCA

    weight = bases.load_model(base.folder, base.dtype).get_input_embeddings().weight.float().numpy()
    tokenizer = bases.load_tokenizer(base.folder)
    words = ["parcel", "refund", "naïve", "Straße"]
    means = [weight[tokenizer(f" {word}", add_special_tokens=False)["input_ids"]].mean(0) for word in words]
    expected = PCA(AXES, svd_solver="full").fit(weight).transform(means)
    found = np.array(WordPlaces(base)(words))
    assert found.shape == (len(words), AXES)
    assert np.abs(found) == pytest.approx(np.abs(expected), rel=1e-3, abs=1e-4)  # an axis may point either way
