"""Drive a headless Chromium through its DevTools protocol, over pipes: no package, no port.

`python tests/browser.py PAGE` prints the medians that an exported page measures, with one thread and with several.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
).split()

# Chromium reads commands from descriptor 3 and answers on 4.
_ON_3_AND_4 = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for number, end in enumerate(ends, 3):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
REQUESTS: list[tuple[str, str]] = []
"""(host, path) of what servers were asked for."""


class Page:
    """One tab. Commands are those of https://chromedevtools.github.io/devtools-protocol."""

    def __init__(self, requests: int, answers: int) -> None:
        self._write, self._read = os.fdopen(requests, "wb", 0), os.fdopen(answers, "rb", 0)
        self._number, self._session, self._rest = 0, "", b""
        self.events: list[dict[str, Any]] = []
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> Any:
        """Send a command and wait for its answer; what comes before is kept in ``events``."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = self._read.read(1 << 20)
            if not part:
                raise RuntimeError("Chromium has ended")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def js(self, expression: str) -> Any:
        """Return the value of an expression, awaited if it is a promise."""
        answer = self.command("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 120) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.js(condition):
            if time.monotonic() > end:
                said = self.js("document.body.innerText")
                raise TimeoutError(f"{condition} did not become true; the page says: {said}")
            time.sleep(0.05)

    def drop(self, selector: str, path: Path) -> None:
        """Drop a file on an element, as from a file manager."""
        box = self.js(f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
                      "return [r.x + r.width / 2, r.y + r.height / 2] })()")  # fmt: skip
        data = {"items": [], "files": [str(path.resolve())], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.command("Input.dispatchDragEvent", type=kind, x=box[0], y=box[1], data=data)

    def screenshot(self, path: Path, width: int, height: int, *, dark: bool = False, whole: bool = False) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.command("Emulation.setEmulatedMedia", features=features)
        time.sleep(0.3)
        data = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browser(profile: Path, *flags: str) -> Iterator[Page]:
    """Start Chromium with a new ``profile`` and give its page."""
    assert CHROMIUM is not None
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-ISc", _ON_3_AND_4, str(their_in), str(their_out)]
        + [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", *flags],
        pass_fds=(their_in, their_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (their_in, their_out):
        os.close(end)
    try:
        yield Page(our_out, our_in)
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder as `python -m http.server` does; give its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        REQUESTS.append((self.headers["Host"], self.path))


def print_times(folder: Path) -> None:
    """Press "Compare times" on the example that an exported page shows first."""
    about = json.loads((folder / "model.json").read_bytes())
    if not about["examples"]:
        raise SystemExit(f"{folder}: offers no example; export it with --examples PICTURE")
    for bypass in (True, False):  # without its service worker, a page has one thread
        with tempfile.TemporaryDirectory() as profile, served(folder) as url, browser(Path(profile)) as page:
            page.command("Network.setBypassServiceWorker", bypass=bypass)
            page.command("Page.navigate", url=url)
            page.wait("document.body?.dataset.state == 'ready'", 600)
            page.js("document.getElementById('compare').click()")
            page.wait("document.getElementById('ratio').textContent.includes('medians')", 600)
            threads = page.js("document.getElementById('status').textContent.match(/on (.*)/)[1]")
            times = page.js("[...document.querySelectorAll('#choices label')].map((label) => label.innerText)")
            ratio = page.js("document.getElementById('ratio').textContent")
            rows = ", ".join(" ".join(text.split("\n")[:2]) for text in times)
            print(f"{threads}: {rows}; {ratio}", flush=True)


if __name__ == "__main__":
    print_times(Path(sys.argv[1]))
