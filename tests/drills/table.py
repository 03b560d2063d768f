"""The table of docs/reliability.md from what drills left: `python -m tests.drills.table docs/drills.jsonl docs/reliability.md`."""

import json
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- made by `make drills` -->", "<!-- end of the table -->"


def latest(lines: list[str]) -> dict[str, dict[str, Any]]:
    """The last result of each drill, by name."""
    return {drill["drill"]: drill for drill in map(json.loads, lines)}


def table(drills: dict[str, dict[str, Any]]) -> str:
    """Markdown of the drills."""
    rows = ["| fault | promise | seen | recovered in |", "| --- | --- | --- | ---: |"]
    for name, drill in drills.items():
        recovery = "" if drill["recovery_s"] is None else f"{drill['recovery_s']:.0f} s"
        rows.append(f"| {drill['fault']} (`{name}`) | {drill['promise']} | {drill['outcome']} | {recovery} |")
    return "\n".join(rows)


def main(source: str, page: str) -> None:
    """Put the table between the page's two marks, and drop older results of the same drills."""
    drills = latest(Path(source).read_text().splitlines())
    Path(source).write_text("".join(json.dumps(drill) + "\n" for drill in drills.values()))
    text = Path(page).read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    Path(page).write_text(f"{before}{BEGIN}\n\n{table(drills)}\n\n{END}{after}")


if __name__ == "__main__":
    main(*sys.argv[1:])
