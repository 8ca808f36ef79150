"""The resumable state of a run: trainable weights, optimizer, step, random generators, loader position.

    RUN/config.json                      the resolved configuration; a folder belongs to one run
    RUN/log.jsonl                        one line per logged step
    RUN/states/step-00000500/
        weights.safetensors              the parameters that require a gradient, and only those
        state.pt                         optimizer, progress, and per rank: random generators, loader position

A state is written to a hidden temporary folder and renamed, so that whatever carries a step's name is
complete. Rank 0 writes; every rank reads. Frozen weights are not saved: they come from the run's starting
checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from train import distributed

# May differ when a run goes on: they do not change what is trained.
OPERATIONAL = (
    "max_minutes",
    "log_every",
    "eval_every",
    "save_every",
    "keep_states",
    "output",
    "threads",
    "timeout_minutes",
    "trackers",
)


class StateError(ValueError):
    """A folder or a state that does not fit the run."""


class SaveError(RuntimeError):
    """A state could not be written; the one before is whole."""


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name, tied ones once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def rng_state() -> dict[str, Any]:
    """This process's random generators, in types that `torch.load(weights_only=True)` reads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def claim(folder: Path, config: Mapping[str, Any]) -> None:
    """Make `folder` this run's folder, or check that it already is; every rank may call it, rank 0 writes.

    Raises:
        StateError: the folder holds another run, or states without a readable configuration.
    """
    resolved = json.loads(json.dumps(config))  # as it will be read back: tuples are lists
    path = folder / "config.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise StateError(f"{path} is not readable JSON ({error}); choose another folder") from error
        ours, theirs = _flat(resolved), _flat(found)
        differing = [k for k in sorted(ours | theirs) if ours.get(k) != theirs.get(k)]
        differing = [k for k in differing if k.split(".")[-1] not in OPERATIONAL]
        if differing:
            shown = "; ".join(f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in differing[:5])
            raise StateError(
                f"{folder} holds another run ({len(differing)} settings differ: {shown}); "
                "choose another folder, or delete this one to start over"
            )
    elif (folder / "states").exists():
        raise StateError(f"{folder} holds states but no config.json; choose another folder")
    distributed.barrier()  # no rank writes before all have compared
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".config.json.tmp"
        temporary.write_text(json.dumps(resolved, indent=2) + "\n")
        os.replace(temporary, path)
        for leftover in (folder / "states").glob(".*"):
            shutil.rmtree(leftover)
    distributed.barrier()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key in value for k, v in _flat(value[key], f"{prefix}.{key}" if prefix else key).items()}


def latest(folder: Path) -> Path | None:
    """The newest complete state of a run, if any."""
    states = sorted((folder / "states").glob("step-*"))
    return states[-1] if states else None


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    loader: Mapping[str, Any],
    progress: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write the state after `step` optimizer steps; collective over ranks.

    Args:
        folder: the run's folder.
        step: number of finished optimizer steps.
        module: unwrapped; its trainable parameters are saved.
        optimizer: over those parameters, in named groups.
        loader: this rank's `loader.state_dict()`.
        progress: small values that `load` returns.
        keep: how many states remain, the new one included.

    Returns:
        The state's folder.

    Raises:
        SaveError: rank 0 could not write it; raised on every rank.
    """
    final = folder / "states" / f"step-{step:08d}"
    ranks = distributed.all_gather_object({"rng": rng_state(), "loader": dict(loader)})
    failure = None
    if distributed.rank() == 0 and not final.exists():
        weights = {k: p.detach().contiguous() for k, p in trainable(module).items()}
        rest = {
            "step": step, "progress": dict(progress), "optimizer": optimizer.state_dict(), "ranks": ranks,
        }  # fmt: skip
        try:
            _write(final, weights, rest, keep)
        except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk is to each writer
            failure = str(error)
    failure = distributed.all_gather_object(failure)[0]  # the others must not wait for a rank that gave up
    if failure is not None:
        whole = latest(folder)
        raise SaveError(
            f"step {step} could not be saved in {final.parent}: {failure}. "
            + (f"{whole.name} is the last whole state" if whole else "There is no whole state yet")
            + "; make room, and start the same command to go on"
        )
    return final


def _write(final: Path, weights: dict[str, torch.Tensor], rest: dict[str, Any], keep: int) -> None:
    temporary = final.parent / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(weights, temporary / "weights.safetensors")
        torch.save(rest, temporary / "state.pt")
        for path in (*temporary.iterdir(), temporary):  # on the disk before it gets its name
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in sorted(final.parent.glob("step-*"))[: -max(1, keep)]:
        doomed = old.parent / f".{old.name}.old"  # renamed first: half deleted it must not look complete
        old.rename(doomed)
        shutil.rmtree(doomed)


def load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore module, optimizer and this rank's random generators from a state, strictly.

    Returns:
        `step`, `progress`, and `loader` (this rank's).

    Raises:
        StateError: other parameters, other shapes, or another number of processes.
    """
    weights = load_file(path / "weights.safetensors")
    _check(path, {k: p.shape for k, p in trainable(module).items()}, {k: w.shape for k, w in weights.items()})
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    if len(state["ranks"]) != distributed.world_size():
        raise StateError(
            f"{path} was saved by {len(state['ranks'])} process(es), "
            f"this run has {distributed.world_size()}: start as many, or begin a new run"
        )
    ours, theirs = optimizer.state_dict()["param_groups"], state["optimizer"]["param_groups"]
    if [g["param_names"] for g in ours] != [g["param_names"] for g in theirs]:
        raise StateError(
            f"{path}: the optimizer groups hold other parameters; the recipe's optimizer has changed"
        )
    with torch.no_grad():
        for name, parameter in trainable(module).items():
            parameter.copy_(weights[name])
    optimizer.load_state_dict(state["optimizer"])
    mine = state["ranks"][distributed.rank()]
    set_rng_state(mine["rng"])
    return {"step": state["step"], "progress": state["progress"], "loader": mine["loader"]}


def _check(path: Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    wrong = [
        f"{k} {tuple(found[k])} for {tuple(expected[k])}"
        for k in expected
        if k in found and found[k] != expected[k]
    ]
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)):
        if names:
            raise StateError(
                f"{path}: {len(names)} parameters {kind}: {', '.join(names[:5])}; "
                "the state belongs to another model or to one with other frozen parts"
            )
