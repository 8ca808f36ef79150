"""One token of one row on a GPU: a cache of fixed size, a compiled step, and a CUDA graph that replays it.

At one row a GPU waits for Python longer than for memory. Here every tensor keeps its address and shape, so
the step is compiled and captured once for a size of cache and replayed from token to token and from turn to
turn. S tokens of room, H heads, L LLM width.
"""

import os
import threading
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_triton_available

SIZES = (256, 512, 1024, 2048)  # tokens of room; a conversation that outgrows one goes on in the next


class StaticKeyValues:
    """Keys and values in tensors that stay where they are; what lies behind `place` is masked by the caller.

    Args:
        layers: each (2, 1, H, S, L/H): keys, then values.
        place: int (1,), where the next token goes.
    """

    def __init__(self, layers: list[Tensor], place: Tensor):
        self.layers, self.place = layers, place

    def write(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's keys and values, (1, H, 1, L/H), at `place`; returns all S."""
        layer = self.layers[index]
        layer[0].index_copy_(2, self.place, keys)
        layer[1].index_copy_(2, self.place, values)
        return layer[0], layer[1]


class StaticStep:
    """A language model's step for one row.

    Args:
        forward: (model, embeds, positions, cache, mask) -> logits, such as `decoders.read_opt`.
        model: the language model, on its device.
        like: a layer of a cache, (2, 1, H, any, L/H).
        room: S.
        backend: of torch.compile; None to leave it uncompiled.
    """

    def __init__(self, forward: Any, model: Any, like: Tensor, room: int, backend: str | None = "inductor"):
        self.room, self.lock = room, threading.Lock()
        shape = (*like.shape[:3], room, like.shape[4])
        self.layers = [like.new_zeros(shape) for _ in range(model.config.num_hidden_layers)]
        self.token = torch.zeros(1, dtype=torch.long, device=like.device)
        self.place = torch.zeros_like(self.token)
        self.weights = addresses(model)
        places = torch.arange(room, device=like.device)
        embed = model.get_input_embeddings()

        def step(token: Tensor, place: Tensor, layers: list[Tensor]) -> Tensor:
            mask = (places <= place)[None, None, None, :]
            cache = StaticKeyValues(layers, place)
            return forward(model, embed(token)[:, None], place[:, None], cache, mask)

        self.step = step if backend is None else torch.compile(step, fullgraph=True, backend=backend)
        self.graph: torch.cuda.CUDAGraph | None = None
        if like.device.type == "cuda":
            self._capture()

    @torch.no_grad()
    def _capture(self) -> None:
        """Record the step; it is run before, as compilation and libraries allocate in their first calls."""
        side = torch.cuda.Stream(self.token.device)
        side.wait_stream(torch.cuda.current_stream(self.token.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(self.token, self.place, self.layers)
        torch.cuda.current_stream(self.token.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.step(self.token, self.place, self.layers)

    def load(self, layers: list[Tensor], length: int) -> None:
        """Take over the first `length` tokens of a cache."""
        for own, other in zip(self.layers, layers, strict=True):
            own[:, :, :, :length] = other[:, :, :, :length]
        self.place.fill_(length)

    def store(self, layers: list[Tensor], start: int, end: int) -> None:
        """Give the tokens from `start` to `end` back to a cache that has room for them."""
        for own, other in zip(self.layers, layers, strict=True):
            other[:, :, :, start:end] = own[:, :, :, start:end]

    def __call__(self, token: Tensor) -> Tensor:
        """Read a token, int (1,); returns logits, float32 (1, vocabulary), valid until the next call."""
        self.token.copy_(token)
        if self.graph is None:
            self.logits = self.step(self.token, self.place, self.layers)
        else:
            self.graph.replay()
        self.place += 1
        return self.logits


class Steps(dict[int, StaticStep]):
    """A model's steps by their room; they lie with the model, end with it, and are not copied with it."""

    def __deepcopy__(self, memo: Any) -> "Steps":
        return Steps()

    def __reduce__(self) -> Any:
        return Steps, ()


def addresses(model: PreTrainedModel) -> tuple[int, ...]:
    """Where the weights lie; a captured step is good as long as they stay there."""
    return tuple(parameter.data_ptr() for parameter in model.parameters())


def wanted(model: PreTrainedModel) -> bool:
    """Whether steps are worth capturing: on CUDA, in full precision, and not on ZeroGPU.

    A ZeroGPU Space runs each call in a process of its own, which would compile every time.
    """
    return (
        model.device.type == "cuda"
        and not getattr(model, "is_quantized", False)
        and not os.environ.get("SPACES_ZERO_GPU")
    )


def static_step(forward: Any, model: Any, like: Tensor, tokens: int) -> StaticStep | None:
    """The step for a conversation of that many tokens, locked for the caller; None if it is in use.

    Args:
        forward: see `StaticStep`.
        model: the language model.
        like: a layer of the conversation's cache.
        tokens: how many it may come to hold.
    """
    room = next((size for size in SIZES if size >= tokens), None)
    if room is None:
        return None
    steps: Steps = model.__dict__.setdefault("_static_steps", Steps())
    step = steps.get(room)
    if step is None or (step.weights != addresses(model) and not step.lock.locked()):
        backend = "inductor" if is_triton_available() else None  # without it, the graph alone
        step = steps[room] = StaticStep(forward, model, like, room, backend)
    return step if step.lock.acquire(blocking=False) else None
