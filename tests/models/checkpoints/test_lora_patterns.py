"""Patterns of modules against `re`, which PEFT runs; and those that `re` cannot run."""

import re
import time

import pytest

from models.checkpoints.lora.patterns import ModulePattern, PatternError

NAMES = (
    "to_q",
    "attn1.to_q",
    "blocks.0.attn1.to_q",
    "blocks.10.attn1.to_k",
    "blocks.10.attn2.to_v",
    "blocks.3.ffn.net.0.proj",
    "xblocks.0.attn1.to_q",
    "blocks.9.attn-.to-q",
    "blocks.0.attn1.to_",
    "q",
    "Z_9",
    "",
    ".",
)


@pytest.mark.parametrize(
    "text",
    [
        "to_q",
        "blocks.0.attn1.to_q",
        r"blocks\.0\.attn1\.to_q",
        r"attn1\.to.q",
        r"^blocks\.10.attn2.to_v$",
        r"blocks\.\d+\.attn1\.to_q",
        r"blocks\.\d\.attn1\.to_(q|k|v)",
        r"(to_q|to_k)",
        "to_q|to_v",
        r".*\.attn1\.to_q",
        r".*attn[12].*",
        r"^blocks\.[0-9]+\.attn2\.to_v$",
        r"^to_q",
        r"blocks\.(0|10)\.(attn1|attn2)\.to_.?",
        r"blocks\.[^.]+\.ffn\..*proj",
        r"x*blocks\.0\.\w+\.to_q",
        r"blo?cks.0.attn1.to_q",
        ".*?q",
        ".+?q",
        ".??q",
        "",
        r"blocks\.[0-29]\.attn[0-9-].to.q",
        r"blocks.[^0-8].*",
        r"attn[a1-]\.to_[a-q]",
        r"attn[-1]\.to[-_]q",
        r"attn[-12]\.to.q",
        r"[xb]+locks.0.*",
        r"[a-zA-Z]_[0-9]",
        r"\w_\w",
        r"\w\w\d\.to_.?",
        r"to_(?:q|k)",
        r"(blocks|xblocks).0.(attn1.to_q|other)",
        r"[\d.]+attn1.to_q",
        r"^blocks.\d?\d.attn[12]\.to_(q|k|v)$",
    ],
)
def test_as_re_finds_them(text):
    pattern = ModulePattern(text)
    for name in NAMES:
        expected = re.match(rf"(.*\.)?({text})$", name) is not None
        assert pattern.matches(name) == expected, name


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+$",
        "(a|aa)+",
        "(a*)*b",
        "((a))",
        "a{1,9}",
        "a**",
        r"(\w+)\1",
        "(?=a)",
        "(?P<n>a)",
        "[[:alpha:]]",
        "[z-a]",
        "[]",
        "(a",
        "a)",
        "a\\",
        r"\bq",
        "a^b",
        "*",
        "x" * 513,
        "(a|b)" * 7,
        "(a|b|c|d|e)(1|2|3|4|5|6|7|8|9|x|y|z|0)",  # 65 of them
        "|" * 65,
    ],
)
def test_others_are_refused(text):
    with pytest.raises(PatternError):
        ModulePattern(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [("x" * 512, "x" * 512), ("(a|b)" * 6, "ababab"), ("a" + "|" * 63, "a")],
    ids=["characters", "groups", "branches"],
)
def test_the_longest_that_are_read(text, name):
    assert ModulePattern(text).matches(name)


def test_work_is_counted_in_atoms():
    assert ModulePattern("blocks.0.to_q").num_atoms == 0
    assert ModulePattern(r"a\d+(b|c)").num_atoms == 2 * 3


@pytest.mark.parametrize(
    "text", [".*" * 200 + "b", "a*" * 200 + "b", r"\w+" * 150 + "b", "a?" * 200 + "b"]
)
def test_no_pattern_takes_long(text):
    """Steps of `re` grow as a power of the length; these are 0.1 s, measured 0.02 s."""
    start = time.process_time()
    assert not ModulePattern(text).matches("a" * 200)
    assert time.process_time() - start < 1.0
