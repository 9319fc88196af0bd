"""Export a detector to one file that runs without querydet_jax.

``writer`` writes programs for jax, ``artifact`` reads and runs them; ``onnx_writer`` writes an ONNX graph,
``onnx_detector`` runs it. ``artifact`` and ``onnx_detector`` import nothing of this package, so that they can be copied
into other programs.
"""
