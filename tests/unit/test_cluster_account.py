"""The account that ray-cluster.yaml is for, played by moto: what it lacks is named, and Ray's AWS code works in it.

Moto plays AWS's interfaces in this process. It enforces no rights and has no capacity; what only AWS can refuse is not shown.
"""

import copy
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from moto import mock_aws
from moto.core import DEFAULT_ACCOUNT_ID
from moto.servicequotas.responses import ServiceQuotasResponse
from moto.ssm.models import Parameter, ssm_backends
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import utils as aws_utils
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.commands import _bootstrap_config

from infra import check_cluster
from infra.launcher.account import ask
from infra.launcher.quotas import quota_of

FILE = Path(__file__).resolve().parents[2] / "ray-cluster.yaml"
REGION = "us-east-1"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
QUOTAS = {
    "Running On-Demand G and VT instances": 64,
    "All G and VT Spot Instance Requests": 64,
    "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances": 32,
    "All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests": 128,
    "Running On-Demand P instances": 0,
    "All P4, P3 and P2 Spot Instance Requests": 0,
    "All P5 Spot Instance Requests": 0,
    "Running On-Demand Inf instances": 0,
}

Cluster = dict[str, Any]


@pytest.fixture
def cluster() -> Cluster:
    return copy.deepcopy(yaml.safe_load(FILE.read_text()))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An account in which nothing is missing, for all tests: they change the file, not the account. Gives its user's home."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("HOME", str(home))
        for cache in (aws_utils.resource_cache, aws_utils.client_cache, aws_config._get_subnets_or_die):
            cache.cache_clear()  # Ray keeps its clients
        with mock_aws():
            fill()
            yield home


@pytest.fixture
def account(played: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """That account's quotas, to be changed."""
    quotas = dict(QUOTAS)
    listed = lambda _: json.dumps(  # noqa: E731  moto has no quotas of EC2
        {"Quotas": [{"QuotaName": name, "QuotaCode": "L-1", "Value": value} for name, value in quotas.items()]}
    )
    monkeypatch.setattr(ServiceQuotasResponse, "list_service_quotas", listed, raising=False)
    return quotas


@pytest.fixture
def nobody(played: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials from anywhere."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def fill() -> None:
    """What infra/aws makes that the file names, the image, and the machine image's name."""
    iam, ec2, ecr = (boto3.client(name, REGION) for name in ("iam", "ec2", "ecr"))
    for name in ("cxr-dist-head", "cxr-dist-worker"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    iam.create_role(RoleName="AWSServiceRoleForEC2Spot", AssumeRolePolicyDocument="{}")
    group = ec2.create_security_group(GroupName="cxr-dist-nodes", Description="nodes", VpcId=default_vpc())["GroupId"]
    allow(group, {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]})
    allow(group, {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "203.0.113.7/32"}]})
    ecr.create_repository(repositoryName="cxr-dist")
    for target in ("gpu", "cpu"):
        manifest = json.dumps({"schemaVersion": 2, "layers": [], "config": {"digest": f"sha256:{target}"}})
        ecr.put_image(
            repositoryName="cxr-dist",
            imageTag=f"0.1.0-ray{version('ray')}-{target}",
            imageManifest=manifest,
            imageManifestMediaType=MANIFEST,
        )
    image = yaml.safe_load(FILE.read_text())["metadata"]["node"]["ImageId"].removeprefix("resolve:ssm:")
    backend = ssm_backends[DEFAULT_ACCOUNT_ID][REGION]
    backend._parameters[image].append(
        Parameter(
            account_id=DEFAULT_ACCOUNT_ID,
            name=image,
            value="ami-1",
            parameter_type="String",
            description="",
            allowed_pattern=None,
            keyid=None,
            last_modified_date=0,
            version=1,
            data_type="text",
        )
    )


def default_vpc() -> str:
    return boto3.client("ec2", REGION).describe_vpcs()["Vpcs"][0]["VpcId"]


def allow(group: str, rule: dict[str, Any]) -> None:
    boto3.client("ec2", REGION).authorize_security_group_ingress(GroupId=group, IpPermissions=[rule])


def group(name: str = "cxr-dist-nodes") -> dict[str, Any]:
    filters = [{"Name": "group-name", "Values": [name]}]
    return boto3.client("ec2", REGION).describe_security_groups(Filters=filters)["SecurityGroups"][0]


def let_in(name: str = "cxr-dist-nodes") -> list[str]:
    """Networks that a group lets in."""
    return [part["CidrIp"] for rule in group(name)["IpPermissions"] for part in rule["IpRanges"]]


def test_an_account_that_lacks_nothing(cluster: Cluster, account: dict) -> None:
    answers = ask(cluster)
    assert answers.problems == []
    assert answers.unasked == []
    assert instances() == []  # nothing was launched


def test_the_command_asks(account: dict, played: Path, capsys: pytest.CaptureFixture) -> None:
    token = played / ".ray" / "auth_token"
    token.parent.mkdir()
    token.touch(mode=0o600)
    assert check_cluster.main([str(FILE), "--aws"]) == 0
    assert capsys.readouterr().out == f"{FILE}: nothing found\n"
    account["All G and VT Spot Instance Requests"] = 0
    assert check_cluster.main([str(FILE), "--aws"]) == 2
    assert "available_node_types.gpu-spot: the account's quota L-1" in capsys.readouterr().err


def test_a_quota_of_no_gpus(cluster: Cluster, account: dict) -> None:
    account |= {"All G and VT Spot Instance Requests": 0, "Running On-Demand G and VT instances": 4}
    first, second = ask(cluster).problems
    assert first == (
        "available_node_types.gpu-spot: the account's quota L-1 (All G and VT Spot Instance Requests) in us-east-1 is 0 vCPUs, "
        "one g5.2xlarge takes 8; ask AWS for 64 (Service Quotas, EC2; hours to days)"
    )
    assert second.startswith("available_node_types.gpu-on-demand: ")
    assert "is 4 vCPUs, one g5.2xlarge takes 8" in second


@pytest.mark.parametrize(
    ("instance", "spot", "quota"),
    [
        ("g5.2xlarge", True, "All G and VT Spot Instance Requests"),
        ("g5.2xlarge", False, "Running On-Demand G and VT instances"),
        ("c6i.4xlarge", True, "All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests"),
        ("m6i.xlarge", False, "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances"),
        ("im4gn.large", False, "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances"),
        ("p4d.24xlarge", True, "All P4, P3 and P2 Spot Instance Requests"),
        ("p5.48xlarge", True, "All P5 Spot Instance Requests"),
        ("p5.48xlarge", False, "Running On-Demand P instances"),
        ("inf2.xlarge", False, "Running On-Demand Inf instances"),
        ("trn1.2xlarge", False, "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances"),
    ],
)
def test_which_quota_counts_an_instance(instance: str, spot: bool, quota: str) -> None:
    assert quota_of(instance, QUOTAS, spot=spot) == quota


def test_no_credentials(cluster: Cluster, nobody: None) -> None:
    [line] = ask(cluster).problems
    assert line.startswith("credentials: found none (environment, ~/.aws)")


def test_no_such_profile(cluster: Cluster, nobody: None) -> None:
    assert ask(cluster, profile="cxr").problems == [
        "profile cxr: found none in ~/.aws, expected its credentials; run aws configure sso"
    ]


@pytest.mark.parametrize(
    ("code", "operation", "sentence"),
    [
        (
            "InvalidClientTokenId",
            "GetCallerIdentity",
            "credentials: found some that AWS refuses (InvalidClientTokenId, Get",
        ),
        ("ExpiredToken", "GetCallerIdentity", "credentials: found some that AWS refuses (ExpiredToken"),
        ("AuthFailure", "DescribeRegions", "credentials: found some that AWS refuses (AuthFailure, DescribeRegions)"),
        ("InvalidParameterValue", "DescribeRegions", "provider.region: found us-east-1, which EC2 does not know"),
    ],
)
def test_credentials_or_a_region_that_aws_refuses(
    cluster: Cluster, account: dict, monkeypatch: pytest.MonkeyPatch, code: str, operation: str, sentence: str
) -> None:
    refuse(monkeypatch, operation, code, "Invalid region name" if "Parameter" in code else "no")
    [line] = ask(cluster).problems
    assert line.startswith(sentence)


def refuse(monkeypatch: pytest.MonkeyPatch, operation: str, code: str, message: str = "") -> None:
    """Have an operation of AWS's refused; the others go on."""
    from botocore.client import BaseClient

    call = BaseClient._make_api_call

    def answer(self: Any, name: str, arguments: Any) -> Any:
        if name == operation:
            raise ClientError({"Error": {"Code": code, "Message": message}}, name)
        return call(self, name, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", answer)


def test_a_region_that_is_not_enabled(cluster: Cluster, account: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.ec2.models import ec2_backends

    regions = ec2_backends[DEFAULT_ACCOUNT_ID][REGION]
    [region] = [found for found in regions.describe_regions() if found.name == REGION]
    monkeypatch.setattr(region, "opt_in_status", "not-opted-in")
    [line] = ask(cluster).problems
    assert line.startswith("provider.region: us-east-1 is not enabled for this account")


def test_what_may_not_be_asked_is_told(cluster: Cluster, account: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "ListServiceQuotas", "AccessDeniedException")
    answers = ask(cluster)
    assert answers.problems == []
    assert answers.unasked == ["Quotas: your account may not ask (AccessDeniedException, ListServiceQuotas)"]


def test_profiles_that_are_not_there_or_have_no_role(cluster: Cluster, account: dict) -> None:
    boto3.client("iam", REGION).create_instance_profile(InstanceProfileName="without")
    kinds = cluster["available_node_types"]
    kinds["gpu-spot"]["node_config"]["IamInstanceProfile"] = {"Name": "nobody"}
    kinds["cpu-ingest"]["node_config"]["IamInstanceProfile"] = {
        "Arn": "arn:aws:iam::123456789012:instance-profile/without"
    }
    assert [line for line in ask(cluster).problems if "IamInstanceProfile" in line] == [
        "available_node_types.gpu-spot.node_config.IamInstanceProfile: the account has no instance profile nobody; "
        "deploy infra/aws, or name one that is there",
        "available_node_types.cpu-ingest.node_config.IamInstanceProfile: found the profile without without a role, expected "
        "one; add its role to it",
    ]


def test_an_account_that_never_had_a_spot_node(cluster: Cluster, account: dict) -> None:
    iam = boto3.client("iam", REGION)
    iam.delete_role(RoleName="AWSServiceRoleForEC2Spot")
    try:
        [line] = ask(cluster).problems
    finally:
        iam.create_role(RoleName="AWSServiceRoleForEC2Spot", AssumeRolePolicyDocument="{}")
    assert line == (
        "available_node_types.gpu-spot: the account has no role AWSServiceRoleForEC2Spot, without which no spot node starts; "
        "once: aws iam create-service-linked-role --aws-service-name spot.amazonaws.com"
    )


def test_what_the_region_does_not_have(cluster: Cluster, account: dict) -> None:
    kinds = cluster["available_node_types"]
    kinds["gpu-spot"]["resources"] = {"CPU": 16, "GPU": 4}
    kinds["cpu-ingest"]["node_config"]["InstanceType"] = "c9x.4xlarge"
    kinds["head"]["node_config"]["ImageId"] = "resolve:ssm:/nowhere"
    kinds["gpu-on-demand"]["node_config"]["ImageId"] = "ami-0123456789abcdef0"
    tag = f"0.1.0-ray{version('ray')}-$target"
    cluster["initialization_commands"][1] = cluster["initialization_commands"][1].replace(tag, "latest-$target")
    found = " ".join(ask(cluster).problems)
    for sentence in (
        "available_node_types.gpu-spot.resources.CPU: found 16, a g5.2xlarge has 8; correct it",
        "available_node_types.gpu-spot.resources.GPU: found 4, a g5.2xlarge has 1; correct it",
        "cpu-ingest.node_config.InstanceType: c9x.4xlarge is not offered in us-east-1",
        "head.node_config.ImageId: Systems Manager has no /nowhere in us-east-1",
        "gpu-on-demand.node_config.ImageId: us-east-1 has no image ami-0123456789abcdef0",
        "the registry in us-east-1 has no cxr-dist:latest-gpu; build infra/Dockerfile and push it",
        "the registry in us-east-1 has no cxr-dist:latest-cpu; build infra/Dockerfile and push it",
    ):
        assert sentence in found


@pytest.mark.parametrize(
    ("rules", "sentences"),
    [
        (["members", "0.0.0.0/0 22"], ["lets the world to port 22 to 22; remove that rule"]),
        (["203.0.113.7/32 22"], ["for its own members, without which nodes do not meet"]),
        (["members", "203.0.113.7/32 443"], ["lets nobody to port 22, and auth.ssh_proxy_command is not set"]),
        (None, ["the region has no group other, upon which Ray would make one with port 22 open to the world"]),
    ],
)
def test_groups_that_are_open_or_shut_or_not_there(
    cluster: Cluster, account: dict, rules: list[str] | None, sentences: list[str]
) -> None:
    ec2, group = boto3.client("ec2", REGION), ""
    cluster["provider"]["security_group"]["GroupName"] = "other"
    if rules is not None:
        group = ec2.create_security_group(GroupName="other", Description="other", VpcId=default_vpc())["GroupId"]
    for rule in rules or []:
        network, _, port = rule.partition(" ")
        if network == "members":
            allow(group, {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]})
        else:
            ports = {"FromPort": int(port), "ToPort": int(port)}
            allow(group, {"IpProtocol": "tcp", **ports, "IpRanges": [{"CidrIp": network}]})
    try:
        found = ask(cluster).problems
    finally:
        if group:
            ec2.delete_security_group(GroupId=group)
    assert len(found) == len(sentences)
    for line, sentence in zip(found, sentences, strict=True):
        assert sentence in line


def test_a_launch_that_ec2_would_refuse(cluster: Cluster, account: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "RunInstances", "InvalidParameterCombination", "hop limit")
    assert ask(cluster).problems[0] == (
        "available_node_types.head: EC2 would refuse its launch (InvalidParameterCombination: hop limit); correct that first"
    )


def instances() -> list[dict[str, Any]]:
    pages = boto3.client("ec2", REGION).get_paginator("describe_instances").paginate()
    return [instance for page in pages for group in page["Reservations"] for instance in group["Instances"]]


def test_rays_own_code_bootstraps_launches_and_ends_the_nodes(cluster: Cluster, account: dict, played: Path) -> None:
    """What `ray up`, the autoscaler and `ray down` ask of EC2, by Ray's own provider."""
    made = _bootstrap_config(cluster, no_config_cache=True)
    assert Path(made["auth"]["ssh_private_key"]).is_relative_to(played)
    kinds = made["available_node_types"]
    for kind in kinds.values():
        assert kind["node_config"]["SecurityGroupIds"] == [
            group()["GroupId"]
        ]  # the closed one, and no rule was added to it
        assert len(kind["node_config"]["SubnetIds"]) == 6  # each of the region's zones
    assert let_in() == ["203.0.113.7/32"]
    assert kinds["gpu-spot"]["resources"]["accelerator_type:A10G"] == 1
    assert kinds["head"]["resources"]["CPU"] == 0  # what the file says stands

    provider = AWSNodeProvider(made["provider"], made["cluster_name"])
    for name, kind in kinds.items():
        tags = {
            "ray-node-type": "head" if name == "head" else "worker",
            "ray-user-node-type": name,
            "ray-node-name": name,
        }
        provider.create_node(copy.deepcopy(kind["node_config"]), tags, 1)
    there = {tag(instance, "ray-user-node-type"): instance for instance in instances()}
    assert set(there) == {"head", "gpu-spot", "gpu-on-demand", "cpu-ingest"}
    for name, instance in there.items():
        expected = kinds[name]["labels"]
        assert instance["InstanceType"] == expected["cxr-instance"]
        assert ("spot" if instance.get("InstanceLifecycle") == "spot" else "on-demand") == expected["cxr-market"]
        assert instance["IamInstanceProfile"]["Arn"].rpartition("/")[2] == (
            "cxr-dist-head" if name == "head" else "cxr-dist-worker"
        )
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert tag(instance, "project") == "cxr-dist"
        assert tag(instance, "ray-cluster-name") == "cxr-dist"
    volumes = boto3.client("ec2", REGION).describe_volumes()["Volumes"]
    assert {volume["Encrypted"] for volume in volumes} == {True}
    assert len(volumes) == 4

    workers = provider.non_terminated_nodes({"ray-node-type": "worker"})
    assert len(workers) == 3
    provider.terminate_nodes(workers)
    assert [
        tag(instance, "ray-user-node-type") for instance in instances() if instance["State"]["Name"] == "running"
    ] == ["head"]
    provider.terminate_nodes(provider.non_terminated_nodes({}))
    assert {instance["State"]["Name"] for instance in instances()} == {"terminated"}


def test_without_a_closed_group_ray_lets_the_world_in(cluster: Cluster, account: dict) -> None:
    """Why the file names a group, and why the check asks for it."""
    cluster["provider"]["security_group"]["GroupName"] = "not-there"
    _bootstrap_config(cluster, no_config_cache=True)
    assert let_in("not-there") == ["0.0.0.0/0"]


def tag(instance: dict[str, Any], key: str) -> str:
    return {found["Key"]: found["Value"] for found in instance["Tags"]}[key]
