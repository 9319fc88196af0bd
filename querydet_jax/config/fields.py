"""Replace fields of nested dataclasses by dotted name, and read dataclasses from dictionaries, checking types.

Errors name the field; for an unknown key they suggest the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal

from querydet_jax.runtime.errors import ConfigError, shown

_LARGEST = 2**63  # of a number; the array libraries have no larger integers


def replace_field(node: Any, key: str, value: Any, root: type) -> Any:
    """Return a copy of the dataclass ``node`` with the field of dotted name ``key`` replaced.

    Args:
      root: the outermost dataclass, searched for the key in other groups.

    Raises:
      ConfigError: the key is unknown, or the value is of another type.
    """
    return _replace(node, key.split("."), value, key, root)


def from_dict(cls: type, raw: Any, where: str) -> Any:
    """Build the dataclass ``cls`` from nested dictionaries, as made by ``dataclasses.asdict``.

    Args:
      where: the file's name in messages.

    Raises:
      ConfigError: a key is unknown, or a value is not of the field's type.
    """
    return _from_dict(cls, raw, where, "", cls)


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return ``name old -> new`` for every field, by its dotted name, in which two dataclasses of a type differ."""
    found = []
    for field in dataclasses.fields(old):
        a, b, name = getattr(old, field.name), getattr(new, field.name), prefix + field.name
        if dataclasses.is_dataclass(a):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name} {_short(a)} -> {_short(b)}")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _replace(node: Any, parts: list[str], value: Any, full: str, root: type) -> Any:
    names = [f.name for f in dataclasses.fields(node)]
    head, rest = parts[0], parts[1:]
    if head not in names:
        above = full.split(".")[: -len(parts)]
        raise ConfigError(_unknown_key(full, head, names, "".join(f"{part}." for part in above), root))
    old = getattr(node, head)
    if rest:
        if not dataclasses.is_dataclass(old):
            raise ConfigError(f"{full}: {head} is a value, not a group; remove what follows it")
        new = _replace(old, rest, value, full, root)
    elif dataclasses.is_dataclass(old):
        if not isinstance(value, type(old)):
            raise ConfigError(f"{full}: is a group of fields; name one of {', '.join(_field_names(old))}")
        new = value
    else:
        new = _typed(typing.get_type_hints(type(node))[head], value, full)
    return dataclasses.replace(node, **{head: new})


def _unknown_key(full: str, key: str, names: list[str], prefix: str, root: type) -> str:
    # Prefer the same name in another group to a similar name.
    elsewhere = [p for p in _dotted(root) if p.split(".")[-1] == key]
    near = [prefix + name for name in difflib.get_close_matches(key, names, n=1, cutoff=0.4)]
    hint = next(iter(elsewhere + near), None)
    return f"unknown configuration key {full}: " + (
        f"did you mean {hint}?" if hint else f"the keys here are {', '.join(names)}"
    )


def _dotted(cls: type, prefix: str = "") -> list[str]:
    out = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            out += _dotted(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            out.append(prefix + name)
    return out


def _field_names(node: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(node)]


def _from_dict(cls: type, raw: Any, where: str, prefix: str, root: type) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'the file'} must be a group of fields")
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in hints:
            key = key if key.isidentifier() else shown(key)
            raise ConfigError(f"{where}: " + _unknown_key(prefix + key, key, list(hints), prefix, root))
    values = {}
    for key, value in raw.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = _from_dict(typing.cast(type, hint), value, where, f"{prefix}{key}.", root)
        else:
            values[key] = _typed(hint, value, f"{where}: {prefix}{key}")
    return cls(**values)


def _typed(hint: Any, value: Any, key: str) -> Any:
    """Check that ``value`` is of the declared type and return it; convert only int to float and list to tuple."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(value if isinstance(value, str) else "", [str(a) for a in args], n=1)
            raise ConfigError(
                f"{key}: {shown(value)} is not one of {', '.join(map(str, args))}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key}: expected a sequence, got {shown(value)}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_typed(args[0], v, key) for v in value)
        if len(value) != len(args):
            raise ConfigError(f"{key}: expected {len(args)} values, got {shown(value)}")
        return tuple(_typed(a, v, key) for a, v in zip(args, value, strict=True))
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _typed(next(a for a in args if a is not type(None)), value, key)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < _LARGEST else math.inf
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{key}: expected {hint.__name__}, got {shown(value)}")
    if isinstance(value, int | float) and not abs(value) < (math.inf if hint is float else _LARGEST):  # nan, too
        raise ConfigError(f"{key}: expected a finite number, got {shown(value)}")
    return value
