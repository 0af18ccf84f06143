"""Messages quote what people wrote; they do not pour it out."""

from __future__ import annotations

import json

from infra.errors import ConfigError, NotFound


def test_a_long_value_is_cut_in_text_and_json() -> None:
    error = NotFound(f"There is no model {'x' * 100_000}; see above.")
    assert error.message == f"There is no model {'x' * 200}... see above."
    assert str(error) == error.message == error.as_json()["error"]["message"]
    assert len(NotFound("a b " * 100_000).message) < 2100
    assert NotFound("one\ntwo " + "y" * 200).message == "one\ntwo " + "y" * 200, "what is short stays as it is"


def test_of_many_problems_the_first_fifty_are_told() -> None:
    lines = [f"  f.yaml:{n}: gates[{n}]: {'z' * 300}" for n in range(10_000)]
    problems = [{"line": n, "message": "z" * 300} for n in range(10_000)]
    error = ConfigError("10000 problems in f.yaml\n" + "\n".join(lines), details={"problems": problems})
    told = error.message.split("\n")
    assert (len(told), told[0], told[-1]) == (52, "10000 problems in f.yaml", "  and 9950 more")
    assert told[50].startswith("  f.yaml:49: ")
    assert len(error.as_json()["error"]["problems"]) == 50
    assert len(json.dumps(error.as_json())) < 50_000
    fifty = "50 problems in f.yaml\n" + "\n".join(f"  {n}" for n in range(50))
    assert ConfigError(fifty).message == fifty
