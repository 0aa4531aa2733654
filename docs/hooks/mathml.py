"""Formulas as MathML, which browsers draw by themselves: no script, no network.

Pages write formulas as GitHub does: a fenced block named `math`, or $`x`$ in a line.
"""

import re

from latex2mathml.converter import convert

BLOCK = re.compile(r"^```math\n(.*?)^```$", flags=re.M | re.S)
INLINE = re.compile(r"\$`([^`\n]+)`\$")


def on_page_markdown(markdown, **_):
    """Replaces the formulas of a page; MkDocs calls it by this name."""

    def draw_block(match):
        # On one line, so that Markdown takes it for one piece of HTML.
        return f"<div>{convert(match[1].strip(), display='block')}</div>"

    markdown = BLOCK.sub(draw_block, markdown)
    # A span, or a formula that begins a line would be a paragraph of its own.
    return INLINE.sub(lambda match: f"<span>{convert(match[1])}</span>", markdown)
