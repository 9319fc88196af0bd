"""One file from pictures to detections, for programs without querydet_jax.

``artifact`` reads and runs it and imports nothing of this package: it is the file to take along. ``writer``
makes it from a detector, ``command`` is `export.py`.
"""
