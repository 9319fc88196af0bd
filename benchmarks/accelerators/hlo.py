"""Memory traffic and cycle estimates of an optimised TPU program, read from its text.

XLA's cost analysis adds up what operations read and write in any memory. A TPU program keeps much of that on the chip,
marked in an array's layout: ``S(1)`` is VMEM, ``S(3)`` v4's CMEM. A roofline is about the rest, which crosses the bus
to HBM, the main memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16}
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+)\[([\d,]*)\](?:\{([^}]*)\})?")
# Name, type, operation, operands, and what follows them.
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\(([^)]*)\)(.*)")
NAME = re.compile(r"%([\w.-]+)")  # of an operand
_ON_CHIP = re.compile(r"S\([13]\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Operations that move nothing themselves. Asynchronous copies are counted at their start.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}


class Traffic(NamedTuple):
    """Bytes read and written in main memory and on the chip, and the sum of the compiler's cycle estimates."""

    hbm_bytes: int
    on_chip_bytes: int
    cycles: int


def traffic(text: str) -> Traffic:
    """Return the traffic of a scheduled TPU program, ``compiled.as_text()``.

    Each operand and the result of an instruction count once, in full; the inside of a fusion stays in registers. Each
    computation counts once: one turn of a loop, and every branch of a conditional.
    """
    sums = [0, 0]
    cycles = 0
    for _, lines in computations(text):
        sizes: dict[str, list[tuple[int, bool]]] = {}
        for line in lines:
            found = INSTRUCTION.match(line)
            if found is None:
                continue
            name, result, operation, operands, _ = found.groups()
            sizes[name] = _arrays(result)
            cycles += sum(map(int, _CYCLES.findall(line)))
            if operation in FREE or operation.endswith("-done"):
                continue
            if operation in (
                "copy-start",
                "slice-start",
            ):  # its result holds source and destination, of which one may be a slice
                (one, here), (other, there) = sizes[name][:2]
                moved = [(min(one, other), here), (min(one, other), there)]
            else:
                moved = [size for operand in NAME.findall(operands) for size in sizes.get(operand, [])]
                moved += sizes[name]
            for size, on_chip in moved:
                sums[on_chip] += size
    return Traffic(sums[0], sums[1], cycles)


def computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield name and lines of each computation that is not the inside of a fusion."""
    fused = set(re.findall(r"\bfusion\(.*?\bcalls=%?([\w.-]+)", text))
    for block in re.split(r"\n\s*\n", text):
        head, *lines = block.strip("\n").split("\n")
        name = re.match(r"(?:ENTRY )?%?([\w.-]+) \(", head)
        if name is not None and name[1] not in fused:
            yield name[1], lines


def array_bytes(type_text: str) -> int:
    """Return the bytes of the arrays of a type."""
    return sum(size for size, _ in _arrays(type_text))


def _arrays(type_text: str) -> list[tuple[int, bool]]:
    """Return the bytes of each array of a type, and whether it lies on the chip."""
    found = []
    for kind, shape, layout in _ARRAY.findall(type_text):
        count = 1
        for side in filter(None, shape.split(",")):
            count *= int(side)
        bits = _BITS.get(kind) or int(kind[1:])
        found.append((count * bits // 8, _ON_CHIP.search(layout) is not None))
    return found
