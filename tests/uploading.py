"""What tests of many pictures share: files that visitors drop, and a count of what is encoded."""

import numpy as np
from PIL import Image


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def draw_all(folder, names):
    """A picture for each name, in folders of their own; bad.png is none."""
    made = [draw(folder / str(place) / name, place) for place, name in enumerate(names)]
    for path in made:
        if path.name == "bad.png":
            path.write_bytes(b"\x89PNG not really")
    return made


def uploads(folder, names, evil):
    """Files as uploads lie, (path, name) each, and one more that is called `evil`."""
    return list(zip(map(str, draw_all(folder, [*names, "evil.png"])), [*names, evil], strict=True))


def counting(monkeypatch, model_class, sizes):
    """`sizes`, to which every batch that the model encodes is added."""
    encode = model_class.encode_image

    def counted(self, pixels):
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(model_class, "encode_image", counted)
    return sizes
