"""Secrets out of text: what every param, tag, log line and error message passes through before others can read it.

A secret is known by what stands around it, or because the environment holds it. This is the one place of the library
that looks there: what a client library or a program says of a credential may have any form.
"""

import os
import re
from collections.abc import Mapping
from urllib.parse import quote

from cxr_dist.errors import ConfigError

__all__ = ["has_secret", "refuse_secrets", "scrub", "scrub_items"]

HIDDEN = "***"

HELD = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("PGPASSWORD", "RAY_AUTH_TOKEN"),
)
"""Variables whose values are hidden wherever they appear."""
SHORTEST_HELD = 8
"""Characters of a value that is looked for; a shorter one would hide parts of words."""

# A password may hold "/" or "@" (AWS secret keys do), so the first form reaches to the last "@" of the word.
_USER_AND_PASSWORD = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"<>,:/@]*:[^\s'\"<>,]*@")
_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"<>,:/@]+@")
_WORDS = r"secret|password|passwd|passphrase|token|credential|signature|authorization|(?:api|access|private)[_-]?key"
_NAME = rf"[\w.-]*(?:{_WORDS})[\w-]*"
_ASSIGNED = re.compile(
    rf"(?P<name>{_NAME})(?P<sign>[\"']?\s*[=:]\s*[\"']?)(?:(?:bearer|basic)\s+)?[^\s\"'&,;)}}\]]+", re.IGNORECASE
)


def scrub(value: str) -> str:
    """The text without what is or looks like a secret: user:password@ of URLs, values of password=, token: and the like,
    and what the environment holds."""
    for held in _held():
        value = value.replace(held, HIDDEN)
    value = _USER_AND_PASSWORD.sub(rf"\g<scheme>{HIDDEN}@", value)
    value = _USER.sub(rf"\g<scheme>{HIDDEN}@", value)
    return _ASSIGNED.sub(rf"\g<name>\g<sign>{HIDDEN}", value)


def scrub_items(items: Mapping[str, object]) -> dict[str, str]:
    """The mapping as text, scrubbed; a value under a secret-looking key is hidden whole."""
    return {
        key: HIDDEN if re.fullmatch(_NAME, key, re.IGNORECASE) and value not in ("", None) else scrub(str(value))
        for key, value in items.items()
    }


def has_secret(value: str) -> bool:
    """Whether a config value holds a credential: user:password@ in a URL (on the web a lone token@ too), password=…, or
    what the environment holds."""
    if _ASSIGNED.search(value) or any(held in value for held in _held()):
        return True
    if re.match(r"https?://[^/@:]*(:\d+)?(/|$)", value):  # an "@" after the host is part of the path
        return False
    return _USER_AND_PASSWORD.match(value) is not None or re.match(r"https?://[^/]*@", value) is not None


def refuse_secrets(values: Mapping[str, object]) -> None:
    """ConfigError, with its key, for a value that holds a credential: values are logged, kept with runs, sent to workers
    and, of a command line, shown to every user of the machine and of Ray's dashboard."""
    for key, value in values.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(text, str) or not (
                has_secret(text) or has_secret(text.partition("=")[2])
            ):  # NAME=URI, KEY=VALUE
                continue
            raise ConfigError(
                f"{key}: found a credential in {scrub(text)}, expected none; give it in the environment "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
                "PGPASSWORD) or by the machine's role"
            )


def _held() -> list[str]:
    """Secret values of the environment, as they are and as a URL has them."""
    values = [value for name in HELD if len(value := os.environ.get(name, "")) >= SHORTEST_HELD]
    return [form for value in values for form in dict.fromkeys((value, quote(value, safe="")))]
