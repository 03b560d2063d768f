"""docs/scaling.md out of the JSON of `simulate`: its tables between marks, and the chart.

Nothing in the page between two marks is written by hand, and no table holds a computed figure that does not say so.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cxr_dist.bench.report import Row, from_json, table
from cxr_dist.errors import DataError

__all__ = ["MARK", "chart", "is_scaling", "page", "write_page"]

WIDE = "ranks (computed)"
PASSES = "stream (measured, beside the model)"
PLAN = "plan (measured)"
DRIVER = "driver (measured)"

MARK = re.compile(r"(<!-- simulate: ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
"""A part of the page that is made: the name of a stage, or `machine`, and what stands there now."""

SHOWN = (1, 16, 256)
"""Ranks of the plan's table in the page; all are in the JSON."""

COLOURS = ("#0072b2", "#d55e00", "#222222")
"""Blue, vermilion (Okabe and Ito, 2008), ink: told apart by all eyes, and each has a line and a marker of its own."""
LINES = ((0, ()), (0, (5, 2)), (0, (1, 1.5)))
MARKERS = ("o", "s", "^")


def is_scaling(result: Mapping[str, Any]) -> bool:
    """Whether a bench's JSON is one of `simulate`."""
    return any(row.get("stage") == WIDE for row in result.get("rows", ()))


def page(result: Mapping[str, Any], text: str) -> str:
    """The page with its made parts made anew. DataError for a mark that names nothing in the result."""
    rows = from_json(result)
    parts = {stage: _table(stage, [row for row in rows if row.stage == stage]) for stage in {row.stage for row in rows}}
    parts["machine"] = _machine(result)

    def made(match: re.Match[str]) -> str:
        if match[2] not in parts:
            raise DataError(f"page: found a mark for {match[2]!r}, expected one of {', '.join(sorted(parts))}")
        return f"{match[1]}\n{parts[match[2]]}\n\n{match[3]}"

    return MARK.sub(made, text)


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """Make the parts of the page at `path` anew. DataError if there is none, or none of its marks."""
    if not is_scaling(result):
        raise DataError("--results: found no rows of simulate, expected what `jobs/bench.py simulate --json` wrote")
    try:
        text = path.read_text()
    except OSError as error:
        raise DataError(f"--page: found no page at {path} ({error.strerror}), expected one with marks") from None
    if not MARK.search(text):
        raise DataError(f"--page: found no mark in {path}, expected `<!-- simulate: STAGE -->` and `<!-- end -->`")
    path.write_text(page(result, text))


def _table(stage: str, rows: Sequence[Row]) -> str:
    if stage == PLAN:
        rows = [row for row in rows if any(row.name.endswith(f", {ranks} rank{'s'[: ranks > 1]}") for ranks in SHOWN)]
    if stage == WIDE:
        return _wide(rows)
    # images count what a run has; where none went through, the column would be of noughts
    text = table(rows)
    return text if any(row.images for row in rows) else _without(text, "images")


def _without(text: str, head: str) -> str:
    """A Markdown table without a column."""
    lines = [line.strip("|").split("|") for line in text.splitlines()]
    at = [cell.strip() for cell in lines[0]].index(head)
    return "\n".join("|" + "|".join(cell for n, cell in enumerate(line) if n != at) + "|" for line in lines)


def _wide(rows: Sequence[Row]) -> str:
    """Ranks against given rates: part of ranks × rate that comes through, and what holds the rest up."""
    encodings = list(dict.fromkeys(str(row.extra["encoding"]) for row in rows))
    rates = sorted({float(row.extra["rate (given)"]) for row in rows})
    keys = [(encoding, rate) for encoding in encodings for rate in rates]
    found = {(row.extra["encoding"], row.extra["rate (given)"], row.extra["ranks"]): row for row in rows}
    heads = [
        "ranks (computed)",
        "all-reduce, ms a step",
        *(f"{encoding}, {rate:g} images/s a rank (given)" for encoding, rate in keys),
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads)]
    for ranks in sorted({int(row.extra["ranks"]) for row in rows}):
        cells = [str(ranks), f"{float(found[*keys[0], ranks].extra['all-reduce ms a step']):.1f}"]
        for key in keys:
            row = found[*key, ranks]
            part, rate = float(row.extra["part of ranks × rate"]), row.images_per_s or 0.0
            cells.append(f"{rate:,.0f} ({100 * part:.0f} %{', loop' if row.extra['busiest'] == 'loop' else ''})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _machine(result: Mapping[str, Any]) -> str:
    about, options = result["machine"], result["options"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("ray", "torch", "pyarrow", "numpy") if about.get(name))
    rates = ", ".join(f"{rate:g}" for rate in options["rank_images_per_s"])
    return (
        f"{str(about['date'])[:10]}, commit `{about['commit']}`: {about['cores']} cores, no GPU; Python {about['python']}, "
        f"{versions}; medians of {min(options['repeats'], 3)} passes in turns.\n\n"
        f"Given by whoever ran it, and measured by nobody: {rates} images/s a rank, {options['network_gbit']:g} Gbit/s and "
        f"{options['network_latency_us']:g} µs between nodes, {options['store_gbit']:g} Gbit/s from storage to a node."
    )


def chart(result: Mapping[str, Any], path: str | Path) -> None:
    """Two panels: what a plan costs (measured), and what comes through at more ranks (computed, measured points apart)."""
    from matplotlib.figure import Figure  # half a second of imports that no other stage needs

    rows = from_json(result)
    figure = Figure(figsize=(9.2, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    _planning(left, [row for row in rows if row.stage == PLAN])
    _through(right, [row for row in rows if row.stage == WIDE and row.extra["encoding"] == "pixels"])
    about = result["machine"]
    words = f"{about['cores']} cores · {str(about['date'])[:10]} · {about['commit']} · left measured, right computed"
    figure.supxlabel(words, fontsize=7, color="0.35", x=0.01, ha="left")
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "scaling", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=110, metadata={"Date": None} if str(path).endswith(".svg") else None)


def _planning(panel: Any, rows: Sequence[Row]) -> None:
    images = sorted({row.images for row in rows})
    for count, colour, line, marker in zip((images[0], images[-1]), COLOURS, LINES, MARKERS, strict=False):
        of = [row for row in rows if row.images == count]
        ranks = [_ranks(row) for row in of]
        for figure, filled in (("step ms", True), ("a rank's share ms", False)):
            values = [float(row.extra[figure]) for row in of]
            what = "a whole step" if filled else "one rank's share"
            panel.plot(
                ranks, values, color=colour, linestyle=line, marker=marker, markersize=5, linewidth=1.4,
                markerfacecolor=colour if filled else "white", label=f"{what}, {count:.0e} images".replace("e+0", "e"),
            )  # fmt: skip
    panel.axhline(10, color="#767676", linewidth=1)
    panel.text(1, 10.6, "10 ms", fontsize=8, color="#5c5c5c", va="bottom")
    panel.set_ylim(0.02, 40)
    panel.set_yscale("log")
    _axes(panel, "Planning a step, measured", "ms")


def _through(panel: Any, rows: Sequence[Row]) -> None:
    rates = sorted({float(row.extra["rate (given)"]) for row in rows})
    for rate, colour, line, marker in zip(rates, COLOURS, LINES, MARKERS, strict=False):
        of = [row for row in rows if row.extra["rate (given)"] == rate]
        panel.plot(
            [int(row.extra["ranks"]) for row in of], [100 * float(row.extra["part of ranks × rate"]) for row in of],
            color=colour, linestyle=line, marker=marker, markersize=5, linewidth=1.4, label=f"{rate:g} images/s a rank (given)",
        )  # fmt: skip
    panel.set_ylim(0, 108)
    _axes(panel, "Part of ranks × rate that comes through, computed", "%")


def _axes(panel: Any, title: str, unit: str) -> None:
    panel.set_xscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    panel.set_xticks(ticks, [str(one) for one in ticks], fontsize=8)
    panel.set_xlabel("ranks", fontsize=9)
    panel.set_ylabel(unit, fontsize=9)
    panel.tick_params(axis="y", labelsize=8)
    panel.set_title(title, loc="left", fontsize=9, fontweight="bold")
    panel.legend(fontsize=7.5, frameon=False, loc="best")
    panel.grid(color="0.9", linewidth=0.6)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _ranks(row: Row) -> int:
    found = re.search(r"(\d+) ranks?$", row.name)
    assert found is not None, row.name
    return int(found[1])
