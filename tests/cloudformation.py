"""What moto's CloudFormation lacks: resources that it does not know, or of which it drops most properties.

Its engine stays what it is (references, conditions, order, outputs, `DeletionPolicy: Retain`). The kinds of resources below
are made by the AWS API that each is a front of, with the properties of the template as they are: botocore refuses a wrong
shape, and moto's services what they know to be wrong.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moto.cloudformation import parsing
from moto.core.common_models import CloudFormationModel

Properties = dict[str, Any]
Client = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How resources of a type are made, changed and removed; each gets a client by the name of its service."""

    make: Callable[[Client, Properties], tuple[str, dict[str, str]]]
    """Gives what `Ref` and what `Fn::GetAtt` stand for."""
    change: Callable[[Client, str, Properties], object]
    remove: Callable[[Client, str], object]


class Made(CloudFormationModel):
    """A resource; subclasses are for one type each."""

    client: Client
    kind: Kind

    def __init__(self, name: str, attributes: dict[str, str]):
        self.physical_resource_id, self.attributes = name, attributes

    @staticmethod
    def cloudformation_type() -> str:
        return "Custom::Made"

    @staticmethod
    def cloudformation_name_type() -> str:
        return ""

    @classmethod
    def create_from_cloudformation_json(cls, resource_name, cloudformation_json, *_: Any, **__: Any) -> "Made":
        return cls(*cls.kind.make(cls.client, without_nothing(cloudformation_json["Properties"])))

    @classmethod
    def update_from_cloudformation_json(cls, original_resource, cloudformation_json, **_: Any) -> "Made":
        properties = without_nothing(cloudformation_json["Properties"])
        cls.kind.change(cls.client, original_resource.physical_resource_id, properties)
        return original_resource

    def get_cfn_attribute(self, name: str) -> str:
        return self.attributes[name]

    def delete(self, account_id: str, region_name: str) -> None:
        self.kind.remove(self.client, self.physical_resource_id)


@contextmanager
def completed(client: Client) -> Iterator[None]:
    """moto's CloudFormation, with these kinds instead of its own."""
    known, references = parsing.get_model_map(), parsing.get_references_from_template
    before = dict(known)
    for name, kind in KINDS.items():
        known[name] = type(name, (Made,), {"client": staticmethod(client), "kind": kind})
    # it does not see that a resource changes with a parameter that only a condition looks at
    parsing.get_references_from_template = lambda found: Whatever() if "Fn::If" in str(found) else references(found)
    try:
        yield
    finally:
        parsing.get_references_from_template = references
        known.clear()
        known.update(before)


class Whatever(list[str]):
    """The parameters of a resource that may depend on any."""

    def __contains__(self, name: object) -> bool:
        return True


def without_nothing(value: Any) -> Any:
    """The value without what AWS::NoValue took the place of; moto leaves it in lists."""
    if isinstance(value, dict):
        return {name: without_nothing(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nothing(entry) for entry in value if entry is not None]
    return value


def camel(value: Any) -> Any:
    """Names of properties as ECS's API has them."""
    if isinstance(value, dict):
        return {name[0].lower() + name[1:]: camel(entry) for name, entry in value.items()}
    return [camel(entry) for entry in value] if isinstance(value, list) else value


def make_bucket(client: Client, properties: Properties) -> tuple[str, dict[str, str]]:
    name = properties["BucketName"]
    client("s3").create_bucket(Bucket=name)
    change_bucket(client, name, properties)
    return name, {"Arn": f"arn:aws:s3:::{name}"}


def change_bucket(client: Client, name: str, properties: Properties) -> None:
    s3 = client("s3")
    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration=properties["VersioningConfiguration"])
    [rule] = properties["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    rules = [{"ApplyServerSideEncryptionByDefault": rule["ServerSideEncryptionByDefault"]}]
    s3.put_bucket_encryption(Bucket=name, ServerSideEncryptionConfiguration={"Rules": rules})
    closed = properties["PublicAccessBlockConfiguration"]
    s3.put_public_access_block(Bucket=name, PublicAccessBlockConfiguration=closed)
    s3.put_bucket_ownership_controls(Bucket=name, OwnershipControls=properties["OwnershipControls"])
    rules = [lifecycle_rule(rule) for rule in properties["LifecycleConfiguration"]["Rules"]]
    s3.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration={"Rules": rules})
    s3.put_bucket_tagging(Bucket=name, Tagging={"TagSet": properties["Tags"]})


def lifecycle_rule(rule: Properties) -> Properties:
    """A rule in S3's own words."""
    named = {"ID": rule["Id"], "Status": rule["Status"], "Filter": {"Prefix": rule.get("Prefix", "")}}
    if "ExpiredObjectDeleteMarker" in rule:
        named["Expiration"] = {"ExpiredObjectDeleteMarker": rule["ExpiredObjectDeleteMarker"]}
    if "Transitions" in rule:
        named["Transitions"] = [
            {"Days": move["TransitionInDays"], "StorageClass": move["StorageClass"]} for move in rule["Transitions"]
        ]
    same = ("AbortIncompleteMultipartUpload", "NoncurrentVersionExpiration")
    return named | {name: rule[name] for name in same if name in rule}


def put_bucket_policy(client: Client, properties: Properties) -> tuple[str, dict[str, str]]:
    policy = json.dumps(properties["PolicyDocument"])
    client("s3").put_bucket_policy(Bucket=properties["Bucket"], Policy=policy)
    return f"{properties['Bucket']}-policy", {}


def make_policy(client: Client, properties: Properties) -> tuple[str, dict[str, str]]:
    made = client("iam").create_policy(
        PolicyName=properties["ManagedPolicyName"],
        Description=properties["Description"],
        PolicyDocument=json.dumps(properties["PolicyDocument"]),
    )
    return made["Policy"]["Arn"], {}


def change_policy(client: Client, arn: str, properties: Properties) -> None:
    document = json.dumps(properties["PolicyDocument"])
    client("iam").create_policy_version(PolicyArn=arn, PolicyDocument=document, SetAsDefault=True)


def remove_policy(client: Client, arn: str) -> None:
    iam = client("iam")
    if iam.get_policy(PolicyArn=arn)["Policy"]["AttachmentCount"]:
        raise RuntimeError("a role still has it")  # as AWS does; moto comes back later
    for version in iam.list_policy_versions(PolicyArn=arn)["Versions"]:
        if not version["IsDefaultVersion"]:
            iam.delete_policy_version(PolicyArn=arn, VersionId=version["VersionId"])
    iam.delete_policy(PolicyArn=arn)


def make_role(client: Client, properties: Properties) -> tuple[str, dict[str, str]]:
    iam = client("iam")
    name = properties.get("RoleName") or f"made-{properties['Policies'][0]['PolicyName']}"
    trust = json.dumps(properties["AssumeRolePolicyDocument"])
    made = iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust, Tags=properties["Tags"])
    for arn in properties.get("ManagedPolicyArns", []):
        iam.attach_role_policy(RoleName=name, PolicyArn=arn)
    change_role(client, name, properties)
    return name, {"Arn": made["Role"]["Arn"]}


def change_role(client: Client, name: str, properties: Properties) -> None:
    for policy in properties.get("Policies", []):
        document = json.dumps(policy["PolicyDocument"])
        client("iam").put_role_policy(RoleName=name, PolicyName=policy["PolicyName"], PolicyDocument=document)


def remove_role(client: Client, name: str) -> None:
    iam = client("iam")
    for policy in iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]:
        iam.detach_role_policy(RoleName=name, PolicyArn=policy["PolicyArn"])
    for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]:
        iam.delete_role_policy(RoleName=name, PolicyName=policy)
    iam.delete_role(RoleName=name)


def make_secret(client: Client, properties: Properties) -> tuple[str, dict[str, str]]:
    secrets, rules = client("secretsmanager"), dict(properties["GenerateSecretString"])
    value, key = json.loads(rules.pop("SecretStringTemplate")), rules.pop("GenerateStringKey")
    value[key] = secrets.get_random_password(**rules)["RandomPassword"]
    made = secrets.create_secret(Name="made", SecretString=json.dumps(value), Tags=properties["Tags"])
    return made["ARN"], {}


def make_subnets(client: Client, properties: Properties) -> tuple[str, dict[str, str]]:
    client("rds").create_db_subnet_group(DBSubnetGroupName="made", **properties)
    return "made", {}


def make_settings(client: Client, properties: Properties) -> tuple[str, dict[str, str]]:
    given = dict(properties)
    values = given.pop("Parameters")
    client("rds").create_db_parameter_group(
        DBParameterGroupName="made", DBParameterGroupFamily=given.pop("Family"), **given
    )
    parameters = [
        {"ParameterName": name, "ParameterValue": value, "ApplyMethod": "immediate"} for name, value in values.items()
    ]
    client("rds").modify_db_parameter_group(DBParameterGroupName="made", Parameters=parameters)
    return "made", {}


def unused(client: Client) -> None:
    """What a database uses goes after it: moto would remove it before, and comes back later to what raises."""
    if client("rds").describe_db_instances()["DBInstances"]:
        raise RuntimeError("the database is still there")


def make_database(client: Client, properties: Properties) -> tuple[str, dict[str, str]]:
    given = {**properties, "DBInstanceIdentifier": "made", "AllocatedStorage": int(properties["AllocatedStorage"])}
    given["VpcSecurityGroupIds"] = given.pop("VPCSecurityGroups")
    reference = re.fullmatch(r"\{\{resolve:secretsmanager:(.+):SecretString:(\w+)\}\}", given["MasterUserPassword"])
    assert reference is not None
    secret = client("secretsmanager").get_secret_value(SecretId=reference[1])
    given["MasterUserPassword"] = json.loads(secret["SecretString"])[reference[2]]
    endpoint = client("rds").create_db_instance(**given)["DBInstance"]["Endpoint"]
    return "made", {"Endpoint.Address": endpoint["Address"], "Endpoint.Port": str(endpoint["Port"])}


def change_database(client: Client, name: str, properties: Properties) -> None:
    kept = properties["DeletionProtection"]
    client("rds").modify_db_instance(DBInstanceIdentifier=name, DeletionProtection=kept, ApplyImmediately=True)


def remove_database(client: Client, name: str) -> None:
    client("rds").delete_db_instance(DBInstanceIdentifier=name, FinalDBSnapshotIdentifier="last")  # DeletionPolicy


def make_task(client: Client, properties: Properties) -> tuple[str, dict[str, str]]:
    given = {name: value for name, value in properties.items() if name != "Tags"}
    made = client("ecs").register_task_definition(**camel(given))
    return made["taskDefinition"]["taskDefinitionArn"], {}


def make_server(client: Client, properties: Properties) -> tuple[str, dict[str, str]]:
    return client("ecs").create_service(**camel(properties))["service"]["serviceArn"], {}


def remove_server(client: Client, arn: str) -> None:
    client("ecs").delete_service(cluster=arn.split("/")[-2], service=arn, force=True)


def make_namespace(client: Client, properties: Properties) -> tuple[str, dict[str, str]]:
    names = client("servicediscovery")
    operation = names.create_private_dns_namespace(**properties)["OperationId"]
    made = names.get_operation(OperationId=operation)["Operation"]["Targets"]["NAMESPACE"]
    return made, {"Id": made}


def make_name(client: Client, properties: Properties) -> tuple[str, dict[str, str]]:
    made = client("servicediscovery").create_service(**properties)["Service"]
    return made["Id"], {"Arn": made["Arn"]}


def nothing(*_: object) -> None:
    """Of what no update here changes."""


KINDS = {
    "AWS::S3::Bucket": Kind(
        make=make_bucket, change=change_bucket, remove=lambda client, name: client("s3").delete_bucket(Bucket=name)
    ),
    "AWS::S3::BucketPolicy": Kind(make=put_bucket_policy, change=nothing, remove=nothing),
    "AWS::IAM::ManagedPolicy": Kind(make=make_policy, change=change_policy, remove=remove_policy),
    "AWS::IAM::Role": Kind(make=make_role, change=change_role, remove=remove_role),
    "AWS::SecretsManager::Secret": Kind(
        make=make_secret,
        change=nothing,
        remove=lambda client, arn: client("secretsmanager").delete_secret(
            SecretId=arn, ForceDeleteWithoutRecovery=True
        ),
    ),
    "AWS::RDS::DBSubnetGroup": Kind(
        make=make_subnets,
        change=nothing,
        remove=lambda client, name: unused(client) or client("rds").delete_db_subnet_group(DBSubnetGroupName=name),
    ),
    "AWS::RDS::DBParameterGroup": Kind(
        make=make_settings,
        change=nothing,
        remove=lambda client, name: (
            unused(client) or client("rds").delete_db_parameter_group(DBParameterGroupName=name)
        ),
    ),
    "AWS::RDS::DBInstance": Kind(make=make_database, change=change_database, remove=remove_database),
    "AWS::ECS::TaskDefinition": Kind(
        make=make_task,
        change=nothing,
        remove=lambda client, arn: client("ecs").deregister_task_definition(taskDefinition=arn),
    ),
    "AWS::ECS::Service": Kind(make=make_server, change=nothing, remove=remove_server),
    "AWS::ServiceDiscovery::PrivateDnsNamespace": Kind(
        make=make_namespace,
        change=nothing,
        remove=lambda client, name: client("servicediscovery").delete_namespace(Id=name),
    ),
    "AWS::ServiceDiscovery::Service": Kind(
        make=make_name,
        change=nothing,
        remove=lambda client, name: client("servicediscovery").delete_service(Id=name),
    ),
}
