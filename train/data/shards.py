"""Records -> tar shards and the metadata with which megatron-energon reads them.

Images are copied as they are; those that cannot be opened are left out, and all that is left out is counted.
A shard and its counts appear at once and whole, so a run that was killed goes on with the next shard when the
same records are given again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import multiprocessing
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blip2.errors import ImageError
from blip2.images import open_image
from train.data.records import IMAGES, Record

PARTS = ("train", "val", "test")


class PrepareError(RuntimeError):
    """Data that cannot be prepared, or a folder that holds something else."""


# --- writing ---


def write_atomically(path: Path, data: bytes) -> None:
    """The whole file or none, also when the machine stops."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_shards(
    records: Iterable[Record], output: Path, *, per_shard: int = 1000, workers: int = 1
) -> Counter[str]:
    """Write what is not yet written of `records` as shards, with metadata.

    Args:
        records: in the same order whenever the command runs.
        output: folder; gets train-00000.tar ... and its like for val and test.
        per_shard: records in a shard, before any is dropped.
        workers: processes.

    Returns:
        Counts: "kept", and what was dropped by reason.

    Raises:
        PrepareError: nothing to write, or `output` holds other records.
    """
    parts: dict[str, list[Record]] = {part: [] for part in PARTS}
    digest = hashlib.sha256()
    for record in records:
        parts[record.part].append(record)
        digest.update(repr((record.key, record.part, record.captions)).encode())
    total = sum(map(len, parts.values()))
    if not total:
        raise PrepareError("the annotations name no image")
    notes = output / "prepared"
    plan = {"records": total, "per_shard": per_shard, "digest": digest.hexdigest()}
    if (notes / "plan.json").exists():
        found = json.loads((notes / "plan.json").read_text())
        if differing := [name for name in plan if found.get(name) != plan[name]]:
            shown = "; ".join(f"{name}: {found.get(name)} there, {plan[name]} here" for name in differing)
            raise PrepareError(f"{output} holds other shards ({shown}); choose another folder, or delete it")
    elif any(output.glob("*.tar")):
        raise PrepareError(f"{output} holds shards of something else; choose another folder")
    notes.mkdir(parents=True, exist_ok=True)
    write_atomically(notes / "plan.json", json.dumps(plan, indent=2).encode())

    tasks = [
        (output / f"{part}-{start // per_shard:05d}.tar", found[start : start + per_shard])
        for part, found in parts.items()
        for start in range(0, len(found), per_shard)
    ]
    todo = [task for task in tasks if not task[0].exists()]
    if todo:  # the folder is not whole until the end
        (output / ".nv-meta" / "dataset.yaml").unlink(missing_ok=True)
    with tqdm(total=total, unit=" images", desc=output.name, disable=None) as bar:
        bar.update(total - sum(len(found) for _, found in todo))
        with contextlib.ExitStack() as stack:
            write: Any = map(_write_shard, todo)
            if workers > 1 and len(todo) > 1:
                pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers))
                write = pool.imap_unordered(_write_shard, todo)
            for number in write:
                bar.update(number)
    counts: Counter[str] = Counter()
    for path, _ in tasks:
        counts.update(json.loads((notes / f"{path.stem}.json").read_text()))
    if not counts["kept"]:
        raise PrepareError(f"no image could be used: {tell(counts)}; is the folder of images the right one?")
    counts.update(
        write_metadata(output, {p: [path for path, _ in tasks if path.stem.startswith(p)] for p in PARTS})
    )
    return counts


@contextlib.contextmanager
def write_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar archive that appears whole, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            yield tar
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def add_sample(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    """Add a sample; `members` are its files by extension. A dot in `key` would end it, and becomes _."""
    for extension, data in members.items():
        info = tarfile.TarInfo(f"{key.replace('.', '_')}.{extension}")
        info.size, info.mode = len(data), 0o644
        tar.addfile(info, io.BytesIO(data))


def _write_shard(task: tuple[Path, list[Record]]) -> int:
    path, records = task
    counts: Counter[str] = Counter()
    with write_tar(path) as tar:
        for record in records:
            counts[_add(tar, record)] += 1
        # before the shard: one that is there has its counts
        write_atomically(path.parent / "prepared" / f"{path.stem}.json", json.dumps(counts).encode())
    return len(records)


def _add(tar: tarfile.TarFile, record: Record) -> str:
    captions = [caption.strip() for caption in record.captions if caption.strip()]
    if not captions and "questions" not in record.extra:
        return "no caption"
    path = next((path for path in record.image if path.is_file()), None)
    if path is None:
        return "no image file"
    extension = path.suffix.lower().removeprefix(".")
    try:
        data = path.read_bytes()
        open_image(data)
    except (OSError, ImageError):
        return "broken image"
    if extension not in IMAGES:
        return "unknown kind of image"
    content = json.dumps({"captions": captions, **record.extra}, ensure_ascii=False).encode()
    add_sample(tar, record.key, {extension: data, "json": content})
    return "kept"


def tell(counts: Counter[str]) -> str:
    """Counts in words."""
    dropped = [f"{number:,} {reason}" for reason, number in counts.most_common() if reason != "kept"]
    return f"{counts['kept']:,} kept" + (f"; dropped: {', '.join(dropped)}" if dropped else "; none dropped")


# --- metadata ---


def index_shard(path: Path) -> int:
    """Write a shard's index, unless it has a newer one.

    Returns:
        Number of samples; 0 if the shard cannot be read.
    """
    from megatron.energon.epathlib import EPath  # torch comes with it, which processes that copy do not need
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    index = path.with_name(path.name + ".idx")
    if index.exists() and index.stat().st_mtime >= path.stat().st_mtime:
        return max(0, index.stat().st_size // 8 - 1)
    index.unlink(missing_ok=True)
    logging.getLogger("megatron.energon.flavors.webdataset.prepare").setLevel(logging.CRITICAL)
    *_, last = WebdatasetPreparator._preprocess_tar(
        path.name, shard_to_idx={path.name: 0}, parent_path=EPath(path.parent), max_parts=50
    )
    return last.shard_info.count


def write_metadata(output: Path, parts: dict[str, list[Path]], workers: int = 1) -> Counter[str]:
    """What `energon prepare` writes into .nv-meta, but for the database of its random access.

    Args:
        output: folder.
        parts: name of a split -> its shards.
        workers: processes.

    Returns:
        Counts of what was left out.
    """
    meta = output / ".nv-meta"
    meta.mkdir(exist_ok=True)
    paths = [path for found in parts.values() for path in found]
    with contextlib.ExitStack() as stack:
        index: Any = map(index_shard, paths)
        if workers > 1:
            index = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers)).imap(
                index_shard, paths
            )
        sizes = dict(zip(paths, tqdm(index, total=len(paths), unit=" shards", disable=None), strict=True))
    good = {name: [str(p.relative_to(output)) for p in found if sizes[p]] for name, found in parts.items()}
    if not any(good.values()):
        raise PrepareError(f"no shard of {output} can be read")
    info = {
        "shard_counts": {str(path.relative_to(output)): size for path, size in sizes.items() if size},
        "energon_version": version("megatron-energon"),
    }
    split = {"split_parts": {name: found for name, found in good.items() if found}, "exclude": []}
    write_atomically(meta / ".info.json", json.dumps(info, indent=2).encode())
    # JSON is YAML, too
    write_atomically(meta / "split.yaml", json.dumps(split, indent=2).encode())
    kind = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    write_atomically(meta / "dataset.yaml", json.dumps(kind).encode())
    unreadable = sum(not size and not Path(f"{path}.idx").exists() for path, size in sizes.items())
    return Counter({"unreadable shards": unreadable} if unreadable else {})
