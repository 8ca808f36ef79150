"""Keys and values of what a language model has read: a cache that grows in place, and transformers' own.

N rows, T and S tokens, H heads, L LLM width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

STEP = 64  # tokens by which a cache grows


class KeyValues:
    """Keys and values of every layer, with room to grow; `length` tokens are valid.

    On a CPU they are float32 at least.
    """

    def __init__(self) -> None:
        self.layers: list[Tensor] = []  # each (2, N, H, room, L/H): keys, then values
        self.length = 0

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(layer.nbytes for layer in self.layers)

    def write(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's keys and values, (N, H, T, L/H), behind the first `length`; returns all.

        The caller raises `length` once all layers have written, so that a failure in between loses nothing.
        """
        end = self.length + keys.shape[2]
        if index == len(self.layers):
            # torch attends to bfloat16 in a quarter of float32's speed on a CPU
            wide = keys.device.type == "cpu" and keys.dtype == torch.bfloat16
            dtype = torch.float32 if wide else keys.dtype
            self.layers.append(keys.new_empty((2, *keys.shape[:2], 0, keys.shape[3]), dtype=dtype))
        layer = self._grown(index, end)
        new_keys, new_values = layer[:, :, :, self.length : end].unbind()
        new_keys.copy_(keys)
        new_values.copy_(values)
        all_keys, all_values = layer[:, :, :, :end].unbind()
        return all_keys, all_values

    def grow(self, end: int) -> None:
        """Have room for `end` tokens in every layer."""
        for index in range(len(self.layers)):
            self._grown(index, end)

    def _grown(self, index: int, end: int) -> Tensor:
        layer = self.layers[index]
        if end > layer.shape[3]:
            room = -(-(end + end // 4) // STEP) * STEP
            self.layers[index] = layer.new_empty((*layer.shape[:3], room, layer.shape[4]))
            self.layers[index][:, :, :, : self.length] = layer[:, :, :, : self.length]
        return self.layers[index]

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)

    def repeat(self, copies: int) -> None:
        """Copy every row, one behind the other."""
        if self.layers:
            rows = torch.arange(self.layers[0].shape[1], device=self.layers[0].device)
            self.keep(rows.repeat_interleave(copies))

    def keep(self, rows: Tensor) -> None:
        """Only these rows, int (N,), each as often as it is there."""
        for index, layer in enumerate(self.layers):
            new = self.layers[index] = layer.new_empty((2, len(rows), *layer.shape[2:]))
            said = slice(self.length)  # what lies behind is not copied
            torch.index_select(layer[:, :, :, said], 1, rows, out=new[:, :, :, said])

    def reorder(self, rows: Tensor, since: int) -> None:
        """Row i becomes row rows[i], int (N,), where the first `since` tokens of both are the same."""
        for layer in self.layers:
            new = layer[:, :, :, since : self.length]
            new.copy_(new.index_select(1, rows))


class LibraryKeyValues(DynamicCache):
    """transformers' cache with the same words."""

    @property
    def length(self) -> int:
        """Tokens read."""
        return self.get_seq_length()

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        layers: Any = self.layers
        return sum(x.keys.nbytes + x.values.nbytes for x in layers if x.is_initialized)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if length < self.length:
            super().crop(length - self.length)
