"""Each primitive of a traced detector in ONNX operators.

Every shape stays static. A primitive without a translation here is refused by name. ``control`` walks through a trace;
the other modules hold a table of translations each.
"""

from querydet_jax.inference.export.onnx_operators.control import translate_closed

__all__ = ["translate_closed"]
