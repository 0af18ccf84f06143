"""The batch: answers in company equal answers alone, and adapters equal PEFT's own."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from lora import save_adapter, save_base

from deploy.adapters import Adapters, BadAdapter, NameTaken
from deploy.decoding import Batch, Finish, Request, Row, generate, open_model
from deploy.packed import pack
from deploy.prefixes import Prefixes
from deploy.sampling import Sampling, Text
from deploy.scheduler import Scheduler, Ticket
from infra.errors import NotFound, Unreachable
from registry import bases

# PEFT 0.21 asks transformers 5.23 by an old name.
ADAPTERS: dict[str, dict[str, Any]] = {
    "cats-v1": {"seed": 1, "r": 4},
    "cats-v2": {"seed": 2, "r": 16, "use_rslora": True},
    "dogs-v1": {"seed": 3, "r": 8, "targets": ["q_proj", "v_proj"]},
    "dora-v1": {"seed": 5, "r": 4, "use_dora": True},
    "dogs-v2": {"seed": 4, "r": 8, "targets": ["down_proj", "o_proj"], "alpha_pattern": {"o_proj": 3}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base, and the adapters by name."""
    root = tmp_path_factory.mktemp("lora")
    base = save_base(root / "base")
    model, _ = open_model(base)
    return {"base": base} | {name: save_adapter(model, root / name, **how) for name, how in ADAPTERS.items()}


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> tuple[Any, Any, Adapters]:
    model, tokenizer = open_model(folders["base"])
    adapters = Adapters(model)
    for name in ADAPTERS:
        adapters.load(name, folders[name])
    return model, tokenizer, adapters


def _requests(tokenizer: Any) -> list[Request]:
    """Twelve requests of all adapters and the base, long and short, greedy and random."""
    texts = ["the cat", "a rat ran on and on and on over the mat", "émigré 猫", "the"]
    names = [None, *ADAPTERS]
    return [
        Request(
            prompt=tokenizer(texts[i % 4]).input_ids,
            adapter=names[i % 5],
            sampling=Sampling(
                max_tokens=5 + 3 * i, temperature=0.8 * (i % 3 == 1), top_p=0.9, seed=i, ignore_eos=i % 2 == 0
            ),
        )
        for i in range(12)
    ]


def test_a_mixed_batch_answers_as_each_request_alone(opened: tuple[Any, Any, Adapters]) -> None:
    model, tokenizer, adapters = opened
    requests = _requests(tokenizer)
    alone = [generate(model, tokenizer, adapters, [request])[0] for request in requests]
    # Four places for twelve requests of different lengths: rows join and leave all the time.
    together = generate(model, tokenizer, adapters, requests, max_rows=4)
    assert [result.tokens for result in together] == [result.tokens for result in alone]
    assert [result.text for result in together] == [result.text for result in alone]
    assert [result.finish_reason for result in together] == [result.finish_reason for result in alone]
    assert len({result.tokens[:4] for result in alone}) > 6, "the adapters must not all say the same"
    for one, other in zip(alone, together, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_prompts_that_begin_alike_are_answered_as_alone(opened: tuple[Any, Any, Adapters]) -> None:
    """One system prompt, two adapters and the base by turns, and some prompts of another kind in between."""
    model, tokenizer, adapters = opened
    system = tokenizer("on the mat the cat ran and a rat ran on and on over the mat " * 2).input_ids
    requests = [
        Request(
            prompt=([] if n % 7 == 6 else system) + tokenizer(text).input_ids,
            adapter=[None, "cats-v1", "dogs-v2"][n % 3],
            sampling=Sampling(max_tokens=6, temperature=0.0, ignore_eos=True),
        )
        for n, text in enumerate(
            ["a cat", "the rat", "a rat on the mat", "the", "a dog ran", "on and on", "émigré"] * 3
        )
    ]
    alone = [generate(model, tokenizer, adapters, [request])[0] for request in requests]
    batch = Batch(model, tokenizer, adapters, max_rows=1)
    computed, found = [], []
    forward = batch._forward

    def counting(rows: Any, tokens: Any, *rest: Any) -> None:
        computed.append(tokens.shape[1])
        forward(rows, tokens, *rest)

    batch._forward = counting  # type: ignore[method-assign]
    for request in requests:
        row = batch.row(request)
        computed.clear()
        batch.join(row)
        found.append((len(request.prompt) - computed[0], len(request.prompt)))
        while row.finish is None:
            batch.step()
        expected = alone[requests.index(request)]
        assert tuple(row.tokens) == expected.tokens
        assert row.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert all(spared == 0 for spared, _ in found[:6]), "an adapter's first two prompts are computed whole"
    assert all(spared >= len(system) for spared, length in found[9:] if length > len(system))
    assert all(spared < length for spared, length in found)


def test_prompts_that_join_together_are_answered_as_alone(opened: tuple[Any, Any, Adapters]) -> None:
    """In one pass: of some a beginning is known, of some another one, of some nothing; long ones beside short ones."""
    model, tokenizer, adapters = opened
    system = tokenizer("on the mat the cat ran and a rat ran on and on over the mat " * 2).input_ids
    requests = [
        Request(
            prompt=([] if n % 5 == 4 else system[: len(system) - 9 * (n % 2)]) + tokenizer(text).input_ids,
            adapter=[None, "cats-v1", "dogs-v2"][n % 3],
            sampling=Sampling(max_tokens=5, temperature=0.0, ignore_eos=True),
        )
        for n, text in enumerate(["a cat", "the rat " * 12, "a rat on the mat", "the", "a dog ran", "on and on"] * 5)
    ]
    alone = [generate(model, tokenizer, adapters, [request])[0] for request in requests]
    together = generate(model, tokenizer, adapters, requests, max_rows=7)
    for one, other in zip(alone, together, strict=True):
        assert other.tokens == one.tokens
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)


def test_kept_beginnings_stay_within_their_tokens() -> None:
    import torch
    from transformers import DynamicCache

    prefixes = Prefixes(most_tokens=40)
    for name in ("a", "b", "c"):
        for last in (1, 2):
            prompt = [*range(18), last + 100]
            known, cache = prefixes.start(name, prompt)
            assert known == 0
            cache.update(torch.zeros(1, 1, 19, 2), torch.zeros(1, 1, 19, 2), 0)
            prefixes.learn(name, prompt, cache)
    assert [prefixes.start(name, [*range(18), 5])[0] for name in ("a", "b", "c")] == [0, 18, 18]
    assert prefixes.start("b", list(range(18)))[0] == 17, "the last token predicts"
    assert prefixes.start("b", [7, *range(18)])[0] == 0
    assert isinstance(prefixes.start("new", [1, 2])[1], DynamicCache)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_computes_what_peft_computes(
    name: str, folders: dict[str, Path], opened: tuple[Any, Any, Adapters]
) -> None:
    import torch
    from peft import PeftModel

    model, tokenizer, adapters = opened
    reference, _ = open_model(folders["base"])
    peft = PeftModel.from_pretrained(reference, folders[name]).eval()
    tokens = torch.tensor([tokenizer("the rat sat on the mat").input_ids])
    with torch.inference_mode():
        expected, plain = peft(input_ids=tokens).logits, None
        with adapters.rows([adapters.get(name)]):
            direct = model(input_ids=tokens).logits
        with adapters.rows([adapters.get("cats-v1"), adapters.get(name), None]):
            mixed = model(input_ids=tokens.expand(3, -1)).logits
        plain = model(input_ids=tokens).logits
    torch.testing.assert_close(direct, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1:2], expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[2:], plain, atol=2e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 0.1


def test_in_bf16_teacher_forced_logprobs_stay_close_to_peft(
    folders: dict[str, Path], opened: tuple[Any, Any, Adapters]
) -> None:
    import torch
    from peft import PeftModel

    tokenizer = opened[1]
    model, _ = open_model(folders["base"], dtype="bfloat16")
    adapters = Adapters(model)
    adapters.load("cats-v1", folders["cats-v1"])
    adapters.load("cats-v2", folders["cats-v2"])
    reference, _ = open_model(folders["base"], dtype="bfloat16")
    peft = PeftModel.from_pretrained(reference, folders["cats-v2"]).eval()
    tokens = torch.tensor([tokenizer("the cat sat on the mat and the rat ran").input_ids])
    with torch.inference_mode():
        expected = torch.log_softmax(peft(input_ids=tokens).logits.float(), -1)
        with adapters.rows([adapters.get("cats-v1"), adapters.get("cats-v2")]):
            mixed = torch.log_softmax(model(input_ids=tokens.expand(2, -1)).logits.float(), -1)
    targets = tokens[:, 1:, None]
    difference = (mixed[1:, :-1].gather(2, targets) - expected[:, :-1].gather(2, targets)).abs()
    assert difference.mean() < 0.05


def test_packed_weights_compute_the_same_bits(folders: dict[str, Path], opened: tuple[Any, Any, Adapters]) -> None:
    """Of one row, of many, and of a prompt: of what a prompt says, when it joins and in which company."""
    import torch

    plain = bases.load_model(folders["base"], "bfloat16")
    packed = bases.load_model(folders["base"], "bfloat16")
    if not pack(packed):
        pytest.skip("this processor does not multiply in bfloat16")
    tokens = torch.tensor([opened[1]("the cat sat on the mat and the rat ran").input_ids])
    with torch.inference_mode():
        for rows, length in ((1, 1), (1, 5), (3, 1), (9, 4), (40, 5)):
            ids = tokens[:, :length].expand(rows, -1)
            assert torch.equal(packed(input_ids=ids).logits, plain(input_ids=ids).logits)


async def test_a_first_token_does_not_wait_for_everybodys_next_one(opened: tuple[Any, Any, Adapters]) -> None:
    model, tokenizer, adapters = opened
    scheduler = Scheduler(model, tokenizer, adapters, max_rows=4, max_cells=4096, queue=8)
    scheduler.start()
    try:
        asked = Request(prompt=tokenizer("a rat").input_ids, sampling=Sampling(max_tokens=9, ignore_eos=True))
        ticket = scheduler.submit([asked], asyncio.get_running_loop())
        pieces = []
        while not pieces or pieces[-1].finish is None:
            pieces.append(await asyncio.wait_for(ticket.pieces.get(), 30))
        assert [len(piece.tokens) for piece in pieces] == [1] * 9
    finally:
        scheduler.stop()


def test_logprobs_are_those_of_the_forced_answer(opened: tuple[Any, Any, Adapters]) -> None:
    import torch

    model, tokenizer, adapters = opened
    request = _requests(tokenizer)[7]
    result = generate(model, tokenizer, adapters, [request])[0]
    tokens = torch.tensor([[*request.prompt, *result.tokens]])
    with torch.inference_mode(), adapters.rows([adapters.get(str(request.adapter))]):
        logprobs = torch.log_softmax(model(input_ids=tokens).logits, -1)[0]
    begin = len(request.prompt)
    forced = [float(logprobs[begin + i - 1, token]) for i, token in enumerate(result.tokens)]
    assert result.logprobs == pytest.approx(forced, abs=1e-4)
    assert result.mean_logprob == pytest.approx(sum(forced) / len(forced), abs=1e-4)


def test_the_end_token_ends_an_answer(opened: tuple[Any, Any, Adapters]) -> None:
    model, tokenizer, adapters = opened
    prompt = tokenizer("the").input_ids
    free = generate(
        model, tokenizer, adapters, [Request(prompt=prompt, sampling=Sampling(max_tokens=20, ignore_eos=True))]
    )[0]
    batch = Batch(model, tokenizer, adapters)
    batch._ends = frozenset({free.tokens[6]})
    row = batch.row(Request(prompt=prompt, sampling=Sampling(max_tokens=20)))
    batch.join(row)
    while row.finish is None:
        batch.step()
    first = free.tokens.index(free.tokens[6])
    assert (row.finish, tuple(row.tokens)) == ("stop", free.tokens[: first + 1])
    assert row.text.value == tokenizer.decode(free.tokens[:first])


def test_pieces_of_text_make_the_whole_text(opened: tuple[Any, Any, Adapters]) -> None:
    tokenizer = opened[1]
    for whole in ("naïve 猫と犬 🐈‍⬛ the cat", "\ufffd genuine", "  spaces  "):
        text, pieces = Text(tokenizer), []
        for token in tokenizer(whole).input_ids:
            text.push(token)
            pieces.append(text.take())
        text.close()
        pieces.append(text.take())
        assert "".join(pieces) == text.value == whole
        assert len([piece for piece in pieces if piece]) > 3
    # Bytes that are no character at all: nothing is lost, and the end is as the tokeniser shows it.
    text, tokens = Text(tokenizer), tokenizer("猫").input_ids[:-1] * 3
    for token in tokens:
        text.push(token)
    text.close()
    assert text.value == tokenizer.decode(tokens)


def test_stop_strings_end_before_themselves_and_never_show(opened: tuple[Any, Any, Adapters]) -> None:
    tokenizer = opened[1]
    text, shown = Text(tokenizer, (" the mat", "rat!")), ""
    for token in tokenizer("the cat sat on the map and the mat was red").input_ids:
        stopped = text.push(token)
        shown += text.take()
        assert "the cat sat on the map and the mat".startswith(shown)
        if stopped:
            break
    text.close()
    assert stopped
    assert shown + text.take() == text.value == "the cat sat on the map and"


def test_cancelling_frees_the_place_and_disturbs_nobody(opened: tuple[Any, Any, Adapters]) -> None:
    model, tokenizer, adapters = opened
    long = Request(prompt=tokenizer("the mat " * 20).input_ids, sampling=Sampling(max_tokens=200, ignore_eos=True))
    short = Request(
        prompt=tokenizer("a cat").input_ids, adapter="cats-v1", sampling=Sampling(max_tokens=30, ignore_eos=True)
    )
    alone = generate(model, tokenizer, adapters, [short])[0]
    batch = Batch(model, tokenizer, adapters, max_rows=2)
    gone, stays = batch.row(long), batch.row(short)
    batch.join(gone)
    batch.join(stays)
    for _ in range(5):
        batch.step()
    assert not batch.fits(batch.row(short))
    batch.cancel(gone)
    assert batch.fits(batch.row(short))
    assert batch._mask is not None
    assert batch._mask.shape[1] == stays.length, "dead columns are cut off"
    while batch.rows:
        batch.step()
    assert tuple(stays.tokens) == alone.tokens
    assert gone.finish == "cancelled"


def test_those_who_decode_wait_for_few_tokens_of_prompts(
    opened: tuple[Any, Any, Adapters], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight prompts wait together; places there are for all of them, but not as many tokens at once."""
    model, tokenizer, adapters = opened
    joined: list[list[int]] = []
    join = Batch.join

    def seen(batch: Batch, *rows: Row) -> None:
        joined.append([len(row.request.prompt) for row in rows])
        join(batch, *rows)

    monkeypatch.setattr(Batch, "join", seen)
    prompt = tokenizer("the mat " * 300).input_ids[:300]
    scheduler = Scheduler(model, tokenizer, adapters, max_rows=8, max_cells=65536, queue=16)

    async def ask() -> list[Finish | None]:
        sampling = Sampling(max_tokens=2, ignore_eos=True)
        requests = [Request(prompt=prompt[: 300 - i], sampling=sampling) for i in range(8)]
        ticket = scheduler.submit(requests, asyncio.get_running_loop())
        ends: list[Finish | None] = []
        while len(ends) < len(requests):
            piece = await ticket.pieces.get()
            ends += [piece.finish] if piece.finish is not None else []
        return ends

    scheduler.start()
    try:
        assert asyncio.run(ask()) == ["length"] * 8
    finally:
        scheduler.stop()
    with pytest.raises(Unreachable):
        asyncio.run(scheduler.call(adapters.names))
    assert [rows for rows in joined if rows] == [[300, 299, 298], [297, 296, 295], [294, 293]]


def test_what_is_set_aside_goes_on_as_if_nothing_had_been(opened: tuple[Any, Any, Adapters]) -> None:
    """Rows of several adapters, greedy and random, leave between any two steps and in the middle of their prompts,
    while another one is answered."""
    model, tokenizer, adapters = opened
    long = tokenizer("on the mat the cat ran and a rat ran on and on over the mat " * 6).input_ids
    requests = [
        Request(
            prompt=long[: 97 - 30 * n],
            adapter=[None, "cats-v1", "dora-v1"][n],
            sampling=Sampling(max_tokens=12 + 5 * n, temperature=0.9 * (n > 0), seed=n, ignore_eos=True),
            priority=1 + n,
        )
        for n in range(3)
    ]
    alone = [generate(model, tokenizer, adapters, [request])[0] for request in requests]
    batch = Batch(model, tokenizer, adapters)
    rows = [batch.row(request) for request in requests]
    passes = [0] * len(rows)
    left = 0
    while any(row.finish is None for row in rows):
        for n, row in enumerate(rows):
            while row not in batch.rows and row.finish is None:
                passes[n] += not row.tokens
                there = batch.join_shortly(row)
                assert there == (row.aside is None)
                if not there:
                    other = batch.row(Request(prompt=long[:20], sampling=Sampling(max_tokens=3, ignore_eos=True)))
                    batch.set_aside(list(batch.rows))
                    batch.join(other)
                    while other.finish is None:
                        batch.step()
                    break
        batch.step()
        batch.step()
        left += len(batch.rows)
        batch.set_aside(batch.rows[::2])
    assert passes == [4, 3, 2], "prompts are read in passes of 32 tokens"
    assert left > 10
    assert [tuple(row.tokens) for row in rows] == [result.tokens for result in alone]
    for row, result in zip(rows, alone, strict=True):
        assert row.logprobs == pytest.approx(result.logprobs, abs=1e-4)


def test_background_requests_make_way_for_all_others(
    opened: tuple[Any, Any, Adapters], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies decode in all the places that they may have and more wait when others come: these are begun at the next
    turn, no step has both, and all are answered as alone."""
    model, tokenizer, adapters = opened
    copies = [
        Request(
            prompt=tokenizer("the cat sat on the mat " * 3).input_ids,
            adapter="cats-v1",
            sampling=Sampling(max_tokens=200, temperature=1.0, seed=n, ignore_eos=True),
            priority=[3, 1, 2, 1][n],
        )
        for n in range(4)
    ]
    others = [
        Request(
            prompt=tokenizer("a rat").input_ids,
            adapter="cats-v2",
            sampling=Sampling(max_tokens=9 + n, temperature=1.0, seed=n, ignore_eos=True),
            priority=-(n == 3),
        )
        for n in range(4)
    ]
    alone = [result.tokens for result in generate(model, tokenizer, adapters, [*copies, *others])]
    steps: list[list[Request]] = []
    begun: list[Request] = []
    held, go = threading.Event(), threading.Event()  # the model's thread, in the middle of the copies
    step, choose = Batch.step, Row.choose

    def seen(batch: Batch) -> list[Row]:
        steps.append([row.request for row in batch.rows])
        if len(steps) == 20:
            held.set()
            go.wait(60)
        return step(batch)

    def chosen(row: Row, logits: Any) -> int:
        if not row.tokens:
            begun.append(row.request)
        return choose(row, logits)

    monkeypatch.setattr(Batch, "step", seen)
    monkeypatch.setattr(Row, "choose", chosen)
    scheduler = Scheduler(model, tokenizer, adapters, max_rows=8, max_cells=65536, queue=16)

    async def collect(ticket: Ticket) -> list[tuple[int, ...]]:
        tokens: list[list[int]] = [[] for _ in ticket.rows]
        left = len(ticket.rows)
        while left:
            piece = await ticket.pieces.get()
            tokens[piece.index] += piece.tokens
            left -= piece.finish is not None
        return [tuple(each) for each in tokens]

    async def ask() -> list[list[tuple[int, ...]]]:
        loop, ready = asyncio.get_running_loop(), threading.Event()
        waiting = asyncio.create_task(scheduler.call(lambda: ready.wait(60)))
        await asyncio.sleep(0)
        tickets = [scheduler.submit([request], loop) for request in copies]
        ready.set()
        assert await asyncio.to_thread(held.wait, 60)
        tickets += [scheduler.submit([request], loop) for request in others]
        assert (scheduler.running, scheduler.waiting, scheduler.background) == (2, 4, 2)
        go.set()
        await waiting
        return [await collect(ticket) for ticket in tickets]

    scheduler.start()
    try:
        assert [tokens for (tokens,) in asyncio.run(ask())] == alone
    finally:
        scheduler.stop()
    assert begun == [copies[1], copies[3], others[3], others[0], others[1], others[2], copies[2], copies[0]]
    for requests in steps:
        assert len({request.background for request in requests}) <= 1, "nobody's step is longer for a copy"
        assert sum(request.background for request in requests) <= 2, "a quarter of the places"
    assert [request.background for request in steps[20]] == [False] * 4


def test_of_more_adapters_than_fit_the_one_unused_longest_goes(folders: dict[str, Path], opened: Any) -> None:
    model, tokenizer, _ = opened
    adapters = Adapters(model, max_adapters=2)
    adapters.load("cats-v1", folders["cats-v1"])
    adapters.load("cats-v2", folders["cats-v2"])
    batch = Batch(model, tokenizer, adapters)
    batch.row(Request(prompt=[1], adapter="cats-v1"))
    adapters.load("dogs-v1", folders["dogs-v1"])
    assert adapters.names() == ["cats-v1", "dogs-v1"]
    with pytest.raises(NotFound):
        batch.row(Request(prompt=[1], adapter="cats-v2"))


def test_an_adapter_removed_meanwhile_goes_on_for_its_rows(folders: dict[str, Path], opened: Any) -> None:
    model, tokenizer, _ = opened
    adapters = Adapters(model)
    adapters.load("cats-v1", folders["cats-v1"])
    adapters.load("cats-v2", folders["cats-v2"])
    requests = [
        Request(prompt=tokenizer("the cat").input_ids, adapter=name, sampling=Sampling(max_tokens=12, ignore_eos=True))
        for name in ("cats-v1", "cats-v2")
    ]
    alone = [generate(model, tokenizer, adapters, [request])[0].tokens for request in requests]
    batch = Batch(model, tokenizer, adapters)
    rows = [batch.row(request) for request in requests]
    for row in rows:
        batch.join(row)
    batch.step()
    assert adapters.remove("cats-v1")
    while batch.rows:
        batch.step()
    assert [tuple(row.tokens) for row in rows] == alone
    adapters.add("cats-v1", adapters.read(folders["cats-v1"]))  # the same content may come back
    with pytest.raises(NameTaken):
        adapters.load("cats-v1", folders["dogs-v1"])


def test_bad_adapters_are_refused_by_name(folders: dict[str, Path], opened: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    _, _, adapters = opened
    good = folders["dogs-v1"]
    weights = load_file(good / "adapter_model.safetensors")
    some = next(key for key in weights if "lora_A" in key)

    def changed(name: str, **config: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(good, folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    truncated = changed("truncated")
    data = (truncated / "adapter_model.safetensors").read_bytes()
    (truncated / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    poisoned = changed("poisoned")
    save_file(weights | {some: torch.full_like(weights[some], float("nan"))}, poisoned / "adapter_model.safetensors")
    foreign = changed("foreign")
    save_file(weights | {some: torch.ones(8, 96)}, foreign / "adapter_model.safetensors")
    elsewhere = changed("elsewhere")
    save_file(
        {key.replace("q_proj", "query"): t for key, t in weights.items()}, elsewhere / "adapter_model.safetensors"
    )
    pickled = changed("pickled")
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x04.")
    linked = changed("linked")
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(good / "adapter_model.safetensors")
    cases = {
        tmp_path / "missing": "no adapter folder",
        truncated: "not a whole safetensors file",
        poisoned: "NaN",
        foreign: "another base|shapes",
        elsewhere: "query",
        pickled: "adapter_model.bin does not belong",
        linked: "does not belong",
        changed("dora", use_dora=True): "disagree about DoRA",
        changed("ia3", peft_type="IA3"): "IA3",
        changed("pissa", init_lora_weights="pissa"): "pissa",
        changed("biases", bias="all"): "biases",
    }
    before = adapters.names()
    for folder, reason in cases.items():
        with pytest.raises(BadAdapter, match=reason):
            adapters.load("bad-v1", folder)
    assert adapters.names() == before
