"""One base in memory, the adapters of several versions beside it, and the same rows put to all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from deploy.adapters import Adapters
from deploy.decoding import Batch, Request, Result, generate, open_model
from deploy.sampling import Sampling
from infra.errors import TunesmithError, Unreachable
from pipelines.config_address import Address
from pipelines.evaluation.address import Client, Said, Unavailable
from pipelines.evaluation.hosted import MISSING
from registry import prompts
from registry.bases import Base
from registry.datasets import Row

_BATCH_TOKENS = 4_096
_BATCH_ROWS = 32
_LOAD_CELLS = 65_536


@dataclass(frozen=True, kw_only=True)
class HostedResult(Result):
    """A hosted model's answer, with the tokens that it counted itself, None where it does not. Its `tokens` are not
    told; `seconds` is the whole request's time, network and further tries included, NaN where it is not known. Where
    it failed its text is empty."""

    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row in tokens: its prompt, as it is served, and the completion after it, as it is trained on. `own` has the
    prompts of versions with another system prompt, which they are given in place of the first `replaced` tokens;
    `system` is the system prompt of the others, `systems` those of these; `elsewhere` is the row in the tokens of
    other bases, by the versions that stand on them."""

    row: Row
    whole: tuple[int, ...]
    prompt_length: int
    own: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    replaced: int = 0
    system: str | None = None
    systems: Mapping[str, str | None] = field(default_factory=dict)
    elsewhere: Mapping[str, Case] = field(default_factory=dict)

    def messages(self, version: str) -> list[dict[str, Any]]:
        """What this version is asked, as a chat."""
        return prompts.with_system(self.row.prompt, self.systems.get(version, self.system))

    def of(self, version: str) -> Case:
        """The case as this version is asked."""
        if version in self.elsewhere:
            return self.elsewhere[version]
        if version not in self.own:
            return self
        own = self.own[version]
        length = len(own) + self.prompt_length - self.replaced
        return Case(row=self.row, whole=own + self.whole[self.replaced :], prompt_length=length)

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.whole[: self.prompt_length]

    @property
    def completion_length(self) -> int:
        return len(self.whole) - self.prompt_length


@dataclass(frozen=True)
class Elsewhere:
    """A version on another base: its adapter's folder, or None for that base alone."""

    base: Base
    adapter: Path | None


Version = Path | Address | Elsewhere | None
"""An adapter's folder, the address of a hosted model, a version on another base, or None for the base alone."""


class Bench:
    """Versions side by side: `versions` are those on the base, `elsewhere` those on others, which are in memory too,
    and `hosted` those that are asked over an address. Be sure to `close` it."""

    def __init__(self, base: Base, versions: Mapping[str, Version]) -> None:
        self.base = base
        self.model, self.tokenizer = open_model(base.folder)
        # The last columns of many rows are no contiguous block, and torch would copy the head's weight for each row
        self.model.get_output_embeddings().register_forward_pre_hook(_contiguous)
        self.adapters = Adapters(self.model)
        self.versions = {name: where for name, where in versions.items() if not isinstance(where, (Address, Elsewhere))}
        for name, folder in self.versions.items():
            if folder is not None:
                self.adapters.load(name, folder)
        self.elsewhere = {
            name: Bench(where.base, {name: where.adapter})
            for name, where in versions.items()
            if isinstance(where, Elsewhere)
        }
        self.hosted = {name: _client(where) for name, where in versions.items() if isinstance(where, Address)}

    @property
    def here(self) -> list[str]:
        """The versions that this machine decodes."""
        return [*self.versions, *self.elsewhere]

    def close(self) -> None:
        for client in self.hosted.values():
            client.close()

    def cases(
        self, rows: Sequence[Row], *, system: str | None, max_tokens: int, own: Mapping[str, str | None] | None = None
    ) -> list[Case]:
        """The rows in tokens, in their order, without those that do not fit the context of every base. `own` has the
        system prompts of versions that have another one."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        found = []
        for row in rows:
            whole, prompt_length = prompts.encode_pair(self.tokenizer, row.messages, system=system)
            others = {
                name: tuple(prompts.encode(self.tokenizer, row.prompt, system=other))
                for name, other in (own or {}).items()
            }
            elsewhere = {
                name: bench.cases([row], system=(own or {}).get(name, system), max_tokens=max_tokens)
                for name, bench in self.elsewhere.items()
            }
            longest = max([prompt_length, *map(len, others.values())])
            if longest + max(max_tokens, len(whole) - prompt_length) <= most and all(elsewhere.values()):
                found.append(
                    Case(
                        row=row,
                        whole=tuple(whole),
                        prompt_length=prompt_length,
                        own=others,
                        replaced=prompt_length,
                        system=system,
                        systems=dict(own or {}),
                        elsewhere={name: case for name, [case] in elsewhere.items()},
                    )
                )
        return found

    def losses(self, cases: Sequence[Case], progress: Callable[[int], None] | None = None) -> dict[str, list[float]]:
        """For each version of the base the mean negative log-likelihood (nats a token) of each row's completion, end
        token included, given its prompt. Of other bases there is none: their tokens are other ones."""
        found: dict[str, list[float]] = {name: [0.0] * len(cases) for name in self.versions}
        done = 0
        for batch in _batches(cases):
            for name in self.versions:
                for number, loss in zip(batch, self._losses(name, [cases[n].of(name) for n in batch]), strict=True):
                    found[name][number] = loss
            done += len(batch)
            if progress:
                progress(done)
        return found

    def _losses(self, version: str, cases: Sequence[Case]) -> list[float]:
        """Padded on the left, so that the completions stand together at the right end and the head works there
        only: logits are the costly part of a short row."""
        import torch

        width = max(len(case.whole) for case in cases)
        kept = max(case.completion_length for case in cases)
        ids = torch.zeros((len(cases), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        wanted = torch.zeros((len(cases), kept), dtype=torch.bool)
        for i, case in enumerate(cases):
            ids[i, width - len(case.whole) :] = torch.tensor(case.whole)
            mask[i, width - len(case.whole) :] = 1
            wanted[i, kept - case.completion_length :] = True
        ids, mask, wanted = (t.to(self.model.device) for t in (ids, mask, wanted))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode(), self.adapters.rows([self.adapters.get(version)] * len(cases)):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=kept + 1,
            )
            logits = output.logits[:, -kept - 1 : -1].float()
            each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -kept:].flatten(), reduction="none")
            each = each.view(len(cases), kept) * wanted
            losses: list[float] = (each.sum(1) / wanted.sum(1)).tolist()
        return losses

    def answers(
        self,
        cases: Sequence[Case],
        *,
        max_tokens: Mapping[str, int],
        temperature: float = 0.0,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, list[Result]]:
        """The answers of each version in `max_tokens`, at most so long; all versions of the base in one batch. Greedy
        unless there is a `temperature`; then a case that comes twice is drawn twice, on the base each time by a seed
        of its own. Raises Unreachable when a hosted model does not answer more than a few of them."""
        order = sorted(range(len(cases)), key=lambda n: len(cases[n].prompt))
        asked = [(name, number) for number in order for name in self.versions if name in max_tokens]
        results = self._generate(
            [
                self._request(name, cases[number], max_tokens[name], temperature=temperature, seed=seed + number)
                for name, number in asked
            ],
            max_rows=_BATCH_ROWS,
            progress=progress,
        )
        by_number: dict[str, dict[int, Result]] = {name: {} for name in self.versions if name in max_tokens}
        for (name, number), result in zip(asked, results, strict=True):
            by_number[name][number] = result
        found = {name: [given[n] for n in range(len(cases))] for name, given in by_number.items()}
        done = len(asked)
        for name, bench in self.elsewhere.items():
            if name in max_tokens:
                theirs = [case.of(name) for case in cases]
                say = partial(_onwards, progress, done)
                found |= bench.answers(
                    theirs, max_tokens={name: max_tokens[name]}, temperature=temperature, seed=seed, progress=say
                )
                done += len(cases)
        for name, client in self.hosted.items():
            if name in max_tokens:
                say = partial(_onwards, progress, done)
                chats = [case.messages(name) for case in cases]
                found[name] = list(_ask(client, chats, max_tokens[name], temperature, say))
                done += len(cases)
        return {name: [_storable(result) for result in given] for name, given in found.items()}

    def alone(self, cases: Sequence[Case], *, max_tokens: int, seconds: float, least: int) -> dict[str, list[Result]]:
        """For each version the answers to requests that come one at a time, the versions by turns, so that what
        else the machine does falls on all of them; ends after `seconds`, but not before `least` rows."""
        found: dict[str, list[Result]] = {name: [] for name in (*self.here, *self.hosted)}
        begun = time.monotonic()
        for number, case in enumerate(cases):
            if number >= least and time.monotonic() - begun > seconds:
                break
            for name in self.here:
                found[name].append(self.of(name)._alone(self._request(name, case, max_tokens)))
            for name, client in self.hosted.items():
                asked = time.perf_counter()
                try:
                    said = client.ask(case.messages(name), max_tokens=max_tokens)
                except Unavailable as error:
                    raise _away(error.why) from error
                # One without an answer was waited for all the same
                found[name].append(replace(_hosted_result(said), seconds=time.perf_counter() - asked))
        for name, client in self.hosted.items():
            _enough(client, sum(result.finish_reason == "error" for result in found[name]), len(found[name]))
        return found

    def at_load(
        self, cases: Sequence[Case], *, max_tokens: int, seconds: float, least: int, at_once: int
    ) -> dict[str, list[Result]]:
        """For each version that is here the answers to the cases, each once, while `at_once` requests are in work: the
        next begins as soon as one is over, and behind the last case the first ones again, uncounted, until the last
        one's answer is there. Versions by turns, some requests each; what is in work meanwhile rests, and `seconds`
        of a result are those that its version worked. Ends as `alone` does."""
        loads = {
            name: _Load(self.of(name), [self._request(name, case, max_tokens) for case in cases], at_once)
            for name in self.here
        }
        begun, size, done = time.monotonic(), 3 * at_once, 0
        while done < len(cases) and (done < least or time.monotonic() - begun <= seconds):
            done = min(done + size, len(cases))
            for load in loads.values():
                load.work_until(done)
        return {name: load.answers[:done] for name, load in loads.items()}

    def of(self, version: str) -> Bench:
        """The bench with the base that a version stands on."""
        return self.elsewhere.get(version, self)

    def _generate(
        self, requests: Sequence[Request], *, max_rows: int, progress: Callable[[int], None] | None = None
    ) -> list[Result]:
        return generate(self.model, self.tokenizer, self.adapters, requests, max_rows=max_rows, progress=progress)

    def _alone(self, request: Request) -> Result:
        cells = len(request.prompt) + request.sampling.max_tokens
        batch: Any = Batch(self.model, self.tokenizer, self.adapters, max_rows=1, max_cells=cells)
        row = batch.row(request)
        batch.join(row)
        while row.finish is None:
            batch.step()
        result: Result = row.result()
        return result

    def _request(
        self, version: str, case: Case, max_tokens: int, *, temperature: float = 0.0, seed: int | None = None
    ) -> Request:
        adapter = version if self.of(version).versions[version] is not None else None
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
        return Request(prompt=case.of(version).prompt, adapter=adapter, sampling=sampling)


class _Load:
    """So many requests at once on one base, the next when one is over, from the first again after the last."""

    def __init__(self, bench: Bench, requests: Sequence[Request], at_once: int) -> None:
        longest = max(len(request.prompt) + request.sampling.max_tokens for request in requests)
        cells = max(_LOAD_CELLS, at_once * longest)  # so that none ever waits for room
        self._batch: Any = Batch(bench.model, bench.tokenizer, bench.adapters, max_rows=at_once, max_cells=cells)
        self._requests, self._at_once = requests, at_once
        self._begun: list[tuple[Any, float]] = []  # rows, and how long the load had rested when they began
        self._rested, self._paused_at = 0.0, time.perf_counter()
        self.answers: list[Result] = []

    def work_until(self, count: int) -> None:
        """Work until the first `count` requests are over, and keep their answers."""
        self._rested += time.perf_counter() - self._paused_at
        over = len(self.answers)
        while over < count:
            while (free := self._at_once - len(self._batch.rows)) and over < count:
                self._begin(free)
                over = self._over(over)
            if over < count:
                self._batch.step()
                over = self._over(over)
        self._paused_at = time.perf_counter()
        for row, rested in self._begun[len(self.answers) : count]:
            result: Result = row.result()
            self.answers.append(replace(result, seconds=result.seconds - (self._rested - rested)))

    def _begin(self, count: int) -> None:
        """The next requests, together."""
        turns = range(len(self._begun), len(self._begun) + count)
        rows = [self._batch.row(self._requests[turn % len(self._requests)]) for turn in turns]
        self._begun += [(row, self._rested) for row in rows]
        self._batch.join(*rows)

    def _over(self, known: int) -> int:
        """How many of the first requests are over, without a gap."""
        while known < len(self._begun) and self._begun[known][0].finish is not None:
            if (row := self._begun[known][0]).finish == "error":
                raise TunesmithError(f"The model computed NaN or infinity with the adapter {row.request.adapter}.")
            known += 1
        return known


def _ask(
    client: Client,
    asked: Sequence[list[dict[str, Any]]],
    max_tokens: int,
    temperature: float,
    progress: Callable[[int], None],
) -> list[HostedResult]:
    try:
        said = client.ask_all(asked, max_tokens=max_tokens, temperature=temperature, progress=progress)
    except Unavailable as error:
        raise _away(error.why) from error
    _enough(client, said.count(None), len(said))
    return [_hosted_result(answer) for answer in said]


def _enough(client: Client, missing: int, asked: int) -> None:
    if missing > MISSING * asked:
        raise _away(f"{missing} of {asked} requests to {client.model} have no answer")


def _storable(result: Result) -> Result:
    """Without the character that the database cannot hold."""
    return replace(result, text=result.text.replace("\0", "�")) if "\0" in result.text else result


def _onwards(progress: Callable[[int], None] | None, before: int, done: int) -> None:
    if progress:
        progress(before + done)


def _client(address: Address) -> Client:
    try:
        return Client(address)
    except Unavailable as error:
        raise _away(error.why) from error


def _away(why: str) -> Unreachable:
    return Unreachable(f"A hosted version cannot be judged: {why}.", hint="Mend it, then run the same command again.")


def _hosted_result(said: Said | None) -> HostedResult:
    return HostedResult(
        text=said.text if said else "",
        tokens=(),
        finish_reason="error" if said is None else "length" if said.finish_reason == "length" else "stop",
        mean_logprob=math.nan,
        logprobs=(),
        engine_seconds=0.0,
        seconds=said.seconds if said else math.nan,
        prompt_tokens=said.prompt_tokens if said else None,
        completion_tokens=said.completion_tokens if said else None,
    )


def _contiguous(module: object, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(), *args[1:])


def _batches(cases: Sequence[Case]) -> list[list[int]]:
    """Rows of like length together, by number; at most so many padded tokens, and so many rows."""
    batches: list[list[int]] = []
    for number in sorted(range(len(cases)), key=lambda n: len(cases[n].whole)):
        width = len(cases[number].whole)  # the longest so far
        if batches and len(batches[-1]) < _BATCH_ROWS and width * (len(batches[-1]) + 1) <= _BATCH_TOKENS:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
