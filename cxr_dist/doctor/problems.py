"""What the doctor found wrong: which check, where, what was found, what was expected, what to do."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from cxr_dist.errors import InputError
from cxr_dist.scrub import scrub

__all__ = ["Problem", "caught", "of_sentence", "one_line"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One reason why the cluster is not ready."""

    check: str
    """What was looked at, in a word or two."""
    found: str
    expected: str = ""
    do: str = ""
    node: str | None = None
    """Host of the node that it is about; None: not about one."""

    def as_json(self) -> dict[str, str | None]:
        return asdict(self)

    def sentence(self) -> str:
        """For people: found, expected, what to do."""
        where = f"{self.node}: " if self.node else ""
        expected = f", expected {self.expected}" if self.expected else ""
        return f"{where}{self.found}{expected}" + (f"; {self.do}" if self.do else "")


def of_sentence(check: str, sentence: str, node: str | None = None) -> Problem:
    """A problem out of an error's one sentence, `found …, expected …; do …`; parts that it lacks are left empty."""
    text = one_line(sentence)
    told, _, do = text.partition("; ")
    found, _, expected = told.partition(", expected ")
    return Problem(check=check, node=node, found=found, expected=expected, do=do)


@contextlib.contextmanager
def caught(check: str, problems: list[Problem]) -> Iterator[None]:
    """An InputError of the block becomes a problem of this check, and the doctor goes on."""
    try:
        yield
    except InputError as error:
        problems.append(of_sentence(check, str(getattr(error, "cause", error))))


def one_line(text: object) -> str:
    """An error's words in one line, without secrets, cut where it is long."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(text))  # Ray colours its tracebacks
    return scrub(re.sub(r"\s+", " ", plain).strip())[:500]
