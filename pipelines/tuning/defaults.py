"""What a search looks through where the pipeline file leaves a dimension out, by the size of the base.

Where the numbers come from (hyper-parameters as the authors' own scripts have them, where they published some):

- Hu: Hu et al. 2021, "LoRA". GPT-2 medium (355M): r 4, alpha 32, dropout 0.1, rate 2e-4, linear decay, batch 8;
  RoBERTa: warm-up 6 %. Adapters on attention; ranks from 1 to 64 compared.
- QLoRA: Dettmers et al. 2023. 7B to 65B: r 64, alpha 16, all linear layers, constant rate of 2e-4 (7B, 13B) or 1e-4
  (33B, 65B), dropout 0.1 (7B) or 0.05, batch 4 accumulated 4 times, gradients clipped at 0.3, warm-up 3 %, no decay.
- Regret: Schulman et al. 2025, "LoRA Without Regret". Alpha 32; the best rate is about ten times that of full
  fine-tuning, hardly depends on the rank, and follows 5e-4 (2000 / hidden size)^0.781 for Llama-like bases: 1.3e-3
  at 576 (SmolLM2-135M), 4.9e-4 at 2048, 2.9e-4 at 4096, 2.4e-4 at 5120, 1.7e-4 at 8192. Adapters on attention alone
  stay behind, and large batches cost more than in full fine-tuning.
- PiSSA: Meng et al. 2024, "PiSSA". Cosine decay, warm-up 3 %, no dropout.
- PEFT and transformers: the defaults of LoraConfig and TrainingArguments.

Ranges of rates are ours: from about a quarter of the lowest to four times the highest rate that these give for the
class, for the optimum moves with data and batch size.
"""

from __future__ import annotations

from typing import Any

# What a study has that knows nothing of these dimensions: plain LoRA on all layers, one batch a step, as in PEFT and
# transformers. rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024), which makes each step dearer, and PiSSA are for a
# file to ask for.
FIXED: dict[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "layers_to_transform": "all",
    "gradient_accumulation_steps": 1,
}

# Under 1B
SMALL: dict[str, Any] = FIXED | {
    "r": [4, 8, 16, 32],  # Hu: from the 4 of GPT-2 medium upwards
    "lora_alpha": [16, 32],  # QLoRA; Hu and Regret
    "lora_dropout": [0.0, 0.05, 0.1],  # PiSSA, QLoRA, Hu
    "learning_rate": {"low": 1e-4, "high": 5e-3, "log": True},  # half of Hu's to four times Regret's at 576
    "lr_scheduler_type": ["cosine", "linear", "constant"],  # PiSSA, Hu, QLoRA
    "warmup_ratio": 0.05,  # Hu, near enough
    "weight_decay": 0.0,  # QLoRA, PiSSA
    "max_grad_norm": 1.0,  # transformers
    "target_modules": ["attention", "all-linear"],  # Hu; QLoRA and Regret
    "per_device_train_batch_size": [4, 8, 16],  # around Hu's 8, no larger for Regret's sake
}

# 1B to 10B: QLoRA's rank as the highest, its placement, clipping, warm-up, and batch of 4, accumulated up to 4 times.
# Rates around 2e-4 (QLoRA, 7B) to 4.9e-4 (Regret at 2048). The rest as above.
_MIDDLE = SMALL | {
    "r": [8, 16, 32, 64],
    "learning_rate": {"low": 5e-5, "high": 2e-3, "log": True},
    "warmup_ratio": 0.03,
    "max_grad_norm": 0.3,
    "target_modules": "all-linear",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": [1, 2, 4],
}

# Above: rates around 1e-4 (QLoRA, 33B and 65B) to 2.4e-4 (Regret at 5120); QLoRA used no more dropout than 0.05.
_LARGE = _MIDDLE | {
    "lora_dropout": [0.0, 0.05],
    "learning_rate": {"low": 2.5e-5, "high": 1e-3, "log": True},
}


def defaults_for(parameters: int) -> dict[str, Any]:
    """Every dimension of `tuning.space` for a base of so many parameters: under 1e9, up to 1e10, or above. Sources as
    in this module's docstring."""
    if parameters < 1_000_000_000:
        return dict(SMALL)
    return dict(_MIDDLE if parameters <= 10_000_000_000 else _LARGE)
