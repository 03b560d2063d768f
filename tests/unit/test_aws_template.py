"""infra/aws/stack.yaml as it is written: nothing open, nothing that expires under a run, the names that others use."""

import copy
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.local import parts
from tests.aws import ROOT, TEMPLATE, template

KEPT = (
    "release/nih/images_001.tar.gz",
    "dataset/nih14-224/manifest.json",
    "dataset/nih14-224/train/00000.parquet",
    "runs/nih14-first/run.json",
    "runs/nih14-first/initial.pt",
    "runs/nih14-first/lease/000000001-0123456789ab.json",
    "runs/nih14-first/checkpoints/000001/000001200.pt",
    "runs/features/0123456789abcdef0123456789abcdef/00000.parquet",
    "predictions/nih14-first/part-00000.parquet",
)
AT_ONCE = {"STANDARD", "STANDARD_IA", "INTELLIGENT_TIERING"}
"""Storage classes that are read like any object; of others S3 refuses to read until they are restored."""


@pytest.fixture
def stack() -> dict[str, Any]:
    return template()


def of_type(stack: dict[str, Any], kind: str) -> dict[str, Any]:
    return {name: entry for name, entry in stack["Resources"].items() if entry["Type"] == kind}


def losses(bucket: dict[str, Any], key: str) -> list[str]:
    """The lifecycle rules that take away, or out of reach, the current version of an object."""
    found = []
    for rule in bucket["Properties"]["LifecycleConfiguration"]["Rules"]:
        moves = {move["StorageClass"] for move in rule.get("Transitions", [])}
        expires = {"ExpirationInDays", "ExpirationDate"} & rule.keys()
        if key.startswith(rule.get("Prefix", "")) and (expires or moves - AT_ONCE):
            found.append(rule["Id"])
    return found


@pytest.mark.parametrize("key", KEPT)
def test_nothing_that_a_run_may_need_expires_or_is_moved_out_of_reach(stack: dict[str, Any], key: str) -> None:
    for bucket in of_type(stack, "AWS::S3::Bucket").values():
        assert losses(bucket, key) == []


@pytest.mark.parametrize(
    "rule",
    [
        {"Id": "old", "Prefix": "runs/", "ExpirationInDays": 3650},
        {"Id": "old", "Transitions": [{"StorageClass": "DEEP_ARCHIVE", "TransitionInDays": 90}]},
        {"Id": "old", "Prefix": "runs/nih14-first/checkpoints/", "Transitions": [{"StorageClass": "GLACIER"}]},
    ],
)
def test_rules_that_would_take_a_checkpoint_are_seen(stack: dict[str, Any], rule: dict[str, Any]) -> None:
    bucket = copy.deepcopy(stack["Resources"]["Bucket"])
    bucket["Properties"]["LifecycleConfiguration"]["Rules"].append(rule)
    assert losses(bucket, "runs/nih14-first/checkpoints/000001/000001200.pt") == ["old"]


def test_old_versions_delete_markers_and_cut_off_uploads_go_in_every_bucket(stack: dict[str, Any]) -> None:
    for bucket in of_type(stack, "AWS::S3::Bucket").values():
        rules = bucket["Properties"]["LifecycleConfiguration"]["Rules"]
        everywhere = {name for rule in rules if "Prefix" not in rule for name in rule}
        assert everywhere >= {
            "AbortIncompleteMultipartUpload",
            "NoncurrentVersionExpiration",
            "ExpiredObjectDeleteMarker",
        }
        assert {rule["Status"] for rule in rules} == {"Enabled"}


def test_what_people_made_outlives_the_stack(stack: dict[str, Any]) -> None:
    for name, bucket in of_type(stack, "AWS::S3::Bucket").items():
        assert bucket["DeletionPolicy"] == bucket["UpdateReplacePolicy"] == "Retain"
        [policy] = [
            policy
            for policy in of_type(stack, "AWS::S3::BucketPolicy").values()
            if policy["Properties"]["Bucket"] == {"Ref": name}
        ]
        assert policy["DeletionPolicy"] == "Retain"
    [database] = of_type(stack, "AWS::RDS::DBInstance").values()
    assert database["DeletionPolicy"] == database["UpdateReplacePolicy"] == "Snapshot"


def test_nothing_is_reached_from_outside_but_ssh_by_those_who_are_named(stack: dict[str, Any]) -> None:
    groups = of_type(stack, "AWS::EC2::SecurityGroup")
    rules = [rule for group in groups.values() for rule in group["Properties"].get("SecurityGroupIngress", [])]
    rules += [rule["Properties"] for rule in of_type(stack, "AWS::EC2::SecurityGroupIngress").values()]
    from_networks = [rule for rule in rules if "SourceSecurityGroupId" not in rule]
    assert [(rule["FromPort"], rule["ToPort"], rule["CidrIp"]) for rule in from_networks] == [
        (22, 22, {"Ref": "SshFrom"})
    ]
    assert stack["Parameters"]["SshFrom"]["Default"] == ""
    assert stack["Resources"]["NodesBySsh"]["Condition"] == "Ssh"
    [database] = of_type(stack, "AWS::RDS::DBInstance").values()
    assert database["Properties"]["PubliclyAccessible"] is False


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("", True),
        ("198.51.100.7/32", True),
        ("10.1.0.0/16", True),
        ("0.0.0.0/0", False),
        ("10.0.0.0/8", False),
        ("198.51.100.7", False),
        ("::/0", False),
        ("0.0.0.0/00016", False),
    ],
)
def test_ssh_for_the_whole_internet_is_refused(stack: dict[str, Any], given: str, taken: bool) -> None:
    assert bool(re.fullmatch(stack["Parameters"]["SshFrom"]["AllowedPattern"], given)) == taken


@pytest.mark.parametrize(
    ("given", "taken"),
    [("cxr-1", True), ("a" * 56, True), ("a" * 57, False), ("Cxr", False), ("cxr.data", False), ("-cxr", False)],
)
def test_a_bucket_name_leaves_room_for_the_second(stack: dict[str, Any], given: str, taken: bool) -> None:
    assert bool(re.fullmatch(stack["Parameters"]["BucketName"]["AllowedPattern"], given)) == taken


def test_its_names_are_those_of_the_cluster_file(stack: dict[str, Any]) -> None:
    cluster = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())
    name = stack["Parameters"]["ClusterName"]["Default"]
    assert cluster["cluster_name"] == name
    profiles = of_type(stack, "AWS::IAM::InstanceProfile").values()
    made = {profile["Properties"]["InstanceProfileName"]["Sub"].replace("${ClusterName}", name) for profile in profiles}
    used = {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in cluster["available_node_types"].values()}
    assert used == made == {"cxr-dist-head", "cxr-dist-worker"}


def container(stack: dict[str, Any]) -> dict[str, Any]:
    [task] = of_type(stack, "AWS::ECS::TaskDefinition").values()
    [found] = task["Properties"]["ContainerDefinitions"]
    return found


def test_mlflow_is_the_version_that_is_tested(stack: dict[str, Any]) -> None:
    pinned = re.search(r"^mlflow==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned[1] == version("mlflow")
    assert stack["Parameters"]["MlflowImage"]["Default"] == f"ghcr.io/mlflow/mlflow:v{pinned[1]}-full"


def test_mlflow_is_started_as_in_the_local_stack(stack: dict[str, Any], tmp_path: Path) -> None:
    def option(text: Any) -> str:
        return str(text["Sub"] if isinstance(text, dict) else text).partition("=")[0]

    ports = dict.fromkeys(parts.DEFAULT_PORTS, 1)
    credentials = dict.fromkeys(("s3_key", "s3_secret", "postgres_password"), "x")
    local = parts.mlflow(tmp_path, ports, credentials)
    [*_, server] = [index for index, word in enumerate(local.command) if word == "server"]
    assert {option(word) for word in container(stack)["Command"][2:]} == {
        option(word) for word in local.command[server + 1 :]
    }
    here = {entry["Name"]: entry["Value"] for entry in container(stack)["Environment"]}
    for name, value in local.env.items():
        if name.startswith("MLFLOW_") and name != "MLFLOW_BACKEND_STORE_URI":
            assert here[name] == value


def test_the_password_is_nowhere_in_the_template(stack: dict[str, Any]) -> None:
    [database] = of_type(stack, "AWS::RDS::DBInstance").values()
    assert database["Properties"]["MasterUserPassword"]["Sub"].startswith("{{resolve:secretsmanager:")
    assert "password" not in str(container(stack)["Environment"]).lower()
    assert [secret["Name"] for secret in container(stack)["Secrets"]] == ["PGPASSWORD"]


def test_cloudformation_can_read_it() -> None:
    tokens = yaml.scan(TEMPLATE.read_text())
    assert not [token for token in tokens if isinstance(token, yaml.AliasToken | yaml.AnchorToken)], "no aliases there"
    assert len(TEMPLATE.read_bytes()) < 51_200, "longer templates must be uploaded first"


def test_whatever_can_be_tagged_is_tagged_for_its_cost(stack: dict[str, Any]) -> None:
    untaggable = {
        "AWS::S3::BucketPolicy",
        "AWS::IAM::ManagedPolicy",
        "AWS::IAM::InstanceProfile",
        "AWS::EC2::SecurityGroupIngress",
    }
    tag = [{"Key": "project", "Value": {"Ref": "ClusterName"}}]
    wrong = {
        name
        for name, entry in stack["Resources"].items()
        if entry["Type"] not in untaggable and entry["Properties"].get("Tags") != tag
    }
    assert wrong == set()
