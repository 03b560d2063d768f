"""Secrets out of text: what every param, tag, log line and error message passes through before others can read it."""

import re
from collections.abc import Mapping

__all__ = ["has_secret", "scrub", "scrub_items"]

HIDDEN = "***"

# A password may hold "/" or "@" (AWS secret keys do), so the first form reaches to the last "@" of the word.
_USER_AND_PASSWORD = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"<>,:/@]*:[^\s'\"<>,]*@")
_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"<>,:/@]+@")
_NAME = r"[\w.-]*(?:secret|password|passwd|token|credential|authorization|api[_-]?key|access[_-]?key)[\w-]*"
_ASSIGNED = re.compile(
    rf"(?P<name>{_NAME})(?P<sign>[\"']?\s*[=:]\s*[\"']?)(?:(?:bearer|basic)\s+)?[^\s\"'&,;)}}\]]+", re.IGNORECASE
)


def scrub(value: str) -> str:
    """The text without what looks like a secret: user:password@ of URLs, and values of password=, token: and the like."""
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
    """Whether a config value holds a credential: user:password@ in a URL (on the web a lone token@ too), or password=…"""
    if _ASSIGNED.search(value):
        return True
    if re.match(r"https?://[^/@]*(/|$)", value):  # an "@" after the host is part of the path
        return False
    return _USER_AND_PASSWORD.match(value) is not None or re.match(r"https?://[^/]*@", value) is not None
