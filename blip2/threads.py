"""Short work by one thread, where waking the others takes longer than it takes itself.

With `OMP_WAIT_POLICY=passive`, which suits machines that are shared, threads sleep between two products, and
to wake one takes as long as a product of one row with a matrix of 2 MB. Threads that spin are there at once.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

from threadpoolctl import ThreadpoolController

SHORT = 1 << 20  # elements of a matrix
PASSIVE = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"  # OpenMP reads it once, too


@cache
def _threadpools() -> ThreadpoolController:
    return ThreadpoolController()


def one_thread(short: bool) -> AbstractContextManager[object]:
    """Has short work done by the thread that asks for it; of other threads' work nothing changes."""
    return _threadpools().limit(limits=1, user_api="openmp") if short else nullcontext()
