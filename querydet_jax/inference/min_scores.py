"""The score from which a detection counts, by class: ``--min-score``. K classes."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from querydet_jax.data.classes import plain
from querydet_jax.inference.export.exported import Exported
from querydet_jax.runtime.errors import ConfigError, shown
from querydet_jax.runtime.reading import numbers, read_json
from querydet_jax.runtime.stores import as_path, is_url

DEFAULT = 0.3
"""For a class of which nothing is known."""
BEST = "best"
REPORT = "report.json"  # of `querydet eval`, in a run's folder

_log = logging.getLogger("querydet_jax")


def min_scores(
    value: str | float | Mapping[str, float],
    classes: Sequence[str],
    source: str | Path | Exported | Mapping[str, float] | None = None,
    *,
    query: str = "",
    name: str = "--min-score",
) -> np.ndarray:
    """Turn ``--min-score`` into one score per class; a detection counts if its score is at least its class's.

    Args:
      value: a score for all classes, as number or text; ``best``, the scores with the largest F1 in the last
        evaluation of ``source``; ``Person=0.4,Car=0.2`` or a dictionary for some classes, after a score or ``best`` for
        the others (``best,Car=0.2``; without it 0.3). Empty: the scores of an exported file that has some,
        otherwise 0.3.
      classes: class names ``[K]``.
      source: where ``best`` is looked up: a run folder or a weight file in one, an exported file, or scores by class
        name.
      query: the method that detects (dense, csq ..); a run stores scores for each one evaluated.
      name: what messages call the value.

    Returns:
      float32 ``[K]``. A class without a best score, since nothing of it was found or none was there, has 0.3, which is
      logged, as are scores of another step than the newest, of some of the images, or of another method.

    Raises:
      ConfigError: the value is none of these, a score is not from 0 to 1, a class is unknown, or ``source`` has no
        best scores.
    """
    if isinstance(value, Mapping):
        common, own = "", {str(key): score for key, score in value.items()}
    elif isinstance(value, str):
        common, own = _parsed(value.strip(), classes, name)
    else:
        common, own = value, {}
    if common == "":
        stored = isinstance(source, Exported) and source.min_scores is not None
        common = BEST if stored and not own else DEFAULT
    if common == BEST:
        out = _best(classes, source, query, name)
    else:
        out = np.full(len(classes), _score(common, name), np.float32)
    for key, score in own.items():
        out[_position(key, classes, name)] = _score(score, f"{name} {key}")
    return out


def _parsed(text: str, classes: Sequence[str], name: str) -> tuple[str | float, dict[str, float]]:
    """Return the score of all classes ("": not given) and those of some; names may hold commas and equals signs."""
    common: str | float = ""
    own: dict[str, float] = {}
    known, pending = {plain(c) for c in classes}, ""
    for n, piece in enumerate(text.split(",") if text else ()):
        pending += f",{piece}" if pending else piece
        head, equals, tail = (part.strip() for part in pending.rpartition("="))
        value = numbers([tail])
        if not equals and n == 0 and (tail == BEST or value):
            common = value[0] if value else BEST
        elif equals and value:
            if head in own:
                raise ConfigError(f"{name} {text}: names {head} twice; give each class once")
            own[head] = value[0]
        elif equals and plain(head) in known:
            raise ConfigError(f"{name} {pending.strip()}: {shown(tail)} is no score; give a number from 0 to 1")
        else:
            continue
        pending = ""
    if pending:
        raise ConfigError(
            f"{name} {shown(pending)}: is no score; give a number from 0 to 1, {BEST}, or CLASS=NUMBER,CLASS=NUMBER "
            f"after an optional number or {BEST} for the other classes"
        )
    return common, own


def _position(key: str, classes: Sequence[str], name: str) -> int:
    names = [plain(c) for c in classes]
    if plain(key) in names:
        return names.index(plain(key))
    near = difflib.get_close_matches(key, classes, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the classes are {', '.join(classes[:8])}"
    raise ConfigError(f"{name}: no class {shown(key)}; {hint}")


def _score(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
        text = f"{value:g}" if isinstance(value, float) else shown(value)
        raise ConfigError(f"{where} {text}: give a score from 0 to 1")
    return float(value)


def _best(classes: Sequence[str], source: Any, query: str, name: str) -> np.ndarray:
    if isinstance(source, Exported):
        if source.min_scores is None:
            raise ConfigError(
                f"{name} {BEST}: {source.path} holds none; export it again with `querydet export RUN --min-score "
                f"{BEST}`, or give a number"
            )
        return source.min_scores.copy()
    if isinstance(source, Mapping):
        where, of_class = "the scores given", dict(source)
    elif source is None:
        raise ConfigError(
            f"{name} {BEST}: these weights come from no run folder, so no evaluation of them is known; give numbers"
        )
    else:
        where, of_class = str(source), _of_run(as_path(source), query, name)
    known = {plain(key): _score(value, f"{where}: {key}:") for key, value in of_class.items() if value is not None}
    lacking = [c for c in classes if plain(c) not in known]
    if lacking:
        _log.warning(
            "%s: no best score for %s, of which nothing was found or none was there; %g is used", where,
            ", ".join(lacking), DEFAULT,
        )  # fmt: skip
    return np.array([known.get(plain(c), DEFAULT) for c in classes], np.float32)


def _of_run(weights: Path, query: str, name: str) -> dict[str, float | None]:
    """Return {class: score or None} of a run's last evaluation, and log what to know about it."""
    folder = weights.parent if weights.is_file() else weights
    path, again = folder / REPORT, f"run `querydet eval {folder}`"
    if not path.is_file():
        raise ConfigError(f"{name} {BEST}: {folder} holds no evaluation; {again} first, or give a number")
    report = read_json(path, ConfigError)
    methods = report.get("methods") if isinstance(report, dict) else None
    stored = {
        key: method["best_thresholds"]
        for key, method in (methods.items() if isinstance(methods, dict) else ())
        if isinstance(method, dict) and isinstance(method.get("best_thresholds"), dict)
    }
    if not stored:
        raise ConfigError(f"{name} {BEST}: {path} holds no best thresholds (an older version wrote it); {again} again")
    method = query if query in stored else next(iter(stored))
    scores: dict[str, float | None] = {}
    for key, entry in stored[method].items():
        if entry is not None and not isinstance(entry, dict):
            raise ConfigError(f"{path}: best_thresholds of {key}: {shown(entry)} is no entry; {again} again")
        scores[key] = None if entry is None else _score(entry.get("score"), f"{path}: best_thresholds of {key}:")
    if query and method != query:
        _log.warning("%s: %s was not evaluated; the best scores of %s are used", path, query, method)
    if report.get("images", "all") != "all":
        _log.warning("%s: the best scores come from %s images alone; %s for all", path, shown(report["images"]), again)
    _warn_of_other_weights(weights, path, report, again)
    return scores


def _warn_of_other_weights(weights: Path, path: Path, report: dict[str, Any], again: str) -> None:
    from querydet_jax.runtime.checkpoint_store import newest_step  # imports orbax, which takes a second

    step = report.get("step")
    evaluated = f"{shown(report.get('weights'))}" if step is None else f"step {shown(step)}"
    if weights.is_file():
        same = step is None and Path(str(report.get("weights"))).name == weights.name
        if not same or (not is_url(weights) and weights.stat().st_mtime > path.stat().st_mtime):
            known = f"{evaluated}, not of {weights.name}" if not same else f"an earlier {weights.name}"
            _log.warning("%s: the best scores are those of %s; %s --weights %s again", path, known, again, weights)
    elif step != (newest := newest_step(weights)):
        now = "no checkpoint is there" if newest is None else f"the newest is {newest}"
        _log.warning("%s: the best scores are those of %s, %s; %s again", path, evaluated, now, again)
