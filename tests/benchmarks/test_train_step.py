"""The training step taken apart, on a small network."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from benchmarks.main import main
from benchmarks.speed.train_step import matrix_product
from querydet_jax.config import load_config


def test_parts_add_up_and_the_peak_is_a_matrix_product(monkeypatch, tmp_path, run_folder):
    monkeypatch.chdir(tmp_path)  # where its scenes go
    words = "train-step --height 64 --width 96 --batch 2 --rounds 2 --matrix 64 --dtype bfloat16 --out out"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words.split(), "--configs", str(run_folder)])
    main()
    (row,) = json.loads((tmp_path / "out" / "train_step.json").read_text())["rows"]
    config = load_config(run_folder / "config.json")
    assert row["config"] == config.name
    assert row["ms_step"] == pytest.approx(row["ms_forward"] + row["ms_backward"] + row["ms_optimiser"], rel=0.5)
    assert row["images_per_s"] == pytest.approx(2e3 / row["ms_step"])
    # Every convolution again for its input and for its weights, but for what is frozen and the image.
    assert 2 * row["gflop_forward"] < row["gflop"] < 3.05 * row["gflop_forward"]
    rate = row["gflop"] / row["ms_step"] * 1e3
    assert row["of_peak_step"] == pytest.approx(rate / row["peak_gflops"])
    assert row["outside"] > -1 and row["gib"] > 0


def test_matrix_product():
    product, gflop = matrix_product(32, "float32")
    assert gflop == pytest.approx(2 * 32**3 / 1e9)
    out = np.asarray(product())
    assert out.shape == (32, 32) and np.isfinite(out).all() and out.std() == pytest.approx(32**0.5, rel=0.2)
