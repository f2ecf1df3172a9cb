"""What a command printed, as a test reads it."""

from __future__ import annotations

import pytest


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Return all that was printed since the last call, on one line."""
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split())


def complained(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed to stderr since the last call, on one line."""
    return " ".join(capsys.readouterr().err.split())
