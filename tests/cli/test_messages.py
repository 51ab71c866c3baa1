"""Of several ranks one speaks, and the others' libraries can speak later."""

from __future__ import annotations

import logging
import sys

import pytest

from dream_trainer.cli.messages import first_rank_speaks


def test_what_a_silent_rank_imports_can_speak_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    log = logging.getLogger("a library")
    with first_rank_speaks():
        handler = logging.StreamHandler()  # keeps sys.stderr, as Lightning's does
        log.addHandler(handler)
        print("usage")
        log.warning("too early")
        assert sys.stderr.isatty() is False
    log.warning("later")
    log.removeHandler(handler)
    assert capsys.readouterr() == ("", "later\n")
