"""An object store's policy, held to by a proxy: the statements of docs/security.md, tried on what jobs really ask for."""

import copy
import fnmatch
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

from tests.faultproxy import Fault, Rule, Seen

REFUSED = Fault(status=403, code="AccessDenied")
# Arrow asks for a bucket that cannot exist, to tell by the error which store answers; any error will do.
ARROW_PROBE = "/%24extremelyunlikelytoexist%24"


def documented(page: Path, names: dict[str, str], number: int = 0) -> dict[str, Any]:
    """A policy in JSON on a page, by its number there, with the page's placeholders replaced."""
    text = re.findall(r"```json\n(\{\"Version\".*?)```", page.read_text(), re.DOTALL)[number]
    for placeholder, name in names.items():
        text = text.replace(placeholder, name)
    return json.loads(text)


def with_ingest(policy: dict[str, Any], bucket: str) -> dict[str, Any]:
    """The documented policy of the store, with what the page says that ingest wants besides."""
    widened = copy.deepcopy(policy)
    listing, reading, writing = widened["Statement"]
    listing["Condition"]["StringLikeIfExists"]["s3:prefix"].append("release*")
    reading["Resource"].append(f"arn:aws:s3:::{bucket}/release/*")
    writing["Resource"].append(f"arn:aws:s3:::{bucket}/dataset/*")
    return widened


def held_to(policy: dict[str, Any]) -> Rule:
    """The rule that refuses every request that the policy does not allow, as S3 does."""
    return lambda request: None if allows(policy, request) else REFUSED


def allows(policy: dict[str, Any], request: Seen) -> bool:
    """Whether each action that the request needs is allowed; only `Allow` and a condition on s3:prefix are known."""
    return all(
        any(_covers(statement, action, resource, prefix) for statement in policy["Statement"])
        for action, resource, prefix in needs(request)
    )


def needs(request: Seen) -> list[tuple[str, str, str | None]]:
    """(action, resource, listed prefix) of an S3 request in path style."""
    url = urlsplit(request.path)
    query = parse_qs(url.query, keep_blank_values=True)
    bucket, _, key = unquote(url.path).lstrip("/").partition("/")
    arn = f"arn:aws:s3:::{bucket}"
    if not key:
        if request.method == "POST" and "delete" in query:
            root = ElementTree.fromstring(request.body)
            keys = [found.text for found in root.iter() if found.tag.endswith("}Key") or found.tag == "Key"]
            return [("s3:DeleteObject", f"{arn}/{name}", None) for name in keys]
        listed = query.get("prefix", [None])[0] if request.method == "GET" else None
        action = "s3:ListBucket" if request.method in ("GET", "HEAD") else "s3:CreateBucket"
        return [(action, arn, listed)]
    aborted = request.method == "DELETE" and "uploadId" in query
    actions = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject", "POST": "s3:PutObject"}
    action = "s3:AbortMultipartUpload" if aborted else actions.get(request.method, "s3:DeleteObject")
    return [(action, f"{arn}/{key}", None)]


def refused(requests: list[Seen]) -> list[Seen]:
    """The requests that were refused, but for the one that is made to be."""
    return [request for request in requests if request.status == REFUSED.status and request.path != ARROW_PROBE]


def _covers(statement: dict[str, Any], action: str, resource: str, prefix: str | None) -> bool:
    assert statement["Effect"] == "Allow"
    allowed = [*statement.get("Condition", {}).get("StringLikeIfExists", {}).get("s3:prefix", ["*"])]
    return (
        action in _list(statement["Action"])
        and any(fnmatch.fnmatchcase(resource, pattern) for pattern in _list(statement["Resource"]))
        and (prefix is None or any(fnmatch.fnmatchcase(prefix, pattern) for pattern in allowed))
    )


def _list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
