"""The PTX that copies rows, run instruction by instruction for some threads."""

import re

import numpy as np
import pytest

from draft_jax.grid import VideoGrid
from pallas_kernels.attention.sm90.copies import SingleRows
from pallas_kernels.attention.sm90.geometry import geometry_of
from pallas_kernels.attention.sm90.plan import BLOCK
from pallas_kernels.attention.sm90.row_copies import (
    CHUNK,
    _Copies,
    _fetch_code,
    _store_code,
)
from tests.cases import mostly_nightly

THREADS = 128
SOME_THREADS = (*range(0, THREADS, 9), 7, 8, 15, 16, 127)
NO_TOKEN = -1
GRIDS = {  # none is read by TMA, in either order
    "odd-tiles-and-text": VideoGrid(2, 15, 26, text_length=13),
    "odd-text": VideoGrid(1, 16, 32, text_length=77),
    "odd-text-before": VideoGrid(1, 8, 48, text_length=131, text_side="before"),
    "fewer-than-a-block": VideoGrid(1, 3, 21, text_length=5),
    "narrow-frames": VideoGrid(2, 6, 11),
}


class Thread:
    """Runs PTX: integer arithmetic, forward branches, and 16-byte copies.

    Global memory holds at each chunk its token, counted from 0, and its number in the
    token's row; shared memory is a dictionary.
    """

    def __init__(self, code, operands, copies):
        self.values = dict(enumerate(operands))
        self.copies = copies
        self.fetched, self.stored = {}, {}
        lines = [x.strip() for x in re.split(r"[;\n]", code)]
        self.lines = [x for x in lines if x and x[0] not in ".{}"]

    def value(self, name):
        name = name.strip()
        if name[0] == "$":
            return int(self.values[int(name[1:])])
        return int(name) if re.fullmatch(r"-?\d+", name) else self.values[name]

    def run(self):
        at = 0
        while at < len(self.lines):
            line = self.lines[at]
            at += 1
            if line.endswith(":"):
                continue
            if guard := re.match(r"@(\w+) ", line):
                if not self.values[guard[1]]:
                    continue
                line = line[guard.end() :]
            name, rest = line.split(" ", 1)
            if name == "bra":
                at = self.lines.index(rest + ":")
            else:
                self.execute(name, [x.strip() for x in re.split(r",(?![^{]*})", rest)])
        return self

    def execute(self, name, operands):
        if name.startswith("cp.async"):
            size = self.value(operands[3]) if len(operands) > 3 else CHUNK
            self.fetched[self.place(operands[0])] = self.load(operands[1], size)
            return
        if name.startswith("ld.shared"):
            self.values["chunk"] = self.place(operands[1])
            return
        if name.startswith("st.global"):
            self.stored[self.load(operands[0], CHUNK)] = self.values["chunk"]
            return
        target, *given = operands
        a, b, *c = (self.value(x) for x in given)
        self.values[target] = {
            "add": lambda: a + b,
            "sub": lambda: a - b,
            "mul": lambda: a * b,
            "mad": lambda: a * b + c[0],
            "min": lambda: min(a, b),
            "shr": lambda: a >> b,
            "selp": lambda: a if c[0] else b,
            "setp.ne": lambda: a != b,
            "setp.lt": lambda: a < b,
            "setp.ge": lambda: a >= b or bool(c and c[0]),
        }[re.match(r"setp\.\w+|\w+", name)[0]]()
        if ".wide" not in name and "64" not in name and target != "other":
            assert -(2**31) <= self.values[target] < 2**31

    def place(self, operand):
        base, offset = operand.strip("[]").split("+")
        return self.value(base) + self.value(offset)

    def load(self, operand, size):
        """Which token and chunk an address is; it must be within the array."""
        base, *offset = operand.strip("[]").split("+")
        address = self.value(base) + sum(map(self.value, offset))
        token, byte = divmod(address, self.copies.token_bytes)
        assert 0 <= token < self.copies.num_tokens
        return (token, byte // CHUNK) if size else (NO_TOKEN, 0)


def threads_of(code, grid, addresses, block, first, num_rows, head_dim):
    """Some threads of a warpgroup after they ran the code for some rows."""
    per_row = 2 * head_dim // CHUNK
    rows_at_once = THREADS // per_row
    copies = _Copies(
        places=tuple(1000 * i for i in range(num_rows // rows_at_once)),
        rows_at_once=rows_at_once,
        token_bytes=6 * head_dim,  # of three heads
        num_tokens=grid.num_tokens,
    )
    found = (*addresses, grid.block_lengths)
    for thread in SOME_THREADS:
        row, chunk = divmod(thread, per_row)
        operands = (0, CHUNK * chunk, first + row, *(x[block] for x in found))
        yield row, chunk, rows_at_once, Thread(code(copies), operands, copies).run()


def cases(grid):
    """Query rows of both consumers, and key blocks of a few widths."""
    for block in range(grid.num_blocks):
        yield block, 0, 64
        yield block, 64, 64
        yield block, 0, -(-int(grid.block_lengths[block]) // 16) * 16


@pytest.mark.parametrize("head_dim", mostly_nightly([64, 128], [128]))
@pytest.mark.parametrize("order", ["tiled", "raster"])
@pytest.mark.parametrize(
    "name", mostly_nightly(GRIDS, ["odd-tiles-and-text", "odd-text-before"])
)
def test_fetch_and_store(name, order, head_dim):
    grid = GRIDS[name]
    geometry = geometry_of(grid, order)
    assert isinstance(geometry.copies, SingleRows)
    tokens = np.arange(grid.num_tokens) if order == "tiled" else grid.tile_order
    for block, first, num_rows in cases(grid):
        start, length = int(grid.block_starts[block]), int(grid.block_lengths[block])
        sizes = (grid, geometry.addresses, block, first, num_rows, head_dim)
        for row, chunk, step, thread in threads_of(_fetch_code, *sizes):
            rows = first + row + step * np.arange(num_rows // step)
            assert sorted(thread.fetched) == [1000 * i for i in range(len(rows))]
            for i, own in enumerate(rows):
                if own < length:
                    assert thread.fetched[1000 * i] == (tokens[start + own], chunk)
        if num_rows != 64:
            continue
        for row, chunk, step, thread in threads_of(_store_code, *sizes):
            rows = first + row + step * np.arange(num_rows // step)
            assert thread.stored == {
                (tokens[start + own], chunk): 1000 * i
                for i, own in enumerate(rows)
                if own < length
            }


def test_blocks_of_common_runs_and_others_are_tested():
    tiled = geometry_of(GRIDS["odd-text"], "tiled").addresses
    raster = geometry_of(GRIDS["odd-tiles-and-text"], "raster").addresses
    runs = set(np.round(2**16 / raster.reciprocal).astype(int).tolist())
    assert runs == {16, 10, BLOCK}
    assert set(tiled.reciprocal.tolist()) == {2**16 // BLOCK}
