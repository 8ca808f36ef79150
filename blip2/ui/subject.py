"""What a visitor asks about: a picture, and the conversation about it. No gradio in this file."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from blip2.conversation import Conversation
from blip2.images import ImageError, open_image

if TYPE_CHECKING:
    from blip2.checkpoint import Loaded
    from blip2.vision import ImageFeatures

SIDE = 320  # pixels of the longer side of the picture's small form


class Subject:
    """A picture with what the models made of it, and a conversation.

    It can be pickled, to be worked on in another process, and taken back from there.

    Attributes:
        path: the picture's file; None before there is one.
        name: what the visitor calls it.
        digest: of the file's bytes.
        anyway: the visitor wants answers about it though the model does not know its kind.
        conversation: with the model in use.
    """

    def __init__(self, path: str | None = None, name: str = "the picture", digest: str = ""):
        self.path, self.name, self.digest = path, name, digest
        self.anyway = False
        self.conversation = Conversation()
        self._features: dict[str, ImageFeatures] = {}
        self._small = b""

    @classmethod
    def of_file(cls, path: str | None, name: str = "") -> Subject:
        """A picture that has not been talked about.

        Raises:
            ImageError: there is none, or it is no usable picture.
        """
        if path is None:
            raise ImageError("There is no picture: upload or paste one, take one, or pick an example.")
        subject = cls(path, Path(name or path).name)
        data = subject._read()
        subject._open(data)
        subject.digest = hashlib.sha256(data).hexdigest()
        return subject

    def anew(self) -> Subject:
        """The same picture, with nothing said about it."""
        other = Subject(self.path, self.name, self.digest)
        other.anyway, other._features, other._small = self.anyway, self._features, self._small
        return other

    def image(self) -> Image.Image:
        """The picture, decoded.

        Raises:
            ImageError: it is no longer here.
        """
        return self._open(self._read())

    def small(self) -> bytes:
        """The picture as a JPEG file of at most SIDE pixels a side.

        Raises:
            ImageError: it is no longer here.
        """
        if not self._small:
            image = self.image()
            image.thumbnail((SIDE, SIDE))
            file = io.BytesIO()
            image.save(file, "JPEG", quality=80)
            self._small = file.getvalue()
        return self._small

    def features(self, loaded: Loaded) -> ImageFeatures:
        """The picture as the model sees it, on its device; encoded once for each model.

        Raises:
            ImageError: it is no longer here.
            UnknownPictureError: the model does not know its kind, and the visitor did not insist.
        """
        if loaded.name not in self._features:
            pixels = loaded.processor.images(self.image()).to(loaded.device)
            self._features[loaded.name] = loaded.model.encode_image(pixels)
        features = self._features[loaded.name].to(loaded.device)
        if not self.anyway:
            loaded.check_known(features)
        return features

    def to(self, device: str) -> Subject:
        """This, with all tensors on another device."""
        self._features = {name: features.to(device) for name, features in self._features.items()}
        if self.conversation.image is not None:
            self.conversation.image = self.conversation.image.to(device)
        return self

    def adopt(self, other: Subject) -> None:
        """Take over what another process made of a copy of this, unless the conversation has begun anew."""
        self._features |= other._features
        if self.conversation.key == other.conversation.key:
            self.conversation = other.conversation

    def _read(self) -> bytes:
        try:
            return Path(self.path or "").read_bytes()
        except OSError:
            raise ImageError(
                f"{self.name} is no longer here, uploads are deleted within the hour: add it again."
            ) from None

    def _open(self, data: bytes) -> Image.Image:
        try:
            return open_image(data)
        except ImageError as error:  # the visitor's name for the file, not the server's
            raise ImageError(str(error).replace("the image data", self.name, 1)) from error
