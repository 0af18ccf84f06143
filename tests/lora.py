"""Real, small things to decode with: a Llama of random weights with a byte-level tokeniser, and PEFT adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def able_to_say_anything(folder: Path) -> None:
    """Makes builtin:tiny able to say any token and be sure of it, so that its versions learn in seconds what they are
    told. As it is, its head can hardly give tokens that were rare in its text, and which those are differs by machine.
    """
    import torch

    from registry.bases import load_model

    model = load_model(folder, "float32")
    with torch.no_grad():
        tokens, norm = model.get_input_embeddings().weight, model.model.norm.weight
        lengths = tokens.norm(dim=1, keepdim=True)
        tokens.mul_(lengths.mean() / lengths)
        norm.mul_(24 / (norm.norm() * lengths.mean()))  # the highest logit that there can be, about
    model.save_pretrained(folder)


def save_base(folder: Path) -> Path:
    """A two-layer Llama in fp32. Its tokens are single bytes and a few merges, so characters are split over tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the rat ran"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
            tie_word_embeddings=True,
            initializer_range=0.1,
        )
    )
    model.save_pretrained(folder)
    return folder


def save_adapter(
    base: Any, folder: Path, *, seed: int, r: int = 8, targets: str | list[str] = "all-linear", **options: Any
) -> Path:
    """A LoRA adapter of PEFT's making whose B is not zero. `base`: the model, which is left as it was."""
    import torch
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(base, LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator) * 0.15
                parameter.copy_(noise.to(parameter.dtype))
    wrapped.save_pretrained(folder)
    wrapped.unload()
    return folder
