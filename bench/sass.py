"""What loops cost, read from a listing of NVIDIA machine code (cuobjdump -sass).

sweep   the straight code that takes one whole group of columns: it begins with a block that
        accesses global memory 16 bytes at a time, and goes on to the next conditional branch
trip    the shortest way from a 16-byte load round its loop and back: the tile that nearly all
        tiles are, past branches that are rarely taken (the end of a row, infinite logits)
"""

from __future__ import annotations

import heapq
import re
from typing import NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_ENDS = ("EXIT", "RET", "BRA", "BRX", "JMP")


class Instruction(NamedTuple):
    """One line of a listing, as far as control flow and memory need it."""

    address: int
    opcode: str
    operands: str
    predicated: bool

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch leads to."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def conditional(self) -> bool:
        """Whether a branch may not be taken: a predicate before it, or among its operands."""
        return self.predicated or (self.name != "EXIT" and ", " in self.operands.strip())

    def is_wide(self, opcode: str) -> bool:
        """Whether it moves 16 bytes of a thread between global memory and registers."""
        return self.opcode.startswith(opcode) and ".128" in self.opcode


class Sweep(NamedTuple):
    """The code that takes one group: bytes read and written, and instructions, an element."""

    read: float
    written: float
    instructions: float
    spills: int  # accesses of local memory


def instructions(sass: str) -> list[Instruction]:
    return [Instruction(int(m[1], 16), m[3], m[4], bool(m[2])) for m in _LINE.finditer(sass)]


def find_sweeps(sass: str, elements: int) -> list[Sweep]:
    """Sweeps of a listing, in order, by a thread that takes so many elements of a group.

    A mask is a predicate, so the part of a row that has one is no sweep; nor are stores of RZ,
    which clear.
    """
    blocks = _blocks(instructions(sass))
    order = list(blocks)

    def onwards(address: int) -> list[Instruction]:
        block, after = blocks[address], order.index(address) + 1
        last = block[-1]
        if last.name in ("EXIT", "RET") or (last.name == "BRA" and last.conditional):
            return block
        if last.target is None:
            return block + (onwards(order[after]) if after < len(order) else [])
        return block + (onwards(last.target) if last.target > address else [])

    def moved(block: list[Instruction], opcode: str) -> float:
        whole = (i for i in block if not i.predicated and ", RZ" not in i.operands)
        return 16 * sum(i.is_wide(opcode) for i in whole) / elements

    sweeps = []
    for address, block in blocks.items():
        read, written = moved(block, "LDG"), moved(block, "STG")
        if read or written:
            code = onwards(address)
            spills = sum(i.name in ("LDL", "STL") for i in code)
            sweeps.append(Sweep(read, written, round(len(code) / elements, 2), spills))
    return sweeps


def _blocks(listing: list[Instruction]) -> dict[int, list[Instruction]]:
    """The straight pieces of a listing, each by its first address."""
    targets = {i.target for i in listing}
    blocks: dict[int, list[Instruction]] = {}
    fresh = True
    for instruction in listing:
        if fresh or instruction.address in targets:
            block = blocks.setdefault(instruction.address, [])
        block.append(instruction)
        fresh = instruction.name in _ENDS
    return blocks


def shortest_trip(sass: str) -> int:
    """Instructions of the shortest cycle through a 16-byte global load; 0 where there is none."""
    listing = instructions(sass)
    following = _following(listing)
    best = 0
    for start in (i.address for i in listing if i.is_wide("LDG")):
        cost = {start: 0}
        queue = [(0, start)]
        while queue:
            done, address = heapq.heappop(queue)
            if address == start and done:
                best = min(best, done) if best else done
                break
            for after in following[address]:
                if after == start or done + 1 < cost.get(after, 1 << 30):
                    cost[after] = done + 1
                    heapq.heappush(queue, (done + 1, after))
    return best


def _following(listing: list[Instruction]) -> dict[int, list[int]]:
    """The addresses that may follow each."""
    addresses = [i.address for i in listing]
    following: dict[int, list[int]] = {}
    for instruction, after in zip(listing, [*addresses[1:], None], strict=True):
        falls = instruction.name not in _ENDS or instruction.conditional
        way = (instruction.target, after if falls else None)
        following[instruction.address] = [address for address in way if address is not None]
    return following
