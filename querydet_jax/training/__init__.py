"""Training: the loop, the step and its state, schedule, replication over devices and hosts, checkpoints."""

from querydet_jax.training.loop import train

__all__ = ["train"]
