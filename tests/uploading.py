"""What tests of many pictures share: files that visitors drop, and a count of what is encoded."""

import numpy as np
from PIL import Image


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def uploads(folder, names, evil):
    """Files as uploads lie, (path, name) each: bad.png broken, and one more that is called `evil`."""
    files = [(draw(folder / str(place) / name, place), name) for place, name in enumerate(names)]
    for path, name in files:
        if name == "bad.png":
            path.write_bytes(b"\x89PNG not really")
    files.append((draw(folder / str(len(names)) / "evil.png", len(names)), evil))
    return [(str(path), name) for path, name in files]


def counting(monkeypatch, model_class, sizes):
    """`sizes`, to which every batch that the model encodes is added."""
    encode = model_class.encode_image

    def counted(self, pixels):
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(model_class, "encode_image", counted)
    return sizes
