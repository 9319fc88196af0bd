"""What an optimised TPU program says about itself in its text: memory traffic and the compiler's cycles.

XLA's cost analysis adds up what operations read and write wherever it lies. A TPU program keeps much of that in memory
on the chip, marked in a layout: ``S(1)`` is VMEM, ``S(3)`` v4's CMEM. Only the rest crosses the bus to HBM, the main
memory, which a roofline is about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16}
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\(([^)]*)\)")
_ON_CHIP = re.compile(r"S\([13]\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# No work of their own. The ends of asynchronous copies, whose starts are counted; what is done by other computations.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}


class Traffic(NamedTuple):
    """hbm_bytes: read from and written to main memory; on_chip_bytes: memory on the chip; cycles: the sum of the
    compiler's estimates, one instruction after another."""

    hbm_bytes: int
    on_chip_bytes: int
    cycles: int


def traffic(text: str) -> Traffic:
    """Traffic of a scheduled TPU program, ``compiled.as_text()``.

    Every operand of an instruction counts whole, once, and so does its result; what happens inside a fusion stays in
    registers. Every computation counts once, so a loop's body is one turn and all branches of a conditional count.
    """
    sums = [0, 0]
    cycles = 0
    for lines in _computations(text):
        sizes: dict[str, list[tuple[int, bool]]] = {}
        for line in lines:
            found = _INSTRUCTION.match(line)
            if found is None:
                continue
            name, result, operation, operands = found.groups()
            sizes[name] = _arrays(result)
            cycles += sum(map(int, _CYCLES.findall(line)))
            if operation in _FREE or operation.endswith("-done"):
                continue
            if operation in (
                "copy-start",
                "slice-start",
            ):  # its result holds source and destination, of which one may be a slice
                (one, here), (other, there) = sizes[name][:2]
                moved = [(min(one, other), here), (min(one, other), there)]
            else:
                moved = [size for operand in re.findall(r"%([\w.-]+)", operands) for size in sizes.get(operand, [])]
                moved += sizes[name]
            for size, on_chip in moved:
                sums[on_chip] += size
    return Traffic(sums[0], sums[1], cycles)


def _computations(text: str) -> Iterator[list[str]]:
    """The lines of each computation that is not the inside of a fusion."""
    fused = set(re.findall(r"\bfusion\(.*?\bcalls=%?([\w.-]+)", text))
    for block in re.split(r"\n\s*\n", text):
        head, *lines = block.strip("\n").split("\n")
        name = re.match(r"(?:ENTRY )?%?([\w.-]+) \(", head)
        if name is not None and name[1] not in fused:
            yield lines


def _arrays(type_text: str) -> list[tuple[int, bool]]:
    """Bytes of each array of a type, and whether it lies on the chip."""
    found = []
    for kind, shape, layout in _ARRAY.findall(type_text):
        count = 1
        for side in filter(None, shape.split(",")):
            count *= int(side)
        bits = _BITS.get(kind) or int(kind[1:])
        found.append((count * bits // 8, _ON_CHIP.search(layout) is not None))
    return found
