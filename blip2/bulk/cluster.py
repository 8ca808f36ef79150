"""Units of work on actors of a Ray, this machine's or a cluster's.

Each actor takes a unit and hands back a report. Ray Data passes on units and reports alone; what a unit
stands for is read and written by the actors. Ray is imported when it is used.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

RETRIES = 3  # of a unit whose actor died: one that brings every actor down must not go on for ever
PATIENCE = 1.0  # seconds between two looks at what is done; a look takes several ms of a core, a unit seconds
STORE = 200_000_000  # bytes of the object store: only units and reports pass through it
QUIET = {  # read when ray is imported or started
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_worker_niceness": "0",  # else whatever runs beside it goes before it
    "RAY_enable_metrics_collection": "0",  # nobody looks, and every process would spend time on them
    "RAY_task_events_report_interval_ms": "0",
}


class StoppedError(RuntimeError):
    """A run ended early: a full disk, too little memory, a model that cannot be had."""


class RoomError(ValueError):
    """Actors that the machines have no room for, or no Ray at all; the message says what to change."""


@dataclass(frozen=True)
class Pool:
    """Actors of a run.

    Attributes:
        actors: how many.
        gpus: of each; may be a fraction.
        cpus: cores of each.
    """

    actors: int
    gpus: float
    cpus: int


@contextmanager
def connected(address: str | None = None) -> Iterator[list[dict[str, float]]]:
    """Ray, on a cluster or on this machine, for as long as the block lasts.

    Args:
        address: of a running cluster, or "auto"; by default $RAY_ADDRESS, and without it one starts here.

    Yields:
        What each machine has: CPU and GPU.

    Raises:
        RoomError: there is no Ray here, or none at the address.
        StoppedError: it could not be started, or an actor died time after time.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise RoomError(f'Ray is not installed ({error}): pip install "ray[data]"') from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    options: dict[str, Any] = {"logging_level": "warning", "log_to_driver": False}
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        options |= {"include_dashboard": False, "object_store_memory": STORE}
    try:
        with _hushed():
            ray.init(address=address or "local", **options)
    except (ConnectionError, ValueError) as error:
        raise RoomError(f"no Ray answers at {address or 'this machine'}: {error}") from error
    except Exception as error:  # that is what Ray raises where a busy machine is too slow for it
        raise StoppedError(f"Ray could not be started: {error}") from error
    try:
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        raise StoppedError(
            f"an actor died {1 + RETRIES} times in one unit of work, of too little memory perhaps ({error}). "
            "The same command goes on"
        ) from error
    finally:
        ray.shutdown()


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep what is not Python from writing to stderr, such as Ray's word on the level of its own log."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def room(machines: Sequence[Mapping[str, float]], gpus: float, cpus: int) -> int:
    """How many actors of so many GPUs and CPU cores there is room for, on machines with such resources."""
    found = 0
    for machine in machines:
        here = int(machine.get("CPU", 0) // cpus)
        found += min(here, int(machine.get("GPU", 0) / gpus + 1e-9)) if gpus else here
    return found


def reports(
    worker: type, arguments: tuple[Any, ...], units: Sequence[str], pool: Pool, ahead: int = 1
) -> Iterator[dict[str, Any]]:
    """Have actors do units of work, inside `connected`.

    Args:
        worker: a class whose instances take {"unit": units} and return {"report": a JSON each}.
        arguments: of its constructor.
        units: what it is called with, one at a time.
        pool: the actors.
        ahead: units that an actor holds, the one under way included.

    Yields:
        Reports, each as soon as it is there.
    """
    import ray.data

    with suppress(ImportError):  # it looks every 0.1 s by itself, and has no setting for that
        from ray.data._internal.execution import streaming_executor_state

        streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = PATIENCE
    size = min(pool.actors, len(units))
    source = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # nothing else takes max_task_retries yet
        done = source.map_batches(
            worker,
            fn_constructor_args=arguments,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=ahead),
            num_gpus=pool.gpus,
            num_cpus=pool.cpus,
            max_task_retries=RETRIES,
        )
    for batch in done.iter_batches(batch_size=None, prefetch_batches=0):
        yield from map(json.loads, batch["report"])
