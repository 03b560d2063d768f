"""Checkpoints written while training goes on: one at a time, in order, by rank 0.

A state is copied to the host when it is given, so the next step may change the original. What a run cannot do without
(the end of an epoch, a state that someone waits for) is tried again for minutes; a periodic checkpoint that the store
does not take, or that comes while another is still on its way, is left out: there will be a later one.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch

from cxr_dist import storage
from cxr_dist.data.plan import Step
from cxr_dist.errors import InputError, RunError
from cxr_dist.train.checkpoint import Checkpoints

__all__ = ["PATIENCE_S", "Saver", "is_due", "on_host"]

log = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""Longest that a needed checkpoint is tried for, seconds."""
PAUSE_S = 5.0


def is_due(step: Step, steps: int, every: int) -> bool:
    """Whether a periodic checkpoint follows a step, after so many training steps of the run; 0: none within an epoch."""
    return step.kind == "train" and every > 0 and steps % every == 0


def on_host(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples whose tensors lie in the host's memory and are nobody else's."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if value.device.type == "cpu" else value.detach().cpu()
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(item) for item in value)
    return value


class Saver:
    """Saves states in a thread of its own; use it in a `with`, whose end waits for what is on its way."""

    def __init__(self, checkpoints: Checkpoints, *, patience_s: float = PATIENCE_S, pause_s: float = PAUSE_S):
        self.checkpoints = checkpoints
        self.patience_s, self.pause_s = patience_s, pause_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._stored = -1
        """Index of the last state that was stored."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()

    def save(
        self,
        state: dict[str, Any],
        *,
        index: int,
        epoch: int,
        score: float | None = None,
        finished: bool = False,
        needed: bool,
        scores: Callable[[], bytes] | None = None,
        then: Callable[[], None] | None = None,
    ) -> bool:
        """Begin to store the state before step `index`, with the file that `scores` makes; `then` is called when it counts.
        See `Checkpoints.save`.

        False if it is not needed and left out, since another is on its way. Raises RunError for an earlier one that was
        needed and could not be stored.
        """
        if not needed and self._writing is not None and not self._writing.done():
            return False
        self.wait()
        self._writing = self._thread.submit(
            self._write, on_host(state), needed, scores, then, index=index, epoch=epoch, score=score, finished=finished
        )
        return True

    def wait(self) -> None:
        """Until what was given is stored; RunError if it was needed and could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(
        self,
        state: dict[str, Any],
        needed: bool,
        scores: Callable[[], bytes] | None,
        then: Callable[[], None] | None,
        **about: Any,
    ) -> None:
        began = time.monotonic()
        while about["index"] != self._stored:  # else it is there, and in a moment would not be if it were written again
            try:
                entry = self.checkpoints.save(state, **about, scores=scores() if scores else None)
            except (InputError, OSError) as error:
                reason = " ".join(str(error).split())
                if not needed:
                    log.warning("checkpoint before step %d is left out: %s", about["index"], reason)
                    return
                if time.monotonic() - began > self.patience_s:
                    raise RunError(
                        f"checkpoint before step {about['index']} could not be stored under "
                        f"{storage.shown(self.checkpoints.folder)}: {reason}"
                    ) from error
                log.warning("checkpoint before step %d is tried again: %s", about["index"], reason)
                time.sleep(self.pause_s)
            else:
                self._stored = entry.index
                log.info("checkpoint before step %d: %.1f MB", entry.index, entry.bytes / 1e6)
        if then is not None:
            then()
