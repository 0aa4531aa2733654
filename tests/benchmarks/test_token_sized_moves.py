"""What counts as a move of a token-sized array in a compiled program."""

from benchmarks.layer import token_sized_moves

PROGRAM = """
  %x.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %copy.1 = bf16[4,8]{0,1} copy(%x.1)
  %transpose.2 = f32[8,4]{1,0} transpose(%x.1), dimensions={1,0}
  %slice.3 = bf16[4,7]{1,0} slice(%x.1), slice={[0:4], [0:7]}
  %fusion.4 = bf16[4,8]{1,0} fusion(%x.1), kind=kLoop, calls=%gather
"""


def test_large_moves_are_found_and_others_are_not():
    found = token_sized_moves(PROGRAM, 32)
    assert found == ["copy [4,8]", "transpose [8,4]"]
    assert token_sized_moves(PROGRAM, 28)[-1] == "slice [4,7]"
