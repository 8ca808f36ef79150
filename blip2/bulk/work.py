"""One unit of work, from its source to its result: what an actor does.

Rows are read and decoded in threads, a batch ahead of the models; where one core does it all and nothing
comes over a network, in turns, as threads would only stand in each other's way. A row that cannot be used is
noted in the unit's report.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from blip2.bulk.results import Destination
from blip2.bulk.rows import rows
from blip2.bulk.settings import Settings
from blip2.bulk.tars import ShardError
from blip2.bulk.tasks import Item, make_task
from blip2.bulk.unit import Row, Sample, Unit
from blip2.errors import ImageError
from blip2.folder import Picture
from blip2.images import open_image
from blip2.pictures import Failure, read_ahead


class Work:
    """A loaded model, and what takes units through it.

    Args:
        settings: of the run.
        device: as of `blip2.load`.
        threads: that decode.
    """

    def __init__(self, settings: Settings, device: str = "auto", threads: int = 1):
        if settings.model.encoder:
            from blip2.encoders import import_encoder

            import_encoder(settings.model.encoder)
        self.settings = settings
        self.task = make_task(settings, device)
        self.images = not settings.texts_only
        self.texts = settings.texts_only or (settings.task == "score" and not settings.texts)
        self.keeps_files = settings.to == "shards"
        waits = threads > 1 or device != "cpu" or "://" in settings.source.address
        self.pool = ThreadPoolExecutor(threads) if waits else None

    def unit(self, unit: Unit, out: Destination) -> dict[str, Any]:
        """Do a unit, whatever is there of it.

        Returns:
            Its report: unit: its name; rows: done; errors: of each other row, in order; seconds; batches: of
            each the time it ended, and rows.
        """
        start = time.time()
        errors: list[dict[str, Any]] = []
        ends: list[tuple[float, int]] = []
        done = 0
        try:
            with (
                rows(unit, self.settings.source, self.images, self.texts) as found,
                out.writing(unit) as writer,
            ):
                for batch in self.batches(unit, found):
                    for row, item, result in batch:
                        if isinstance(result, Failure):
                            errors.append(self._error(result))
                        else:
                            writer.add(result, item.sample, row.sample_key)
                            done += 1
                    ends.append((time.time(), len(batch)))
        except ShardError as error:
            errors, done = [{"file": unit.names[0], "reason": str(error)}], 0
        report = {"unit": unit.name, "rows": done, "errors": errors, "seconds": round(time.time() - start, 3)}
        out.report(unit, report)
        return report | {"batches": ends}

    def batches(self, unit: Unit, found: Sequence[Row]) -> Iterator[list[tuple[Row, Item, Any]]]:
        """A batch of rows at a time: each row, what it was read as, and what became of it."""
        size = self.settings.batch_size
        batches = [found[start : start + size] for start in range(0, len(found), size)]
        read = read_ahead(batches, self._read) if self.pool else map(self._read, batches)
        for number, items in enumerate(read):
            usable = [item for item in items if not item.picture.reason]
            made = iter(self.task(usable, f"{unit.number} {number}") if usable else ())
            results = [
                Failure(item.picture.image, item.picture.reason) if item.picture.reason else next(made)
                for item in items
            ]
            yield list(zip(batches[number], items, results, strict=True))

    def _read(self, batch: Sequence[Row]) -> list[Item]:
        return list(self.pool.map(self._item, batch) if self.pool else map(self._item, batch))

    def _item(self, row: Row) -> Item:
        try:
            sample = row.read()
            image = open_image(sample.image) if self.images else None
            picture = self.task.prepare(row.key, image)
            if not self.keeps_files:
                sample.image = b""
            if self.texts and not sample.texts:
                raise ImageError(f"{row.key} has no text")
        except ImageError as error:
            reason = str(error).replace("the image data", row.key, 1)
            return Item(Picture(row.key, reason=reason), Sample())
        return Item(picture, sample)

    def _error(self, failure: Failure) -> dict[str, Any]:
        error: dict[str, Any] = {"image" if self.images else "key": failure.image, "reason": failure.reason}
        return error | ({"unknown": True} if failure.unknown else {})
