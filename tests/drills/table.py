"""The table of docs/reliability.md from what drills left: `python -m tests.drills.table DRILLS.jsonl docs/reliability.md`."""

import json
import sys
from pathlib import Path

BEGIN, END = "<!-- made by `make drills` -->", "<!-- end of the table -->"


def table(lines: list[str]) -> str:
    """Markdown of the drills, the last of each name, in the order in which they ran."""
    drills = {drill["drill"]: drill for drill in map(json.loads, lines)}
    rows = ["| fault | promise | seen | recovered in |", "| --- | --- | --- | ---: |"]
    for name, drill in drills.items():
        recovery = "" if drill["recovery_s"] is None else f"{drill['recovery_s']:.0f} s"
        rows.append(f"| {drill['fault']} (`{name}`) | {drill['promise']} | {drill['outcome']} | {recovery} |")
    return "\n".join(rows)


def main(source: str, page: str) -> None:
    """Put the table between the page's two marks."""
    text = Path(page).read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    Path(page).write_text(f"{before}{BEGIN}\n\n{table(Path(source).read_text().splitlines())}\n\n{END}{after}")


if __name__ == "__main__":
    main(*sys.argv[1:])
