"""Training: state, schedule, the step, its replication over devices and hosts, checkpoints, the loop."""

from querydet_jax.training.loop import train

__all__ = ["train"]
