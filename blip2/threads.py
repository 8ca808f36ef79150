"""Short work by one thread, where waking the others takes longer than it takes itself.

With `OMP_WAIT_POLICY=passive`, which suits machines that are shared, threads sleep between two products, and
to wake one takes as long as a product of one row with a matrix of 2 MB. Threads that spin are there at once.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController

SHORT = 1 << 20  # elements of a matrix
PASSIVE = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"  # OpenMP reads it once, too


@cache
def _openmp() -> list[Any]:
    return ThreadpoolController().select(user_api="openmp").lib_controllers


def short(elements: int) -> bool:
    """Whether work that reads a matrix of so many elements once is better done by one thread."""
    return PASSIVE and elements < SHORT


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Has work done by the thread that asks for it; of other threads' work nothing changes.

    threadpoolctl's own context takes 0.2 ms a time, longer than the work.
    """
    pools = _openmp() if wanted else []
    before = [pool.get_num_threads() for pool in pools]
    try:
        for pool in pools:
            pool.set_num_threads(1)
        yield
    finally:
        for pool, number in zip(pools, before, strict=True):
            pool.set_num_threads(number)
