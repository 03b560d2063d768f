"""What is wrong with a cluster file, before `ray up` spends money on it: python infra/check_cluster.py ray-cluster.yaml [--aws]

Without --aws it reads the file, and asks nobody. With it, it asks the account as well: whether credentials, region, profiles,
instance types, quotas, images and security group are there, and whether EC2 would accept each launch; nothing is started or
changed. Exit codes: 0 nothing found, though perhaps not everything could be asked (`not checked: …`); 2 something is wrong.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # infra is no part of the installed package

from infra.launcher.account import ask
from infra.launcher.rules import file_problems, local_problems, pinned_ray

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    """Check a cluster file; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the cluster file")
    parser.add_argument("--aws", action="store_true", help="ask the AWS account too")
    parser.add_argument("--profile", default=os.environ.get("AWS_PROFILE"), help="of ~/.aws/config (AWS_PROFILE)")
    options = parser.parse_args(arguments)
    problems, unasked = check(options.file, aws=options.aws, profile=options.profile)
    for line in unasked:
        print(f"not checked: {line}")
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    if not problems:
        print(
            f"{options.file}: nothing found{'' if options.aws else ' in the file; the account was not asked (--aws)'}"
        )
    return 2 if problems else 0


def check(path: Path, *, aws: bool, profile: str | None = None) -> tuple[list[str], list[str]]:
    """What is wrong, and what could not be asked. The account is asked once the file is sound."""
    try:
        cluster = yaml.safe_load(path.read_text())
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror}); give the path of a cluster file"], []
    except yaml.YAMLError as error:
        return [f"{path}: is no YAML ({' '.join(str(error).split())[:200]}); correct that place"], []
    if not isinstance(cluster, dict):
        return [f"{path}: found {type(cluster).__name__}, expected a mapping; begin with ray-cluster.yaml"], []
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Ray's launcher and boto3 talk while they look
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            problems = file_problems(cluster, ray_version=pinned_ray(ROOT))
        problems += local_problems(cluster, Path.cwd())
        if not aws:
            return problems, []
        if problems:
            return problems, ["the account, until the file is right"]
        answers = ask(cluster, profile=profile)
        return answers.problems, answers.unasked
    finally:
        logging.disable(disabled)


if __name__ == "__main__":
    sys.exit(main())
