"""Is what will be served what was trained? Looked at before the judgement, and so before registration.

The base's files must still be what its digests say, and the same rows must have the same log-probabilities in the form
that was trained (the pack that trained it; PEFT itself for DoRA and PiSSA, which train alone) and in the form that is
served (`deploy/adapters.py`): in fp32 up to the order of sums, in bf16 up to its rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import storage
from infra.errors import Refused, TunesmithError
from infra.settings import get_settings
from registry import bases, prompts, servable
from registry.bases import Base
from registry.datasets import Row

if TYPE_CHECKING:
    import torch

ROWS = 8
# Nats a token: the largest difference allowed in fp32, where only sums are ordered otherwise, and the mean one in bf16,
# whose logits of 16 and more are an eighth apart: forms of one adapter on SmolLM2-135M were up to 0.18 apart
ALLOWED = {"float32": 1e-3, "bfloat16": 0.3}
_EXACTLY = 500_000_000  # parameters up to which a bf16 base is looked at in fp32 too, which takes 4 bytes each
_LONGEST = 512
_HINT = "Nothing was registered."


def check(
    base: Base, adapter: Path, params: Mapping[str, Any], rows: Sequence[Row], system: str | None
) -> dict[str, Any]:
    """What was found, for the evaluation: ``{"rank", "max_rank", "rows", "differences": {dtype: nats a token}}``.
    `params` are the trial's, `adapter` is the plain PEFT adapter that it left.

    Raises Refused, in one sentence, when the version could not be served as it was trained.
    """
    rank = servable.check(adapter, base.folder)
    tokenizer = bases.load_tokenizer(base.folder)
    _same_base(base, tokenizer)
    chosen: list[tuple[list[int], int]] = []
    for row in rows[:ROWS]:
        ids, length = prompts.encode_pair(tokenizer, row.messages, system=system)
        if prompts.encode(tokenizer, row.prompt, system=system) != ids[:length]:
            raise Refused(f"The row {row.id} has another prompt in training than in serving.", hint=_HINT)
        start = max(0, min(length - 1, len(ids) - _LONGEST))  # of a long row so much as has answer tokens in it
        chosen.append((ids[start : start + _LONGEST], length - start))
    if not chosen:
        raise Refused("There is no validation row to compare the two forms on.", hint=f"Add some. {_HINT}")
    dtypes = [base.dtype] if base.dtype == "float32" or base.parameters > _EXACTLY else ["float32", base.dtype]
    differences = {dtype: _difference(base, adapter, params, chosen, dtype) for dtype in dtypes}
    for dtype, found in differences.items():
        if not found <= ALLOWED[dtype]:
            raise Refused(
                f"The adapter is not served as it was trained: on {len(chosen)} validation rows the log-probabilities "
                f"differ by {found:.3g} nats a token in {dtype}, and {ALLOWED[dtype]:g} is allowed.",
                hint=f"Its files are not what the trial left, or the two forms disagree; search again. {_HINT}",
            )
    return {
        "rank": rank,
        "max_rank": get_settings().max_lora_rank,
        "rows": len(chosen),
        "differences": differences,
    }


def _difference(
    base: Base, adapter: Path, params: Mapping[str, Any], chosen: Sequence[tuple[list[int], int]], dtype: str
) -> float:
    from deploy.adapters import Adapters
    from deploy.decoding import open_model

    model, _ = open_model(base.folder, dtype, packed=False)  # it is trained on as well
    adapters = Adapters(model, max_rank=get_settings().max_lora_rank)
    try:
        loaded = adapters.load("candidate", adapter)
    except TunesmithError as error:
        raise Refused(f"The adapter cannot be served: {error.message}", hint=f"{error.hint} {_HINT}".strip()) from error
    served = []
    for ids, length in chosen:
        with adapters.rows([loaded]):
            served.append(_logprobs(model, ids, length))
    trained = _trained(model, adapter, params, chosen)
    differences = [(one - other).abs() for one, other in zip(served, trained, strict=True)]
    if dtype == "float32":
        return max(float(d.max()) for d in differences)
    return sum(float(d.mean()) for d in differences) / len(differences)


def _same_base(base: Base, tokenizer: Any) -> None:
    """The files in the store are those that versions name; engines load these very files."""
    digest, tokenizer_digest, template_digest = bases.identity(base.folder, tokenizer)
    found = {"digest": digest, "tokenizer_digest": tokenizer_digest, "template_digest": template_digest}
    for what in ("template_digest", "tokenizer_digest", "digest"):  # the most telling first
        if found[what] != (wanted := getattr(base, what)):
            raise Refused(
                f"The base {base.id} that is served has {what} {found[what]}, and was trained on with {wanted}.",
                hint=f"Its files in {storage.where('base', base.digest)} were changed: bring them back. {_HINT}",
            )


def _logprobs(model: Any, ids: Sequence[int], length: int) -> torch.Tensor:
    """Of each completion token given all before it, with the row by itself."""
    import torch

    whole = torch.tensor([list(ids)], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=whole, use_cache=False).logits[0, length - 1 : -1].float()
    found: torch.Tensor = logits.log_softmax(-1).gather(1, whole[0, length:, None])[:, 0]
    return found


def _trained(
    model: Any, adapter: Path, params: Mapping[str, Any], chosen: Sequence[tuple[list[int], int]]
) -> list[torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about how PEFT asks it
        return _in_training(model, adapter, params, chosen)


def _in_training(
    model: Any, adapter: Path, params: Mapping[str, Any], chosen: Sequence[tuple[list[int], int]]
) -> list[torch.Tensor]:
    from pipelines.tuning.methods import Targets, packable

    if not packable(params):
        from peft import PeftModel

        peft = PeftModel.from_pretrained(model, adapter).eval()
        try:
            return [_logprobs(peft, ids, length) for ids, length in chosen]
        finally:
            peft.unload()
    from pipelines.tuning.pack import Pack

    try:
        pack = Pack(model, [params], [0], Targets(model))
        pack.load(0, adapter)
    except ValueError as error:
        raise Refused(f"The adapter is not the trial's: {error}.", hint=_HINT) from error
    import torch

    with pack.attached(), torch.inference_mode():
        return [_logprobs(model, ids, length) for ids, length in chosen]
