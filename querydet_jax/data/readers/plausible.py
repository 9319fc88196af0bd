"""Boxes that are well formed but hardly meant: what a reader says about them."""

from __future__ import annotations

import logging

import numpy as np

_log = logging.getLogger("querydet_jax")


def say_what_is_odd(
    where: str, written: np.ndarray, corners: np.ndarray, sides: np.ndarray, keys: np.ndarray, slack: float, form: str
) -> None:
    """Log how many boxes of a data set reach beyond their image, and how many are there more than once.

    Args:
      where: the data set in messages.
      written: the four numbers of each box as in the file, [n, 4].
      corners: the boxes as read, x1, y1, x2, y2 in the units of ``sides``, [n, 4].
      sides: width and height of each box's image, [n, 2].
      keys: what tells boxes apart besides their place: image and class, [n, 2].
      slack: how far rounding may push a box out of its image.
      form: what the four numbers are, in words.
    """
    beyond = ((corners[:, :2] < -slack) | (corners[:, 2:] > sides + slack)).any(axis=1)
    count = np.count_nonzero(beyond)
    if count:
        fit = (written[:, 2:] > written[:, :2]) & (written[:, 2:] <= sides + slack) & (written[:, :2] >= -slack)
        hint = f"; all would fit as x1, y1, x2, y2, but the format's are {form}: check the export" if fit.all() else ""
        _log.log(
            logging.WARNING if hint else logging.INFO, "%s: %s of %s boxes reach beyond their image and are cut off%s",
            where, f"{count:,}", f"{len(corners):,}", hint,
        )  # fmt: skip
    rows = np.concatenate([keys, written], axis=1)
    # Equal rows have equal sums and so become neighbours; sorting by all columns takes ten times as long.
    ordered = rows[np.argsort((rows * np.sqrt([2, 3, 5, 7, 11, 13])).sum(axis=1), kind="stable")]
    again = int((ordered[1:] == ordered[:-1]).all(axis=1).sum())
    if again:
        _log.warning(
            "%s: %s of %s boxes repeat another of the same image, class and place; remove them, or scores count each",
            where, f"{again:,}", f"{len(rows):,}",
        )  # fmt: skip
