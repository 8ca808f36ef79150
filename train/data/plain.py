"""The position of an energon loader as plain values, which `torch.load(weights_only=True)` reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import (
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)
from megatron.energon.state import FlexState

CLASSES = {
    c.__name__: c
    for c in (
        SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState, SliceState, SystemRngState
    )
}  # fmt: skip


def to_plain(value: Any) -> Any:
    """Dataclasses, energon's dicts and arrays as tagged dicts."""
    if isinstance(value, FlexState):
        return {"flex": {name: to_plain(item) for name, item in value.items()}}
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, "fields": fields}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": value.dtype.str}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {"dict": {name: to_plain(item) for name, item in value.items()}}
    if isinstance(value, list | tuple):
        return type(value)(map(to_plain, value))
    assert value is None or isinstance(value, bool | int | float | str | bytes | torch.Tensor), type(value)
    return value


def from_plain(value: Any) -> Any:
    """What `to_plain` was given."""
    if isinstance(value, dict):
        if "flex" in value:
            return FlexState({name: from_plain(item) for name, item in value["flex"].items()})
        if "class" in value:
            fields = {name: from_plain(item) for name, item in value["fields"].items()}
            return CLASSES[value["class"]](**fields)
        if "array" in value:
            return np.array(value["array"], dtype=value["dtype"])
        return {name: from_plain(item) for name, item in value["dict"].items()}
    return type(value)(map(from_plain, value)) if isinstance(value, list | tuple) else value
