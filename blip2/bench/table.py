"""Findings as a table in markdown, so that it can be pasted where figures are wanted."""

from collections.abc import Iterator, Sequence
from typing import Any

from blip2.bench import machine

NAMES = {"ours": "blip2", "theirs": "transformers"}
BEYOND_CACHE = 100_000_000  # bytes; smaller models stay in a processor's cache


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The lines of one table, title and machine first."""
    precisions = found["precisions"]
    both = set(precisions.values())
    what = (
        f"{both.pop()} on both sides"
        if len(both) == 1 and len(precisions) == 2
        else ", ".join(f"{NAMES[side]} in {precision}" for side, precision in precisions.items())
    )
    threads = found["machine"]["threads"]
    yield f"**{found['size']}** ({found['weights']} weights), {what}, {threads} thread{'s' * (threads != 1)}"
    yield ""
    yield machine.line(found["machine"])
    yield ""
    yield "| | blip2 | transformers | times as fast | middle half | same result |"
    yield "|---|--:|--:|--:|--:|---|"
    for row in found["rows"]:
        yield _row(
            row["label"], [_figure(row, side) for side in NAMES], row.get("ratio"),
            (row.get("lower"), row.get("upper")), _agreement(row.get("agreement")),
        )  # fmt: skip
    yield from _loads(found.get("loads", {}))
    yield from _decoding(found)


def _row(
    label: str, shown: Sequence[str], ratio: float | None = None, span: tuple[Any, Any] = (None, None),
    same: str = "",
) -> str:  # fmt: skip
    times = "" if ratio is None else f"**{ratio:.2f}**"
    spread = "" if span[0] is None else f"{span[0]:.2f} to {span[1]:.2f}"
    return f"| {label} | {' | '.join(shown)} | {times} | {spread} | {same} |"


def _figure(row: dict[str, Any], side: str) -> str:
    seconds = row.get(side)
    if seconds is None:
        return ""
    if "count" in row:
        return f"{row['count'] / seconds:.3g} {row['unit']}"
    return duration(seconds)


def duration(seconds: float) -> str:
    """Such as "12.3 ms" or "4.56 s"."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s"


def _agreement(agreement: dict[str, Any] | None) -> str:
    if agreement is None:
        return ""
    if "shared" in agreement:
        return "yes" if agreement["equal"] else f"{agreement['shared']} of {agreement['words']} words"
    return "yes" if agreement["equal"] else f"to {agreement['difference']:.1g} of {agreement['scale']:.2g}"


def _loads(loads: dict[str, Any]) -> Iterator[str]:
    labels = {"seconds": "load", "load": "most memory of the load", "use": "most memory with a caption"}
    for name, label in labels.items():
        values = {side: loads[side][name] for side in loads}
        form = duration if name == "seconds" else _gigabytes
        ratio = values["theirs"] / values["ours"] if len(values) == 2 else None
        if values:
            yield _row(label, [form(values[side]) if side in values else "" for side in NAMES], ratio)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _decoding(found: dict[str, Any]) -> Iterator[str]:
    """How near decoding comes to its limit, the memory."""
    limit = found["machine"]["bandwidth"]
    for row in found["rows"]:
        if "bytes" not in row or min(row["bytes"].values()) < BEYOND_CACHE:
            continue
        yield ""
        parts = []
        for side, size in row["bytes"].items():
            speed = size * row["count"] / row[side]
            parts.append(f"{NAMES[side]} {speed / 1e9:.3g} GB/s ({speed / limit:.0%})")
        sizes = " and ".join(f"{size / 1e9:.3g}" for size in dict.fromkeys(row["bytes"].values()))
        yield (
            f"Decoding reads {sizes} GB of weights a token; memory gives {limit / 1e9:.3g} GB/s. Reached: "
            f"{', '.join(parts)}."
        )
