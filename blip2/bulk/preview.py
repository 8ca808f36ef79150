"""What a run would do, and about how long it would take: a few batches are tried, nothing is written."""

import os
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from blip2.bulk.results import Destination
from blip2.bulk.rows import rows
from blip2.bulk.run import anywhere, choose_pool, free_memory, look
from blip2.bulk.settings import Settings
from blip2.bulk.tars import ShardError
from blip2.bulk.unit import Row, Unit
from blip2.bulk.units import about, cut
from blip2.pictures import Failure

if TYPE_CHECKING:
    from blip2.bulk.tasks import Item
    from blip2.bulk.work import Work

SHOWN = 5


def preview(settings: Settings, batches: int = 4) -> dict[str, Any]:
    """Look at the source, and take some of it through the model as one of the workers would.

    Args:
        settings: of the run.
        batches: how many; the first does not count, for it warms up.

    Returns:
        source: in words; rows, and whether that is exact; parts; workers and their threads; first: results;
        rows_per_second of all workers, and seconds for all rows, once the models are loaded, or None where
        there were too few rows to tell.
    """
    settings = anywhere(settings)
    found = look(settings, Destination(settings))
    units = cut(found, settings.batch_size, settings.per_file)
    total, exact = about(found)
    facts: dict[str, Any] = {
        "source": found.described(), "rows": total, "exact": exact, "parts": len(units), "first": [],
        "rows_per_second": None, "seconds": None,
    }  # fmt: skip
    if not units:
        return facts
    import torch

    from blip2.bulk.work import Work

    here = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    alone = settings.workers == 0
    pool = None if alone else choose_pool(settings, [here], free_memory())
    facts |= {
        "workers": pool.actors if pool else 1,
        "threads": pool.cpus if pool else torch.get_num_threads(),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(facts["threads"])
    try:
        device = settings.device if alone or (pool and pool.gpus) else "cpu"
        work = Work(settings, device, facts["threads"])
        times: list[tuple[float, int]] = []
        for batch in islice(_tried(work, units), batches):
            times.append((time.perf_counter(), len(batch)))
            for _, _, result in batch[: SHOWN - len(facts["first"])]:
                facts["first"].append(vars(result) if isinstance(result, Failure) else result)
    finally:
        torch.set_num_threads(before)
    if len(times) > 1:
        one = sum(count for _, count in times[1:]) / (times[-1][0] - times[0][0])
        facts["rows_per_second"] = round(one * facts["workers"], 2)
        facts["seconds"] = round(total / (one * facts["workers"]), 1)
    return facts


def _tried(work: "Work", units: Sequence[Unit]) -> Iterator[list[tuple[Row, "Item", Any]]]:
    """Batches of results, for as long as someone asks."""
    for unit in units:
        try:
            with rows(unit, work.settings.source, work.images, work.texts) as some:
                yield from work.batches(unit, some)
        except ShardError:
            continue  # the run lists it
