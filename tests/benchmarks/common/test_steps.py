"""What `benchmarks.common.steps` says of a program."""

import pytest

from benchmarks.common import steps


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("__cudnn$fmhaSoftmax of tokens; __cudnn$fmhaSoftmax of text", True),
        ("block_sparse_attention_sm90; __cudnn$fmhaSoftmax of text", False),
        ("dot of tokens", False),
    ],
    ids=["cudnn", "text-only", "none"],
)
def test_self_attention_is_cudnns_if_no_kernel_of_ours_is_there(program, expected):
    assert steps._has_cudnn(program) is expected
