"""What the AWS account lacks for a cluster file, asked before anything is launched: nothing here costs or changes anything.

A question that the caller may not ask is told as such, and is no fault of the account.
"""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import boto3
import botocore.exceptions as errors
from botocore.config import Config

from infra.launcher.quotas import quota_of
from infra.launcher.rules import Cluster, is_spot, node_types

__all__ = ["Answers", "ask"]

QUICK = Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 2})
DENIED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthorizationError")
SSH = 22
SPOT_ROLE = "AWSServiceRoleForEC2Spot"


@dataclass
class Answers:
    """What came of the questions."""

    problems: list[str] = field(default_factory=list)
    """What would fail, or cost, in sentences with what to do."""
    unasked: list[str] = field(default_factory=list)
    """Questions that were refused, with who refused them."""


@dataclass(frozen=True, kw_only=True)
class _Account:
    cluster: Cluster
    region: str
    client: Callable[[str], Any]


def ask(cluster: Cluster, *, profile: str | None = None) -> Answers:
    """Asks EC2, IAM, Service Quotas, Systems Manager and the registry about everything that the file needs.

    `profile` is one of ~/.aws/config; None is the environment's. Without credentials or region nothing else is asked.
    """
    answers, region = Answers(), str(cluster["provider"]["region"])
    try:
        session = boto3.Session(profile_name=profile, region_name=region)
        account = _Account(
            cluster=cluster, region=region, client=functools.cache(lambda name: session.client(name, config=QUICK))
        )
        _identity(account)
    except _NotThereError as error:
        answers.problems.append(str(error))
        return answers
    except errors.ProfileNotFound:
        name = profile or "of AWS_PROFILE"
        answers.problems.append(
            f"profile {name}: found none in ~/.aws, expected its credentials; run aws configure sso"
        )
        return answers
    for question in (_profiles, _spot_role, _types, _quotas, _machine_images, _group, _registry, _launches):
        try:
            answers.problems += question(account)
        except errors.ClientError as error:
            if _code(error) not in DENIED:
                raise
            asked = question.__doc__.split(":")[0] if question.__doc__ else question.__name__
            answers.unasked.append(f"{asked}: your account may not ask ({_code(error)}, {error.operation_name})")
    return answers


class _NotThereError(Exception):
    """Nothing can be asked; the message says why and what to do."""


def _identity(account: _Account) -> None:
    """Credentials that are accepted, and a region that is enabled."""
    try:
        account.client("sts").get_caller_identity()
        found = account.client("ec2").describe_regions(RegionNames=[account.region], AllRegions=True)["Regions"]
    except (errors.NoCredentialsError, errors.PartialCredentialsError):
        raise _NotThereError(
            "credentials: found none (environment, ~/.aws), expected those of the account; set AWS_PROFILE, or run aws login"
        ) from None
    except (errors.SSOError, errors.TokenRetrievalError) as error:
        raise _NotThereError(f"credentials: the login has expired ({error}); run aws sso login") from None
    except errors.EndpointConnectionError as error:
        raise _NotThereError(
            f"provider.region: nobody answers for {account.region} ({error}); correct the region, or look at the network"
        ) from None
    except errors.ClientError as error:
        if _code(error).startswith("InvalidParameter"):
            raise _NotThereError(
                f"provider.region: found {account.region}, which EC2 does not know ({_code(error)}); correct it"
            ) from None
        raise _NotThereError(
            f"credentials: found some that AWS refuses ({_code(error)}, {error.operation_name}); log in again"
        ) from None
    if found and found[0].get("OptInStatus") == "not-opted-in":
        raise _NotThereError(
            f"provider.region: {account.region} is not enabled for this account; enable it (Account, AWS Regions), or take "
            "another"
        )


def _profiles(account: _Account) -> Iterator[str]:
    """Instance profiles: each is there and has a role."""
    seen = set()
    for name, kind in node_types(account.cluster).items():
        given = kind["node_config"].get("IamInstanceProfile") or {}
        profile = given.get("Name") or str(given.get("Arn", "")).rpartition("/")[2]
        if not profile or profile in seen:
            continue
        seen.add(profile)
        where = f"available_node_types.{name}.node_config.IamInstanceProfile"
        try:
            roles = account.client("iam").get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Roles"]
        except errors.ClientError as error:
            if _code(error) != "NoSuchEntity":
                raise
            yield f"{where}: the account has no instance profile {profile}; deploy infra/aws, or name one that is there"
        else:
            if not roles:
                yield f"{where}: found the profile {profile} without a role, expected one; add its role to it"


def _spot_role(account: _Account) -> Iterator[str]:
    """Role for spot: EC2 needs it once in an account, and the head may not make it."""
    spot = [name for name, kind in node_types(account.cluster).items() if is_spot(kind["node_config"])]
    try:
        if spot:
            account.client("iam").get_role(RoleName=SPOT_ROLE)
    except errors.ClientError as error:
        if _code(error) != "NoSuchEntity":
            raise
        yield (
            f"available_node_types.{spot[0]}: the account has no role {SPOT_ROLE}, without which no spot node starts; once: "
            "aws iam create-service-linked-role --aws-service-name spot.amazonaws.com"
        )


def _types(account: _Account) -> Iterator[str]:
    """Instance types: offered in the region, with as many CPUs and GPUs as the file says."""
    ec2 = account.client("ec2")
    wanted = {name: kind["node_config"].get("InstanceType", "") for name, kind in node_types(account.cluster).items()}
    there = _offered(ec2, sorted(set(wanted.values())))
    for name, instance in wanted.items():
        where = f"available_node_types.{name}"
        if instance not in there:
            yield f"{where}.node_config.InstanceType: {instance} is not offered in {account.region}; take another or a region"
            continue
        described = ec2.describe_instance_types(InstanceTypes=[instance])["InstanceTypes"][0]
        has = {
            "CPU": described["VCpuInfo"]["DefaultVCpus"],
            "GPU": sum(gpu["Count"] for gpu in described.get("GpuInfo", {}).get("Gpus", [])),
        }
        given = node_types(account.cluster)[name].get("resources") or {}
        for resource, amount in has.items():
            if given.get(resource, amount if resource == "CPU" else 0) > amount:
                yield f"{where}.resources.{resource}: found {given[resource]}, a {instance} has {amount}; correct it"


def _quotas(account: _Account) -> Iterator[str]:
    """Quotas: vCPUs for at least one node of each type. A new account has none for GPUs."""
    client = account.client("service-quotas")
    quotas = {
        quota["QuotaName"]: quota
        for page in client.get_paginator("list_service_quotas").paginate(ServiceCode="ec2")
        for quota in page["Quotas"]
    }
    ec2 = account.client("ec2")
    there = _offered(
        ec2, sorted({kind["node_config"].get("InstanceType", "") for kind in node_types(account.cluster).values()})
    )
    for name, kind in node_types(account.cluster).items():
        instance, spot = kind["node_config"].get("InstanceType", ""), is_spot(kind["node_config"])
        quota = quota_of(instance, quotas, spot=spot)
        if quota is None or instance not in there:
            continue
        described = ec2.describe_instance_types(InstanceTypes=[instance])["InstanceTypes"][0]
        each, allowed = described["VCpuInfo"]["DefaultVCpus"], quotas[quota]["Value"]
        if allowed < each:
            yield (
                f"available_node_types.{name}: the account's quota {quotas[quota]['QuotaCode']} ({quota}) in {account.region} is "
                f"{allowed:g} vCPUs, one {instance} takes {each}; ask AWS for {each * max(1, kind.get('max_workers', 1))} "
                "(Service Quotas, EC2; hours to days)"
            )


def _machine_images(account: _Account) -> Iterator[str]:
    """Machine images: each is found in the region."""
    by_image: dict[str, str] = {}
    for name, kind in node_types(account.cluster).items():
        by_image.setdefault(str(kind["node_config"].get("ImageId", "")), name)
    for image, name in by_image.items():
        where = f"available_node_types.{name}.node_config.ImageId"
        if image.startswith("resolve:ssm:"):
            parameter = image.removeprefix("resolve:ssm:")
            if account.client("ssm").get_parameters(Names=[parameter])["InvalidParameters"]:
                yield f"{where}: Systems Manager has no {parameter} in {account.region}; give the id of an image"
        elif image:
            try:
                account.client("ec2").describe_images(ImageIds=[image])
            except errors.ClientError as error:
                if not _code(error).startswith("InvalidAMIID"):
                    raise
                yield f"{where}: {account.region} has no image {image}; image ids differ from region to region"


def _group(account: _Account) -> Iterator[str]:
    """Security group: it exists, is closed to the world, and lets its members talk."""
    ec2 = account.client("ec2")
    named = (account.cluster["provider"].get("security_group") or {}).get("GroupName")
    ids = sorted(
        {
            group
            for kind in node_types(account.cluster).values()
            for group in kind["node_config"].get("SecurityGroupIds", [])
        }
    )
    filters = [{"Name": "group-id", "Values": ids}] if ids else [{"Name": "group-name", "Values": [named]}]
    groups = ec2.describe_security_groups(Filters=filters)["SecurityGroups"]
    where = "node_config.SecurityGroupIds" if ids else "provider.security_group.GroupName"
    if not groups:
        yield (
            f"{where}: the region has no group {', '.join(ids) or named}, upon which Ray would make one with port 22 open to the "
            "world; deploy infra/aws, or name one that is there"
        )
        return
    for group in groups:
        rules, called = group["IpPermissions"], f"{group['GroupName']} ({group['GroupId']})"
        for rule in rules:
            open_to = [part["CidrIp"] for part in rule.get("IpRanges", [])] + [
                part["CidrIpv6"] for part in rule.get("Ipv6Ranges", [])
            ]
            if {"0.0.0.0/0", "::/0"} & set(open_to):
                ports = (
                    "all ports"
                    if rule["IpProtocol"] == "-1"
                    else f"port {rule.get('FromPort')} to {rule.get('ToPort')}"
                )
                yield f"{where}: {called} lets the world to {ports}; remove that rule"
        if not any(
            pair.get("GroupId") in [g["GroupId"] for g in groups] for rule in rules for pair in rule["UserIdGroupPairs"]
        ):
            yield f"{where}: found no rule of {called} for its own members, without which nodes do not meet; add one for all traffic"
        ssh_from = [
            rule
            for rule in rules
            if rule.get("FromPort", -1) in (-1, SSH) and (rule["IpRanges"] or rule.get("Ipv6Ranges"))
        ]
        if not ssh_from and not (account.cluster.get("auth") or {}).get("ssh_proxy_command"):
            yield f"{where}: {called} lets nobody to port 22, and auth.ssh_proxy_command is not set; `ray up` would not reach the head"


def _registry(account: _Account) -> Iterator[str]:
    """Container images: those that the nodes pull from the account's own registry."""
    text = " ".join([*(account.cluster.get("initialization_commands") or []), str(account.cluster.get("docker") or "")])
    wanted = {(repository, tag) for repository, tag in re.findall(r"\$registry/([\w./-]+):([\w.$-]+)", text)}
    wanted |= set(re.findall(r"\.dkr\.ecr\.[\w-]+\.amazonaws\.com/([\w./-]+):([\w.$-]+)", text))
    for repository, tag in sorted(wanted):
        for found in [tag.replace("$target", target) for target in ("gpu", "cpu")] if "$target" in tag else [tag]:
            try:
                account.client("ecr").describe_images(repositoryName=repository, imageIds=[{"imageTag": found}])
            except errors.ClientError as error:
                if _code(error) not in ("RepositoryNotFoundException", "ImageNotFoundException"):
                    raise
                yield (
                    f"initialization_commands: the registry in {account.region} has no {repository}:{found}; build infra/Dockerfile "
                    "and push it"
                )


def _launches(account: _Account) -> Iterator[str]:
    """Launches: EC2 is asked to check each node type's whole request, without carrying it out (DryRun)."""
    ec2 = account.client("ec2")
    for name, kind in node_types(account.cluster).items():
        request = {key: value for key, value in kind["node_config"].items() if key != "SubnetIds"}
        try:
            ec2.run_instances(DryRun=True, MinCount=1, MaxCount=1, **request)
        except errors.ClientError as error:
            if _code(error) == "DryRunOperation":
                continue
            said = error.response["Error"].get("Message", "")
            yield f"available_node_types.{name}: EC2 would refuse its launch ({_code(error)}: {said[:200]}); correct that first"


def _offered(ec2: Any, instances: list[str]) -> set[str]:
    pages = ec2.get_paginator("describe_instance_type_offerings").paginate(
        Filters=[{"Name": "instance-type", "Values": [name for name in instances if name]}]
    )
    return {offer["InstanceType"] for page in pages for offer in page["InstanceTypeOfferings"]}


def _code(error: errors.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
