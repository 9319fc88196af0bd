"""Processes of the commands that connect over loopback, for tests of several hosts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import quick

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds for any of these processes
SMALL = (
    "--model.backbone.name resnet10 --model.backbone.norm frozen --model.backbone.freeze-at 5 --model.min-level 4 "
    "--model.max-level 5 --model.loss.level-weighting uniform --model.fpn.channels 16 --model.head.channels 16 "
    "--model.head.num-convs 1 --model.query.no-enabled --inference.query dense --data.scenes-train 11 "
    "--data.scenes-val 3 --data.scenes-size 96 96 --data.scenes-val-size 96 96 --data.train-short 96 "
    "--data.train-max 96 --data.train-canvases 96 96 --data.test-short 96 --data.test-max 96 "
    "--data.test-canvases 96 96 --train.batch-size 4 --train.steps 4 --train.log-every 1 --train.checkpoint-every 2 "
    "--train.eval-every 3 --train.ema 0.9 --train.warmup-steps 0"
)


def started(
    cwd: Path, data: Path, devices: int, *words: str, command: str = "train.py configs/demo.py --run run"
) -> subprocess.Popen[str]:
    """Start a command in folder ``cwd`` with virtual devices; names of files in this checkout become paths."""
    environment = {
        **os.environ,
        **quick.environment(f"--xla_force_host_platform_device_count={devices}"),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(data / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    given = [str(ROOT / word) if (ROOT / word).is_file() else word for word in command.split()]
    line = [sys.executable, *given, "--data.root", str(data), *SMALL.split(), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=cwd, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finished(*processes: subprocess.Popen[str], status: int = 0) -> list[str]:
    """Return what the processes printed; kill those that take too long, and show all output if a status differs."""
    outputs, deadline = ["" for _ in processes], time.monotonic() + LIMIT
    try:
        for i, process in enumerate(processes):
            outputs[i], _ = process.communicate(timeout=max(deadline - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    shown = "\n".join(f"--- host {i}, status {p.returncode}\n{outputs[i][-3000:]}" for i, p in enumerate(processes))
    assert all(process.returncode == status for process in processes), shown
    return outputs


def hosts(count: int) -> list[list[str]]:
    """Return the flags of each host, with a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.count", str(count), "--hosts.timeout", "120"]
    return [[*common, "--hosts.index", str(i)] for i in range(count)]
