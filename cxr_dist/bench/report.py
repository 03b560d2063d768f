"""What a bench found: rows, the table and chart people read, and the JSON they are made from."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cxr_dist.errors import DataError

__all__ = ["Row", "chart", "from_json", "machine", "ratios", "table", "to_json"]

FORMAT = 1
"""Version of the JSON; an unknown one is refused."""

WIDE = 30
"""A bar more than this many times as long as its panel's shortest is cut, and hatched to say so."""

PACKAGES = ("torch", "torchvision", "ray", "numpy", "pyarrow", "pillow", "kornia_rs")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing measured. None where a figure does not apply or was not taken."""

    stage: str
    name: str
    """What was measured, in a few words; unique in its stage."""
    images: int
    """Images that went through it."""
    images_per_s: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    """Images per second over those of another row measured in turns with this one: {"notebooks": 3.9, "limit": 0.93}."""
    cpu_ms_per_image: float | None = None
    """CPU time of all processes, children that have exited included, milliseconds."""
    peak_rss_mb: float | None = None
    """Highest private memory of all processes together, MB (10**6 bytes)."""
    object_store_mb: float | None = None
    """Highest use of Ray's object store, MB."""
    bytes_read: int | None = None
    """Bytes read from storage."""
    extra: Mapping[str, float | str] = field(default_factory=dict)
    """Figures of this stage alone, each key with its unit: gpu_utilisation, tflop_per_s, data_wait_fraction, first_batch_s."""


def ratios(images_per_s: float, of: Mapping[str, float | None]) -> dict[str, float]:
    """`images_per_s` over each of the others; those that were not measured are left out."""
    return {name: images_per_s / other for name, other in of.items() if other}


def table(rows: Sequence[Row]) -> str:
    """A Markdown table for each stage, without the columns in which nothing stands."""
    parts = []
    for stage in dict.fromkeys(row.stage for row in rows):
        of_stage = [row for row in rows if row.stage == stage]
        cells = [_cells(row) for row in of_stage]
        heads = [head for head in _heads(of_stage) if any(cell.get(head) for cell in cells)]
        grid = [heads, *[[cell.get(head, "") for head in heads] for cell in cells]]
        widths = [max(len(line[column]) for line in grid) for column in range(len(heads))]
        lines = [
            "| "
            + " | ".join(_pad(text, width, head) for text, width, head in zip(line, widths, heads, strict=True))
            + " |"
            for line in grid
        ]
        rule = (
            "|"
            + "|".join(
                "-" * (width + 1) + ("-" if head == stage else ":") for width, head in zip(widths, heads, strict=True)
            )
            + "|"
        )
        parts.append("\n".join([lines[0], rule, *lines[1:]]))
    return "\n\n".join(parts)


def _heads(rows: Sequence[Row]) -> list[str]:
    ratio_names = dict.fromkeys(f"× {name}" for row in rows for name in row.ratios)
    extras = dict.fromkeys(name for row in rows for name in row.extra)
    figures = ("images", "images/s", *ratio_names, "CPU ms/image", "peak RSS MB", "object store MB", "read MB")
    return [rows[0].stage, *figures, *extras]


def _cells(row: Row) -> dict[str, str]:
    read_mb = None if row.bytes_read is None else row.bytes_read / 1e6
    return {
        row.stage: row.name,
        "images": f"{row.images:,}",
        "images/s": _number(row.images_per_s),
        **{f"× {name}": f"{value:.2f}" if value < 99.95 else _number(value) for name, value in row.ratios.items()},
        "CPU ms/image": _number(row.cpu_ms_per_image),
        "peak RSS MB": _number(row.peak_rss_mb),
        "object store MB": _number(row.object_store_mb),
        "read MB": _number(read_mb),
        **{name: value if isinstance(value, str) else _number(value) for name, value in row.extra.items()},
    }


def _number(value: float | None) -> str:
    """Three significant digits, all digits before the point."""
    if value is None:
        return ""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.3g}"


def _pad(text: str, width: int, head: str) -> str:
    return text.rjust(width) if head and text[:1].isdigit() else text.ljust(width)


def to_json(rows: Sequence[Row], *, machine: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What `from_json` and `chart` take; written by the job."""
    return {
        "format": FORMAT,
        "machine": dict(machine),
        "options": dict(options),
        "rows": [{k: v for k, v in dataclasses.asdict(row).items() if v is not None} for row in rows],
    }


def from_json(result: Mapping[str, Any]) -> list[Row]:
    """The rows of a result. DataError if this is none, or of another version."""
    if result.get("format") != FORMAT:
        raise DataError(f"results: found format {result.get('format')!r}, expected {FORMAT}; run the bench again")
    return [Row(**row) for row in result["rows"]]


def machine() -> dict[str, Any]:
    """What the figures depend on: hardware, versions, date, commit, and how busy the machine was at that moment."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changed = commit and _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if changed else commit


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there, fails, or prints nothing."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)  # noqa: S603 - one of the lists here
    return done.stdout.strip() or None if done.returncode == 0 else None


def chart(result: Mapping[str, Any], path: str | Path) -> None:
    """A picture of the images per second of every row, one panel a stage, from a result's JSON."""
    from matplotlib.figure import Figure  # half a second of imports that no other stage needs

    rows = [row for row in from_json(result) if row.images_per_s is not None]
    if not rows:
        raise DataError("results: found no row with images per second, expected one or more; nothing to draw")
    stages = list(dict.fromkeys(row.stage for row in rows))
    counts = [sum(row.stage == stage for row in rows) for stage in stages]
    figure = Figure(figsize=(9, 0.9 + sum(0.34 * count + 0.75 for count in counts)), layout="constrained")
    axes = figure.subplots(
        len(stages), 1, squeeze=False, gridspec_kw={"height_ratios": [count + 1 for count in counts]}
    )
    for stage, panel in zip(stages, axes[:, 0], strict=True):
        _panel(panel, stage, [row for row in rows if row.stage == stage])
    about = result["machine"]
    figure.suptitle("Images per second", x=0.01, ha="left", fontsize=12, fontweight="bold")
    words = [
        about.get("gpu"),
        about.get("cpu"),
        f"{about.get('cores')} cores",
        str(about.get("date", ""))[:10],
        about.get("commit"),
    ]
    figure.supxlabel(" · ".join(str(word) for word in words if word), fontsize=7, color="0.35", x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def _panel(panel: Any, stage: str, rows: Sequence[Row]) -> None:
    values = [row.images_per_s or 0.0 for row in rows]
    end = max(value for value in values if value <= WIDE * min(values))
    shown = [value if value <= end else 1.15 * end for value in values]
    bars = panel.barh(range(len(rows)), shown, height=0.68, color="#c9d7e8", edgecolor="#44607f", linewidth=0.6)
    labels = []
    for bar, row, value in zip(bars, rows, values, strict=True):
        bar.set_hatch("//" if value > end else "")
        beside = ", ".join(f"{_number(ratio)} × {name}" for name, ratio in row.ratios.items() if ratio != 1)
        labels.append(f" {_number(value)}" + (f"  ({beside})" if beside else ""))
    panel.bar_label(bars, labels, fontsize=7.5)
    panel.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    panel.invert_yaxis()
    panel.set_title(stage, loc="left", fontsize=9, fontweight="bold")
    panel.set_xlim(0, 2.7 * max(shown))
    panel.tick_params(axis="x", labelsize=7)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
