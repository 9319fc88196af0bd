"""Ctrl-C ends `train` at once where nothing is to be saved, and the second one always does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUSY = """
import hashlib, signal, sys, time
from querydet_jax.cli.process import interrupts_end_the_process

class Lost:
    def __del__(self):  # an exception in it is printed and forgotten, as in jax's callbacks
        print("busy", flush=True)
        time.sleep(60)

with interrupts_end_the_process():
    if sys.argv[1] == "preparing":
        print("busy", flush=True)
        time.sleep(60)
    elif sys.argv[1] == "a callback":
        lost = Lost()
        del lost
    else:
        signal.signal(signal.SIGINT, lambda number, frame: None)  # as guards.preemption does
        print("busy", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)  # Python calls no handler meanwhile, as in a compilation
"""


@pytest.mark.parametrize(("place", "presses"), [("preparing", 1), ("a callback", 1), ("a compilation", 2)])
def test_ctrl_c_is_never_lost(place, presses):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, place], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "busy\n"
    begun = time.monotonic()
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=50)
    assert process.returncode == 130 and errors.strip().endswith("interrupted")
    assert time.monotonic() - begun < 5
