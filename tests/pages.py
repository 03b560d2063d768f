"""The commands of a documentation page, as a test can read and run them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Block:
    """A fenced block of shell commands."""

    page: Path
    line: int
    """Of its first command, from 1."""
    text: str
    tried: bool
    """Whether a test runs it."""


def blocks(page: Path) -> list[Block]:
    """The page's fenced blocks that say `bash` or nothing, in order."""
    found, text = [], page.read_text()
    for match in re.finditer(r"^```(bash|bash tried)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(page, line, match[2], match[1] == "bash tried"))
    return found


def joined(text: str) -> list[str]:
    """The lines of a block, each with its continuations."""
    return text.replace("\\\n", " ").splitlines()


def job_commands(block: Block) -> list[tuple[str, list[str]]]:
    """Name and arguments of every `python jobs/NAME.py`; variables stay as they are written, and what is said to be
    optional is there."""
    found = []
    for line in joined(re.sub(r"\$\([^()]*\)", "PUT-IN", block.text).replace("--config …", "")):
        for match in re.finditer(r"python jobs/(\w+)\.py([^\n;&|]*)", line):
            words = [re.sub(r"^\[(?=--)", "", word) for word in shlex.split(match[2], comments=True)]
            found.append((match[1], [word if word.startswith("[") else word.rstrip("]") for word in words]))
    return found
