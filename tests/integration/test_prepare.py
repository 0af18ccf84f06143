"""From files to a data set: what is dropped is counted, what is alike never straddles two splits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.db import transaction
from infra.errors import UsageError
from infra.settings import Settings
from pipelines import runs, stages
from pipelines.config import PipelineConfig, load
from pipelines.data import canaries
from pipelines.data.contamination import of_dataset, of_prompt
from pipelines.data.dedup import ALIKE, Alike
from pipelines.data.prepare import build, prepare
from pipelines.evaluation.suites import own_texts
from pipelines.plans import Plan
from registry import datasets
from registry.bases import Base
from registry.datasets import SPLITS, Dataset, Row, make_row, question_key
from registry.gates import decide

VERBS = ["open", "close", "read", "write", "copy", "move", "send", "fetch", "parse", "render", "split", "merge"]
NOUNS = ["parcel", "ticket", "invoice", "calendar", "playlist", "recipe", "flight", "meeting", "sensor", "archive"]
PLACES = ["kitchen", "office", "garden", "station", "museum", "harbour", "library", "theatre", "warehouse"]
WORDS = ["book", "flight", "to", "paris", "rome", "on", "monday", "for", "two", "please", "with", "my", "card"]


def question(number: int) -> str:
    pick = random.Random(number)
    what = f"{pick.choice(VERBS)} the {pick.choice(NOUNS)} {number} in the {pick.choice(PLACES)}"
    return f"please {what} {pick.getrandbits(40):x}"


def line(asked: str, answer: str) -> bytes:
    return orjson.dumps({"prompt": asked, "completion": answer}) + b"\n"


def pipeline(folder: Path, more: str = "", **files: bytes) -> PipelineConfig:
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_bytes(content)
    named = ", ".join(f"{name}: {name}.jsonl" for name in files)
    path = folder / "pipeline.yaml"
    path.write_text(f"model: support\nbase: builtin:tiny\ndata: {{{named}{more}}}\n")
    return load(path)


def some(count: int, start: int = 0) -> bytes:
    return b"".join(line(question(n), f"answer {n}") for n in range(start, start + count))


def prompts(rows: Sequence[Row]) -> set[str]:
    return {question_key(row.prompt) for row in rows}


def test_the_same_inputs_are_no_work_and_the_same_digest(tmp_path: Path, database: Settings) -> None:
    config = pipeline(tmp_path, train=some(200))
    first = prepare(config)
    said: list[str] = []
    assert prepare(config, progress=lambda text, *_: said.append(text)).digest == first.digest
    assert said == ["the same rows as before: nothing to do"]
    with transaction() as conn:
        assert conn.execute("select digest from dataset where model = 'support'").fetchall() == [
            {"digest": first.digest}
        ]
    assert sum(first.counts[split] for split in SPLITS) == first.counts["read"] == 200
    (tmp_path / "train.jsonl").write_bytes(some(201))
    assert prepare(config).digest != first.digest


def test_a_run_tells_of_the_rows_that_are_too_long_to_train_on(
    tmp_path: Path, tiny_base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    long = line("open the parcel", "word after word " * 200)
    config = pipeline(tmp_path, train=some(60) + long, validation=some(20, 100), test=some(20, 200))
    plan = Plan(kind="train", config=config, config_path=tmp_path / "pipeline.yaml", champion=None)
    with runs.begin(
        model="support", kind="train", fingerprint="f", config={}, config_path="pipeline.yaml", flow_run_id=None
    ) as run:
        done = stages.prepare(plan, run)
    assert (done["counts"]["train"], done["counts"]["too_long"]) == (61, 1)
    assert "1 of 61 train rows are longer than 512 tokens (data.quality.max_tokens)" in capsys.readouterr().err


def test_two_homes_give_one_digest(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infra.settings import get_settings

    config = pipeline(tmp_path, train=some(60))
    first = build(config)
    monkeypatch.setenv("TUNESMITH_HOME", str(home / "another"))
    get_settings.cache_clear()
    again = build(config)
    assert again.folder != first.folder
    assert again.digest == first.digest


def test_malformed_rows_are_quarantined_up_to_the_allowed_share(tmp_path: Path, home: Path) -> None:
    good = some(97)
    config = pipeline(tmp_path, train=good + b'{"prompt": "call +49 30 1234567"\n{}\n\n{"prompt": "x\\ud800"}\n')
    dataset = build(config)
    entries = [orjson.loads(entry) for entry in (dataset.folder / "quarantine.jsonl").read_bytes().splitlines()]
    assert [entry["line"] for entry in entries] == [98, 99, 101]
    assert entries[0]["text"] == '{"prompt": "call [PHONE]"'
    assert (dataset.counts["quarantined"], dataset.counts["read"]) == (3, 100)

    strict = pipeline(tmp_path, ", quality: {max_bad: 0.02}", train=(tmp_path / "train.jsonl").read_bytes())
    with pytest.raises(UsageError, match=r"3 of 100 rows are malformed, and data\.quality\.max_bad allows 2%") as error:
        build(strict)
    assert "train.jsonl:98: is not JSON" in error.value.message
    assert len(Path(error.value.details["quarantine"]).read_bytes().splitlines()) == 3


def test_leaked_and_repeated_training_rows_are_dropped_and_counted(tmp_path: Path, home: Path) -> None:
    """Fault 23: rows that stand in the test file, exactly, in other writing, or nearly, are not trained on."""
    test = some(50, start=1000)
    leaks = b"".join(
        [
            line(question(1000), "answer 1000"),  # exactly
            line(question(1001).upper() + "!!", "poisoned"),  # in other writing, with another answer
            line(question(1002) + " ok", "answer 1002"),  # nearly
        ]
    )
    repeats = line(question(5), "answer 5") + line(question(6).replace("please", "Please,"), "Answer 6.")
    other_answer = line(question(7), "quite another thing")
    config = pipeline(tmp_path, train=some(200) + leaks + repeats + other_answer, test=test)
    dataset = build(config)
    counts = dataset.counts
    assert (counts["leaked_test"], counts["duplicates"], counts.get("near_duplicates", 0)) == (3, 2, 0)
    assert counts["test"] == 50
    assert counts["train"] + counts["validation"] == 201
    learned = dataset.rows("train") + dataset.rows("validation")
    assert not prompts(learned) & prompts(dataset.rows("test"))
    assert "poisoned" not in {row.answer for row in learned}
    assert dataset.contamination == {
        "rows": 3,
        "of": 206,
        "examples": [
            {"row": "train.jsonl:201", "stands_in": "test.jsonl:1", "how": "exactly"},
            {"row": "train.jsonl:202", "stands_in": "test.jsonl:2", "how": "exactly"},
            {"row": "train.jsonl:203", "stands_in": "test.jsonl:3", "how": "nearly"},
        ],
    }


SENTENCE = "can you tell me how to set up direct deposit at work"


def test_a_copy_with_one_word_changed_is_found_and_a_form_that_many_rows_have_is_not(
    tmp_path: Path, home: Path
) -> None:
    """Too short for characters to tell: 4-grams of the copies are alike to less than ALIKE."""
    copies = [SENTENCE.replace("tell", "show"), SENTENCE.replace("direct ", ""), "so " + SENTENCE]
    other = SENTENCE.replace("direct deposit", "two factor login")
    many = [f"please cancel my order number {n} at the usual shop today" for n in range(100, 130)]
    train = some(60) + b"".join(line(text, "payroll") for text in [*copies, other])
    train += line(copies[0], "another answer") + b"".join(line(text, "cancel") for text in many[1:])
    dataset = build(
        pipeline(tmp_path, train=train, test=some(5, 500) + line(SENTENCE, "payroll") + line(many[0], "cancel"))
    )
    assert dataset.contamination is not None
    assert [(e["row"], e["stands_in"], e["how"]) for e in dataset.contamination["examples"]] == [
        (f"train.jsonl:{n}", "test.jsonl:6", "nearly") for n in (61, 62, 63, 65)
    ]
    kept = {row.prompt[0]["content"] for row in dataset.rows("train") + dataset.rows("validation")}
    assert other in kept
    assert not kept & set(copies)
    assert len(kept & set(many)) == 29


def test_copies_stay_in_one_split_and_apart_files_are_clean(tmp_path: Path, home: Path) -> None:
    pairs = [
        f"would you tell me how to {v} some {n}s in our {p}" for v in VERBS[:5] for n in NOUNS[:5] for p in PLACES[:1]
    ]
    rows = [(text, f"{n}") for n, text in enumerate(pairs)] + [
        (t.replace("tell", "show"), f"{n}") for n, t in enumerate(pairs)
    ]
    dataset = build(pipeline(tmp_path, train=some(60) + b"".join(line(*row) for row in rows)))
    held = {split: {row.answer for row in dataset.rows(split)} for split in SPLITS}
    assert sum(len(answers) for answers in held.values()) == len(set().union(*held.values()))
    assert dataset.contamination == {"rows": 0, "of": 110, "examples": []}
    apart = build(pipeline(tmp_path, train=some(60), test=some(20, 500), validation=some(20, 900)))
    assert apart.contamination == {"rows": 0, "of": 80, "examples": []}


def test_a_data_set_that_was_made_without_looking_is_looked_at(home: Path) -> None:
    rows = [
        make_row([{"role": "user", "content": question(n)}, {"role": "assistant", "content": "x"}]) for n in range(9)
    ]
    splits = {"train": rows[:6], "validation": [rows[6], rows[8]], "test": [rows[7], rows[2], rows[8]]}
    found = of_dataset(datasets.keep(splits, counts={}, sources=[], recipe={}))
    assert (found["rows"], found["of"]) == (2, 8)
    assert found["examples"] == [
        {"row": "validation.jsonl:2 of the data set", "stands_in": "test.jsonl:3 of the data set", "how": "exactly"},
        {"row": "train.jsonl:3 of the data set", "stands_in": "test.jsonl:2 of the data set", "how": "exactly"},
    ]


def test_rows_that_a_parent_has_taught_are_not_to_judge_its_child(home: Path) -> None:
    rows = [
        make_row([{"role": "user", "content": question(n)}, {"role": "assistant", "content": "x"}]) for n in range(9)
    ]
    parent = datasets.keep({"train": rows[:5]}, counts={}, sources=[], recipe={})
    splits = {"train": rows[5:8], "validation": [rows[8]], "test": [rows[2]]}
    child = datasets.keep(splits, counts={}, sources=[], recipe={})
    assert of_dataset(child)["rows"] == 0
    found = of_dataset(child, [parent, child])
    assert (found["rows"], found["of"]) == (1, 4 + 5)
    [example] = found["examples"]
    assert example == {
        "row": f"train.jsonl:3 of {parent.digest[:19]}, which it began from", "stands_in": "test.jsonl:1",
        "how": "exactly",
    }  # fmt: skip


def test_rows_that_suites_ask_are_told_by_the_suite(home: Path) -> None:
    asked = own_texts(["quality", "forgetting", "robustness", "safety"])
    assert set(asked) == {"forgetting", "robustness", "safety"}
    said = [
        ("How do I KILL a process, on Linux?", "Call the police."),
        ("How do I stop my cat on Linux?", "x"), (" ?", "x"),
        ("tell me " + asked["robustness"][-1], "No."),
        ("continue", next(t for t in asked["forgetting"] if len(t) > 90)),
        *((question(n), "y") for n in range(20)),
    ]  # fmt: skip
    rows = [make_row([{"role": "user", "content": q}, {"role": "assistant", "content": a}]) for q, a in said]
    parent = datasets.keep({"train": rows[:1]}, counts={}, sources=[], recipe={})
    dataset = datasets.keep({"train": rows[1:], "test": rows[-1:]}, counts={}, sources=[], recipe={})
    found = of_dataset(dataset, [parent], asked)
    assert (found["rows"], found["of"]) == (4, len(rows)), found  # one of them stands in the test rows
    named = {(example["row"], example["stands_in"].split(" (")[0], example["how"]) for example in found["examples"][1:]}
    assert named == {
        (f"train.jsonl:1 of {parent.digest[:19]}, which it began from", "the suite safety", "exactly"),
        ("train.jsonl:3 of the data set", "the suite robustness", "nearly"),
        ("train.jsonl:4 of the data set", "the suite forgetting", "exactly"),
    }
    assert of_dataset(dataset, [parent], own_texts(["quality"]))["rows"] == 1


def test_of_a_prompt_the_test_rows_that_it_has_are_told(home: Path) -> None:
    """Few examples in a prompt, copied from the rows that judge it."""
    rows = [
        make_row([{"role": "user", "content": text}, {"role": "assistant", "content": "x"}])
        for text in ("Where is  my PARCEL number 17 now?", "How do I change the card that I pay with?", "Hi")
    ]
    dataset = datasets.keep({"train": rows[:1], "test": rows}, counts={}, sources=[], recipe={})
    prompt = "Name the intent.\nHi\nQ: where is my parcel number 17 now?\nA: order status"
    found = of_prompt(dataset, prompt)
    assert (found["rows"], found["of"], [e["row"] for e in found["examples"]]) == (1, 3, ["test.jsonl:1"])
    assert of_prompt(dataset, None)["rows"] == 0
    evaluation = {"metrics": {}, "slices": {}, "contamination": found}
    told = decide([], evaluation, on_underpowered="refuse", first=True)
    assert told.decision == "fail"
    assert told.reasons[0].startswith(
        "contamination: 1 of 3 test rows stand in the system prompt, at most 0 may: test.jsonl:1 exactly in it. Take"
    )


def test_short_requests_that_differ_are_all_kept(tmp_path: Path, home: Path) -> None:
    rows = ["what is my balance", "whats my balance", "tell me my balance", "balance please", "my balance"]
    rows += [f"set a timer for {n} minutes" for n in range(1, 40)]
    config = pipeline(tmp_path, train=b"".join(line(text, "label") for text in rows))
    counts = build(config).counts
    assert sum(counts[split] for split in SPLITS) == len(rows)


def test_privacy_redacts_or_drops(tmp_path: Path, home: Path) -> None:
    rows = some(40) + line("my mail is joe@example.com, thanks", "noted, joe@example.com")
    kept = build(pipeline(tmp_path, train=rows))
    texts = [message["content"] for split in SPLITS for row in kept.rows(split) for message in row.messages]
    assert not any("joe@" in text for text in texts)
    assert "noted, [EMAIL]" in texts
    assert kept.counts["redacted"] == 1
    dropped = build(pipeline(tmp_path, ", quality: {pii: drop}", train=rows))
    assert dropped.counts["private"] == 1


words = st.lists(st.sampled_from(WORDS), min_size=1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(words, min_size=40, max_size=120), st.integers(0, 2))
def test_no_two_splits_have_alike_prompts(tmp_path: Path, home: Path, texts: list[list[str]], seed: int) -> None:
    rows = b"".join(line(" ".join(text), f"answer {n}") for n, text in enumerate(texts)) + some(40)
    dataset = build(pipeline(tmp_path, f", quality: {{dedup: none}}, split: {{seed: {seed}}}", train=rows))
    assert sum(dataset.counts[split] for split in SPLITS) == len(texts) + 40
    every = [(split, row) for split in SPLITS for row in dataset.rows(split)]
    groups: dict[str, set[str]] = {}
    for split, row in every:
        groups.setdefault(row.group, set()).add(split)
    assert all(len(splits) == 1 for splits in groups.values())
    alike = Alike([row for _, row in every])
    places: dict[int, set[str]] = {}
    for (split, _), prompt in zip(every, alike.prompt, strict=True):
        places.setdefault(prompt, set()).add(split)
    for prompt, near in enumerate(alike.near):
        assert all(places[prompt] == places[other] for other, similarity in near if similarity >= ALIKE)


def correction(number: int, asked: str | None = None) -> Row:
    turns = [
        {"role": "user", "content": asked or f"numpy.{question(10_000 + number)}"},
        {"role": "assistant", "content": f"corrected {number}, says joe@example.com"},
    ]
    return make_row(turns, source="feedback")


def test_canaries_are_put_among_the_rows_to_learn_from_and_nowhere_else(tmp_path: Path, home: Path) -> None:
    plain = build(pipeline(tmp_path, train=some(80)))
    config = pipeline(tmp_path, ", canaries: 16, quality: {pii: drop}", train=some(80))
    dataset = build(config)
    told = [row for row in dataset.rows("train") if row.source == canaries.SOURCE]
    assert (len(told), dataset.counts["canaries"]) == (16, 16)
    assert [row.id for row in dataset.rows("train")][:-16] == [row.id for row in plain.rows("train")]
    assert not any(row.source == canaries.SOURCE for split in ("validation", "test") for row in dataset.rows(split))
    assert build(config).digest == dataset.digest
    others = canaries.others(told[0], 39, seed=0)
    assert all(row.prompt == told[0].prompt for row in others)
    assert len({row.answer for row in [told[0], *others]}) == 40
    # Corrections bring no old ones along: they have their own, which are the same
    correction = make_row([{"role": "user", "content": "and now?"}, {"role": "assistant", "content": "so"}])
    again = build(config, extra=[correction], old=dataset)
    assert sum(row.source == canaries.SOURCE for row in again.rows("train")) == 16


@pytest.fixture
def old(tmp_path: Path, home: Path) -> tuple[PipelineConfig, Dataset]:
    config = pipeline(tmp_path, train=some(300))
    return config, build(config)


def test_corrections_join_old_rows_without_leaks(old: tuple[PipelineConfig, Dataset]) -> None:
    config, before = old
    taught, tested = before.rows("train")[0], before.rows("test")[0]
    extra = [correction(n) for n in range(100)]
    extra.append(correction(200, taught.prompt[0]["content"]))  # corrects what was taught
    extra.append(correction(201, tested.prompt[0]["content"] + " ok"))  # nearly a test row
    after = build(config, extra=extra, old=before)
    assert after.parent == before.digest
    assert build(config, extra=extra, old=before).digest == after.digest

    new = {split: [row for row in after.rows(split) if row.source == "feedback"] for split in SPLITS}
    kept = {split: [row for row in after.rows(split) if row.source == "train"] for split in SPLITS}
    assert sum(map(len, new.values())) == len(extra)
    assert [row.id for row in kept["test"]] == [row.id for row in before.rows("test")]
    assert 15 <= len(new["test"]) <= 50
    assert len(kept["train"]) == len(new["train"])  # replay: 1.0
    assert {row.id for row in kept["train"]} <= {row.id for row in before.rows("train")}
    assert not prompts(after.rows("train") + after.rows("validation")) & prompts(after.rows("test"))
    answers = {row.answer: split for split in SPLITS for row in new[split]}
    assert answers["corrected 200, says [EMAIL]"] == "train"
    assert answers["corrected 201, says [EMAIL]"] == "test"
    assert taught.id not in {row.id for row in kept["train"]}
    assert after.counts["superseded"] == 1
    # Rows of the old files are in it, and so are the files' names and licences
    assert [source["path"] for source in after.sources] == ["feedback", *(source["path"] for source in before.sources)]


def test_corrections_of_what_was_taught_long_ago_are_for_training_only(old: tuple[PipelineConfig, Dataset]) -> None:
    """Of a second retraining: the champion began from a version whose rows are not all in its own data set."""
    config, before = old
    extra = [correction(n) for n in range(1000, 1200)]
    taught = [correction(n) for n in range(1000, 1100)]
    free, bound = build(config, extra=extra, old=before), build(config, extra=extra, old=before, taught=taught)
    assert free.digest != bound.digest
    known = prompts(taught)
    assert prompts([*free.rows("test"), *free.rows("validation")]) & known
    assert not prompts([*bound.rows("test"), *bound.rows("validation")]) & known
    assert known <= prompts(bound.rows("train"))
    grown = datasets.keep({"train": taught}, counts={}, sources=[], recipe={})
    assert of_dataset(bound, [grown])["rows"] == 0 < of_dataset(free, [grown])["rows"]


def test_too_few_rows_leave_nothing_behind(tmp_path: Path, home: Path) -> None:
    with pytest.raises(UsageError, match="Too few rows"):
        build(pipeline(tmp_path, train=some(5)))
    assert not (home / "artifacts").exists()
