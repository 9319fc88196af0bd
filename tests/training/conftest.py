"""Runs of a few steps draw no curves: that takes longer than their steps."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
