"""Messages to tokens, in one way for training, evaluation and serving, so that their forms are equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# The form of a base that brings no chat template of its own. Many such bases have only seen texts that begin with
# their begin-of-text token.
FALLBACK_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

Messages = Sequence[Mapping[str, Any]]


def render(tokenizer: Any, messages: Messages, *, system: str | None = None, generation: bool = True) -> str:
    """The text a model is given for a conversation; `system` is put first when it has no system message.

    Raises ValueError, with the template's own words, for a conversation that the template refuses.
    """
    turns = with_system(messages, system)
    template = None if tokenizer.chat_template else FALLBACK_TEMPLATE
    try:
        text = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=generation
        )
    except Exception as error:  # jinja2's errors, and those that templates raise on their own
        raise ValueError(f"the chat template refuses these messages: {error}") from error
    return str(text)


def with_system(messages: Messages, system: str | None) -> list[dict[str, Any]]:
    """A conversation with `system` put first when it has no system message."""
    turns = [dict(m) for m in messages]
    if system is not None and not any(m["role"] == "system" for m in turns):
        turns.insert(0, {"role": "system", "content": system})
    return turns


def encode(tokenizer: Any, messages: Messages, *, system: str | None = None) -> list[int]:
    """Token ids of a conversation up to where the answer begins."""
    return _ids(tokenizer, render(tokenizer, messages, system=system))


def encode_pair(tokenizer: Any, messages: Messages, *, system: str | None = None) -> tuple[list[int], int]:
    """Token ids of a conversation whose last message is the answer, and how many of them are the prompt.

    The prompt's ids are exactly those of `encode`; the answer's follow, tokenised on their own as a model would
    produce them, with the template's end-of-turn token last.
    """
    prompt = render(tokenizer, messages[:-1], system=system)
    whole = render(tokenizer, messages, system=system, generation=False)
    # What the template puts around an answer; a template that changes earlier turns gives the plain answer
    answer = whole[len(prompt) :].rstrip("\n") if whole.startswith(prompt) else str(messages[-1]["content"])
    prompt_ids, answer_ids = _ids(tokenizer, prompt), _ids(tokenizer, answer)
    if not answer_ids or answer_ids[-1] not in set(tokenizer.all_special_ids):
        answer_ids.append(tokenizer.eos_token_id)
    return prompt_ids + answer_ids, len(prompt_ids)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
