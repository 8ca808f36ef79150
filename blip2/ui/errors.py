"""What a visitor is told when there is no answer."""

import logging

from blip2.devices import is_out_of_memory
from blip2.errors import PromptError

log = logging.getLogger("blip2.ui")

# What a visitor's input, a file or a model can bring about. Others are bugs and pass.
EXPECTED = (ValueError, RuntimeError, OSError, MemoryError)


def friendly(error: BaseException) -> str:
    """One sentence for the visitor; details of what is not their doing go to the log alone."""
    if is_out_of_memory(error):
        return (
            "The model ran out of memory: ask for fewer beams, captions or tokens, or choose a smaller model."
        )
    if isinstance(error, ValueError):
        return str(error)
    log.error("the app could not answer", exc_info=error)
    return "The model failed on this; the app's log says why. Try again, or with other settings."


def question(text: str | None) -> str:
    """What a visitor typed, checked.

    Raises:
        PromptError: nothing, or characters that are no text.
    """
    text = (text or "").strip()
    if not text:
        raise PromptError("There is nothing to ask yet: write a question or an instruction first.")
    odd = sorted(
        {f"U+{ord(c):04X}" for c in text if (ord(c) < 32 and c not in "\t\n\r") or 127 <= ord(c) < 160}
    )
    if odd:
        raise PromptError(f"The text holds control characters ({', '.join(odd[:3])}): remove them.")
    if any(0xD800 <= ord(c) < 0xE000 for c in text):
        raise PromptError("The text holds half a character (a lone surrogate): type it again.")
    return text
