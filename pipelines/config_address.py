"""The sections of a pipeline file that name an OpenAI-shaped address: a judge, a hosted model to compare with, and a
version that hosted models answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from registry.bundle import HostedModel
from registry.pricing import TokenPrice
from registry.upstreams import check_options, check_url, check_variable

PLACES = ("rubric", "question", "expected", "answer")
"""What a judge's own prompt may hold in braces."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=False, serialize_by_alias=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """True would count as 1."""
        wanted = cls.model_fields[info.field_name].annotation if info.field_name else None
        if isinstance(value, bool) and {int, float} & {wanted, *get_args(wanted)} and bool not in get_args(wanted):
            raise ValueError(f"must be a number, not {str(value).lower()}")
        return value


def absolute(value: Any, info: ValidationInfo) -> Path:
    """A path as written, made absolute: relative ones start at the file's folder."""
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError(f"must be a path, not {value!r}")
    return Path((info.context or {}).get("folder", Path.cwd()), Path(value).expanduser()).absolute()


class Address(Section):
    """An address that answers ``POST <url>/chat/completions`` as OpenAI's does, and the model to ask there.

    `key_env` names the environment variable that holds the key; the key itself stands nowhere. `options` are put into
    each request's body, a null takes a field out of it.
    """

    url: str | None = None
    model: str | None = Field(default=None, min_length=1, max_length=200)
    key_env: str | None = None
    timeout_seconds: float = Field(default=60.0, gt=0, le=3600)
    parallel: int = Field(default=4, ge=1, le=16)
    options: dict[str, Any] = {}

    @field_validator("url")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return None if value is None else check_url(value)

    @field_validator("key_env")
    @classmethod
    def _variable(cls, value: str | None) -> str | None:
        return None if value is None else check_variable(value)

    @field_validator("options")
    @classmethod
    def _options(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_options(value)


class Judge(Address):
    """A model that calls answers good or bad. Without `url`, `model` or `labelled` what it would measure is
    unavailable. `labelled` is JSONL, each line ``{"question", "answer", "good": true or false, "expected"?}``: what
    people said of answers of this kind. `rubric` says what a good answer is; `prompt` replaces the whole question to
    the judge. Where it agrees with people by a kappa under `least_kappa`, no gate passes by it."""

    labelled: Annotated[Path, BeforeValidator(absolute)] | None = None
    rubric: str | None = Field(default=None, min_length=1, max_length=20_000)
    prompt: str | None = Field(default=None, min_length=1, max_length=20_000)
    least_kappa: float = Field(default=0.4, ge=-1, le=1)

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: str | None) -> str | None:
        for place in ("question", "answer") if value is not None else ():
            if f"{{{place}}}" not in str(value):
                raise ValueError(f"has no {{{place}}}; it may hold {', '.join(f'{{{p}}}' for p in PLACES)}")
        return value


class HostedPrice(Section):
    """A price list, in US dollars for a million tokens."""

    input_per_million_usd: float = Field(ge=0)
    output_per_million_usd: float = Field(ge=0)

    @property
    def tokens(self) -> TokenPrice:
        return TokenPrice(
            per_1k_prompt_tokens_usd=self.input_per_million_usd / 1000,
            per_1k_completion_tokens_usd=self.output_per_million_usd / 1000,
        )


class Hosted(Address):
    """A hosted model that answers the test rows too, and stands beside the candidate in one more column. `system` is
    its own prompt; without it, the file's `prompt.system`. Without `price` its cost is unavailable."""

    system: str | None = Field(default=None, max_length=20_000)
    price: HostedPrice | None = None


class HostedVersion(Section):
    """A version that hosted models answer: the first, and when it fails in serving the next. It is judged by the
    answers of the first, `parallel` requests at a time."""

    models: Annotated[tuple[HostedModel, ...], Field(min_length=1, max_length=8)]
    price: HostedPrice | None = None
    parallel: int = Field(default=4, ge=1, le=16)
