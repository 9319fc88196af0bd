"""Pages: the browser finds what Python finds, sends nothing, and what cannot become a page is refused."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import json
import time
import urllib.request
from pathlib import Path

import browser
import jax
import numpy as np
import pytest
import small_detector as small
from PIL import Image
from test_export import CANVAS, CONFIG, model
from test_onnx import RUNGS, run_export

from querydet_jax import Detector
from querydet_jax.inference.export import web_runtime
from querydet_jax.inference.export.web import write_page
from querydet_jax.inference.predictor import load, of_model
from querydet_jax.runtime.errors import ConfigError, DataError
from querydet_jax.runtime.machine import cache_folder

# Where users' exports keep it; tests have a cache of their own.
KEPT = cache_folder({}) / web_runtime.URL.rpartition("/")[2]
EXAMPLES = Path(__file__).parents[2] / "examples/hituav"
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="pip install -r requirements-onnx.txt")
needs_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium in PATH; apt install chromium")
needs_runtime = pytest.mark.skipif(
    not KEPT.is_file(), reason=f"{KEPT.name} is not kept here; querydet export hituav --format web fetches it once"
)
ROWS = "[...document.querySelectorAll('#boxes tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
READY = "document.body?.dataset.state == 'ready'"
SIZES = [((50, 70), (50, 33)), ((50, 70), (64, 96)), ((41, 300), (13, 96)), ((97, 33), (97, 60)), ((1, 9), (3, 4))]


def config(query: str = "csq"):
    settings = {"capacities": RUNGS, "threshold": 0.65, "query": query}
    return dataclasses.replace(CONFIG, inference=dataclasses.replace(CONFIG.inference, **settings))


def expected(predictor, picture: Path, least: object) -> list[tuple[str, float, np.ndarray]]:
    (result,) = predictor.predict(picture, min_score=least)
    return list(zip(result.names, result.scores.tolist(), result.boxes, strict=True))


def assert_rows(rows: list[list[str]], wanted: list[tuple[str, float, np.ndarray]]) -> None:
    assert [row[0] for row in rows] == [name for name, _, _ in wanted]
    np.testing.assert_allclose([float(row[1]) for row in rows], [score for _, score, _ in wanted], atol=6e-4)
    boxes = np.array([[float(x) for x in row[2:]] for row in rows])
    np.testing.assert_allclose(boxes, np.stack([box for _, _, box in wanted]), atol=0.06)  # the page shows tenths


def set_threshold(page: browser.Page, value: float) -> None:
    page.js(
        f"document.getElementById('threshold').value = {value};"
        "document.getElementById('threshold').dispatchEvent(new Event('input'))"
    )


@needs_onnx
@needs_browser
@needs_runtime
def test_the_page_finds_what_python_finds_and_sends_nothing(tmp_path):
    scores = np.full(3, 0.2, np.float32)
    about = write_page(tmp_path / "web", model(), config(), canvases=[CANVAS], min_scores=scores, runtime=KEPT)
    weights = sum(x.nbytes for x in jax.tree.leaves(Detector(model(), CONFIG.inference).function()[1]))
    assert about["weights"]["bytes"] < 1.1 * weights  # once for both programs
    picture = tmp_path / "picture.png"
    pixels = small.pictures(4, *CANVAS, seed=0)[3]
    Image.fromarray(pixels).resize((150, 100), Image.Resampling.BICUBIC).save(picture)
    rng = np.random.default_rng(0)
    with (
        browser.served(tmp_path / "web") as url,
        browser.served(tmp_path) as elsewhere,
        browser.browser(tmp_path / "profile") as page,
    ):
        page.command("Page.navigate", url=url)
        page.wait(READY)
        page.drop("#stage", picture)
        page.wait(f"{READY} && document.querySelectorAll('#boxes tbody tr').length > 0")
        # A plain server, as here, allows one thread; the page's service worker adds what several need.
        threads = page.js("crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency) : 1")
        assert page.js("crossOriginIsolated || navigator.hardwareConcurrency == 1")
        assert f" on {threads} thread" in page.js("document.getElementById('status').textContent")
        wanted = expected(of_model(model(), config(), tmp_path), picture, 0.2)
        assert len(wanted) > 3
        assert_rows(page.js(ROWS), wanted)
        cells = page.js("document.querySelector('[data-view^=cells] small').textContent")

        set_threshold(page, 0.9)
        page.wait(f"{READY} && document.querySelector('[data-view^=queries] small').textContent.endsWith('0.9')")
        assert page.js("document.querySelector('[data-view^=cells] small').textContent") != cells

        page.js("document.querySelector('[value=dense]').click()")
        page.wait(f"{READY} && document.getElementById('time-dense').textContent.endsWith('ms')")
        assert_rows(page.js(ROWS), expected(of_model(model(), config("dense"), tmp_path), picture, 0.2))

        for size, new in SIZES:
            image = rng.integers(0, 256, (*size, 3), np.uint8)
            image[: size[0] // 2] = np.where(image[: size[0] // 2] > 127, 255, 0)  # rounding at both ends
            text = base64.b64encode(image.tobytes()).decode()
            resized = page.js(
                f"import('./worker.js').then((worker) => [...worker.resize(Uint8Array.from(atob('{text}'), "
                f"(c) => c.charCodeAt()), {size[0]}, {size[1]}, {new[0]}, {new[1]})])"
            )
            pillow = Image.fromarray(image).resize(new[::-1], Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(np.array(resized, np.uint8), np.asarray(pillow).ravel())

        send = f"fetch('{elsewhere}').then(() => 'sent', () => 'refused')"
        assert page.js(send) == "refused"
        assert page.js(
            "new Promise((done) => { const code = `" + send + ".then((x) => postMessage(x))`;"
            "new Worker(URL.createObjectURL(new Blob([code]))).onmessage = (event) => done(event.data) })"
        ) == "refused"  # fmt: skip
        time.sleep(0.1)
        host = elsewhere.split("/")[2]
        assert not [path for to, path in browser.REQUESTS if to == host]


@needs_onnx
@needs_browser
@needs_runtime
@pytest.mark.slow
def test_the_packaged_weights_in_the_browser(tmp_path):
    """JPEG, decoded by the browser; the examples come along."""
    run_export("hituav", "--format", "web", "--out", tmp_path / "web", "--runtime", KEPT)
    predictor = load("hituav")
    with browser.served(tmp_path / "web") as url, browser.browser(tmp_path / "profile") as page:
        page.command("Page.navigate", url=url)
        for n, picture in enumerate(sorted(EXAMPLES.glob("*.jpg"))):
            if n:
                page.js(f"document.querySelectorAll('#examples button')[{n}].click()")
            shown = f"document.getElementById('caption').textContent.startsWith('{picture.name}')"
            page.wait(f"{READY} && {shown} && document.querySelectorAll('#boxes tbody tr').length > 0")
            wanted = expected(predictor, picture, "best")
            assert len(wanted) > 3
            assert_rows(page.js(ROWS), wanted)
        set_threshold(page, 0.3)
        page.wait(f"{READY} && document.querySelector('[data-view^=queries] small').textContent.endsWith('0.3')")
        stricter = load("hituav", {"inference.threshold": 0.3})
        assert_rows(page.js(ROWS), expected(stricter, picture, "best"))
        assert "Creative Commons Attribution 4.0" in page.js("document.getElementById('attribution').textContent")


def written(folder: Path, **changes):
    given = {"canvases": [CANVAS], "min_scores": np.zeros(3, np.float32), **changes}
    return write_page(folder, model(), given.pop("config", CONFIG), **given)


def test_what_cannot_become_a_page_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for field, value in (("exif", "ignore"), ("bit_depth", "0:4095")):
        data = dataclasses.replace(CONFIG.data, **{field: value})
        with pytest.raises(ConfigError, match=f"^data.{field} {value}: browsers .* a page needs"):
            written(tmp_path / "web", config=dataclasses.replace(CONFIG, data=data))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds other files than a page; give a new folder"):
        written(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(DataError, match="notes.txt: no such picture"):
        written(tmp_path / "web", examples=[tmp_path / "notes.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no picture"):
        written(tmp_path / "web", examples=[tmp_path / "empty"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install -r requirements-onnx.txt"):
        written(tmp_path / "web")


def test_another_runtime_is_refused(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(DataError, match=r"1.30.0.tgz: cannot be fetched \(no route\); fetch it .*npm pack.*--runtime"):
        web_runtime.web_runtime()
    (tmp_path / "x.tgz").write_bytes(b"other")
    with pytest.raises(DataError, match="x.tgz: is not onnxruntime-web 1.30.0 as published"):
        web_runtime.web_runtime(tmp_path / "x.tgz")
    with pytest.raises(DataError, match="none.tgz: cannot be read"):
        web_runtime.web_runtime(tmp_path / "none.tgz")
    (tmp_path / "package.json").write_text(json.dumps({"name": "onnxruntime-web", "version": "1.0.0"}))
    with pytest.raises(DataError, match="package.json is not of onnxruntime-web 1.30.0"):
        web_runtime.web_runtime(tmp_path)


def test_options_that_do_not_fit_are_refused():
    for words, message in (
        (("--runtime", "x.tgz"), "--runtime: is for pages; add --format web"),
        (("--format", "web", "--batch-sizes", "2"), "--batch-sizes: a page looks at one picture at a time"),
        (("--format", "web", "--platforms", "cpu"), "--platforms: a page is for no platform"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_export("hituav", *words)
