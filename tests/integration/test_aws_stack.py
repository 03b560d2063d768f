"""infra/aws/stack.yaml deployed to a server that plays AWS's interfaces (moto): made, used, changed, taken away.

What moto does not do is not tested here, and infra/aws/README.md says so: it enforces no policy, runs no lifecycle rule,
and starts neither the database nor the server. The server's own command is therefore run here, for real.
"""

import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from cxr_dist import storage
from infra.local import parts
from infra.local.processes import free_ports
from infra.local.stack import start
from tests.aws import ACCOUNT, REGION, ROOT, Account, Stack, account
from tests.faultproxy import fault_proxy
from tests.policy import documented, held_to, needs, refused, with_ingest

BUCKET = "cxr-dist-test"
SECURITY = ROOT / "docs" / "security.md"
NAMES = {"BUCKET": BUCKET, "REGION": REGION, "ACCOUNT": ACCOUNT}


@pytest.fixture(scope="module")
def aws() -> Iterator[Account]:
    with account() as found, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in found.env.items():
            patch.setenv(name, value)
        storage.forget_filesystems()
        yield found
        storage.forget_filesystems()


@pytest.fixture(scope="module")
def stack(aws: Account) -> Stack:
    return Stack(aws, BucketName=BUCKET, SshFrom="198.51.100.7/32")


def policies(aws: Account, role: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The policies of a role: those attached, and those in it, by name."""
    iam = aws.client("iam")
    attached = {}
    for entry in iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]:
        default = iam.get_policy(PolicyArn=entry["PolicyArn"])["Policy"]["DefaultVersionId"]
        version = iam.get_policy_version(PolicyArn=entry["PolicyArn"], VersionId=default)
        attached[entry["PolicyName"]] = version["PolicyVersion"]["Document"]
    inline = {
        name: iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
        for name in iam.list_role_policies(RoleName=role)["PolicyNames"]
    }
    return attached, inline


def test_it_is_made(stack: Stack) -> None:
    assert stack.status == "CREATE_COMPLETE"
    assert {name: value for name, value in stack.outputs.items() if name != "NodesGroupId"} == {
        "Region": REGION,
        "HeadProfile": "cxr-dist-head",
        "WorkerProfile": "cxr-dist-worker",
        "NodesGroup": "cxr-dist-nodes",
        "ImageRepository": f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/cxr-dist",
        "ReleaseUri": f"s3://{BUCKET}/release",
        "DatasetUri": f"s3://{BUCKET}/dataset",
        "RunsUri": f"s3://{BUCKET}/runs",
        "PredictionsUri": f"s3://{BUCKET}/predictions",
        "TrackingUri": "http://mlflow.cxr-dist.internal:5000",
        "MlflowCluster": "cxr-dist-mlflow",
    }


@pytest.mark.parametrize("bucket", [BUCKET, f"{BUCKET}-mlflow"])
def test_a_bucket_is_versioned_encrypted_closed_and_tagged(aws: Account, stack: Stack, bucket: str) -> None:
    s3 = aws.client("s3")
    assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
    [rule] = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    closed = s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"]
    assert closed == dict.fromkeys(
        ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"), True
    )
    [owned] = s3.get_bucket_ownership_controls(Bucket=bucket)["OwnershipControls"]["Rules"]
    assert owned["ObjectOwnership"] == "BucketOwnerEnforced"
    policy = json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])
    assert policy["Statement"] == [
        {
            "Sid": "TlsOnly",
            "Effect": "Deny",
            "Principal": "*",
            "Action": "s3:*",
            "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
            "Condition": {"Bool": {"aws:SecureTransport": "false"}},
        }
    ]
    tags = {tag["Key"]: tag["Value"] for tag in s3.get_bucket_tagging(Bucket=bucket)["TagSet"]}
    assert tags["project"] == "cxr-dist"
    rules = {rule["ID"]: rule for rule in s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]}
    assert rules["old-versions"]["NoncurrentVersionExpiration"] == {"NoncurrentDays": 30}
    assert rules["uploads-cut-off"]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}
    assert not [rule for rule in rules.values() if rule.get("Expiration", {}).keys() - {"ExpiredObjectDeleteMarker"}]


def test_the_nodes_have_the_rights_of_the_security_page_and_no_more(aws: Account, stack: Stack) -> None:
    stack.update(AllowIngest="false", AllowPredict="false")
    store, image, head = (documented(SECURITY, NAMES, number) for number in range(3))
    both = {"cxr-dist-store": store, "cxr-dist-image": image}
    assert policies(aws, "cxr-dist-worker") == (both, {})
    assert policies(aws, "cxr-dist-head") == (both, {"head": head})


def test_ingest_and_predict_add_what_the_page_says(aws: Account, stack: Stack) -> None:
    stack.update(AllowIngest="true", AllowPredict="true")
    found = policies(aws, "cxr-dist-worker")[0]["cxr-dist-store"]
    store = with_ingest(documented(SECURITY, NAMES), BUCKET)
    for statement in store["Statement"][1:]:
        statement["Resource"].append(f"arn:aws:s3:::{BUCKET}/predictions/*")
    store["Statement"][0]["Condition"]["StringLikeIfExists"]["s3:prefix"].append("predictions*")
    assert found == store


def test_the_store_is_used_by_the_uris_that_come_out(aws: Account, stack: Stack) -> None:
    aws.client("s3").delete_bucket_policy(Bucket=BUCKET)  # moto knows no conditions: it would refuse TLS as well
    for name in ("DatasetUri", "RunsUri", "PredictionsUri"):
        uri = storage.join(stack.outputs[name], "x", "object")
        storage.put_atomic(uri, b"whole")
        assert storage.read_bytes(uri) == b"whole"


def test_the_cluster_file_takes_the_names_that_come_out(aws: Account, stack: Stack) -> None:
    cluster = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())
    assert cluster["provider"]["region"] == stack.outputs["Region"]
    iam, out = aws.client("iam"), stack.outputs
    for kind, node in cluster["available_node_types"].items():
        head = kind == cluster["head_node_type"]
        profile = node["node_config"]["IamInstanceProfile"]["Name"]
        assert profile == out["HeadProfile" if head else "WorkerProfile"]
        [role] = iam.get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Roles"]
        assert role["RoleName"] == profile


def test_the_nodes_are_reached_by_one_another_and_by_ssh_from_where_it_is_said(aws: Account, stack: Stack) -> None:
    [group] = aws.client("ec2").describe_security_groups(GroupIds=[stack.outputs["NodesGroupId"]])["SecurityGroups"]
    assert group["GroupName"] == stack.outputs["NodesGroup"]
    rules = {rule["IpProtocol"]: rule for rule in group["IpPermissions"]}
    assert rules.keys() == {"tcp", "-1"}
    assert [entry["CidrIp"] for entry in rules["tcp"]["IpRanges"]] == ["198.51.100.7/32"]
    assert rules["-1"]["IpRanges"] == []
    assert [pair["GroupId"] for pair in rules["-1"]["UserIdGroupPairs"]] == [group["GroupId"]]


def test_the_database_is_private_encrypted_and_kept(aws: Account, stack: Stack) -> None:
    [found] = aws.client("rds").describe_db_instances()["DBInstances"]
    assert found["StorageEncrypted"] is True
    assert found["PubliclyAccessible"] is False
    assert found["DeletionProtection"] is True
    assert found["BackupRetentionPeriod"] == 7
    secret = aws.client("secretsmanager").get_secret_value(SecretId=stack.resources["DatabaseSecret"])
    value = json.loads(secret["SecretString"])
    assert value.keys() == {"username", "password"}
    assert value["password"].isalnum()
    assert len(value["password"]) == 40


def test_rays_autoscaler_asks_ec2_for_what_the_heads_role_allows_and_no_more(aws: Account, stack: Stack) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.aws.utils import resource_cache

    cluster = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())
    node = cluster["available_node_types"]["gpu-spot"]["node_config"]
    ec2 = aws.client("ec2")
    subnet = stack.parameters["SubnetIds"].split(",")[0]
    image = ec2.describe_images()["Images"][0]["ImageId"]
    config = {**node, "ImageId": image, "SubnetIds": [subnet], "SecurityGroupIds": [stack.outputs["NodesGroupId"]]}
    with fault_proxy(aws.url) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setattr(boto3, "DEFAULT_SESSION", None)  # it would keep this account's keys for the tests to come
        resource_cache.cache_clear()
        provider = AWSNodeProvider({"region": REGION, "cache_stopped_nodes": False}, cluster["cluster_name"])
        tags = {"ray-node-kind": "worker", "ray-node-type": "gpu-spot", "ray-node-status": "uninitialized"}
        provider.create_node(config, tags, 1)
        [name] = provider.non_terminated_nodes({"ray-node-kind": "worker"})
        provider.set_node_tags(name, {"ray-node-status": "up-to-date"})
        [instance] = ec2.describe_instances(InstanceIds=[name])["Reservations"][0]["Instances"]
        provider.terminate_nodes([name])
        resource_cache.cache_clear()
    assert {tag["Key"]: tag["Value"] for tag in instance["Tags"]}["ray-cluster-name"] == "cxr-dist"
    asked = {f"ec2:{parse_qs(request.body.decode())['Action'][0]}" for request in proxy.seen}
    statements = policies(aws, "cxr-dist-head")[1]["head"]["Statement"]
    allowed = {action for statement in statements for action in listed(statement["Action"])}
    assert asked == {action for action in allowed if action.startswith("ec2:")}


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@pytest.mark.long
def test_the_servers_own_command_serves_mlflow_out_of_its_bucket_alone(
    aws: Account, stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ecs = aws.client("ecs")
    task = ecs.describe_task_definition(taskDefinition=stack.resources["MlflowTask"])["taskDefinition"]
    [container] = task["containerDefinitions"]
    policy = policies(aws, stack.resources["MlflowRole"])[1]["artifacts"]
    port = free_ports(["mlflow"])["mlflow"]
    here = {"--host=0.0.0.0": "--host=127.0.0.1", "5000": str(port)}
    aws.client("s3").delete_bucket_policy(Bucket=f"{BUCKET}-mlflow")  # moto knows no conditions
    with start(tmp_path / "postgres", ["postgres"]) as database, fault_proxy(aws.url) as proxy:
        proxy.rule = held_to(policy)
        env = {entry["name"]: entry["value"] for entry in container["environment"]}
        where = re.sub(r"mlflow@.*(?=/)", f"cxr@{database.addresses['postgres']}", env["MLFLOW_BACKEND_STORE_URI"])
        env |= {**aws.env, "AWS_ENDPOINT_URL": proxy.url, "MLFLOW_BACKEND_STORE_URI": where}
        # the local Postgres speaks no TLS
        env |= {"PGSSLMODE": "disable", "PGPASSWORD": database.credentials["postgres_password"]}
        server = parts.Part(
            name="mlflow",
            command=[sys.executable, "-m", *replaced(container["command"], here)],
            env=parts.environment(env),
            address=f"http://127.0.0.1:{port}",
            answers=lambda: healthy(replaced(container["healthCheck"]["command"], here)),
            deadline_s=120,
        )
        database._launch(server)
        database._wait(server)
        hosts = ("mlflow.cxr-dist.internal", "localhost", "evil.example.org")
        assert [answer(port, f"{host}:{port}") for host in hosts] == [200, 200, 403]
        client = MlflowClient(server.address)
        run_id = client.create_run(client.create_experiment("policed")).info.run_id
        (tmp_path / "artifact.bin").write_bytes(os.urandom(12 << 20))  # in parts
        client.log_artifact(run_id, str(tmp_path / "artifact.bin"))
        [found] = client.list_artifacts(run_id)
        assert (found.path, found.file_size) == ("artifact.bin", 12 << 20)
        copy = client.download_artifacts(run_id, "artifact.bin", str(tmp_path / "postgres"))
        assert Path(copy).read_bytes() == (tmp_path / "artifact.bin").read_bytes()
        get_artifact_repository(client.get_run(run_id).info.artifact_uri, server.address).delete_artifacts(
            "artifact.bin"
        )
        assert client.list_artifacts(run_id) == []
    asked = {action for request in proxy.seen for action, _, _ in needs(request)}
    assert asked >= {"s3:GetObject", "s3:ListBucket", "s3:PutObject", "s3:DeleteObject"}
    assert refused(proxy.seen) == []


def replaced(words: list[str], by: dict[str, str]) -> list[str]:
    """The words of a command, with names of the task's own surroundings replaced by those here."""
    for old, new in by.items():
        words = [word.replace(old, new) for word in words]
    return words


def healthy(check: list[str]) -> bool:
    """What the task's health check says."""
    [kind, program, *arguments] = check
    assert (kind, program) == ("CMD", "python")
    return subprocess.run([sys.executable, *arguments], capture_output=True).returncode == 0


def answer(port: int, host: str) -> int:
    """The status that a request for experiments by this name of the host gets."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0", headers={"Host": host})
    return connection.getresponse().status


def test_it_goes_only_unprotected_and_the_buckets_stay(aws: Account, stack: Stack) -> None:
    s3, iam = aws.client("s3"), aws.client("iam")
    s3.delete_bucket_policy(Bucket=BUCKET)  # moto knows no conditions
    storage.put_atomic(f"s3://{BUCKET}/runs/kept", b"whole")
    stack.update(Protect="false")
    stack.delete()
    with pytest.raises(ClientError, match="does not exist"):
        _ = stack.status
    assert {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]} == {BUCKET, f"{BUCKET}-mlflow"}
    assert storage.read_bytes(f"s3://{BUCKET}/runs/kept") == b"whole"
    assert s3.get_bucket_versioning(Bucket=BUCKET)["Status"] == "Enabled"
    assert iam.list_roles()["Roles"] == []
    assert aws.client("rds").describe_db_instances()["DBInstances"] == []
