"""Channels of a head that turn with each axis of a Wan video."""


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
    """Returns channels of a head that turn with the frame, the row and the column.

    Rows and columns get `2 * (head_dim // 6)` each and frames the rest: 44, 42, 42
    of 128.
    """
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side
