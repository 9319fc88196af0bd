"""Data sets, image transforms and batches."""

from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.loader import eval_batches, train_batches
from querydet_jax.data.sources import check_classes, open_dataset, open_split

__all__ = ["Annotation", "Dataset", "check_classes", "eval_batches", "open_dataset", "open_split", "train_batches"]
