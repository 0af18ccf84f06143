"""builtin:tiny: a language model of half a million parameters, made on the spot from Python's documentation.

For tests and the quick demo. It takes seconds, and goes through the same code as any large base: it is trained,
saved, loaded, tuned and served like one.
"""

from __future__ import annotations

import sys
from pathlib import Path

_VOCABULARY = 2048
# Measured on held-out docstrings: two layers on many short windows learn more in half the time of four on long ones
_LAYERS, _STEPS, _RATE = 2, 480, 6e-3
_BATCH, _LENGTH = 8, 32
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def revision() -> str:
    """Changes with the recipe and with the interpreter, whose documentation is the text."""
    return f"3-py{sys.version_info.major}.{sys.version_info.minor}"


def make(folder: Path) -> None:
    """Train the tokenizer and the model into an empty folder. Two makings may differ in tokens and weights, on one
    machine too; a home makes it once, and knows it by digest."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    text = _text()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(  # special tokens, not secrets
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        chat_template=_TEMPLATE,
    )
    fast.save_pretrained(folder)

    ids = torch.tensor([i for part in text for i in [*tokenizer.encode(part).ids, fast.eos_token_id]])
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=tokenizer.get_vocab_size(),
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=_LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=fast.eos_token_id,
                pad_token_id=fast.pad_token_id,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_RATE, total_steps=_STEPS, pct_start=0.1)
        for _ in range(_STEPS):
            starts = torch.randint(0, len(ids) - _LENGTH, (_BATCH,)).tolist()
            batch = torch.stack([ids[s : s + _LENGTH] for s in starts])
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    torch.set_num_threads(was)
    model.save_pretrained(folder)


def _text() -> list[str]:
    """The documentation of common modules, in a stable order: prose and code, no questions and answers."""
    import importlib
    import inspect
    import warnings

    names = (
        "argparse", "ast", "asyncio", "base64", "collections", "configparser", "contextlib", "csv", "datetime",
        "decimal", "difflib", "email", "fractions", "functools", "heapq", "http.client", "inspect", "io", "itertools",
        "json", "logging", "math", "os", "pathlib", "pickle", "random", "re", "shutil", "socket", "statistics",
        "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "typing", "unittest", "urllib.parse",
        "uuid", "zipfile",
    )  # fmt: skip
    found: dict[str, None] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some modules warn when an old name of theirs is looked at
        for name in names:
            module = importlib.import_module(name)
            named = (getattr(module, n) for n in sorted(dir(module)) if not n.startswith("_"))
            # Not submodules: which of them a package shows depends on what else was imported before
            for thing in (module, *(t for t in named if not inspect.ismodule(t))):
                members = [getattr(thing, n, None) for n in sorted(vars(thing))] if inspect.isclass(thing) else []
                for part in (thing, *members):
                    doc = inspect.getdoc(part)
                    if isinstance(doc, str) and len(doc) > 30:
                        found[doc[:2000]] = None
    return list(found)
