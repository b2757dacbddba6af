"""A model of CUDA's caching allocator: how much memory it reserves for given tensors."""

import bisect
import math
from collections import defaultdict


class OutOfMemory(Exception):
    pass


class Block:
    def __init__(self, size: int, segment: int, start: int, small: bool) -> None:
        self.key = size, segment, start  # the best fit is first, then the lowest address
        self.small = small
        self.before = self.after = None
        self.free = True


def by_key(block: Block) -> tuple[int, int, int]:
    return block.key


class Allocator:
    """CUDA's caching allocator as torch documents it, on one stream."""

    def __init__(self, capacity: float = math.inf) -> None:
        self.capacity = capacity
        self.reserved = 0
        self.segments = 0
        self.free = {True: [], False: []}  # blocks, small and large, sorted

    def allocate(self, size: int) -> Block:
        size = -(-size // 512) * 512
        small = size <= 2**20
        free = self.free[small]
        at = bisect.bisect_left(free, (size, -1, -1), key=by_key)
        block = free.pop(at) if at < len(free) else self.segment(size, small)
        whole, segment, start = block.key
        if whole - size >= 512 if small else whole - size > 2**20:  # split
            block.key = size, segment, start
            rest = Block(whole - size, segment, start + size, small)
            rest.before, rest.after = block, block.after
            if rest.after:
                rest.after.before = rest
            block.after = rest
            bisect.insort(free, rest, key=by_key)
        block.free = False
        return block

    def segment(self, size: int, small: bool) -> Block:
        """Reserve 2 MiB for small blocks, 20 MiB for middle ones, else a multiple of 2 MiB."""
        size = 2**21 if small else 20 * 2**20 if size < 10 * 2**20 else -(-size // 2**21) * 2**21
        if self.reserved + size > self.capacity:  # give unused segments back
            for free in self.free.values():
                for block in [x for x in free if not x.before and not x.after]:
                    free.remove(block)
                    self.reserved -= block.key[0]
        if self.reserved + size > self.capacity:
            raise OutOfMemory
        self.reserved += size
        self.segments += 1
        return Block(size, self.segments, 0, small)

    def release(self, block: Block) -> None:
        free = self.free[block.small]
        block.free = True
        for other in (block.before, block.after):  # merge with free neighbours
            if other and other.free:
                free.remove(other)
                first, second = (other, block) if other is block.before else (block, other)
                first.key = first.key[0] + second.key[0], *first.key[1:]
                first.after = second.after
                if first.after:
                    first.after.before = first
                block = first
        bisect.insort(free, block, key=by_key)


def replay(events: list, capacity: float = math.inf) -> dict[str, tuple[int, int]]:
    """Return the peaks of each phase: bytes in use, and reserved. Raises OutOfMemory."""
    allocator = Allocator(capacity)
    blocks = {}
    live = 0
    peaks = defaultdict(lambda: (0, 0))
    for phase, number, size in events:
        if size:
            blocks[number] = allocator.allocate(size), size
            live += size
        else:
            block, size = blocks.pop(number)
            allocator.release(block)
            live -= size
        peaks[phase] = max(peaks[phase][0], live), max(peaks[phase][1], allocator.reserved)
    return peaks
