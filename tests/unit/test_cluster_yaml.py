"""ray-cluster.yaml: Ray's launcher accepts it, the stricter checks find nothing, and name each fault that it might have."""

import copy
import logging
import subprocess
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from infra import check_cluster
from infra.launcher import on_premise as own
from infra.launcher.rules import file_problems, local_problems, pinned_ray

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "ray-cluster.yaml"
RAY = version("ray")

Cluster = dict[str, Any]
Damage = Callable[[Cluster], Any]


@pytest.fixture
def cluster() -> Cluster:
    return copy.deepcopy(yaml.safe_load(FILE.read_text()))


def types(cluster: Cluster) -> dict[str, Any]:
    return cluster["available_node_types"]


def node(cluster: Cluster, name: str = "gpu-spot") -> dict[str, Any]:
    """A node type's node_config, apart from the others' (the file shares what they have in common)."""
    types(cluster)[name] = copy.deepcopy(types(cluster)[name])
    return types(cluster)[name]["node_config"]


def test_the_file_has_no_fault(cluster: Cluster) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))
    assert pinned_ray(ROOT) == RAY
    assert file_problems(cluster, ray_version=RAY) == []


def test_what_the_design_needs_of_it(cluster: Cluster) -> None:
    kinds = types(cluster)
    head = kinds.pop(cluster["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert {name: kind["min_workers"] for name, kind in kinds.items()} == {
        "gpu-spot": 0,
        "gpu-on-demand": 0,
        "cpu-ingest": 0,
    }
    assert sum(kind["max_workers"] for kind in kinds.values()) <= cluster["max_workers"]
    assert "GPU" not in kinds["cpu-ingest"]["resources"]
    assert kinds["cpu-ingest"]["labels"]["cxr-role"] == "ingest"
    assert not [kind for kind in kinds.values() if "docker" in kind]  # the token's option is for all of them


FAULTS: dict[str, tuple[Damage, str]] = {
    # unknown keys and values: Ray takes the first two without a word
    "provider key": (
        lambda c: c["provider"].update(regoin="x"),
        "provider.regoin: found a key that Ray does not read, did you mean region?",
    ),
    "auth missing": (lambda c: c.pop("auth"), "auth.ssh_user: found nothing"),
    "node type key": (
        lambda c: types(c)["gpu-spot"].update(max_worker=8),
        "Ray's launcher refuses it (Additional properties",
    ),
    "head type": (
        lambda c: c.update(head_node_type="haed"),
        "Ray's launcher refuses it (`head_node_type` must be one of",
    ),
    "EC2 key": (
        lambda c: node(c).update(Instancetype="g5.xlarge"),
        "node_config.Instancetype: found a key that EC2 does not know, did you mean InstanceType?",
    ),
    "EC2 key inside": (
        lambda c: node(c)["BlockDeviceMappings"][0]["Ebs"].update(Encrypt=True),
        "gpu-spot.node_config.BlockDeviceMappings[0].Ebs.Encrypt: found a key that EC2 does not know, did you mean Encrypted?",
    ),
    "EC2 type": (
        lambda c: node(c)["BlockDeviceMappings"][0]["Ebs"].update(VolumeSize="140"),
        "Ebs.VolumeSize: found '140', expected integer",
    ),
    "EC2 value": (lambda c: node(c).update(InstanceType="g5.2xlrage"), "did you mean g5.2xlarge?"),
    "EC2 bool": (
        lambda c: node(c)["BlockDeviceMappings"][0]["Ebs"].update(VolumeSize=True),
        "Ebs.VolumeSize: found True, expected integer",
    ),
    "no instance type": (lambda c: node(c).pop("InstanceType"), "gpu-spot.node_config.InstanceType: found nothing"),
    "Ray's own": (lambda c: node(c).update(MinCount=1), "node_config.MinCount: found a value that Ray sets itself"),
    # the region
    "no such region": (
        lambda c: c["provider"].update(region="us-eastt-1"),
        "provider.region: found us-eastt-1, expected a region of AWS, did you mean us-east-1?",
    ),
    "no region": (lambda c: c["provider"].pop("region"), "provider.region: found nothing"),
    "another's zone": (
        lambda c: c["provider"].update(availability_zone="us-west-2a"),
        "availability_zone: found us-west-2a, expected zones of us-east-1",
    ),
    "another's registry": (
        lambda c: c["provider"].update(region="eu-west-1"),
        "initialization_commands[1]: found us-east-1, expected eu-west-1",
    ),
    "another cloud": (lambda c: c["provider"].update(type="gcp"), "provider.type: found 'gcp', expected aws"),
    # what a node has to be
    "no profile": (
        lambda c: node(c).pop("IamInstanceProfile"),
        "gpu-spot.node_config.IamInstanceProfile: found nothing",
    ),
    "head's profile": (
        lambda c: node(c)["IamInstanceProfile"].update(Name="cxr-dist-head"),
        "found cxr-dist-head, which is the head's and may start nodes",
    ),
    "IMDSv1": (
        lambda c: node(c)["MetadataOptions"].update(HttpTokens="optional"),
        "MetadataOptions.HttpTokens: found optional, expected required",
    ),
    "no IMDS options": (lambda c: node(c).pop("MetadataOptions"), "MetadataOptions.HttpTokens: found nothing"),
    "plain disk": (
        lambda c: node(c)["BlockDeviceMappings"][0]["Ebs"].pop("Encrypted"),
        "Ebs.Encrypted: found None, expected true",
    ),
    "no disk": (lambda c: node(c).pop("BlockDeviceMappings"), "BlockDeviceMappings: found none"),
    "small disk": (lambda c: node(c)["BlockDeviceMappings"][0]["Ebs"].update(VolumeSize=30), "found no disk of 100 GB"),
    "disk that stays": (
        lambda c: node(c)["BlockDeviceMappings"][0]["Ebs"].update(DeleteOnTermination=False),
        "DeleteOnTermination: found false",
    ),
    "Ray's old image": (lambda c: node(c).pop("ImageId"), "gpu-spot.node_config.ImageId: found nothing"),
    "no cost tag": (
        lambda c: node(c)["TagSpecifications"].pop(),
        "TagSpecifications: found no tag project for the volume",
    ),
    # labels
    "no role": (
        lambda c: types(c)["gpu-spot"]["labels"].pop("cxr-role"),
        "gpu-spot.labels.cxr-role: found nothing, expected train or ingest",
    ),
    "GPU for ingest": (
        lambda c: types(c)["gpu-spot"]["labels"].update({"cxr-role": "ingest"}),
        "found ingest on a type with 1 GPU",
    ),
    "role of the head": (
        lambda c: types(c)["head"]["labels"].update({"cxr-role": "ingest"}),
        "head.labels.cxr-role: found ingest on the head",
    ),
    "another instance": (
        lambda c: node(c).update(InstanceType="g5.4xlarge"),
        "gpu-spot.labels.cxr-instance: found g5.2xlarge, expected g5.4xlarge",
    ),
    "another market": (
        lambda c: node(c).pop("InstanceMarketOptions"),
        "gpu-spot.labels.cxr-market: found spot, expected on-demand",
    ),
    # scaling and money
    "no fallback": (
        lambda c: types(c).pop("gpu-on-demand"),
        "gpu-spot: found spot without a type of the same instance",
    ),
    "fallback first": (
        lambda c: types(c)["gpu-on-demand"].update(priority=10),
        "gpu-on-demand.priority: found 10, expected less than that of gpu-spot (10)",
    ),
    "paid at once": (
        lambda c: types(c)["cpu-ingest"].update(min_workers=1),
        "cpu-ingest.min_workers: found 1, expected 0",
    ),
    "negative": (
        lambda c: types(c)["cpu-ingest"].update(min_workers=-1),
        "cpu-ingest.min_workers: found -1, expected 0",
    ),
    "never started": (
        lambda c: types(c)["cpu-ingest"].update(max_workers=0),
        "cpu-ingest.max_workers: found 0, expected 1 to max_workers (24)",
    ),
    "head decodes": (lambda c: types(c)["head"].update(resources={"CPU": 4}), "head: found CPUs for tasks on the head"),
    "head on spot": (
        lambda c: node(c, "head").update(InstanceMarketOptions={"MarketType": "spot"}),
        "head: found a spot instance",
    ),
    "never idle": (lambda c: c.pop("idle_timeout_minutes"), "idle_timeout_minutes: found None, expected 1 to 60"),
    "stopped disks": (
        lambda c: c["provider"].pop("cache_stopped_nodes"),
        "cache_stopped_nodes: found true (Ray's default)",
    ),
    # who may come in
    "Ray's own group": (
        lambda c: c["provider"].pop("security_group"),
        "provider.security_group.GroupName: found nothing, upon which Ray makes a group with port 22 open",
    ),
    "the world": (
        lambda c: c["provider"]["security_group"].update(
            IpPermissions=[{"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
        ),
        "IpPermissions: found 0.0.0.0/0, expected no rule for the world",
    ),
    "no token asked for": (
        lambda c: c["docker"]["run_options"].pop(0),
        "docker.run_options: found no --env RAY_AUTH_MODE=token",
    ),
    "no token": (lambda c: c["file_mounts"].clear(), "file_mounts: found no …/.ray/auth_token"),
    "dashboard for all": (
        lambda c: replace(c, "head", "127.0.0.1", "0.0.0.0"),
        "found no --dashboard-host=127.0.0.1 in ray start, without which the job server",
    ),
    "key in the file": (
        lambda c: c["initialization_commands"].append("export AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE"),
        "initialization_commands[2]: found what looks like a credential",
    ),
    "password": (
        lambda c: c["setup_commands"].append("export PGPASSWORD=hunter22"),
        "setup_commands[0]: found what looks like a credential",
    ),
    "keys of the provider": (
        lambda c: c["provider"].update(aws_credentials={}),
        "provider.aws_credentials: found credentials in the file",
    ),
    # what is started
    "no container": (lambda c: c.pop("docker"), "docker: found no image and container_name"),
    "another Ray": (
        lambda c: c["docker"].update(image="rayproject/ray:2.40.0-py311-gpu"),
        f"docker.image: found an image with Ray 2.40.0, expected {RAY}",
    ),
    "another image": (
        lambda c: c["initialization_commands"].__setitem__(1, c["initialization_commands"][1].replace(RAY, "2.59.0")),
        f"initialization_commands[1]: found an image with Ray 2.59.0, expected {RAY}",
    ),
    "Ray's nightly": (
        lambda c: c.pop("setup_commands"),
        "setup_commands: found nothing, for which Ray installs packages",
    ),
    "no autoscaler": (
        lambda c: replace(c, "head", "--autoscaling-config=~/ray_bootstrap_config.yaml", ""),
        "found no --autoscaling-config",
    ),
    "no spilling": (
        lambda c: replace(c, "worker", "--object-spilling-directory=/scratch/spill", ""),
        "worker_start_ray_commands: found no --object-spilling-directory=",
    ),
    "not started": (
        lambda c: c["worker_start_ray_commands"].pop(),
        "worker_start_ray_commands: found 0 lines with ray start",
    ),
    "no types": (lambda c: c.pop("available_node_types"), "available_node_types"),
}


def replace(cluster: Cluster, kind: str, old: str, new: str) -> None:
    key = f"{kind}_start_ray_commands"
    assert old in " ".join(cluster[key])
    cluster[key] = [line.replace(old, new) for line in cluster[key]]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(cluster: Cluster, fault: str) -> None:
    damage, sentence = FAULTS[fault]
    damage(cluster)
    found = file_problems(cluster, ray_version=RAY)
    assert [line for line in found if sentence in line], found


def test_files_that_would_be_sent(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    [line] = local_problems(cluster, ROOT)
    assert "found no ~/.ray/auth_token" in line
    assert "ray get-auth-token --generate" in line
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("t")
    token.chmod(0o644)
    [line] = local_problems(cluster, ROOT)
    assert "expected mode 600" in line
    token.chmod(0o600)
    assert list(local_problems(cluster, ROOT)) == []


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.touch(mode=0o600)
    assert check_cluster.main([str(FILE)]) == 0
    assert logging.root.manager.disable == logging.NOTSET, "what it silences, it silences for itself"
    assert capsys.readouterr().out == f"{FILE}: nothing found in the file; the account was not asked (--aws)\n"
    for text, sentence in (
        ("a: [", "is no YAML"),
        ("- a", "found list, expected a mapping"),
        ("provider: {type: aws}", "available_node_types: found none"),
    ):
        bad = tmp_path / "bad.yaml"
        bad.write_text(text)
        assert check_cluster.main([str(bad)]) == 2
        out, err = capsys.readouterr()
        assert sentence in err
        assert out == ""
    assert check_cluster.main([str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_file_with_faults_asks_nobody(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(FILE.read_text().replace("region: us-east-1", "region: us-eastt-1"))
    assert check_cluster.main([str(bad), "--aws"]) == 2
    assert capsys.readouterr().out == "not checked: the account, until the file is right\n"


def test_the_same_file_for_machines_of_ones_own(cluster: Cluster, capsys: pytest.CaptureFixture) -> None:
    flags = [
        "--head",
        "10.0.0.1",
        "--workers",
        "10.0.0.2",
        "10.0.0.3",
        "--ssh-user",
        "ray",
        "--scratch",
        "/data/scratch",
    ]
    assert own.main([str(FILE), *flags]) == 0
    made = yaml.safe_load(capsys.readouterr().out)
    prepared = prepare_config(copy.deepcopy(made))
    validate_config(prepared)
    [kind] = prepared["available_node_types"].values()
    assert (kind["min_workers"], kind["max_workers"]) == (2, 2)
    assert made["provider"] == {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
    assert made["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    starts = [line for kind in ("head", "worker") for line in made[f"{kind}_start_ray_commands"] if "ray start" in line]
    for line in starts:
        assert "RAY_AUTH_MODE=token" in line
        assert "--object-spilling-directory=/data/scratch/spill" in line
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "aws" not in yaml.safe_dump(made)


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_a_node_pulls_its_own_target_out_of_the_accounts_registry(
    cluster: Cluster, tmp_path: Path, target: str
) -> None:
    """The command as the node's shell runs it, with doubles of what the machine image has."""
    said = tmp_path / "said"
    for name, body in {
        "aws": 'case "$1" in sts) echo 123456789012;; ecr) echo "$AWS_DEFAULT_REGION password";; esac',
        "nvidia-smi": f"exit {0 if target == 'gpu' else 9}",
        "docker": f'echo "$@" >> {said}; [ "$1" != login ] || cat >> {said}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    command, env = cluster["initialization_commands"][1], {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", command], env=env, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    registry = "123456789012.dkr.ecr.us-east-1.amazonaws.com"
    image = f"{registry}/cxr-dist:{project}-ray{RAY}-{target}"
    assert said.read_text().splitlines() == [
        f"login --username AWS --password-stdin {registry}",
        "us-east-1 password",
        f"pull --quiet {image}",
        f"tag {image} {cluster['docker']['image']}",
    ]
    (tmp_path / "docker").write_text('#!/bin/sh\ncat >/dev/null; [ "$1" != pull ]\n')
    assert subprocess.run(["bash", "-c", command], env=env, stdin=subprocess.DEVNULL).returncode != 0
