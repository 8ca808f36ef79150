"""What bad input raises; every message is one sentence that can be shown to a user."""

from typing import ClassVar


class ImageError(ValueError):
    """A picture that cannot be used."""


class PromptError(ValueError):
    """A prompt that cannot be asked: empty, not text, or longer than the model reads."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or cannot be found; the message says what to do."""


class DoesNotFitError(CheckpointError):
    """A model that needs more memory than is free; the message says what would fit."""


class UnknownPictureError(ValueError):
    """A picture of a kind that the model does not know; an answer would be about something else.

    Attributes:
        facts: what to add to a JSON document that holds the message.
    """

    facts: ClassVar[dict[str, bool]] = {"unknown_picture": True}
