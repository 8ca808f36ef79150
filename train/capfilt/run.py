r"""Captioning and filtering of web images (CapFilt) as BLIP-2 did it: shards in, shards out, resumable.

    python -m train.capfilt INPUT OUTPUT --captioner scenes-opt --scorer scenes-itm

Of every image N captions are drawn, ranked together with the original alt text by image-text similarity, and
the best two kept; pre-training draws one of them at each step (Sec. 3.4). A sample of the output is the image
file as it was and a json with

    captions    the kept texts, best first
    capfilt     provenance: similarity and original (of each kept text), original_caption,
                original_similarity (null where there was none), candidates, captioner, scorer

beside what the input's json held. One shard in is one shard out. Ray Data hands the names of the shards to a
pool of actors, on one machine or a cluster, and an actor takes a whole shard through decoding, captioning,
ranking and writing. Passing samples on between Ray operators instead would spread stages over machines, but
mixes shards, so that a stopped run could not tell which output is complete; the models are the bottleneck by
far, and they see full batches either way. A shard counts as done once NAME.capfilt.json lies beside it, which
is written last. The chances that captions are drawn by depend on seed, shard and key alone, so a shard done
again after a kill comes out the same.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from blip2.bulk import cluster
from blip2.bulk.cluster import RoomError, StoppedError
from blip2.bulk.store import Store
from train.capfilt.filter import Settings, Worker, marker, summarize
from train.capfilt.models import CapFiltError, model_kind

SUMMARY = "capfilt.json"
# May differ when a run goes on: they do not change what comes out.
OPERATIONAL = ("output", "batch_size", "workers", "actors", "num_gpus_per_actor", "address")


def run(settings: Settings) -> dict[str, Any]:
    """Do what is left to do of a folder of shards; returns the summary, which lies in OUTPUT/capfilt.json.

    Raises:
        CapFiltError: a folder, model or setting does not fit; no shard has been touched.
        StoppedError: it ended early.
    """
    for name, task in ((settings.captioner, "captioner"), (settings.scorer, "scorer")):
        model_kind(name, task)
    source, sink = Store(settings.input), Store(settings.output)
    if os.path.realpath(source.root) == os.path.realpath(sink.root) and source.fs == sink.fs:
        raise CapFiltError(f"the output is the input, {settings.input}: name another folder")
    names = source.names(".tar") if source.fs.exists(source.root) else None
    if not names:
        what = "there is no folder" if names is None else "there is no .tar file in"
        raise CapFiltError(f"{what} {settings.input}: give a folder of image-text tar shards")
    _claim(sink, settings)
    sink.remove_parts()
    markers = set(sink.names(".capfilt.json"))
    done = [name for name in names if marker(name) in markers]
    left = sorted(set(names) - set(done))
    print(f"{len(names)} shards, {len(done)} of them done", flush=True)
    unreadable = {}
    everywhere = replace(
        settings,
        input=_anywhere(settings.input),
        output=_anywhere(settings.output),
        captioner=_anywhere(settings.captioner),
        scorer=_anywhere(settings.scorer),
    )
    start, images = time.perf_counter(), 0
    work = _here if settings.actors == 0 else _on_ray
    for number, report in enumerate(work(everywhere, left) if left else (), 1):
        if "failed" in report:
            raise StoppedError(f"{report['shard']}: {report['failed']}. The same command goes on")
        if "unreadable" in report:
            unreadable[report["shard"]] = report["unreadable"]
        else:
            done.append(report["shard"])
        images += report.get("samples", 0)
        print(_line(report, number, len(left), images, time.perf_counter() - start), flush=True)
    sink.remove_parts()  # of actors that died and were replaced
    summary = {
        **summarize(sink.read_jsons([marker(name) for name in sorted(done)])),
        "unreadable": unreadable,
        "last_run": {"samples": images, "seconds": round(time.perf_counter() - start, 1)},
    }
    sink.write_json(SUMMARY, {"settings": _lasting(settings), "summary": summary})
    return summary


def _anywhere(place: str) -> str:
    """A relative folder as it is called on every machine that shares it; anything else as it is."""
    path = Path(place).expanduser()
    return str(path.absolute()) if "://" not in place and path.is_dir() else place


def _lasting(settings: Settings) -> dict[str, Any]:
    """The settings that a folder is made with."""
    values = {name: value for name, value in asdict(settings).items() if name not in OPERATIONAL}
    store = Store(settings.input)
    return values | {"input": os.path.realpath(store.root) if store.local else settings.input.rstrip("/")}


def _claim(sink: Store, settings: Settings) -> None:
    """Make the output this run's, or check that it is."""
    wanted = _lasting(settings)
    if not sink.fs.exists(sink.path(SUMMARY)):
        sink.write_json(SUMMARY, {"settings": wanted})
        return
    found = sink.read_jsons([SUMMARY])[0]
    other = [
        f"{name} {found['settings'].get(name)!r}, now {value!r}"
        for name, value in wanted.items()
        if found["settings"].get(name) != value
    ]
    if other:
        raise CapFiltError(
            f"{settings.output} was made with other settings ({'; '.join(other)}): choose another folder, or "
            f"go on with those. If only the input has moved, delete {SUMMARY} there"
        )


def _line(report: Mapping[str, Any], number: int, total: int, images: int, seconds: float) -> str:
    """What is said of a shard."""
    head = f"[{number}/{total}] {report['shard']}:"
    if "unreadable" in report:
        return f"{head} skipped, {report['unreadable']}"
    dropped = ", ".join(f"{count} {kind}" for kind, count in report["dropped"].items()) or "none"
    minutes = seconds / number * (total - number) / 60
    return (
        f"{head} {report['images']:,} images, {report['original_kept']:,} with their original kept; "
        f"dropped: {dropped}. {images / seconds:.1f} images/s, {minutes:.0f} min left"
    )


def _here(settings: Settings, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One shard after another in this process."""
    work = Worker(settings)
    for name in names:
        yield work.report(name)


def _on_ray(settings: Settings, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Shards on a pool of actors, reports as they come."""
    with cluster.connected(settings.address) as machines:
        pool = _pool(settings, machines)
        print(f"{pool.actors} actors, {pool.gpus:g} GPUs and {pool.cpus} CPU cores each", flush=True)
        arguments = (settings, "auto" if pool.gpus else "cpu")
        yield from cluster.reports(Worker, arguments, names, pool)


def _pool(settings: Settings, machines: Sequence[Mapping[str, float]]) -> cluster.Pool:
    """GPUs and CPU cores of an actor, and how many actors, on machines with such resources."""
    gpus = settings.num_gpus_per_actor
    if gpus is None:
        gpus = 1.0 if any(machine.get("GPU", 0) for machine in machines) else 0.0
    cpus = max(1, settings.workers)
    room = cluster.room(machines, gpus, cpus)
    if not room or (settings.actors or 0) > room:
        raise CapFiltError(
            f"there is room for {room} actors of {gpus:g} GPUs and {cpus} CPU cores each, "
            f"{settings.actors or 1} are wanted: lower --actors, --workers or --num-gpus-per-actor"
        )
    return cluster.Pool(settings.actors or room, gpus, cpus)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0: done; 1: it ended early, or could not read a shard; 2: it could not start."""
    try:
        settings = tyro.cli(
            Annotated[Settings, tyro.conf.OmitArgPrefixes],
            prog="python -m train.capfilt",
            description="Caption, rank and filter image-text shards as BLIP-2 did.",
            args=arguments,
        )
        summary = run(settings)
    except (CapFiltError, RoomError, StoppedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, StoppedError) else 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(json.dumps(summary, indent=2, ensure_ascii=False))
    return 1 if summary["unreadable"] else 0
