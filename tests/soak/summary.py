"""A soak in words: what was survived, what was lost, and what grew."""

import re
import statistics
from collections import Counter
from typing import Any

from tests.soak.account import Check
from tests.soak.processes import OURS, Held

__all__ = ["FEW_FILES", "MOST_GROWTH", "checks_of_processes", "grown", "shapes", "summary"]

MOST_GROWTH = 0.05
"""Part by which memory and open files of the run's own kinds may grow."""
NOTHING = Held(0, 0, 0, 0)
FEW_FILES = 4
"""Open files more that are no growth: a connection that happens to be open."""


def checks_of_processes(report: dict[str, Any]) -> list[Check]:
    """Promises about memory and open files, for each of the run's own kinds and each of the two comparisons."""
    checks = []
    for when, before, after in (("start to end", "start", "end"), ("while it lived", "end", "later")):
        for kind in OURS:
            checks += grown(f"{kind}, {when}", report[before][kind], report[after][kind])
    return checks


def grown(what: str, before: Held, after: Held) -> list[Check]:
    """Whether memory and open files have not grown by more than is allowed."""
    part, more = after.mb / before.mb - 1, after.files - before.files
    memory = f"{before.mb:.0f} → {after.mb:.0f} MiB, {100 * part:+.1f} %"
    return [
        Check(f"memory of the {what}", part <= MOST_GROWTH, memory),
        Check(
            f"open files of the {what}",
            more <= max(FEW_FILES, MOST_GROWTH * before.files),
            f"{before.files:g} → {after.files:g}",
        ),
    ]


def summary(report: dict[str, Any]) -> str:
    """The report for people."""
    minutes, whole = report.get("soaked_s", 0) / 60, report["took_s"] / 60
    lines = [
        f"soak, seed {report['seed']}: {minutes:.1f} minutes of a run, {whole:.1f} with start and end",
        *kills(report),
    ]
    if "account" in report:
        lines += ["", *losses(report["account"])]
    if "later" in report:
        lines += ["", *table(report)]
    if "checks" in report:
        lines.append("")
        for check in report["checks"]:
            lines.append(f"{'held  ' if check['held'] else 'BROKEN'}  {check['promise']}: {check['found']}")
    if report["broken"]:
        lines += ["", f"BROKEN  {report['broken']}"]
    return "\n".join(lines)


def kills(report: dict[str, Any]) -> list[str]:
    """What was survived, by kind, and how long each took: least / median / most."""
    took: dict[str, list[float]] = {}
    for recovery in report["recoveries"]:
        took.setdefault(recovery["fault"], []).append(recovery["took_s"])
    lines = ["", f"kills survived: {len(report['recoveries'])}"]
    lines += [f"  {len(times)} × {fault}: new steps after {spread(times)}" for fault, times in sorted(took.items())]
    if took:
        lines.append(f"  all: new steps after {spread([time for times in took.values() for time in times])}")
    return lines


def losses(found: dict[str, Any]) -> list[str]:
    """Steps, and what was left."""
    steps, trained, planned = found["steps"], found["checkpoint"], found["planned"]
    once = all(trained[key] == planned[key] for key in planned)
    return [
        f"steps trained once, by the sum of their images: {trained['steps'] if once else 'NOT SO'}"
        f" ({found['epochs']} whole epochs)",
        f"steps logged once: {steps['once']} of {steps['last']}",
        f"steps logged twice: {steps['twice']}",
        f"steps missing: {steps['missing']}",
        f"left in the run's folder: {', '.join(f'{name} {count}' for name, count in found['left'].items())}",
        f"left among temporary files: {', '.join(shapes(found['temporary_files'])) or 'nothing'}",
        f"data, logs and temporary files of all servers: {found['folder_mb']} MiB",
    ]


def shapes(names: list[str]) -> list[str]:
    """How many names there are of each shape, their numbers and random parts left out."""
    found = Counter(re.sub(r"[0-9a-f]{32}|(?<=-)\w{8}$|\d+", "…", name) for name in names)
    return [f"{count} × {shape}" for shape, count in sorted(found.items())]


def spread(seconds: list[float]) -> str:
    if len(seconds) == 1:
        return f"{seconds[0]:.0f} s"
    return f"{min(seconds):.0f} / {statistics.median(seconds):.0f} / {max(seconds):.0f} s"


def table(report: dict[str, Any]) -> list[str]:
    """Memory and open files of every kind at the three moments, the run's own kinds first."""
    moments = [report[name] for name in ("start", "end", "later")]
    others = sorted({kind for moment in moments for kind in moment} - set(OURS))
    rows = [
        f"{'':47}{'memory alone, MiB':^22}{'growth, %':^16}{'RSS, MiB':^21}{'open files':^21}",
        f"{'':47}{'start':>6}{'end':>7}{'later':>7}  {'to end':>8}{'later':>8}"
        + f"{'start':>7}{'end':>7}{'later':>7}" * 2,
    ]
    for kind in (*OURS, *others):
        first, second, third = found = [moment.get(kind, NOTHING) for moment in moments]
        growth = "".join(
            f"{100 * (b.mb / a.mb - 1) if a.mb else 0:+8.1f}" for a, b in ((first, second), (second, third))
        )
        rows.append(
            f"{kind} ({', '.join(f'{one.processes:g}' for one in found)})".ljust(46)
            + "".join(f"{one.mb:7.0f}" for one in found)
            + f"  {growth}"
            + "".join(f"{one.rss_mb:7.0f}" for one in found)
            + "".join(f"{one.files:7.0f}" for one in found)
        )
    return rows
