"""What a data set asks of a detector: `python -m querydet_jax.data report`. No image is read."""
