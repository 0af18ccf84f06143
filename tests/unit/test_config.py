from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from infra.errors import ConfigError
from pipelines import config as configs
from pipelines.config import PipelineConfig, check, load

EXAMPLES = Path(configs.__file__).parent / "examples"
ROW = '{"prompt": "Where is my parcel %d?", "completion": "order_status"}\n'


def write(folder: Path, text: str, *, rows: int = 60) -> Path:
    (folder / "train.jsonl").write_text("".join(ROW % number for number in range(rows)))
    path = folder / "pipeline.yaml"
    path.write_text(text)
    return path


def minimal(folder: Path, more: str = "") -> Path:
    return write(folder, f"model: support\nbase: builtin:tiny\ndata: {{train: train.jsonl}}\n{more}")


def problems(error: pytest.ExceptionInfo[ConfigError]) -> list[tuple[int, str, str]]:
    return [(p["line"], p["field"], p["message"]) for p in error.value.details["problems"]]


def test_three_keys_are_a_pipeline(tmp_path: Path) -> None:
    config = load(minimal(tmp_path))
    assert config.data.train == (tmp_path / "train.jsonl",)
    assert (config.tuning.trials, config.evaluation.suites) == (16, ("quality", "latency"))
    assert [gate.metric for gate in config.gates] == ["loss", "loss"]
    assert check(config)["files"][0] == {
        "path": str(tmp_path / "train.jsonl"),
        "split": "train",
        "form": "prompt/completion",
        "rows_read": 50,
        "rows_bad": 0,
    }


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_validates_and_opens_with_its_command(example: Path) -> None:
    assert example.read_text().startswith(f"# tunesmith run -c {example.name}\n")
    config = load(example)
    assert PipelineConfig.model_validate(config.jsonable()).jsonable() == config.jsonable()


def test_the_full_example_names_every_setting() -> None:
    text = (EXAMPLES / "support.yaml").read_text()

    def names(values: object) -> set[str]:
        if isinstance(values, dict):
            return set(values).union(*(names(v) for v in values.values()))
        return set().union(*(names(v) for v in values)) if isinstance(values, list) else set()

    assert [name for name in names(load(EXAMPLES / "support.yaml").jsonable()) if f"{name}:" not in text] == []


def test_yaml_numbers_and_labels_are_those_of_1_2(tmp_path: Path) -> None:
    config = load(
        minimal(
            tmp_path,
            "tuning: {budget: {max_tokens: 2e6}, space: {learning_rate: {low: 1e-5, high: 1e-2, log: true}}}\n"
            "prompt: {system: yes}\nretrain: {on: drift, cooldown: 1h30m}\n",
        )
    )
    assert config.tuning.budget.max_tokens == 2_000_000
    assert config.tuning.space.learning_rate == {"low": 1e-5, "high": 1e-2, "log": True}
    assert config.prompt.system == "yes"
    assert config.retrain is not None
    assert config.retrain.cooldown == timedelta(minutes=90)
    assert config.jsonable()["retrain"]["cooldown"] == "90m"


def test_every_problem_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """model: Support Intents
base: {path: builtin:tinny, revison: main}
data:
  train: train.parquet
  train: train.jsonl
  quality: {dedup: fuzzy, max_tokens: many}
tunning: {}
tuning:
  trials: 0
  space: {r: [4, 4], learning_rate: {low: 1e-2, high: 1e-5}, lora_dropot: 0.1}
evaluation: {suites: [quality, forgetting]}
gates:
  - {metric: exact, against: champion, must: not_worse}
  - {metric: loss, must: at_most}
promote: yes
retrain: {cooldown: 24}
""",
    )
    with pytest.raises(ConfigError) as error:
        load(path, ["tuning.workers=two", "nonsense", "gates.9.margin=1"])
    found = problems(error)
    assert [(line, field) for line, field, _ in found] == [
        (0, ""),
        (0, ""),
        (0, "tuning.workers"),
        (1, "model"),
        (2, "base.path"),
        (2, "base.revison"),
        (4, "data.train[0]"),
        (5, "data.train"),
        (6, "data.quality.dedup"),
        (6, "data.quality.max_tokens"),
        (7, "tunning"),
        (9, "tuning.trials"),
        (10, "tuning.space.r"),
        (10, "tuning.space.learning_rate"),
        (10, "tuning.space.lora_dropot"),
        (11, "evaluation.suites"),
        (13, "gates[0].metric"),
        (14, "gates[1]"),
        (15, "promote"),
        (16, "retrain.cooldown"),
    ]
    said = {field: message for _, field, message in found}
    assert said["base.revison"] == "is not a known key; did you mean 'revision'?"
    assert said["tunning"] == "is not a known key; did you mean 'tuning'?"
    assert said["data.train"] == "stands twice, first in line 4; keep one of them"
    assert said["evaluation.suites"] == "the suite 'forgetting' is not built yet; use quality, latency"
    assert said["tuning.workers"] == "must be a whole number, not 'two'"
    assert f"  {path}:9: tuning.trials: must be greater than or equal to 1, not 0" in error.value.message
    assert "  --set nonsense: is not of the form name=value" in error.value.message


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("model: a: b\n", 1, "mapping values are not allowed"),
        ("model: x\ndata: [1, 2\nbase: y\n", 3, "expected ',' or ']'"),
        ("model: x\ndata:\n\t- y\n", 3, "cannot start any token"),
        ("- just\n- a list\n", 1, "holds no settings"),
        ("", 1, "holds no settings"),
        ("model: \x00\n", 0, "not YAML"),
    ],
)
def test_syntax_errors_have_their_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path, text))
    assert problems(error)[0][0] == line
    assert words in error.value.message


def test_a_file_that_blows_up_or_refers_to_itself_is_refused(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    with pytest.raises(ConfigError, match="too much"):
        load(write(tmp_path, bomb))
    with pytest.raises(ConfigError, match="refers to itself"):
        load(write(tmp_path, "model: &m [*m]\n"))


def test_a_tag_makes_no_object(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(ConfigError):
        load(write(tmp_path, f"model: !!python/object/apply:pathlib.Path.touch ['{target}']\n"))
    assert not target.exists()


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    config = load(
        minimal(tmp_path),
        ["tuning.trials=4", "tuning.space.r=[8, 16]", "gates=[{metric: chrf, must: at_least, value: 5e-1}]"],
    )
    assert (config.tuning.trials, config.tuning.space.r, config.gates[0].value) == (4, [8, 16], 0.5)


def test_missing_and_malformed_files_are_told_at_their_line(tmp_path: Path) -> None:
    path = minimal(tmp_path)
    path.write_text(
        "model: support\nbase: builtin:tiny\ndata:\n  train: [train.jsonl, bad.jsonl]\n  test: gone.jsonl\n"
    )
    with pytest.raises(ConfigError) as error:
        check(load(path))
    assert {(line, field) for line, field, _ in problems(error)} == {(4, "data.train[1]"), (5, "data.test")}
    (tmp_path / "gone.jsonl").write_text(ROW % 1)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt": ')
    with pytest.raises(ConfigError) as error:
        check(load(path))
    assert [message.split(":")[:2] for _, _, message in problems(error)] == [["bad.jsonl", "1"], ["bad.jsonl", "2"]]


def test_the_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one, other = load(minimal(tmp_path / "one")), load(minimal(tmp_path / "other"))
    assert one.fingerprint() == other.fingerprint()
    assert load(minimal(tmp_path / "one"), ["tuning.seed=1"]).fingerprint() != one.fingerprint()
    (tmp_path / "other" / "train.jsonl").write_text(ROW % 7)
    assert other.fingerprint() != one.fingerprint()


def test_reading_a_pipeline_file_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'mlflow', 'prefect', 'optuna', 'numpy', 'scipy', 'datasketch'}"
    example = str(EXAMPLES / "minimal.yaml")
    code = f"import sys, pathlib, pipelines.config as c; c.load(pathlib.Path({example!r}));"
    code += f"print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
