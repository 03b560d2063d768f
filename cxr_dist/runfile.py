"""A run's YAML file, looked at before its values are: one document of sections, each key once and with a value.

YAML lets a later key win over an earlier one in silence, makes lists of a billion out of ten lines of aliases, and reads
nothing as None, 010 as eight and 1:30 as ninety. Here each of these is an error that names the file and the line.
"""

import re
from pathlib import Path

import yaml

from cxr_dist.errors import ConfigError

__all__ = ["check"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 8
"""Levels of a file; a run needs three."""
MAX_VALUE = 4096
"""Characters in one value."""

_STR, _NULL, _INT = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "null", "int"))


def check(path: str, sections: tuple[str, ...]) -> None:
    """Raises ConfigError for a file that is no run. `sections` are the keys that hold keys and values."""
    text = _text(path)
    try:
        _check_events(path, text)
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}: line {mark.line + 1}" if mark else path
        reason = getattr(error, "problem", None) or getattr(error, "reason", "broken")
        raise ConfigError(f"{where}: found what is no YAML ({reason}), expected such as of --print_config") from None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: found no keys and values, expected sections such as of --print_config")
    _check_mapping(path, root, "", set())
    for key, value in root.value:
        if key.value == "config":
            raise ConfigError(
                f"{_where(path, key)}: found a file that names another, expected values; give --config twice"
            )
        if key.value in sections and not isinstance(value, yaml.MappingNode):
            found = (value.value or "nothing") if isinstance(value, yaml.ScalarNode) else "a list"
            raise ConfigError(f"{key.value}: found {found}, expected keys and values, such as in --print_config")


def _text(path: str) -> str:
    data = Path(path).read_bytes()
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: found {len(data)} bytes, expected the few of a run's YAML; give another file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: found bytes that are not UTF-8 at {error.start}, expected text") from None


def _check_events(path: str, text: str) -> None:
    """No anchors, bounded depth and values: what follows may recurse, and no value is repeated without end."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if getattr(event, "anchor", None):
            raise ConfigError(f"{_where(path, event)}: found an anchor or alias, expected values; write them out")
        if tag := getattr(event, "tag", None):
            raise ConfigError(f"{_where(path, event)}: found the tag {tag}, expected plain values; take it away")
        if depth > MAX_DEPTH:
            raise ConfigError(f"{_where(path, event)}: found more than {MAX_DEPTH} levels, expected sections of keys")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_VALUE:
            raise ConfigError(f"{_where(path, event)}: found a value of {len(event.value)} characters, expected fewer")


def _check_mapping(path: str, node: yaml.MappingNode, prefix: str, seen: set[str]) -> None:
    """`seen` are the dotted keys that have a value: `train.epochs: 3` is that of `train: {epochs: 3}`."""
    for key, value in node.value:
        if key.tag != _STR or key.value.startswith("__"):
            raise ConfigError(
                f"{_where(path, key)}: found a key that is no name, expected one such as of --print_config"
            )
        name = prefix + key.value
        if name in seen:
            raise ConfigError(f"{name}: found it again in {_where(path, key)}, expected it once; keep one of them")
        seen.add(name)
        if isinstance(value, yaml.MappingNode):
            _check_mapping(path, value, f"{name}.", seen)
        elif value.tag == _NULL and "." in name:
            raise ConfigError(
                f"{name}: found nothing in {_where(path, key)}, expected a value; leave the key out for its default"
            )
        elif value.tag == _INT and not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", value.value):
            raise ConfigError(f"{name}: found {value.value}, which YAML takes for {_odd(value)}; write it in decimal")


def _odd(value: yaml.ScalarNode) -> int:
    return yaml.SafeLoader("").construct_yaml_int(value)


def _where(path: str, part: yaml.Event | yaml.Node) -> str:
    return f"{path}: line {part.start_mark.line + 1}" if part.start_mark else path
