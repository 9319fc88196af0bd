"""The notebook runs from top to bottom, and the cascade by hand finds what the compiled detector finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[2] / "examples" / "csq_by_hand.ipynb"


def test_the_cascade_by_hand_equals_the_detector():
    namespace: dict[str, Any] = {}
    shortened = 0
    for i, cell in enumerate(json.loads(NOTEBOOK.read_text())["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "commit the notebook without outputs"
            source = "".join(cell["source"])
            shortened += source.count('"train.steps": 200')  # what it shows needs a trained model, what it computes not
            source = source.replace('"train.steps": 200', '"train.steps": 20')
            exec(compile(source, f"{NOTEBOOK.name}, cell {i}", "exec"), namespace)
    assert shortened == 1
    assert max(namespace["differences"]) < 1e-4
    assert namespace["largest"] < 1e-4
    assert namespace["n"] > 0 and len(namespace["keep"]) > 0
