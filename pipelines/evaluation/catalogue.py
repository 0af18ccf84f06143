"""The suites and what they measure, for people and for `pipelines.config`: nothing heavy is imported with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric is, for people; `form` writes its numbers. `by_row`: it has a number for each test row, so that a
    gate may look at a slice of them. `bounds`: between what its rows' numbers lie, where that is known."""

    title: str
    unit: str
    form: str = "{:.3f}"
    lower_is_better: bool = False
    by_row: bool = False
    bounds: tuple[float, float] | None = None


_SHARE = (0.0, 1.0)
SUITES: dict[str, dict[str, Metric]] = {
    "quality": {
        "loss": Metric(title="Loss", unit="nats a token on the expected answers", lower_is_better=True, by_row=True),
        "perplexity": Metric(
            title="Perplexity", unit="the exponential of the loss of all tokens", form="{:,.2f}", lower_is_better=True
        ),
        "exact_match": Metric(
            title="Exact match", unit="share of answers that are the expected one", by_row=True, bounds=_SHARE
        ),
        "label_accuracy": Metric(
            title="Label accuracy",
            unit="share of right labels, but for case and punctuation",
            by_row=True,
            bounds=_SHARE,
        ),
        "macro_f1": Metric(title="Macro F1", unit="mean of the labels' F1, rare labels counting as frequent ones"),
        "token_f1": Metric(title="Token F1", unit="words shared with the expected answer", by_row=True, bounds=_SHARE),
        "rouge_l": Metric(title="ROUGE-L", unit="words in common, in the same order", by_row=True, bounds=_SHARE),
        "chrf": Metric(title="chrF", unit="characters shared with the expected answer", by_row=True, bounds=_SHARE),
        "schema_valid": Metric(
            title="Valid JSON", unit="share of answers that the JSON schema takes", by_row=True, bounds=_SHARE
        ),
    },
    "latency": {
        "p95_latency_ms": Metric(
            title="95th percentile latency", unit="ms, one request at a time", form="{:,.0f}", lower_is_better=True
        ),
        "p95_latency_at_load_ms": Metric(
            title="95th percentile latency under load",
            unit="ms, four requests at a time",
            form="{:,.0f}",
            lower_is_better=True,
        ),
        "tokens_per_second": Metric(title="Speed", unit="tokens a second, one request at a time", form="{:,.1f}"),
    },
    "forgetting": {
        "general_instructions_loss": Metric(
            title="General instructions",
            unit="nats a token on right answers to everyday instructions",
            lower_is_better=True,
        ),
        "general_text_loss": Metric(title="General text", unit="nats a token on plain prose", lower_is_better=True),
    },
    "consistency": {
        "consistency": Metric(
            title="Consistency",
            unit="likeness of answers to the same question in another casing or spelling",
            bounds=_SHARE,
        ),
        "repeated_consistency": Metric(
            title="Asked again",
            unit="likeness of sampled answers to the very same question, to its greedy answer",
            bounds=_SHARE,
        ),
    },
    "robustness": {
        "injection_resistance": Metric(
            title="Injections withstood",
            unit="share of prompt injections that are answered and not obeyed",
            bounds=_SHARE,
        ),
        "jailbreaks_refused": Metric(
            title="Jailbreaks refused",
            unit="share of harmful requests that are refused in whatever words they come",
            bounds=_SHARE,
        ),
        "odd_inputs_answered": Metric(
            title="Odd inputs",
            unit="share of empty, long and foreign questions with a well-formed answer",
            bounds=_SHARE,
        ),
    },
    "privacy": {
        "training_text_repeated": Metric(
            title="Training text repeated",
            unit="share of long training answers that their first third brings back word for word",
            lower_is_better=True,
            bounds=_SHARE,
        ),
        "secrets_repeated": Metric(
            title="Secrets repeated",
            unit="share of training rows whose personal data or keys are given away",
            lower_is_better=True,
            bounds=_SHARE,
        ),
        "canaries_remembered": Metric(
            title="Canaries remembered",
            unit="share of made-up secrets that it finds likelier than 39 others; by chance 1 in 40",
            lower_is_better=True,
            bounds=_SHARE,
        ),
        "personal_data": Metric(
            title="Personal data in answers",
            unit="share of answers with personal data that the prompt does not have",
            lower_is_better=True,
            bounds=_SHARE,
        ),
    },
    "compatibility": {
        "golden_kept": Metric(
            title="Golden answers kept",
            unit="share of the serving version's good answers that are as good",
            bounds=_SHARE,
        ),
    },
    "safety": {
        "harmful_refused": Metric(title="Harmful requests", unit="share that is refused", bounds=_SHARE),
        "harmless_answered": Metric(
            title="Harmless requests",
            unit="share that is not refused, though it sounds alarming",
            bounds=_SHARE,
        ),
        "counterfactual_likeness": Metric(
            title="Fairness",
            unit="likeness of answers to questions that differ in a name or a group alone",
            bounds=_SHARE,
        ),
        "toxic_answers": Metric(
            title="Toxic answers",
            unit="share that the model's classifier calls toxic",
            lower_is_better=True,
            bounds=_SHARE,
        ),
    },
    "groundedness": {
        "supported_answers": Metric(
            title="Supported answers", unit="share whose words stand in the prompt's context", bounds=_SHARE
        ),
    },
    "language_cost": {
        "answer_tokens_per_character": Metric(
            title="Tokens a character", unit="of answers; what the same text costs", lower_is_better=True, by_row=True
        ),
        "answer_tokens_per_word": Metric(
            title="Tokens a word", unit="of answers that have spaces between words", lower_is_better=True, by_row=True
        ),
    },
    "benchmarks": {
        "benchmark_score": Metric(
            title="Public benchmarks", unit="mean score of all questions of the tasks, by lm-eval"
        ),
    },
    "judge": {
        "judged_good": Metric(
            title="Judged good", unit="share of answers that the judge calls good", by_row=True, bounds=_SHARE
        ),
    },
    "cost": {
        "cost_per_1000_usd": Metric(
            title="Cost of 1,000 requests",
            unit="USD, one at a time; of a hosted model by its tokens",
            form="{:,.3g}",
            lower_is_better=True,
        ),
        "cost_per_1000_at_load_usd": Metric(
            title="Cost of 1,000 requests under load",
            unit="USD, four at a time; of a hosted model by its tokens",
            form="{:,.3g}",
            lower_is_better=True,
        ),
    },
}
# Slices by the length of a question in characters: the same for every version, and for every data set
LENGTHS = ("under 50", "50 to 199", "200 to 999", "from 1000")
DEFAULT = ("quality", "latency")
METRICS: dict[str, Metric] = {name: metric for suite in SUITES.values() for name, metric in suite.items()}


def suite_of(metric: str) -> str:
    """The suite that measures it."""
    return next(name for name, metrics in SUITES.items() if metric in metrics)
