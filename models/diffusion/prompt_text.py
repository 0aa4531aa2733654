"""Text that can be written and encoded."""

from collections.abc import Sequence


def check_text(name: str, text: str) -> None:
    """Raises for text that UTF-8 cannot hold, such as bytes of another encoding.

    Python keeps what it cannot decode, on a command line say, as lone surrogates.

    Args:
      name: What the text is, for the message.
      text: A prompt.

    Raises:
      ValueError: Names the first such character and its place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}={text!r} is not text: character {error.start} cannot be written "
            "as UTF-8; type it anew, or convert it from the encoding it was in"
        ) from error


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises for a single string, which is a sequence of strings too.

    Raises:
      TypeError: `prompts` is a string.
      ValueError: There is no prompt.
    """
    if isinstance(prompts, str):
        raise TypeError(f"{prompts=} must be a sequence of strings")
    if not prompts:
        raise ValueError(f"{prompts=} must hold at least one prompt")
