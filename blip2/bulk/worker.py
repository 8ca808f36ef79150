"""What Ray's actors are made of; torch is imported where they work, not where they are started.

What ends a run (a full disk, too little memory, a model that cannot be had) comes back as a report that says
so, for the process that started the run to tell.
"""

import json
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blip2.bulk.results import Destination
from blip2.bulk.settings import Settings
from blip2.bulk.unit import Unit
from blip2.devices import is_out_of_memory

if TYPE_CHECKING:
    from blip2.bulk.work import Work


class Worker:
    """Does units, as Ray Data wants an actor to; it loads the model at the first.

    Args:
        settings: of the run.
        device: as of `blip2.load`.
        threads: that compute, and that decode; by default as torch has it.
    """

    def __init__(self, settings: Settings, device: str = "auto", threads: int | None = None):
        self.settings, self.device, self.threads = settings, device, threads
        self.name = uuid.uuid4().hex
        self.out = Destination(settings)
        self._work: Work | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """unit: units as JSON -> report: one JSON each."""
        return {"report": [json.dumps(self.report(Unit.from_json(str(line)))) for line in batch["unit"]]}

    @property
    def work(self) -> "Work":
        """The model, loaded."""
        if self._work is None:
            import torch

            from blip2.bulk.work import Work

            if self.threads:
                torch.set_num_threads(self.threads)
            self._work = Work(self.settings, self.device, self.threads or torch.get_num_threads())
        return self._work

    def report(self, unit: Unit) -> dict[str, Any]:
        """As `Work.unit`, with the actor's name and when it was ready; or what ends a run: unit, failed."""
        try:
            work, ready = self.work, time.time()
            return work.unit(unit, self.out) | {"actor": self.name, "ready": ready}
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            advice = f"lower --batch-size (now {self.settings.batch_size}) or --workers"
            return {"unit": unit.name, "failed": f"memory does not suffice: {advice}"}
        except (OSError, ValueError, ArithmeticError) as error:
            return {"unit": unit.name, "failed": str(error) or type(error).__name__}
