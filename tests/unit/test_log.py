"""What a stranger sent stays one line of a log, and does nothing to the terminal that shows it (fault 19)."""

from __future__ import annotations

import logging

import pytest

from infra import log


def test_control_characters_of_a_message_are_shown_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        log.setup()
        said = "no\r\n2026-01-01T00:00:00.000Z INFO all is well \x1b[2J\u202ered \x00 \ud800 caf\u00e9"
        logging.getLogger("upstream").warning("it said: %s", said)
        try:
            raise ValueError("line one\nline two")
        except ValueError:
            logging.getLogger("upstream").exception("failed")
    finally:
        root.handlers[:], root.level = before
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(
        r"it said: no\r\n2026-01-01T00:00:00.000Z INFO all is well \x1b[2J\u202ered \x00 \ud800 caf\u00e9".replace(
            r"\u00e9", "\u00e9"
        )
    )
    assert lines[1].endswith("failed")
    assert lines[2] == "Traceback (most recent call last):"
