"""AWS's interfaces as a local server (moto), and infra/aws/stack.yaml deployed to it as a user would deploy it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import yaml
from moto.server import ThreadedMotoServer

from tests.cloudformation import completed

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "infra" / "aws" / "stack.yaml"
REGION = "us-east-1"
ACCOUNT = "123456789012"  # moto's
KEYS = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}


@dataclass(frozen=True, kw_only=True)
class Account:
    """An empty AWS account."""

    url: str

    def client(self, service: str) -> Any:
        return boto3.session.Session().client(service, endpoint_url=self.url, region_name=REGION, **KEYS)

    @property
    def env(self) -> dict[str, str]:
        """What a program must have in its environment to see this account and no other."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def account() -> Iterator[Account]:
    """A moto server of its own; all that is in it ends with it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    try:
        found = Account(url=f"http://{host}:{port}")
        with completed(found.client):
            yield found
    finally:
        running.stop()


class Stack:
    """The stack in an account, as `aws cloudformation deploy` leaves it."""

    def __init__(self, account: Account, **parameters: str):
        self.account, self.name = account, "cxr-dist"
        self.formation = account.client("cloudformation")
        ec2 = account.client("ec2")
        [vpc] = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
        subnets = ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc["VpcId"]]}])["Subnets"]
        self.parameters = {
            "VpcId": vpc["VpcId"],
            "SubnetIds": ",".join(subnet["SubnetId"] for subnet in subnets),
            **parameters,
        }
        self.formation.create_stack(**self._request())

    def update(self, **parameters: str) -> None:
        self.parameters |= parameters
        self.formation.update_stack(**self._request())

    def delete(self) -> None:
        self.formation.delete_stack(StackName=self.name)

    @property
    def status(self) -> str:
        return self.formation.describe_stacks(StackName=self.name)["Stacks"][0]["StackStatus"]

    @property
    def outputs(self) -> dict[str, str]:
        found = self.formation.describe_stacks(StackName=self.name)["Stacks"][0]["Outputs"]
        return {output["OutputKey"]: output["OutputValue"] for output in found}

    @property
    def resources(self) -> dict[str, str]:
        """Physical id of each resource, by its name in the template."""
        found = self.formation.list_stack_resources(StackName=self.name)["StackResourceSummaries"]
        return {entry["LogicalResourceId"]: entry["PhysicalResourceId"] for entry in found}

    def _request(self) -> dict[str, Any]:
        return {
            "StackName": self.name,
            "TemplateBody": TEMPLATE.read_text(),
            "Capabilities": ["CAPABILITY_NAMED_IAM"],
            "Parameters": [{"ParameterKey": name, "ParameterValue": value} for name, value in self.parameters.items()],
        }


class _Loader(yaml.SafeLoader):
    """YAML with CloudFormation's tags, each as a mapping of one key."""


def _tagged(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        value: Any = loader.construct_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        value = loader.construct_mapping(node, deep=True)
    return {suffix: value}


_Loader.add_multi_constructor("!", _tagged)


def template() -> dict[str, Any]:
    """The template as it is written; `!Ref X` is {"Ref": "X"}."""
    return yaml.load(TEMPLATE.read_text(), _Loader)  # noqa: S506 - a SafeLoader
