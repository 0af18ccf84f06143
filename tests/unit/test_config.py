from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from infra.errors import ConfigError
from pipelines import config as configs
from pipelines.config import PipelineConfig, check, load
from pipelines.config_space import Space
from registry.rollouts import Plan
from tests.stacks import new_folder

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


def test_the_full_example_names_every_dimension_and_the_defaults_it_claims() -> None:
    space = load(EXAMPLES / "support.yaml").tuning.space
    assert space.model_fields_set == set(Space.model_fields)
    changed = {name for name, value in space.model_dump().items() if value != Space.model_fields[name].default}
    assert changed == {"use_rslora", "lora_alpha"}  # where a comment says the default


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


def test_licences_are_all_files_or_each_ones_by_name(tmp_path: Path) -> None:
    files = "data: {train: [train.jsonl, more.csv], licence: {more.csv: CC0-1.0}}\n"
    train = write(tmp_path, f"model: support\nbase: builtin:tiny\n{files}")
    data = load(train).data
    assert [data.licence_of(path) for path in data.train] == [None, "CC0-1.0"]
    data = load(train, ["data.licence=MIT"]).data
    assert [data.licence_of(path) for path in data.train] == ["MIT", "MIT"]
    with pytest.raises(ConfigError) as error:
        load(train, ["data.licence={mor.csv: MIT}"])
    assert "did you mean 'more.csv'?" in str(error.value)


def test_a_truth_is_no_number(tmp_path: Path) -> None:
    path = minimal(tmp_path, "tuning: {trials: true, warm_start: true, validation_rows: false}\n")
    with pytest.raises(ConfigError) as error:
        load(path)
    assert [(field, message) for _, field, message in problems(error)] == [
        ("tuning.trials", "must be a number, not true"),
        ("tuning.validation_rows", "must be a number, not false"),
    ]


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
evaluation: {suites: [quality, safty]}
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
    assert said["evaluation.suites"] == "'safty' is no suite; did you mean 'safety'?"
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


def test_approvals_are_a_number_or_a_count(tmp_path: Path) -> None:
    text = "model: m\nbase: builtin:tiny\ndata: {train: train.jsonl}\n"
    path = tmp_path / "p.yaml"
    for written, number in (("", 0), ("approvals: 2\n", 2), ("approvals: {count: 3}\n", 3)):
        path.write_text(text + written)
        config = load(path)
        assert config.approvals == number
        assert config.jsonable()["approvals"] == number
    for wrong in ("-1", "{count: two}", "{people: 2}", "yes"):
        path.write_text(f"{text}approvals: {wrong}\n")
        with pytest.raises(ConfigError, match=r"p\.yaml:4: approvals"):
            load(path)


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


@pytest.mark.parametrize(
    ("space", "field", "message"),
    [
        ("use_dora: 1", "use_dora", "1 is not known; there are false, true"),
        ("use_rslora: yes", "use_rslora", "'yes' is not known; there are false, true"),
        ("init_lora_weights: [true, Pissa]", "init_lora_weights", "'Pissa' is not known; did you mean 'pissa'?"),
        (
            "layers_to_transform: [20, 21]",
            "layers_to_transform",
            "20 is not known; there are all, top_half; single layers are a list of their own: [[20, 21]]",
        ),
        (
            "layers_to_transform: [[-1]]",
            "layers_to_transform",
            "[-1] is not a list of layer numbers, which count from 0",
        ),
        ("gradient_accumulation_steps: 0", "gradient_accumulation_steps", "must be from 1 to 1024, not 0"),
        ("use_dora: {low: 0, high: 1}", "use_dora", "cannot be a range; give a list of choices"),
        (
            "use_rslora: [true, false], r: {when: {use_rslora: true}, then: [8]}",
            "r",
            "has no else; a condition is {when: {use_rslora: true}, then: [8, 16], else: [16, 32]}",
        ),
        (
            "use_rslora: [true, false], r: {when: {use_rslora: true}, then: 8, otherwise: 4}",
            "r",
            "has the unknown key 'otherwise'; a condition is {when: {use_rslora: true}, then: [8, 16], else: [16, 32]}",
        ),
        (
            "r: {when: {use_rslora: true, use_dora: true}, then: 8, else: 4}",
            "r",
            "when must name one other dimension and one of its choices; a condition is {when: {use_rslora: true}, "
            "then: [8, 16], else: [16, 32]}",
        ),
        (
            "r: {when: {use_rslor: true}, then: 8, else: 4}",
            "r",
            "when: 'use_rslor' is not a dimension; did you mean 'use_rslora'?",
        ),
        ("r: {when: {r: 8}, then: 8, else: 4}", "r", "depends on itself; name another dimension in when"),
        (
            "use_dora: [true, false], r: {when: {use_dora: 1}, then: 8, else: 4}",
            "r",
            "when: 1 is not known; there are false, true",
        ),
        (
            "use_dora: [true, false], r: {when: {use_dora: true}, then: [8, 0], else: 4}",
            "r",
            "then: must be from 1 to 256, not 0",
        ),
        (
            "use_dora: [true, false], r: {when: {use_dora: true}, then: 8, else: {when: {}}}",
            "r",
            "else holds another condition; conditions are one level deep",
        ),
        (
            "r: {when: {use_rslora: true}, then: 8, else: 4}",
            "r",
            "depends on use_rslora, which is left out; add use_rslora with its choices to the space",
        ),
        (
            "use_rslora: false, r: {when: {use_rslora: true}, then: 8, else: 4}",
            "r",
            "use_rslora is never true here; add it to use_rslora, or name one of its choices",
        ),
        (
            "lora_alpha: {low: 8, high: 32}, r: {when: {lora_alpha: 8}, then: 8, else: 4}",
            "r",
            "depends on lora_alpha, which is a range; give lora_alpha a list of choices",
        ),
        (
            "use_rslora: [true, false], lora_alpha: {when: {use_rslora: true}, then: 8, else: 16}, "
            "r: {when: {lora_alpha: 8}, then: 8, else: 4}",
            "r",
            "depends on lora_alpha, which has a condition itself; name a dimension without one",
        ),
        (
            "use_dora: true, init_lora_weights: pissa",
            "init_lora_weights",
            "init_lora_weights: pissa does not go with use_dora: true, since PEFT saves no plain adapter of both; "
            "take one of the two out, or make one depend on the other",
        ),
        (
            "use_dora: true, init_lora_weights: [true, pissa]",
            "init_lora_weights",
            "pissa is never drawn: init_lora_weights: pissa does not go with use_dora: true, since PEFT saves no plain "
            "adapter of both; take one of the two out",
        ),
        (
            "init_lora_weights: [true, pissa], lora_dropout: [0.05, 0.1]",
            "lora_dropout",
            "init_lora_weights: pissa needs lora_dropout: 0, since dropout would drop parts of the base itself; "
            "take one of the two out, or make one depend on the other",
        ),
        (
            "init_lora_weights: pissa, lora_dropout: {low: 0, high: 0.1}",
            "lora_dropout",
            "0.1 is never drawn: init_lora_weights: pissa needs lora_dropout: 0, since dropout would drop parts of the "
            "base itself; take one of the two out",
        ),
        (
            "r: [64, 192], init_lora_weights: pissa",
            "init_lora_weights",
            "init_lora_weights: pissa needs r of 128 at most, since it is saved as LoRA of twice r; "
            "take one of the two out, or make one depend on the other",
        ),
    ],
)
def test_a_space_that_cannot_be_searched_is_told_at_its_dimension(
    tmp_path: Path, space: str, field: str, message: str
) -> None:
    path = minimal(tmp_path, f"tuning:\n  space:\n    {{{space}}}\n".replace(f", {field}:", f",\n    {field}:"))
    with pytest.raises(ConfigError) as error:
        load(path)
    [(line, found, said)] = problems(error)
    assert (found, said) == (f"tuning.space.{field}", message)
    assert path.read_text().splitlines()[line - 1].lstrip(" {").startswith(f"{field}:")


def test_a_file_remembers_which_dimensions_it_left_out(tmp_path: Path) -> None:
    config = load(minimal(tmp_path, "tuning: {space: {r: [4, 8]}}\n"))
    assert config.jsonable()["tuning"]["space"] == {"r": [4, 8]}
    again = PipelineConfig.model_validate(config.jsonable()).tuning.space
    assert again.model_fields_set == {"r"}
    assert again.full(7_000_000_000)["target_modules"] == "all-linear"


def test_objectives_are_named_and_begin_with_loss(tmp_path: Path) -> None:
    assert load(minimal(tmp_path)).tuning.objectives == ("loss",)
    more = "tuning: {objectives: [loss, adapter_parameters], pick: {within: 2e-2, then: adapter_parameters}, "
    tuning = load(minimal(tmp_path, more + "constraints: {training_seconds: {at_most: 600}}}\n")).tuning
    assert tuning.pick is not None
    assert (tuning.pick.within, tuning.constraints["training_seconds"].at_most) == (0.02, 600)
    path = write(
        tmp_path,
        """model: support
base: builtin:tiny
data: {train: train.jsonl}
tuning:
  objectives: [adapter_parameters, loss]
  constraints:
    adapter_parameter: {at_most: 5e6}
    training_tokens: {at_least: 5}
  pick: {within: 2, then: loss}
""",
    )
    with pytest.raises(ConfigError) as error:
        load(path)
    said = {field: (line, message) for line, field, message in problems(error)}
    assert said == {
        "tuning.objectives": (5, "must begin with loss, by which trials are drawn and stopped; add it in front"),
        "tuning.constraints.training_tokens.at_most": (8, "is missing; add it"),
        "tuning.constraints.training_tokens.at_least": (8, "is not a known key; did you mean 'at_most'?"),
        "tuning.pick.within": (9, "must be less than or equal to 1, not 2"),
    }
    with pytest.raises(ConfigError) as error:
        load(path, ["tuning.objectives=latency", "tuning.pick.within=0", "tuning.constraints.training_tokens=null"])
    assert "'latency' is no objective" in error.value.message
    ok = ["tuning.objectives=[loss, training_tokens]", "tuning.pick.within=0"]
    with pytest.raises(ConfigError) as error:
        load(path, [*ok, "tuning.constraints={adapter_parameter: {at_most: 5e6}}"])
    assert problems(error)[0][1:] == (
        "tuning.constraints.adapter_parameter",
        "is no measure; did you mean 'adapter_parameters'?",
    )
    with pytest.raises(ConfigError) as error:
        load(path, [*ok, "tuning.constraints={}"])
    assert problems(error) == [(9, "tuning.pick", "then: 'loss' is not an objective beside loss; use training_tokens")]


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


@pytest.fixture
def open_folder() -> Iterator[Path]:
    folder = new_folder()
    yield folder
    shutil.rmtree(folder)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """As root every file can be read."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_files_that_may_not_be_read_are_told_in_a_sentence(open_folder: Path) -> None:
    path = minimal(open_folder)
    path.write_text(
        "model: support\nbase: builtin:tiny\ndata:\n"
        "  train: [train.jsonl, mine.jsonl, closed/train.jsonl]\n  validation: all.jsonl\n  test: train.jsonl/x.csv\n"
    )
    (open_folder / "mine.jsonl").write_text(ROW % 1)
    (open_folder / "mine.jsonl").chmod(0)
    (open_folder / "all.jsonl").mkdir()
    (open_folder / "closed").mkdir()
    (open_folder / "closed" / "train.jsonl").write_text(ROW % 1)
    (open_folder / "closed").chmod(0)
    config = load(path)
    try:
        for use in (configs.check_files, PipelineConfig.fingerprint):
            with ordinary_user(), pytest.raises(ConfigError) as error:
                use(config)
            told = {field: (line, message) for line, field, message in problems(error)}
            closed = "cannot be read (Permission denied); let this user read it and its folders"
            assert told == {
                "data.train[1]": (4, f"{open_folder / 'mine.jsonl'} {closed}"),
                "data.train[2]": (4, f"{open_folder / 'closed/train.jsonl'} {closed}"),
                "data.validation": (5, f"{open_folder / 'all.jsonl'} is not a file; give a JSONL or CSV file"),
                "data.test": (
                    6, f"there is no file {open_folder / 'train.jsonl/x.csv'}; mend the path, or make the file"
                ),
            }  # fmt: skip
    finally:
        (open_folder / "closed").chmod(0o755)


def test_the_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one, other = load(minimal(tmp_path / "one")), load(minimal(tmp_path / "other"))
    assert one.fingerprint() == other.fingerprint()
    assert load(minimal(tmp_path / "one"), ["tuning.seed=1"]).fingerprint() != one.fingerprint()
    (tmp_path / "other" / "train.jsonl").write_text(ROW % 7)
    assert other.fingerprint() != one.fingerprint()


def test_a_rollout_is_read_as_people_write_shares(tmp_path: Path) -> None:
    given = ["promote=canary", "rollout={steps: [5%, 0.25, 100%], min_requests: 30, min_time: 5m, max_time: 2d}"]
    config = load(minimal(tmp_path), given)
    assert config.rollout.plan() == Plan(steps=(0.05, 0.25, 1.0), min_requests=30, min_minutes=5, max_hours=48)
    assert load(minimal(tmp_path)).rollout.plan() == Plan()
    for wrong, words in (
        ("{steps: [50%, 5%]}", "rise"),
        ("{steps: [5]}", "rise"),
        ("{steps: [ten]}", "is not a share"),
        ("{steps: [true]}", "is no share"),
        ("{steps: []}", "rise"),
        ("{min_requests: 0}", "at least one request"),
        ("{min_time: 2d}", "at least its minutes within its hours"),
        ("{alpha: 0.9}", "alpha"),
    ):
        with pytest.raises(ConfigError, match=words):
            load(minimal(tmp_path), [f"rollout={wrong}"])


def test_reading_a_pipeline_file_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'mlflow', 'prefect', 'optuna', 'numpy', 'scipy', 'datasketch'}"
    example = str(EXAMPLES / "minimal.yaml")
    code = f"import sys, pathlib, pipelines.config as c; c.load(pathlib.Path({example!r}));"
    code += f"print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("evaluation: {required: [privacy]}", r"evaluation\.required: privacy does not run; add it to suites"),
        ("evaluation: {required: [privcy]}", r"evaluation\.required: 'privcy' is no suite; did you mean 'privacy'"),
        ("gates: [{metric: contamination, must: better, against: base}]", "contamination is a number of rows"),
        ("gates: [{metric: contamination, must: at_most}]", "at_most needs a limit"),
    ],
)
def test_what_a_policy_demands_must_make_sense(tmp_path: Path, more: str, words: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f"model: m\nbase: builtin:tiny\ndata: {{train: train.jsonl}}\n{more}\n")
    with pytest.raises(ConfigError, match=words):
        load(path)
    right = "evaluation: {suites: [quality, privacy], required: [privacy]}\n"
    path.write_text(f"model: m\nbase: builtin:tiny\ndata: {{train: train.jsonl}}\n{right}")
    assert load(path).evaluation.required == ("privacy",)


def test_a_judge_and_a_hosted_model_are_addresses_and_never_keys(tmp_path: Path) -> None:
    secret = "sk-1234567890abcdef"
    (tmp_path / "labelled.jsonl").write_text('{"question": "q", "answer": "a", "good": true}\n')
    judge = f"""
  judge:
    url: https://me:{secret}@api.example.org/v1
    model: big
    key_env: {secret}
    labelled: labelled.jsonl
    prompt: "Is {{answer}} good?"
    options: {{model: other}}
"""
    path = minimal(tmp_path, f"evaluation:\n  suites: [quality, judge]{judge}")
    with pytest.raises(ConfigError) as error:
        load(path)
    assert [field for _, field, _ in problems(error)] == [
        "evaluation.judge.url",
        "evaluation.judge.key_env",
        "evaluation.judge.prompt",
        "evaluation.judge.options",
    ]
    assert secret not in str(error.value)
    assert secret not in str(error.value.as_json())

    config = load(
        path,
        [
            "evaluation.judge.url=http://127.0.0.1:8080/v1/chat/completions",
            "evaluation.judge.key_env=JUDGE_KEY",
            "evaluation.judge.prompt=null",
            "evaluation.judge.options={temperature: null}",
            "evaluation.hosted={url: https://api.example.org/v1/, model: big, price: {input_per_million_usd: 2, "
            "output_per_million_usd: 8}}",
        ],
    )
    assert config.evaluation.judge is not None
    assert config.evaluation.judge.url == "http://127.0.0.1:8080/v1"
    assert config.evaluation.judge.labelled == tmp_path / "labelled.jsonl"
    assert config.evaluation.hosted is not None
    assert config.evaluation.hosted.url == "https://api.example.org/v1"
    assert config.evaluation.hosted.price is not None
    assert config.evaluation.hosted.price.tokens.cost_usd(1_000_000, 500_000, 0.0) == pytest.approx(6)
    assert PipelineConfig.model_validate(config.jsonable()).jsonable() == config.jsonable()
    with pytest.raises(ConfigError, match="needs good and bad answers"):
        check(config)
    before = config.fingerprint()
    (tmp_path / "labelled.jsonl").write_text('{"question": "q", "answer": "b", "good": false}\n')
    assert config.fingerprint() != before
    (tmp_path / "labelled.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"evaluation\.judge\.labelled: there is no file"):
        check(config)
    with pytest.raises(ConfigError, match=r"evaluation\.judge: is asked by the suite judge; add it to suites"):
        load(path, ["evaluation={suites: [quality], judge: {model: big}}"])


def test_a_prompt_needs_a_prompt_and_no_search(tmp_path: Path) -> None:
    path = minimal(tmp_path, "tuning: {method: prompt, trials: 3}\nretrain: {on: drift}\n")
    with pytest.raises(ConfigError) as error:
        load(path)
    assert sorted(message for _, _, message in problems(error)) == [
        "method: prompt is the base with a prompt; add system: and the prompt",
        "method: prompt trains nothing; leave retrain out",
        "method: prompt trains nothing; leave tuning.trials out",
    ]
    assert load(minimal(tmp_path, "tuning: {method: prompt}\nprompt: {system: Be brief.}\n")).tuning.method == "prompt"


def test_a_hosted_version_names_upstreams_and_trains_nothing(tmp_path: Path) -> None:
    models = "hosted: {models: [{upstream: openai, model: big, options: {max_tokens: null}}], price: {%s}}\n"
    price = "input_per_million_usd: 1, output_per_million_usd: 2"
    gates = "gates: [{metric: token_f1, must: at_least, value: 0.1}]\n"
    config = load(minimal(tmp_path, models % price + gates))
    assert (config.method, config.trains) == ("hosted", False)
    assert config.hosted is not None
    assert config.hosted.models[0].options == {"max_tokens": None}
    assert PipelineConfig.model_validate(config.jsonable()).jsonable() == config.jsonable()
    with pytest.raises(ConfigError) as error:
        load(minimal(tmp_path, models % price + "tuning: {trials: 3}\nretrain: {on: drift}\n"))
    assert sorted(message for _, _, message in problems(error)) == [
        "a hosted model has no loss; gate on another metric, as token_f1",
        "a hosted model has no loss; gate on another metric, as token_f1",
        "a hosted model trains nothing; leave retrain out",
        "a hosted model trains nothing; leave tuning.trials out",
    ]
    for wrong, said in (
        ("hosted: {models: []}\n", "must have at least one entry"),
        ("hosted: {models: [{upstream: Open AI, model: big}]}\n", "upstream"),
        ("hosted: {models: [{upstream: a, model: big, options: {messages: []}}]}\n", "cannot set messages"),
        ("hosted: {models: [{upstream: a, model: big, url: 'https://x.org'}]}\n", "is not a known key"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(minimal(tmp_path, wrong + gates))


def test_the_judged_example_names_every_setting_of_an_address() -> None:
    config = load(EXAMPLES / "judged.yaml")
    text = (EXAMPLES / "judged.yaml").read_text()
    for section in (config.evaluation.judge, config.evaluation.hosted):
        assert section is not None
        assert [name for name in type(section).model_fields if f"{name}:" not in text] == []


def test_a_json_schema_comes_from_a_file_or_stands_in_the_pipeline_file(tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["intent"]}
    (tmp_path / "answer.json").write_text('{"type": "object", "required": ["intent"]}')
    named = load(minimal(tmp_path, "evaluation: {schema: answer.json}\n"))
    inline = load(minimal(tmp_path, "evaluation: {schema: {type: object, required: [intent]}}\n"))
    assert named.evaluation.answer_schema == inline.evaluation.answer_schema == schema
    assert named.fingerprint() == inline.fingerprint()
    assert named.jsonable()["evaluation"]["schema"] == schema
    assert PipelineConfig.model_validate(named.jsonable()).evaluation == named.evaluation
    (tmp_path / "broken.json").write_text("{")
    for wrong, said in (
        ("{type: objekt}", "is no JSON Schema: $.type"),
        ("{$ref: 'https://example.org/s.json'}", "refers to https://example.org/s.json, and nothing is fetched"),
        ("{$ref: '#/$defs/label'}", "refers to #/$defs/label, which is not in it"),
        ("{pattern: '['}", "is no JSON Schema: $.pattern"),
        ("missing.json", "cannot be read"),
        ("broken.json", "is not JSON"),
        ("[a]", "must be a JSON Schema"),
        ("{}, shema: 1", "is not a known key; did you mean 'schema'?"),
    ):
        with pytest.raises(ConfigError) as error:
            load(minimal(tmp_path, f"evaluation: {{schema: {wrong}}}\n"))
        [(line, field, message)] = problems(error)
        assert (line, field.rpartition(".")[0]) == (4, "evaluation")
        assert said in message


def test_a_gate_on_what_nobody_can_measure_is_a_problem_of_the_file(tmp_path: Path) -> None:
    suites = "suites: [quality, safety, judge, benchmarks]"
    for metric, setting in (
        ("judged_good", "judge"), ("schema_valid", "schema"), ("benchmark_score", "benchmarks"),
        ("toxic_answers", "toxicity"),
    ):  # fmt: skip
        gate = f"gates: [{{metric: {metric}, must: at_most, value: 0.1}}]\n"
        with pytest.raises(ConfigError) as error:
            load(minimal(tmp_path, f"evaluation: {{{suites}}}\n{gate}"))
        assert f"{metric} cannot be measured without evaluation.{setting}" in problems(error)[0][2]
    with pytest.raises(ConfigError) as error:
        load(minimal(tmp_path, f"evaluation: {{{suites}, toxicity: {{model: nowhere}}}}\n{gate}"))
    assert problems(error)[0][:2] == (4, "evaluation.toxicity.model")
    (tmp_path / "classifier").mkdir()
    found = load(minimal(tmp_path, f"evaluation: {{{suites}, toxicity: {{model: classifier}}}}\n{gate}"))
    assert found.evaluation.toxicity is not None
    assert found.evaluation.toxicity.model == tmp_path / "classifier"
    (tmp_path / "classifier").rmdir()  # what a run wrote down can be read when the folder is gone
    assert PipelineConfig.model_validate(found.jsonable()).evaluation == found.evaluation


def test_gates_look_at_slices_that_there_are(tmp_path: Path) -> None:
    def gate(slice: str, metric: str = "label_accuracy") -> Path:
        return minimal(tmp_path, f"gates: [{{metric: {metric}, must: at_least, value: 0.1, slice: '{slice}'}}]\n")

    for known in ("source=feedback", "label=refund", "language=German", "length=under 50"):
        assert load(gate(known)).gates[0].slice == known
    for wrong in ("source=test", "length=short", "label=", "refund"):
        with pytest.raises(ConfigError, match=r"is no (slice|length)"):
            load(gate(wrong))
    with pytest.raises(ConfigError, match="measured over all rows"):
        load(gate("label=refund", "macro_f1"))


def test_when_a_golden_set_is_asked_again_is_a_cron_expression(tmp_path: Path) -> None:
    config = load(minimal(tmp_path, 'monitoring: {rescore: "0 3 * * *"}\n'))
    assert config.monitoring.rescore == "0 3 * * *"
    assert load(minimal(tmp_path)).monitoring.rescore is None
    for wrong, why in (("0 3 * *", "five fields"), ("61 3 * * *", "not a cron expression"), ("0 0 30 2 *", "")):
        with pytest.raises(ConfigError) as caught:
            load(minimal(tmp_path, f'monitoring: {{rescore: "{wrong}"}}\n'))
        [problem] = str(caught.value).splitlines()[-1:]
        assert "monitoring.rescore" in problem
        assert why in problem
