"""The documentation's commands: shell that bash can read, flags that the jobs know, and files that are there."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from cxr_dist.cli import model_flag, parse
from tests.conftest import ROOT
from tests.pages import Block, blocks, job_commands, joined

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("infra/**/README.md"))]
BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [(block, name, argv) for block in BLOCKS for name, argv in job_commands(block) if name != "bench"]
CLUSTER = ROOT / "docs" / "cluster.md"


STAND_INS = {"RUN.yaml": "jobs/configs/nih14.yaml", "$MLFLOW": "http://mlflow:5000", "SPLIT": "test", "DAYS": "30"}
"""What a reader puts in where only some values will do."""


def named(value: object) -> str | None:
    return f"{value.page.name}:{value.line}" if isinstance(value, Block) else value if isinstance(value, str) else ""


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.page == CLUSTER], ids=named)
def test_bash_can_read_it(block: Block) -> None:
    read = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
    assert (read.returncode, read.stderr) == (0, "")


@pytest.mark.parametrize(("block", "name", "argv"), COMMANDS, ids=named)
def test_the_job_knows_its_flags(
    block: Block, name: str, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    job = importlib.import_module(f"jobs.{name}")
    flags = getattr(job, "add_flags", None) or getattr(job, "flags", None)
    stand_ins = STAND_INS | {"$RUNS/doctor.json": str(tmp_path / "doctor.json")}
    given = [stand_ins.get(word, word) for word in argv if word != "…"]
    parse("", flags, model_flag(given) if hasattr(job, "model_flag") else given)


def test_the_files_that_the_cluster_page_names_are_there() -> None:
    text = CLUSTER.read_text()
    words = re.findall(r"(?:jobs|infra|tests|docs)/[\w./-]+\w|ray-cluster\.yaml|requirements\.lock", text)
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)]
    assert len(words) > 20
    assert [word for word in words if not (ROOT / word).exists()] == []
    assert [link for link in links if not (CLUSTER.parent / link).exists()] == []


def test_what_is_tried_is_all_that_can_be() -> None:
    """What is left to the reader needs an account, a second terminal, Slurm, or is `make install`."""
    cloud = (
        r"make install|--aws|^export RAY_API|^ray (get-auth-token|up|dashboard|down) |^#|^srun |^export RAY_AUTH|^\s*$"
    )
    for block in blocks(CLUSTER):
        if not block.tried:
            assert [line for line in joined(block.text) if not re.search(cloud, line)] == []
