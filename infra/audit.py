"""Known vulnerabilities of what requirements.lock pins: `make audit`, which `make check` runs.

pip-audit asks PyPI about every package. What it cannot look up it passes over in silence, with exit code 0, be it all of
them: here that is told. Exit codes: 0 nothing found, though perhaps not everything could be asked (`not audited: …`); 1 a
finding that is not triaged.
"""

import json
import re
import subprocess
import sys
from typing import Any

__all__ = ["TRIAGED", "main", "verdict"]

TRIAGED: dict[str, str] = {}
"""Advisory → why it does not touch this project, in a few words; the reasons stand in docs/security.md."""

AWAY = re.compile(r"requests\.exceptions\.\w+|Could not connect|timed? ?out|Connection\w*Error")
"""What pip-audit, which ends with a traceback there, says of a network that is not."""


def verdict(dependencies: list[dict[str, Any]], triaged: dict[str, str]) -> tuple[int, list[str]]:
    """Exit code and lines for people, of the `dependencies` of pip-audit's JSON."""
    unknown = [found["name"] for found in dependencies if "skip_reason" in found]
    if len(unknown) == len(dependencies):
        return 0, [f"not audited: PyPI could not be asked about any of {len(unknown)} packages"]
    lines = [f"not audited: {name}: PyPI knows nothing of this version" for name in unknown]
    code = 0
    for found in dependencies:
        for advisory in found.get("vulns", []):
            names = [advisory["id"], *advisory.get("aliases", [])]
            reason = next((triaged[name] for name in names if name in triaged), "")
            fixed = ", ".join(advisory.get("fix_versions", [])) or "no version"
            lines.append(
                f"{found['name']} {found['version']}: {' '.join(names)}, mended in {fixed}; {reason or 'not triaged'}"
            )
            code = code if reason else 1
    return code, [*lines, f"audited: {len(dependencies) - len(unknown)} packages"]


def main(lock: str) -> int:
    """Audit a file of pinned requirements; the exit code."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", lock, "--no-deps", "--disable-pip", "--timeout=10"]
    # S603: fixed words, and the file that the Makefile names
    done = subprocess.run([*command, "--format=json", "--progress-spinner=off"], capture_output=True, text=True)  # noqa: S603
    try:
        code, lines = verdict(json.loads(done.stdout)["dependencies"], TRIAGED)
    except (ValueError, KeyError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        if AWAY.search(done.stderr):
            code, lines = 0, [f"not audited: no network ({last[:160]})"]
        else:
            code, lines = 1, [f"pip-audit failed: {last}"]
    print("\n".join(lines), file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
