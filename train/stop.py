"""What ends a run before its last step: a signal, or a number that is not finite."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from train import distributed


class NonFiniteError(RuntimeError):
    """A loss or a gradient norm was not finite; the message names the samples."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGTERM or SIGINT into a flag; a second one acts as it did before."""
    received, before = False, dict[int, Any]()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def receive(number: int, frame: Any) -> None:
        nonlocal received
        received = True
        restore()

    if threading.current_thread() is threading.main_thread():  # python delivers signals to no other
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, receive)
    try:
        yield lambda: received
    finally:
        restore()


class Flags:
    """Brings each step's two flags, not finite and stop, to the host one step late.

    So the host never waits for the step it has just launched.
    """

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, Any, int, dict[str, Tensor], Any]] = []

    def put(self, flag: Tensor, step: int, values: dict[str, Tensor], keys: Any) -> None:
        event = None
        if flag.is_cuda:
            host = torch.empty_like(flag, device="cpu", pin_memory=True)
            host.copy_(flag, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            flag = host
        self.pending.append((flag, event, step, values, keys))

    def read(self, everything: bool = False) -> bool:
        """Whether to stop; reads all but the newest flag, or `everything`."""
        stop = False
        while len(self.pending) > (0 if everything else 1):
            flag, event, step, values, keys = self.pending.pop(0)
            if event is not None:
                event.synchronize()
            bad, stopped = flag.tolist()
            stop |= bool(stopped)
            if bad:
                shown = ", ".join(f"{name} {value.item():.4g}" for name, value in values.items())
                raise NonFiniteError(
                    f"step {step}: the loss or the gradient norm is not finite and the step was not applied; "
                    f"rank {distributed.rank()} had {shown} on samples "
                    f"{keys if keys is not None else '(no keys)'}"
                )
        return stop
