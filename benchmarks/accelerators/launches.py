"""What the host of a GPU does for one call of a program, counted in the texts that XLA writes of it.

XLA:GPU turns a program into a sequence of thunks. The host enqueues them one by one: kernels, convolutions, copies.
A command buffer (CUDA graph) holds many of them and is one launch. For a conditional or a turn of a loop outside of
command buffers the host waits until the device has computed the condition.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from benchmarks.accelerators.hlo import FREE, INSTRUCTION, NAME, array_bytes, computations

_THUNK = re.compile(r"( *)\d+: (k\w+)\b")
_WAITS = {"kConditional", "kWhile"}
_SORT = re.compile(r"= \(?\w+\[(?:\d+,)*(\d+)\]\S* .*?(?:\bsort\(|custom_call_target=\"__cub\$)")


class Launches(NamedTuple):
    """Thunks outside of command buffers; of a conditional all branches count, of a loop one turn.

    Attributes:
      launches: kernels, convolutions, copies and others that the host enqueues singly.
      convolutions: those of them that call cuDNN for a convolution.
      host_waits: conditionals and loops that the host drives.
      command_buffers: those that hold at least one thunk.
    """

    launches: int
    convolutions: int
    host_waits: int
    command_buffers: int


class Sorts(NamedTuple):
    """Sorts of a program, and the elements in one row of the largest (arrays are sorted along their last axis)."""

    count: int
    largest: int


def launches(text: str) -> Launches:
    """Count a thunk sequence, as XLA's dump writes it after its passes over thunks."""
    single = convolutions = waits = buffers = 0
    inside: int | None = None  # indentation of the command buffer that the line lies in
    for line in text.splitlines():
        found = _THUNK.match(line)
        if found is None:
            continue
        depth, kind = len(found[1]), found[2]
        if inside is not None and depth > inside:
            continue
        inside = None
        if kind == "kCommandBuffer":
            buffers, inside = buffers + 1, depth
        elif kind in _WAITS:
            waits += 1
        elif kind != "kSequential":  # a name for the thunks below it
            single += 1
            convolutions += kind == "kConvolution"
    return Launches(single, convolutions, waits, buffers)


def sorts(text: str) -> Sorts:
    """Count the sorts of an optimised program, ``compiled.as_text()``; those inside a fusion or a loop count once."""
    sizes = [int(found[1]) for found in map(_SORT.search, text.splitlines()) if found is not None]
    return Sorts(len(sizes), max(sizes, default=0))


def preparing_bytes(text: str) -> int:
    """Return the bytes read and written by operations on weights alone, which give the same in every call.

    Weights are the parameters of a floating type: pictures and their sizes are integers. All branches of a conditional
    count; loops do not.

    Args:
      text: an optimised program for a GPU, ``compiled.as_text()``.
    """
    blocks = {name: lines for name, lines in computations(text)}
    entry = next(name for name in blocks if re.search(rf"^ENTRY %?{re.escape(name)} ", text, re.MULTILINE))
    return _preparing(blocks, entry, None)


def _preparing(blocks: dict[str, list[str]], name: str, arguments: list[Any] | None) -> int:
    """Add up a computation's bytes; ``arguments`` says of each parameter, or of a tuple's parts, if it is weights."""
    fixed: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    total = 0
    for line in blocks[name]:
        found = INSTRUCTION.match(line)
        if found is None:
            continue
        result, kind, operation, inside, rest = found.groups()
        operands = NAME.findall(inside)
        known = [fixed.get(operand) for operand in operands]
        sizes[result] = array_bytes(kind)
        if operation == "parameter":
            weights = re.match(r"(bf16|f\d+)\[", kind) is not None
            fixed[result] = weights if arguments is None else arguments[int(inside)]
        elif operation == "constant":
            fixed[result] = None  # neither: it may join weights
        elif operation == "tuple":
            fixed[result] = known
        elif operation == "get-tuple-element":
            index = re.search(r"index=(\d+)", rest)
            fixed[result] = known[0][int(index[1])] if isinstance(known[0], list) and index else known[0]
        elif operation == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
            names = (
                re.findall(r"%?([\w.-]+)", branches[1]) if branches else re.findall(r"_computation=%([\w.-]+)", rest)
            )
            total += sum(_preparing(blocks, each, [given]) for each, given in zip(names, known[1:], strict=True))
            fixed[result] = False
        elif operation in ("while", "call"):
            fixed[result] = False
        else:
            alone = bool(known) and any(x is True for x in known) and all(x in (True, None) for x in known)
            fixed[result] = alone
            if alone and operation not in FREE:
                total += sizes[result] + sum(sizes.get(operand, 0) for operand in operands)
    return total
