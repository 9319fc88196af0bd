"""Export a detector to one file that runs without querydet_jax.

``writer`` writes the file, ``command`` is `export.py`. ``artifact`` reads and runs the file; it imports
nothing of this package, so that it can be copied into other programs.
"""
