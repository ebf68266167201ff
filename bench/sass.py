"""What a loop costs, read from SASS: the instructions of its shortest trip.

A loop over a row loads it 16 bytes at a time and has branches that are rarely taken (the end of a
row, logits that are not finite). The shortest way from the wide loads around the loop and back to
them is the trip that nearly all tiles make.
"""

import heapq
import re

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_ENDS = ("EXIT", "RET", "BRA", "BRX", "JMP")


def _graph(sass: str) -> tuple[dict[int, str], dict[int, list[int]]]:
    """Opcode at each address, and the addresses that may follow it."""
    lines = [(int(m[1], 16), m[2], m[3], m[4]) for m in _LINE.finditer(sass)]
    opcodes, following = {}, {}
    for n, (address, predicate, opcode, operands) in enumerate(lines):
        opcodes[address] = opcode
        name = opcode.split(".")[0]
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if name == "BRA" else None
        following[address] = [int(target[1], 16)] if target else []
        falls = predicate or name not in _ENDS or ", " in operands.strip()
        if (falls and n + 1 < len(lines) and name != "EXIT") or (name == "EXIT" and predicate):
            following[address].append(lines[n + 1][0])
    return opcodes, following


def shortest_trip(sass: str) -> int:
    """Instructions of the shortest cycle through a 16-byte global load; 0 where there is none."""
    opcodes, following = _graph(sass)
    best = 0
    for start in (a for a, op in opcodes.items() if op.startswith("LDG") and ".128" in op):
        cost = {start: 0}
        queue = [(0, start)]
        while queue:
            done, address = heapq.heappop(queue)
            if address == start and done:
                best = min(best, done) if best else done
                break
            for after in following.get(address, ()):
                if after == start or done + 1 < cost.get(after, 1 << 30):
                    cost[after] = done + 1
                    heapq.heappush(queue, (done + 1, after))
    return best
