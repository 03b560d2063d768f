"""What MLflow knows of runs, and what its registry of models points to: asked, never written to.

InputError if it does not answer, and then nothing is removed.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from cxr_dist import journal
from cxr_dist.errors import InputError
from cxr_dist.scrub import scrub

__all__ = ["Pointer", "Tracking", "one_line"]


class Pointer(NamedTuple):
    """What of a model's version in MLflow's registry may name a run: source, run id, link, tags."""

    what: str
    text: str


class Tracking:
    """An MLflow server with its registry."""

    def __init__(self, uri: str):
        self.uri = uri
        path = uri.removeprefix("sqlite:///")
        if path != uri and not Path(path).is_file():
            # MLflow would make an empty one, and an empty registry protects nothing
            raise InputError(
                f"tracking.uri: found no file {path}, expected the SQLite file that the runs are tracked in"
            )
        self._client = self._ask(functools.partial(MlflowClient, uri))

    def pointers(self) -> tuple[Pointer, ...]:
        """All versions of all registered models."""
        found, token = [], None
        while True:
            page = self._ask(functools.partial(self._client.search_model_versions, max_results=1000, page_token=token))
            for version in page:
                texts = [version.source, version.run_id, version.run_link, *version.tags.values()]
                text = "\n".join(str(text) for text in texts if text)
                found.append(Pointer(f"version {version.version} of model {version.name}", text))
            token = page.token
            if not token:
                return tuple(found)

    def status(self, run_id: str) -> str:
        """Status of a run; empty where MLflow knows none."""

        def ask() -> str:
            try:
                return str(self._client.get_run(run_id).info.status)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return ""

        return self._ask(ask)

    def num_missing(self, records: Iterable[Mapping[str, Any]], run_id: str) -> int:
        """Metric values of a journal's records that MLflow lacks."""
        return self._ask(lambda: journal.num_missing(records, self.uri, run_id))

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (MlflowException, SQLAlchemyError) as error:
            raise InputError(
                f"tracking.uri: MLflow at {scrub(self.uri)} does not say what its registry points to "
                f"({one_line(error)}), without which nothing is removed; start the server or give another URI"
            ) from None


def one_line(error: BaseException) -> str:
    return scrub(" ".join(str(error).split()))[:300]
