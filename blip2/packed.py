"""Linear layers laid out for inference: those with one input fused, matrices in the processor's own order.

torch multiplies a few rows, as decoding does, at a fraction of the memory's speed when a matrix lies in rows,
and bfloat16 slower still, because oneDNN then sorts the matrix anew at every call. Sorted once, a product
with 1 to 5 rows is 1.2 to 3 times as fast, one with 257 rows (a ViT's) 1.1 to 1.5 times. Queries, keys and
values of one input are one product. A single row in bfloat16 is multiplied faster yet (1.3 times; with two
threads 1.5) by torch's own loop over a matrix in rows: smaller language models keep theirs so, too.

Parameters keep their names, shapes and identity. Where oneDNN holds the values, a parameter has none of its
own (it reads as NaN); what needs them (training, saving, moving, copying) puts them back by itself, so only
code that reads `weight` values directly has to call `unpack` first.
"""

import math
import os
import platform
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

ROWS = 4  # with fewer rows oneDNN is slower than with these
BOTH = 1 << 28  # elements; a language model with fewer keeps its matrices in rows, too, for single tokens
SMALL = 1 << 18  # elements; a smaller matrix is kept in rows, too,
MANY = 64  # for products with fewer rows, as oneDNN's calls take longer to begin
HINT = 32  # rows that oneDNN is told to expect; it takes the same blocks for any

# Layers of one module that read the same input; of cross-attention the queries read another. Not the
# Q-Former's: many rows at a time are attended to faster when queries, keys and values lie apart.
TOGETHER: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("gate_proj", "up_proj"),
)
# oneDNN, and torch's layer on it, keep what they made for each shape: 1,024 by themselves, 0.3 MB each, where
# answers of all lengths come along. One forward has about 30 shapes. They read this with their first product.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")

backend: Any = torch.backends.mkldnn
ENABLED = backend.enabled
POST: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
CROSS = ("EncDecAttention", "encoder_attn")


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN's products are there, and faster: float32 and bfloat16 on an x86 processor."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and platform.machine().lower() in ("x86_64", "amd64")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class Product:
    """One matrix product that serves one or more linear layers with the same input.

    Args:
        layers: their matrices become one. The matrix of a single layer may be another module's, too.
        tied: whether it is.
        rows: keep it in rows, too, where a single row is multiplied faster so.
    """

    def __init__(self, layers: list[nn.Linear], tied: bool = False, rows: bool = False):
        weights = [layer.weight.data for layer in layers]
        self.sizes = [layer.out_features for layer in layers]
        self.in_features = layers[0].in_features
        self.seen: tuple[Any, tuple[Tensor, ...]] | None = None
        self.bias: Tensor | None = None
        if layers[0].bias is not None:
            self.bias = torch.cat([layer.bias.data for layer in layers])
        self.blocks: Tensor | None = None
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        if can_pack(weight):
            self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), HINT)
        self.few = 1  # rows from which on oneDNN computes
        self.weight: Tensor | None = None  # in rows
        if self.blocks is None or weight.numel() < SMALL:
            self.few, self.weight = MANY, weight
        elif weight.dtype == torch.bfloat16 and (rows or tied):
            self.few, self.weight = 2, weight
        if self.weight is not None:
            for layer, own in zip(layers, weight.split(self.sizes), strict=True):
                layer.weight.data = own
        elif not tied:
            for layer in layers:
                nothing = torch.full((1, 1), math.nan, dtype=weight.dtype)
                layer.weight.data = nothing.expand_as(layer.weight)

    def __call__(self, input: Tensor, post: str = "none") -> Tensor:
        """input: float (..., in) -> float (..., out of all layers), through "relu" or the exact "gelu"."""
        shape, rows = input.shape, input.numel() // self.in_features
        if self.weight is not None and (rows < self.few or self.blocks is None):
            if rows == 1 and self.blocks is not None and input.dtype == torch.bfloat16:
                output = _looped(input, self.weight, self.bias)
            else:
                output = F.linear(input, self.weight, self.bias)
            return POST[post](output) if post in POST else output
        if rows == 1:
            input = input.reshape(1, self.in_features).expand(ROWS, -1)  # quicker than zeros
        elif rows < ROWS:
            input = F.pad(input.reshape(rows, self.in_features), (0, 0, 0, ROWS - rows))
        output = torch.ops.mkldnn._linear_pointwise(input, self.blocks, self.bias, post, [], "none")
        return output if rows >= ROWS else output[:rows].view(*shape[:-1], sum(self.sizes))

    def part(self, input: Tensor, index: int) -> Tensor:
        """One layer's share; the others', who are asked next, are kept until then."""
        if len(self.sizes) == 1:
            return self(input)
        seen = self.seen
        if seen is None or seen[0]() is not input:
            seen = self.seen = (weakref.ref(input), self(input).split(self.sizes, dim=-1))
        if index == len(self.sizes) - 1:
            self.seen = None
        return seen[1][index]

    def values(self, index: int) -> Tensor:
        """One layer's matrix, (out, in) in rows."""
        if self.weight is None and self.blocks is not None:
            return self.blocks.to_dense().split(self.sizes)[index].contiguous()
        assert self.weight is not None
        return self.weight.split(self.sizes)[index].clone()


def _looped(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Torch's own product, which reads a matrix as it lies; oneDNN's would sort it first.

    The switch is the whole process's. A product that another thread begins meanwhile takes longer or shorter;
    its result is the same but for rounding.
    """
    backend.enabled = False
    try:
        return F.linear(input, weight, bias)
    finally:
        backend.enabled = ENABLED


class PackedLinear(nn.Linear):
    """A linear layer that is part of a `Product`; a change of class makes it so, and undoes it."""

    product: Product
    index: int

    def forward(self, input: Tensor) -> Tensor:
        """input: float (..., in) -> float (..., out)."""
        if torch.is_grad_enabled() and (self.weight.requires_grad or input.requires_grad):
            _release(self)
            return F.linear(input, self.weight, self.bias)
        return self.product.part(input, self.index)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Linear._save_to_state_dict(self, destination, prefix, keep_vars)
        destination[prefix + "weight"] = _values(self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _release(self)
        nn.Linear._load_from_state_dict(self, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _release(self)
        return nn.Linear._apply(self, fn, recurse)

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`; in training a layer has its own matrix."""
        if mode:
            _release(self)
        return nn.Linear.train(self, mode)

    def __reduce_ex__(self, protocol: Any) -> Any:  # copies
        _release(self)
        return nn.Linear.__reduce_ex__(self, protocol)


def activated(layer: nn.Module, activation: nn.Module, input: Tensor) -> Tensor:
    """activation(layer(input)); ReLU and the exact GELU, a tenth of a ViT in float32, within the product."""
    post = "relu" if isinstance(activation, nn.ReLU) else ""
    if isinstance(activation, GELUActivation) and activation.act is F.gelu:
        post = "gelu"
    if post and isinstance(layer, PackedLinear) and not torch.is_grad_enabled():
        return layer.product(input, post)
    return activation(layer(input))


def _values(layer: PackedLinear) -> Tensor:
    kept = layer.weight.detach()
    own = kept.is_contiguous() and len(layer.product.sizes) == 1
    return kept if own else layer.product.values(layer.index)


def _release(layer: nn.Module) -> None:
    """Give a layer its own matrix again."""
    layer.weight.data = _values(layer)  # type: ignore[arg-type]
    del layer.product, layer.index
    layer.__class__ = nn.Linear


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Lay out every linear layer of a model for inference, one product at a time; `unpack` undoes it.

    The model then takes as much memory as before, but for a second copy of matrices that are tied, and in
    bfloat16 of those of a language model below `BOTH`. On ZeroGPU, which moves weights to its GPU by itself,
    all stays as it is.
    """
    if os.environ.get("SPACES_ZERO_GPU"):
        return
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found = list(_together(model))
    spoken = [layers for path, layers in found if "language_model" in path and "encoder" not in path]
    rows = sum(layer.weight.numel() for layers in spoken for layer in layers) < BOTH
    single = {id(layers[0]) for layers in spoken if rows}  # these read token by token
    for _, layers in found:
        tied = any(uses[id(layer.weight)] > 1 for layer in layers)
        if tied and not can_pack(layers[0].weight):
            continue
        for group in [[layer] for layer in layers] if tied else [layers]:
            product = Product(group, tied, id(group[0]) in single)
            for index, layer in enumerate(group):
                layer.__class__ = PackedLinear
                layer.product, layer.index = product, index  # type: ignore[assignment]


def _together(model: nn.Module) -> Iterator[tuple[str, list[nn.Linear]]]:
    """Linear layers, those with the same input and kind of matrix together, and where they are.

    None that are packed already.
    """
    for path, module in model.named_modules():
        layers = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
        for names in TOGETHER:
            if any(word in path for word in CROSS):
                names = names[1:]
            if all(name in layers for name in names):
                group = [layers[name] for name in names]
                kinds = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None) for x in group}
                if len(kinds) == 1:
                    yield path, group
                    for name in names:
                        del layers[name]
        yield from ((path, [layer]) for layer in layers.values())


@torch.no_grad()
def unpack(model: nn.Module) -> bool:
    """Give every linear layer its own matrix again; returns whether any had to be."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for layer in layers:
        _release(layer)
    return bool(layers)


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Have it so for a while: what reads all matrices at once would otherwise hold them twice."""
    was_packed = unpack(model)
    try:
        yield
    finally:
        if was_packed:
            pack(model)
