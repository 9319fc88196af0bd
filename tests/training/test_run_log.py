"""metrics.jsonl as a crash, an editor or another program may leave it."""

from __future__ import annotations

import json

import pytest

from querydet_jax.config import Config
from querydet_jax.training import log as module
from querydet_jax.training.log import RunLog

GOOD = [b'{"step": 1, "loss": 2.0}', b'{"step": 2, "dense/AP": 10.0}']
DAMAGED = {
    "part of a line": b'{"step": 3, "lo',
    "no text": b"\xff\xfe\x00\x01",
    "zeros": b"\0" * 512,
    "a list": b"[1, 2]",
    "a number": b"17",
    "no step": b'{"loss": 1.0}',
    "a step that is text": b'{"step": "3"}',
    "a step that is nothing": b'{"step": NaN}',
    "a step that is true": b'{"step": true}',
    "deeply nested": b"[" * 100_000,
    "an endless number": b'{"step": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_damaged_lines_are_set_aside(tmp_path, caplog, kind, place):
    lines = [*GOOD[:place], DAMAGED[kind], *GOOD[place:]]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * (place != 2))
    log = RunLog(Config(), path, 0)
    assert log.has_evaluation(2) and not log.has_evaluation(1) and not log.has_evaluation(3)
    log.write(3, {"loss": 1.0})
    log.close(0)
    assert path.read_bytes().splitlines()[:-1] == GOOD and json.loads(path.read_bytes().splitlines()[-1])["step"] == 3
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == DAMAGED[kind] + b"\n"
    assert caplog.text.count("1 damaged line(s) moved to metrics.damaged.jsonl") == 1


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n\n",
        b"\n".join(GOOD),
        b"\r\n".join(GOOD) + b"\r\n",
        b"\n\n".join(GOOD) + b"\n",
        b"\n".join([*GOOD, '{"step": 3, "loss": 1, "note": "a\u2028b\x85c"}'.encode()]),
    ],
)
def test_a_log_that_another_program_has_saved_loses_nothing(tmp_path, caplog, text):
    """Other ends of lines, blank lines, no end of the last line, what ends a line of text but not of JSON."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text)
    log = RunLog(Config(), path, 0)
    assert log.has_evaluation(2) == (GOOD[1] in text)
    log.close(0)
    assert [line for line in path.read_bytes().splitlines() if line] == [line for line in text.splitlines() if line]
    assert not caplog.text and not (tmp_path / "metrics.damaged.jsonl").exists()


@pytest.mark.parametrize("wrong", [None, OSError(28, "No space left on device"), RuntimeError("no font")])
def test_curves_that_cannot_be_drawn_end_nothing(tmp_path, caplog, monkeypatch, wrong):
    """Said once: that matplotlib is missing (``conftest.py``), or what it or the disk says."""
    caplog.set_level("INFO", "querydet_jax")
    if wrong is not None:
        monkeypatch.setattr(module, "save_curves", lambda *_: (_ for _ in ()).throw(wrong))
    log = RunLog(Config(), tmp_path / "metrics.jsonl", 0)
    for step in (1, 2):
        log.write(step, {"loss": 1.0})
        log.draw_curves()
    log.close(0)
    expected = "which needs matplotlib" if wrong is None else f"curves.png: cannot be drawn ({wrong.args[-1]})"
    assert caplog.text.count(expected) == 1 and not (tmp_path / "curves.png").exists()
