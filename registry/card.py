"""The model card, made only from what was measured: Markdown with Hugging Face's front matter."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from registry.bundle import ENVIRONMENT, Manifest
from registry.gates import Decision

_HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
_ON_THE_HUB = {"builtin:smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_COLUMNS = {
    "": "metric",
    "candidate": "this version",
    "base": "base",
    "vs_base": "against the base",
    "champion": "champion then",
    "vs_champion": "against the champion",
    "hosted": "hosted",
    "vs_hosted": "against the hosted",
}


def render(
    manifest: Manifest, evaluation: Mapping[str, Any] | None, decision: Decision | None,
    sources: Sequence[Mapping[str, Any]] = (),
) -> str:  # fmt: skip
    """README.md of a bundle; `sources` are those of its data set. The same input gives the same text: no times, no
    version number."""
    lines = [
        _front_matter(manifest, evaluation),
        f"# {manifest.model}",
        "",
        _what(manifest),
        "",
    ]
    if manifest.prompt.system:
        lines += ["System prompt:", "", *("    " + line for line in manifest.prompt.system.splitlines()), ""]
    lines += ["## Evaluation", "", *_evaluation(evaluation), ""]
    if decision is not None:
        lines += [f"Gate: **{decision.decision}**", "", *(f"- {_inline(reason)}" for reason in decision.reasons), ""]
    lines += ["## Lineage", "", *_lineage(manifest, sources), ""]
    return "\n".join(lines)


def _what(manifest: Manifest) -> str:
    base = f"{_inline(manifest.base.id)} (revision `{_inline(manifest.base.revision)}`, {manifest.base.dtype})"
    if manifest.hosted is not None:
        asked = ", then ".join(
            f"`{_inline(each.model)}` at {_inline(each.upstream)}" for each in manifest.hosted.models
        )
        return f"Answered by {asked}; judged beside {base}."
    return base + (
        f" with a `{_inline(manifest.method)}` adapter." if manifest.method != "prompt" else " with a prompt."
    )


def _front_matter(manifest: Manifest, evaluation: Mapping[str, Any] | None) -> str:
    from ruamel.yaml import YAML

    results = [
        {"type": name, "value": measured["candidate"]["estimate"], "name": name}
        for name, measured in (evaluation or {"metrics": {}})["metrics"].items()
        if measured.get("candidate") and measured["candidate"]["estimate"] is not None
    ]
    named = _ON_THE_HUB.get(manifest.base.id, manifest.base.id)
    # The hub takes no other name: a folder's, say
    content: dict[str, Any] = {"base_model": named} if re.fullmatch(_HUB_ID, named) and not manifest.hosted else {}
    content["tags"] = ["tunesmith", manifest.method]
    if manifest.has_adapter or manifest.method not in ("prompt", "hosted"):
        content["library_name"] = "peft"
    content["pipeline_tag"] = "text-generation"
    if results:
        dataset = {"name": manifest.dataset or "own rows", "type": "private"}
        task = {"type": "text-generation"}
        content["model-index"] = [
            {"name": manifest.model, "results": [{"task": task, "dataset": dataset, "metrics": results}]}
        ]
    text = io.StringIO()
    yaml = YAML()
    yaml.width = 10_000
    yaml.dump(content, text)
    return f"---\n{text.getvalue()}---\n"


def _evaluation(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["Not evaluated."]
    compared = any(measured.get("hosted") for measured in evaluation["metrics"].values())
    keys = [key for key in _COLUMNS if compared or "hosted" not in key]
    lines = [
        f"On {evaluation['rows']} test rows that no tuning saw; 95 % confidence intervals.",
        "",
        "| " + " | ".join(_COLUMNS[key] for key in keys) + " |",
        "| " + " | ".join("---" for _ in keys) + " |",
    ]
    for name, measured in evaluation["metrics"].items():
        cells = [measured.get(key) for key in keys[1:]]
        lines.append(f"| {_inline(name)} | " + " | ".join(_estimate(cell) for cell in cells) + " |")
    return lines + [line for text in notes(evaluation) for line in ("", _inline(text))]


def notes(evaluation: Mapping[str, Any], called: Callable[[str], str] = str) -> list[str]:
    """What goes with an evaluation's figures, in sentences: what is unavailable, what suites have to say, and how far
    scorers that stand for people agree with them. `called` gives a metric's name."""
    said = [f"{called(name)} is unavailable: {why}." for name, why in evaluation.get("unavailable", {}).items()]
    for about in evaluation.get("about", {}).values():
        said += about.get("notes", [])
        for name, scorer in about.get("scorers", {}).items():
            kappa = f"kappa {scorer['kappa']:.2f}"
            if "kappa_low" in scorer:
                kappa += f" [{scorer['kappa_low']:.2f}, {scorer['kappa_high']:.2f}]"
            said.append(
                f"{name}: told by {scorer.get('by', 'words')}, which agrees with "
                f"{scorer.get('labelled_by', 'people')} on {100 * scorer['agreement']:.0f} % of {scorer['n']} "
                f"{'held-out ' if scorer.get('held_out') else ''}labelled answers ({kappa}, {scorer['set']})."
            )
    return said


def _estimate(value: Mapping[str, Any] | None) -> str:
    if value is None or value["estimate"] is None:
        return "-"
    low, high = ("?" if end is None else f"{end:.4g}" for end in (value["low"], value["high"]))
    return f"{value['estimate']:.4g} [{low}, {high}]"


def _lineage(manifest: Manifest, sources: Sequence[Mapping[str, Any]]) -> list[str]:
    facts: dict[str, object] = {
        "Base": manifest.base.digest,
        "Tokeniser": manifest.base.tokenizer_digest,
        "Chat template": manifest.base.template_digest,
        "Data set": manifest.dataset,
        "Study": manifest.study,
        "Trial": manifest.trial,
        "Code": manifest.code_version,
        "Environment": f"{ENVIRONMENT} in this folder",
    }
    lines = [f"- {name}: `{_inline(str(value))}`" for name, value in facts.items() if value is not None]
    for source in sources:
        licence = source.get("licence") or "licence not stated"
        lines.append(f"- Source: `{_inline(str(source['path']))}` (`{source['digest']}`), {_inline(str(licence))}")
    return lines + [f"- {_inline(name)}: `{_inline(str(value))}`" for name, value in sorted(manifest.params.items())]


def _inline(text: str) -> str:
    """Text that cannot break out of its line, its table cell or into HTML."""
    flat = re.sub(r"\s+", " ", text)
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'")
