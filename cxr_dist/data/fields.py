"""Values out of JSON as the types that a dataclass's annotations name: what is not of its type is an error by name."""

import dataclasses
import json
import math
import typing
from typing import Any

__all__ = ["WrongFieldError", "loads", "typed"]

_MAX_INT = 1 << 63
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "keys and values"}


class WrongFieldError(ValueError):
    """A value that is not what its field holds; the message begins with the field's dotted name."""


def loads(data: bytes) -> Any:
    """What the JSON says, if it says each thing once, in numbers that are numbers. Raises ValueError."""
    try:
        return json.loads(data, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("found lists within lists without end") from None


def typed(kind: Any, value: Any, field: str) -> Any:
    """`value` as `kind`: int (not negative), float, str, bool, dict, a dataclass, or a tuple or dict of any of these."""
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, field)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(value, field, "a list")
        return tuple(typed(arguments[0], item, f"{field}[{number}]") for number, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(value, field, _WORDS[dict])
        return {key: typed(arguments[1], item, f"{field}.{key}") for key, item in value.items()}
    if not _is(kind, value):
        raise _wrong(value, field, _WORDS[kind])
    return value


def _dataclass(kind: Any, value: Any, field: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(value, field, _WORDS[dict])
    hints = typing.get_type_hints(kind)
    if different := sorted(set(value) ^ set(hints)):
        raise WrongFieldError(f"{field}: found fields that are missing or unknown: {different}")
    return kind(**{name: typed(hint, value[name], f"{field}.{name}") for name, hint in hints.items()})


def _is(kind: Any, value: Any) -> bool:
    if kind is int:
        return type(value) is int and 0 <= value < _MAX_INT
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, kind)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("found a key twice")
    return values


def _no_number(name: str) -> None:
    raise ValueError(f"found {name}, expected a number")


def _wrong(value: object, field: str, expected: str) -> WrongFieldError:
    return WrongFieldError(f"{field}: found {repr(value)[:80]}, expected {expected}")
