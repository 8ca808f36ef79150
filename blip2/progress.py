"""What transformers says while it loads: its progress to whoever watches, the rest to nobody."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers.utils import logging as transformers_logging

from blip2.download import Watch

_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(watch: Watch | None) -> Iterator[None]:
    """Tell `watch` of each tensor that transformers puts in place, in this thread alone."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def _progress_bar(make: Callable[..., Any], arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    """What transformers gets as a progress bar: its own, around items that are counted."""
    watch = _watch.get()
    if watch is None or not arguments or not hasattr(arguments[0], "__len__"):
        return make(*arguments, **settings)

    def counted(items: Any) -> Iterator[Any]:
        for number, item in enumerate(items):
            watch(number, len(items))
            yield item

    return make(counted(arguments[0]), *arguments[1:], **{"total": len(arguments[0]), **settings})


transformers_logging.set_tqdm_hook(_progress_bar)


@contextmanager
def quiet(progress: bool = False) -> Iterator[None]:
    """Silence what transformers and accelerate say about keys and places, as we report them ourselves."""
    level, placing = transformers_logging.get_verbosity(), logging.getLogger("accelerate.big_modeling")
    transformers_logging.set_verbosity_error()
    bar = transformers_logging.is_progress_bar_enabled()
    if not progress:
        transformers_logging.disable_progress_bar()
    before = placing.level
    placing.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # accelerate looks for modules alone, and the queries are a parameter
            warnings.filterwarnings("ignore", message="The following device_map keys do not match")
            yield
    finally:
        placing.setLevel(before)
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
