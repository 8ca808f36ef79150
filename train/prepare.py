"""`python -m train.data prepare`: annotation files and images -> tar shards that the loader reads.

Images are copied as they are; those that cannot be opened are left out, and all that is left out is counted.
A shard and its counts appear at once and whole, so a run that was killed goes on with the next shard when the
same command is given again. The metadata beside the shards is megatron-energon's.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import multiprocessing
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
from tqdm import tqdm
from tyro.conf import Positional

from blip2.errors import ImageError
from blip2.images import open_image
from train import annotations
from train.annotations import AnnotationError, Record
from train.samples import IMAGES

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
        output: folder; gets train-00000.tar ... and its like for val and test. One that holds others is refused.
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
            if workers > 1:
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


def _write_shard(task: tuple[Path, list[Record]]) -> int:
    path, records = task
    counts: Counter[str] = Counter()
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for record in records:
                counts[_add(tar, record)] += 1
        file.flush()
        os.fsync(file.fileno())
    write_atomically(path.parent / "prepared" / f"{path.stem}.json", json.dumps(counts).encode())
    os.replace(temporary, path)  # last: a shard that is there has its counts
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
    for name, member in ((extension, data), ("json", content)):
        info = tarfile.TarInfo(f"{record.key.replace('.', '_')}.{name}")
        info.size, info.mode = len(member), 0o644
        tar.addfile(info, io.BytesIO(member))
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
    index = path.with_name(path.name + ".idx")
    if index.exists() and index.stat().st_mtime >= path.stat().st_mtime:
        return max(0, index.stat().st_size // 8 - 1)
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
    write_atomically(meta / "split.yaml", yaml.safe_dump(split, sort_keys=False).encode())
    kind = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    write_atomically(meta / "dataset.yaml", yaml.safe_dump(kind, sort_keys=False).encode())
    unreadable = sum(not size and not Path(f"{path}.idx").exists() for path, size in sizes.items())
    return Counter({"unreadable shards": unreadable} if unreadable else {})


# --- the command ---


@dataclass(frozen=True)
class Writing:
    """How shards are written."""

    per_shard: int = 1000
    """Images in a shard."""
    workers: int = os.cpu_count() or 1
    """Processes that open and copy images."""
    validation: int = 0
    """Images of the training split that are held out as val, drawn at random; for sources without a val split."""


def _write(records: Iterable[Record], output: Path, writing: Writing, one_record_per_caption: bool) -> None:
    try:
        held = annotations.hold_out(records, writing.validation)
        counts = write_shards(
            annotations.one_per_caption(held) if one_record_per_caption else held,
            output,
            per_shard=writing.per_shard,
            workers=writing.workers,
        )
    except KeyError as error:
        raise AnnotationError(f"an entry of the annotations has no {error}: another kind of file") from error
    print(f"{output}: {tell(counts)}")


def coco(
    annotations_file: Positional[Path],
    images: Positional[Path],
    output: Positional[Path],
    *,
    split: Literal["train", "val", "test"] = "train",
    one_record_per_caption: bool = False,
    writing: tyro.conf.OmitArgPrefixes[Writing] = Writing(),  # noqa: B008
) -> None:
    """COCO captions: Karpathy's dataset_coco.json, or captions_*.json.

    Args:
        annotations_file: the json file.
        images: folder with train2014/ and val2014/, or with the images of captions_*.json.
        output: folder for the shards.
        split: of captions_*.json; Karpathy's file has its own.
        one_record_per_caption: write an image once for each of its captions, which is how LAVIS counts COCO
            (566,747 records); by default once, and training draws one of its captions each time.
        writing: how shards are written.
    """
    try:
        records = list(annotations.karpathy(annotations_file, images))
    except AnnotationError:
        records = list(annotations.coco_captions(annotations_file, images, split))
    _write(records, output, writing, one_record_per_caption)


def flickr30k(
    annotations_file: Positional[Path],
    images: Positional[Path],
    output: Positional[Path],
    *,
    writing: tyro.conf.OmitArgPrefixes[Writing] = Writing(),  # noqa: B008
) -> None:
    """Flickr30k: Karpathy's dataset_flickr30k.json.

    Args:
        annotations_file: the json file.
        images: folder of the images.
        output: folder for the shards.
        writing: how shards are written.
    """
    _write(annotations.karpathy(annotations_file, images), output, writing, False)


def nocaps(
    annotations_file: Positional[Path],
    images: Positional[Path],
    output: Positional[Path],
    *,
    writing: tyro.conf.OmitArgPrefixes[Writing] = Writing(),  # noqa: B008
) -> None:
    """NoCaps: nocaps_val_4500_captions.json; for evaluation only.

    Args:
        annotations_file: the json file.
        images: folder of the images.
        output: folder for the shards.
        writing: how shards are written.
    """
    _write(annotations.coco_captions(annotations_file, images, "val"), output, writing, False)


def vqav2(
    questions: Positional[Path],
    images: Positional[Path],
    output: Positional[Path],
    *,
    answers: Path | None = None,
    split: Literal["train", "val", "test"] = "train",
    writing: tyro.conf.OmitArgPrefixes[Writing] = Writing(),  # noqa: B008
) -> None:
    """VQAv2: questions and their answers as json, for fine-tuning and evaluation.

    Args:
        questions: v2_OpenEnded_mscoco_*_questions.json.
        images: folder with train2014/, val2014/ or test2015/.
        output: folder for the shards.
        answers: v2_mscoco_*_annotations.json; the test questions have none.
        split: of these questions.
        writing: how shards are written.
    """
    _write(annotations.vqa(questions, answers, images, split), output, writing, False)


def visual_genome(
    regions: Positional[Path],
    images: Positional[Path],
    output: Positional[Path],
    *,
    writing: tyro.conf.OmitArgPrefixes[Writing] = Writing(),  # noqa: B008
) -> None:
    """Visual Genome: region_descriptions.json; the phrases of an image's regions are its captions.

    Args:
        regions: the json file.
        images: folder with VG_100K/ and VG_100K_2/.
        output: folder for the shards.
        writing: how shards are written.
    """
    _write(annotations.visual_genome(regions, images), output, writing, False)


def pairs(
    table: Positional[Path],
    output: Positional[Path],
    *,
    images: Path | None = None,
    writing: tyro.conf.OmitArgPrefixes[Writing] = Writing(),  # noqa: B008
) -> None:
    """Your own images: a .csv or .jsonl with `image`, `caption` (or `captions`, a JSON list) and maybe `split`.

    Args:
        table: the file.
        output: folder for the shards.
        images: folder that the names in the table start from, by default the table's.
        writing: how shards are written.
    """
    _write(annotations.pairs(table, images or table.parent), output, writing, False)


def img2dataset(
    folder: Positional[Path], *, validation_shards: int = 0, workers: int = os.cpu_count() or 1
) -> None:
    """What img2dataset downloaded with --output_format webdataset: adds the metadata, the shards stay as they are.

    Shards that img2dataset did not finish (without their _stats.json) are left out; run it again to get them.

    Args:
        folder: its output folder.
        validation_shards: so many shards, the last, become val.
        workers: processes that read shards.
    """
    paths = sorted(folder.glob("**/*.tar"))
    if not paths:
        raise PrepareError(f"{folder} holds no .tar file; use img2dataset's --output_format webdataset")
    stats = {path: path.with_name(f"{path.stem}_stats.json") for path in paths}
    counts: Counter[str] = Counter()
    if any(found.exists() for found in stats.values()):
        unfinished = [path for path in paths if not stats[path].exists()]
        paths = [path for path in paths if stats[path].exists()]
        for path in paths:
            found = json.loads(stats[path].read_text())
            counts["kept"] += found["successes"]
            counts["not downloaded"] += found["failed_to_download"]
            counts["not decoded or resized"] += found["failed_to_resize"]
        counts["unfinished shards"] += len(unfinished)
    if not 0 <= validation_shards < len(paths):
        raise PrepareError(f"--validation-shards {validation_shards} leaves nothing of {len(paths)} shards")
    cut = len(paths) - validation_shards
    counts.update(write_metadata(folder, {"train": paths[:cut], "val": paths[cut:]}, workers))
    if not counts["kept"]:
        counts["kept"] = sum(
            json.loads((folder / ".nv-meta" / ".info.json").read_text())["shard_counts"].values()
        )
    print(f"{folder}: {tell(+counts)}")


KINDS = {
    function.__name__.replace("_", "-"): function
    for function in (coco, visual_genome, flickr30k, nocaps, vqav2, pairs, img2dataset)
}


def main(arguments: Sequence[str]) -> int:
    """The command; 2: it could not start or go on."""
    try:
        tyro.extras.subcommand_cli_from_dict(KINDS, prog="python -m train.data prepare", args=arguments)
    except (PrepareError, AnnotationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; what is written stays, the same command goes on", file=sys.stderr)
        return 2
    return 0
