"""The shell around every job: parse the config, call the job, print one JSON result, choose the exit code.

Stdout ends with exactly one line of JSON; everything meant for people goes to stderr through logging or is printed
before it. Exit codes: 0 done, 1 failed, 2 bad input or config.
"""

import argparse
import difflib
import itertools
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from cxr_dist import environment, runfile
from cxr_dist.config import Config, flatten
from cxr_dist.errors import ConfigError, InputError, RunError
from cxr_dist.scrub import refuse_secrets, scrub

__all__ = ["Job", "model_flag", "parse", "run_job"]

Job = Callable[[Config, argparse.Namespace], dict[str, Any]]

log = logging.getLogger(__name__)

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one sentence on stderr and exit code 2, naming the nearest key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = sorted(option.removeprefix("--") for action in self._actions for option in action.option_strings)
        print(f"error: {scrub(_one_sentence(message, known))}", file=sys.stderr)
        sys.exit(2)

    def dump(self, *args: Any, **options: Any) -> str:
        """The config as --print_config shows it."""
        return scrub(super().dump(*args, **options))


def _one_sentence(message: str, known: list[str]) -> str:
    text = " ".join(str(message).split())
    unknown = re.search(r"[Uu]nrecognized arguments: (.*)", text)
    if unknown:
        return _unknown_key(unknown[1].split()[0].removeprefix("--").split("=")[0], known)
    unknown = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text)
    if unknown:
        return _unknown_key(f"{unknown[1]}.{unknown[2]}", known)
    unknown = re.search(r"Option '([\w.]+)' is not accepted", text)
    if unknown:
        return _unknown_key(unknown[1], known)
    text = re.sub(r"^Parser key \"([^\"]+)\": ", r"\1: ", text)
    wrong = re.fullmatch(r"([\w.]+): Expected a (.*)\. Got value: (.*)", text)
    if wrong:
        return f"{wrong[1]}: found {wrong[3]}, expected {_kind(wrong[2])}"
    return text


def _kind(type_name: str) -> str:
    """What a value of a type looks like, for a person."""
    choices = re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", type_name)
    if choices:
        return "one of " + choices[1].replace("'", "")
    plain = re.fullmatch(r"<class '(\w+)'>", type_name)
    words = {
        "str": "text (in YAML, a number as text stands in quotes)",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "tuple": "a list such as [a, b]",
    }
    return words.get(plain[1] if plain else type_name, type_name)


def _unknown_key(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else "see --help for every key"
    return f"unknown key {key}: {hint}"


def parse(
    description: str, extra: Callable[[Any], None] | None = None, argv: list[str] | None = None
) -> tuple[Config, argparse.Namespace]:
    """Parse a command line into the run's config and the job's own flags; exits with 2 on what cannot be used.

    ConfigError for what does not fit, and for a credential among the values.
    """
    parser = _Parser(description=description, default_env=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of a run; later flags override it")
    parser.add_argument("--json", type=str | None, default=None, help="also write the result to this file or URI")
    if extra is not None:
        extra(parser)
    for section in Config.__dataclass_fields__.values():
        parser.add_class_arguments(section.type, section.name, help=(section.type.__doc__ or "").strip())
    for path in _config_files(sys.argv[1:] if argv is None else argv):
        runfile.check(path, tuple(Config.__dataclass_fields__))
    parsed = parser.parse_args(argv)
    for name in Config.__dataclass_fields__:
        if not isinstance(parsed[name], jsonargparse.Namespace):
            raise ConfigError(f"{name}: found {parsed[name]!r}, expected keys and values, such as in --print_config")
        for field, value in vars(parsed[name]).items():
            if value is None:
                raise ConfigError(f"{name}.{field}: found nothing, expected a value; leave it out for its default")
    if parsed.json and "://" not in parsed.json and not Path(parsed.json).absolute().parent.is_dir():
        raise ConfigError(f"--json: found no folder {Path(parsed.json).absolute().parent}; make it or give another")
    built = parser.instantiate_classes(parsed)
    config = Config(**{name: getattr(built, name) for name in Config.__dataclass_fields__})
    flags = {name: value for name, value in vars(parsed).items() if name not in Config.__dataclass_fields__}
    refuse_secrets(flatten(config) | {f"--{name.replace('_', '-')}": value for name, value in flags.items()})
    return config, argparse.Namespace(**vars(parsed))


def model_flag(argv: list[str]) -> list[str]:
    """The command line with --model as --model-uri: the config has a section `model`, so --model would be a file of it."""
    return [re.sub(r"^--model(?==|$)", "--model-uri", word) for word in argv]


def _config_files(argv: list[str]) -> list[str]:
    """The files that --config names; one that is not there is left to the parser to name."""
    after = [value for flag, value in itertools.pairwise(argv) if flag == "--config"]
    joined = [flag.removeprefix("--config=") for flag in argv if flag.startswith("--config=")]
    return [path for path in (*after, *joined) if Path(path).is_file()]


def run_job(
    main: Job,
    *,
    description: str,
    extra: Callable[[Any], None] | None = None,
    argv: list[str] | None = None,
    failed: Callable[[dict[str, Any]], bool] = lambda result: False,
) -> NoReturn:
    """Run a job from its command line and leave the process with the right exit code.

    `failed` says of a result that is printed like any other whether the code is 1 all the same.
    """
    environment.apply()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ScrubbedFormatter("%(asctime)s %(levelname).1s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        config, args = parse(description, extra, argv)
        result = main(config, args)
    except InputError as error:
        # raised in a Ray task, the error's text is a whole traceback with the sentence at its end
        print(f"error: {scrub(str(getattr(error, 'cause', error)))}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        log.error("failed: %s", error)
        sys.exit(1)
    except Exception as error:
        log.exception("failed: %s", error)
        sys.exit(1)
    _leave_ray()
    line = json.dumps(result, allow_nan=False)
    sys.stderr.flush()
    print(line, flush=True)
    if args.json:
        _write(args.json, line + "\n")
    sys.exit(1 if failed(result) else 0)


def _write(where: str, text: str) -> None:
    if "://" not in where:
        Path(where).write_text(text)
        return
    from cxr_dist import storage  # pyarrow's stores take time to import, and few results go there

    try:
        storage.put_atomic(where, text.encode())
    except (InputError, OSError) as error:
        print(f"error: --json: {scrub(str(error))}", file=sys.stderr)
        sys.exit(2)


class ScrubbedFormatter(logging.Formatter):
    """Log lines and tracebacks without the secrets that a URL or a message may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record))


def _leave_ray() -> None:
    """Disconnect, so that no worker's output comes after the result."""
    ray = sys.modules.get("ray")
    if ray is not None:
        ray.shutdown()
