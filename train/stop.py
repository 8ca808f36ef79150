"""What ends a run before its last step: a signal, its parent's death, or a number that is not finite."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from train import distributed


class NonFiniteError(RuntimeError):
    """A loss or a gradient norm was not finite; the message names the samples."""


SAME_REQUEST = 5.0  # seconds in which another signal is the same request, passed on by a launcher
PARENT_EVERY = 1.0  # seconds between looks at the parent
ORPHAN_ENDS = 300.0  # seconds that a run may take to save once its parent is gone; then it ends without


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGTERM or SIGINT, or the parent's death, into a flag; a later signal acts as before.

    A launcher or a terminal that dies must not leave training behind. Who wants that says so: under `nohup`
    the parent is not watched.
    """
    before, received, ended = dict[int, Any](), list[float](), threading.Event()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def receive(number: int, frame: Any) -> None:
        received.append(time.monotonic())
        if received[-1] - received[0] > SAME_REQUEST:
            restore()
            signal.raise_signal(number)

    def watch(parent: int) -> None:
        while not ended.wait(PARENT_EVERY):
            if os.getppid() != parent:
                received.append(time.monotonic())
                if not ended.wait(ORPHAN_ENDS):
                    os._exit(1)  # it waits for processes that are gone as well
                return

    if threading.current_thread() is threading.main_thread():  # python delivers signals to no other
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, receive)
    if not hasattr(signal, "SIGHUP") or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
    try:
        yield lambda: bool(received)
    finally:
        ended.set()
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
