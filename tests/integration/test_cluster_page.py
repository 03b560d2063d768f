"""docs/cluster.md, its blocks that are marked as tried: typed into one shell, one after the other, on the local servers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cxr_dist.data.synth import write_release
from infra.local.stack import Stack
from tests.conftest import ROOT
from tests.pages import blocks, joined
from tests.submitting import find

SMALL = {
    "ingest": "--data.size 64",
    "doctor": "--data.size 64 --model.weights random --model.prefix_chunk 8 --train.use_gpu no --train.num_workers 2"
    " --train.cpus_per_worker 0.5 --train.global_batch 32 --wait 0",
    "train": "--data.size 64 --model.weights random --model.bn_group 8 --model.prefix_chunk 8 --train.use_gpu no"
    " --train.num_workers 2 --train.cpus_per_worker 0.5 --train.global_batch 32 --train.epochs 1 --train.wait_for_nodes_s 0"
    " --evaluate.bootstrap 50 --evaluate.saliency 0",
    "gc": "",
}
"""What makes the page's commands small enough for two cores without a GPU; later flags win."""


def small(line: str) -> str:
    for name, flags in SMALL.items():
        if f"python jobs/{name}.py --" in line and "--working-dir . --" not in line.partition("python")[2]:
            return line if line.rstrip().endswith("--working-dir .") else f"{line} {flags}"
    return line


@pytest.mark.long
def test_the_page_leads_to_a_finished_run(full_stack: Stack, client: MlflowClient, tmp_path: Path) -> None:
    write_release(tmp_path / "nih", num_patients=60, seed=0, size=64)
    page = blocks(ROOT / "docs" / "cluster.md")
    commands = [small(line) for block in page if block.tried for line in joined(block.text)]
    # in the bucket there is what step 2 leaves; a release in the store is tried by test_ingest_s3.py
    env = os.environ | full_stack.env | {"BUCKET": "cxr", "MLFLOW": full_stack.addresses["mlflow"]}
    env |= {
        "RAY_API_SERVER_ADDRESS": full_stack.addresses["ray"],
        "PATH": f"{Path(sys.executable).parent}:{env['PATH']}",
    }
    env["HOME"] = str(tmp_path)  # the token is made there
    script = "\n".join(commands).replace("RELEASE=s3://$BUCKET/release/nih", f"RELEASE={tmp_path / 'nih'}")
    said = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stdout[-4000:] + said.stderr[-2000:]
    [run] = find(client, "nih14-first")
    assert run.info.status == "FINISHED"
    assert run.data.tags["run_folder"] == "s3://cxr/runs/nih14-first"
    assert "READY" in said.stdout
    for told in ("steps", "cost", "split"):
        assert told in said.stdout
