"""The Space's beginning: `python app.py`. What it offers is in space.json and in the Space's variables."""

import os
from pathlib import Path

if os.environ.get("SPACES_ZERO_GPU"):
    import spaces  # noqa: F401  before anything that starts CUDA: ZeroGPU asks for it

from blip2.ui import space

with space.running():
    demo = space.build(Path(__file__).with_name("space.json"))
    space.launch(demo)
