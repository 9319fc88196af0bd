"""Training: state, schedule, the step, its replication over devices, checkpoints, the loop."""

from querydet_jax.training.loop import train

__all__ = ["train"]
