"""`python -m train.data prepare`: annotation files and images -> tar shards that the loader reads.

docs/data.md says where each source comes from. The same command goes on where a killed run stopped.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

from train.data import records
from train.data.records import AnnotationError, Record
from train.data.shards import PrepareError, tell, write_metadata, write_shards


@dataclass(frozen=True)
class Writing:
    """How shards are written."""

    per_shard: int = 1000
    """Images in a shard."""
    workers: int = os.cpu_count() or 1
    """Processes that open and copy images."""
    validation: int = 0
    """Training images that are held out as val, drawn at random; for sources without a val split."""


def _write(found: Iterable[Record], output: Path, writing: Writing, one_record_per_caption: bool) -> None:
    held = records.hold_out(found, writing.validation)
    counts = write_shards(
        records.one_per_caption(held) if one_record_per_caption else held,
        output,
        per_shard=writing.per_shard,
        workers=writing.workers,
    )
    print(f"{output}: {tell(counts)}")


def coco(
    annotations: Positional[Path],
    images: Positional[Path],
    output: Positional[Path],
    *,
    split: Literal["train", "val", "test"] = "train",
    one_record_per_caption: bool = False,
    writing: tyro.conf.OmitArgPrefixes[Writing] = Writing(),
) -> None:
    """COCO captions: Karpathy's dataset_coco.json, or captions_*.json.

    Args:
        annotations: the json file.
        images: folder with train2014/ and val2014/, or with the images of captions_*.json.
        output: folder for the shards.
        split: of captions_*.json; Karpathy's file has its own.
        one_record_per_caption: write an image once for each of its captions, which is how LAVIS counts COCO
            (566,747 records); by default once, and training draws one of its captions each time.
        writing: how shards are written.
    """
    try:
        found = list(records.karpathy(annotations, images))
    except AnnotationError:
        found = list(records.coco_captions(annotations, images, split))
    _write(found, output, writing, one_record_per_caption)


def flickr30k(
    annotations: Positional[Path],
    images: Positional[Path],
    output: Positional[Path],
    *,
    writing: tyro.conf.OmitArgPrefixes[Writing] = Writing(),
) -> None:
    """Flickr30k: Karpathy's dataset_flickr30k.json.

    Args:
        annotations: the json file.
        images: folder of the images.
        output: folder for the shards.
        writing: how shards are written.
    """
    _write(records.karpathy(annotations, images), output, writing, False)


def nocaps(
    annotations: Positional[Path],
    images: Positional[Path],
    output: Positional[Path],
    *,
    writing: tyro.conf.OmitArgPrefixes[Writing] = Writing(),
) -> None:
    """NoCaps: nocaps_val_4500_captions.json; for evaluation only.

    Args:
        annotations: the json file.
        images: folder of the images.
        output: folder for the shards.
        writing: how shards are written.
    """
    _write(records.coco_captions(annotations, images, "val"), output, writing, False)


def vqav2(
    questions: Positional[Path],
    images: Positional[Path],
    output: Positional[Path],
    *,
    answers: Path | None = None,
    split: Literal["train", "val", "test"] = "train",
    writing: tyro.conf.OmitArgPrefixes[Writing] = Writing(),
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
    _write(records.vqa(questions, answers, images, split), output, writing, False)


def visual_genome(
    regions: Positional[Path],
    images: Positional[Path],
    output: Positional[Path],
    *,
    writing: tyro.conf.OmitArgPrefixes[Writing] = Writing(),
) -> None:
    """Visual Genome: region_descriptions.json; the phrases of an image's regions are its captions.

    Args:
        regions: the json file.
        images: folder with VG_100K/ and VG_100K_2/.
        output: folder for the shards.
        writing: how shards are written.
    """
    _write(records.visual_genome(regions, images), output, writing, False)


def pairs(
    table: Positional[Path],
    output: Positional[Path],
    *,
    images: Path | None = None,
    writing: tyro.conf.OmitArgPrefixes[Writing] = Writing(),
) -> None:
    """Your own: a .csv or .jsonl with `image`, `caption` (or `captions`, a JSON list) and perhaps `split`.

    Or a folder, with one of them in it or a .txt beside each picture.

    Args:
        table: the file, or the folder.
        output: folder for the shards.
        images: folder that the names in the table start from, by default the table's.
        writing: how shards are written.
    """
    _write(records.own(table, images), output, writing, False)


def own(source: Path, output: Path, held_out: float, at_most: int) -> None:
    """`pairs`, with a share of the training images held out as val unless the table has a val split."""
    found = list(records.own(source))
    training = sum(record.part == "train" for record in found)
    number = 0 if any(record.part == "val" for record in found) else min(at_most, int(held_out * training))
    _write(found, output, Writing(validation=number), False)


def img2dataset(
    folder: Positional[Path], *, validation_shards: int = 0, workers: int = os.cpu_count() or 1
) -> None:
    """What img2dataset downloaded with --output_format webdataset: adds the metadata to its shards.

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
    except KeyError as error:
        print(f"error: an entry of the annotations has no {error}: another kind of file", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; what is written stays, the same command goes on", file=sys.stderr)
        return 2
    return 0
