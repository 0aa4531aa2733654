"""What counts as a move of a token-sized array in a compiled program."""

import pytest

from benchmarks.common.moves import token_sized_moves

PROGRAM = """
  %x.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %copy.1 = bf16[4,8]{0,1} copy(%x.1)
  %transpose.2 = f32[8,4]{1,0} transpose(%x.1), dimensions={1,0}
  %slice.3 = bf16[4,7]{1,0} slice(%x.1), slice={[0:4], [0:7]}
  %fusion.4 = bf16[4,8]{1,0} fusion(%x.1), kind=kLoop, calls=%gather
"""
BUFFER = """
  %buffer = f32[9,8]{1,0} parameter(0)
  %large = f32[4,8]{1,0} parameter(1)
  %small = f32[1,8]{1,0} parameter(2)
"""
CASES = {
    "several results": (
        "%sort.1 = (f32[4,8]{1,0}, s32[4,8]{1,0}) sort(%x, %i), dimensions={1}",
        ["sort [4,8]"],
    ),
    "small results": (
        "%sort.1 = (f32[4,7]{1,0}, s32[4,7]{1,0}) sort(%x, %i), dimensions={1}",
        [],
    ),
    "copy-start": (
        "%copy-start.1 = (bf16[4,8]{1,0:S(5)}, bf16[4,8]{1,0}, u32[]) "
        "copy-start(bf16[4,8]{1,0} %x.1)",
        ["copy-start [4,8]"],
    ),
    "copy-done": (  # counted where it starts
        "%copy-done.1 = bf16[4,8]{1,0:S(5)} copy-done(%copy-start.1)",
        [],
    ),
    "large update": (
        "ROOT %dynamic_update_slice.1 = f32[9,8]{1,0} dynamic-update-slice("
        '%buffer, %large, %i, %j), metadata={op_name="jit(f)/scan"}',
        ["dynamic-update-slice [4,8]"],
    ),
    "small update": (  # of a large array, in place
        "%dynamic_update_slice.1 = f32[9,8]{1,0} dynamic-update-slice("
        "f32[9,8]{1,0} %buffer, f32[1,8]{1,0} %small, s32[] %i, s32[] %j)",
        [],
    ),
    "scalar": ("%copy.1 = s32[] copy(%i)", []),
    "many results, none moved": (
        "%while.1 = (f32[4,8]{1,0}, /*index=1*/s32[]) while(%tuple.1), body=%copy",
        [],
    ),
}


def test_large_moves_are_found_and_others_are_not():
    found = token_sized_moves(PROGRAM, 32)
    assert found == ["copy [4,8]", "transpose [8,4]"]
    assert token_sized_moves(PROGRAM, 28)[-1] == "slice [4,7]"


@pytest.mark.parametrize("case", CASES)
def test_instruction(case):
    line, expected = CASES[case]
    assert token_sized_moves(f"{BUFFER}  {line}\n", 32) == expected
