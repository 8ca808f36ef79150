"""A bar chart of how many times as fast as transformers each thing is; it alone needs matplotlib."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(tables: list[dict[str, Any]], path: Path) -> None:
    """Write a picture with a bar for each measure, a color for each table, and a line at equal speed."""
    compared = [table for table in tables if any("ratio" in row for row in table["rows"])]
    labels = list(dict.fromkeys(row["label"] for table in compared for row in table["rows"]))
    figure = Figure(figsize=(9, 1.8 + 0.25 * (len(labels) + 1) * (len(compared) + 1)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(len(compared), 1)
    for number, table in enumerate(compared):
        rows = {row["label"]: row for row in table["rows"] if "ratio" in row}
        places = [labels.index(label) + number * height for label in rows]
        ratios = [row["ratio"] for row in rows.values()]
        spread = [
            [max(0.0, row["ratio"] - row["lower"]) for row in rows.values()],
            [max(0.0, row["upper"] - row["ratio"]) for row in rows.values()],
        ]
        both = " / ".join(table["precisions"][side] for side in ("ours", "theirs"))
        name = f"{table['size']}, {both}, threads: {table['machine']['threads']}"
        bars = axes.barh(places, ratios, height, xerr=spread, label=name, ecolor="0.4")
        axes.bar_label(bars, [f" {ratio:.2f}" for ratio in ratios], fontsize=8)
    axes.axvline(1, color="0.2", linewidth=1)
    middle = height * (len(compared) - 1) / 2
    axes.set_yticks([place + middle for place in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as transformers (bar: median of pairs; line: middle half)")
    figure.legend(title="model, precision of blip2 / transformers", loc="outside lower center")
    figure.savefig(path, dpi=150)
