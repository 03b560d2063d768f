"""Damaged YAML through the command line of a job: exit code 2 and a line on stderr, or a config that says what it says."""

import contextlib
import io
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from cxr_dist.cli import run_job
from cxr_dist.config import Config, flatten
from tests.fuzz.edits import edited, edits
from tests.fuzz.plan import explore

ROOT = Path(__file__).resolve().parents[2]
GOOD = {path.stem: path.read_bytes() for path in sorted((ROOT / "jobs" / "configs").glob("*.yaml"))}
DEFAULTS = flatten(Config())

SCALARS = st.one_of(
    st.sampled_from(
        ["", "null", "~", "true", "no", "0", "-1", "3", "1e3", "1e999", ".inf", "-.inf", ".nan", "010", "0x1F"]
    ),
    st.sampled_from(
        ["1:30", "9" * 30, "9" * 5000, "2024-01-01", "'3'", '"a\\0b"', "'a\nb'", "[]", "[a]", "{}", "{a: 1}"]
    ),
    st.sampled_from(
        [
            "[Mass, Mass]",
            "[[1]]",
            "&a x",
            "*a",
            "!!python/object:os.system x",
            "!!int '3'",
            "!!binary aGk=",
            "|",
            ">",
            "é",
        ]
    ),
    st.sampled_from(
        ["nih8", "auto", "random", "png", "fp32", "s3://bucket/x", "file:///x", "../x", "x" * 300, "%", "@", "`"]
    ),
    st.text(max_size=12),
)


FLOATS = sorted(key for key, value in DEFAULTS.items() if isinstance(value, float))
NUMBERS = st.sampled_from([".inf", "-.inf", "1e999", ".nan", "-1", "0", "0.5", "1e-3", "9999999999"])
"""Numbers where numbers belong, which the parser takes: what is impossible the config itself must refuse."""
numbers = st.tuples(st.sampled_from(FLOATS), NUMBERS).map(lambda drawn: f"{drawn[0]}: {drawn[1]}\n".encode())


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A few keys with any value, mostly known ones, as block or flow."""
    keys = draw(st.lists(st.sampled_from(sorted(DEFAULTS)), min_size=1, max_size=3))
    text = ""
    for key in keys:
        section, name = key.split(".")
        name = draw(st.sampled_from([name] * 6 + [name.upper(), name[:-1], f"{name}s", "", "__path__", "class_path"]))
        shape = draw(st.sampled_from(["{}:\n  {}: {}\n", "{}: {{{}: {}}}\n", "{}.{}: {}\n"]))
        text += shape.format(section, name, draw(SCALARS))
    return text.encode("utf-8", "surrogatepass")


def loaded(path: Path) -> tuple[object, list[Config], str]:
    """Exit code, what the job was given, and stderr."""
    given: list[Config] = []
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as left:
        run_job(lambda config, args: given.append(config) or {}, description="fuzz", argv=["--config", str(path)])  # type: ignore[func-returns-value]
    return left.value.code, given, said.getvalue()


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def agrees(written: Any, held: Any) -> bool:
    """Whether a value of the config is what the file says, read by YAML's own rules; text may hold a number."""
    if isinstance(held, tuple):
        return isinstance(written, list) and tuple(written) == held
    if isinstance(held, float) and isinstance(written, str):
        return float(written) == held
    if isinstance(written, str) and not isinstance(held, str):
        return bool(yaml.safe_load(written) == held)
    return bool(str(written) == held if isinstance(held, str) else written == held)


def test_a_damaged_run_file_is_refused_in_a_line_or_says_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.yaml"
    monkeypatch.setattr(logging.getLogger("cxr_dist.cli"), "disabled", True)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        code, given, said = loaded(path)
        if code == 2:
            assert (len(given), len(said.splitlines())) == (0, 1), said
            assert said.startswith("error: "), said
            assert len(said) < 1200, said
            return
        assert (code, len(given)) == (0, 1), said
        held = flatten(given[0])
        expected = leaves(yaml.safe_load(data.decode("utf-8-sig")))
        expected = {key: value for key, value in expected.items() if key in held}
        assert all(math.isfinite(value) for value in held.values() if isinstance(value, float)), held
        assert all(agrees(value, held[key]) for key, value in expected.items()), (expected, held)
        assert {key: value for key, value in held.items() if value != DEFAULTS[key]}.keys() <= expected.keys()

    damaged = st.tuples(st.sampled_from(sorted(GOOD)), edits(2)).map(lambda drawn: edited(GOOD[drawn[0]], drawn[1]))
    explore("config", st.one_of(lines(), numbers, damaged), check)
