"""Small values that the driver, the controller and the ranks of a run leave for one another.

They lie in the cluster's own key-value store, which is there as long as the ranks are. This module holds all that the
package needs of Ray's private API for that (2.60).
"""

from ray.experimental import internal_kv

__all__ = ["delete", "get", "put"]

_SPACE = "cxr-dist"


def put(key: str, value: bytes) -> None:
    """Leave a value, over an older one if there is any."""
    internal_kv._internal_kv_put(key.encode(), value, namespace=_SPACE)


def get(key: str) -> bytes | None:
    """The value, or None if there is none."""
    return internal_kv._internal_kv_get(key.encode(), namespace=_SPACE)


def delete(key: str) -> None:
    """Take a value away, if there is one."""
    internal_kv._internal_kv_del(key.encode(), namespace=_SPACE)
