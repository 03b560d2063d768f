"""The settings that libraries take from the environment alone, for the driver and the workers of every job.

An entry point applies them before it imports MLflow or Ray, which read them at import.
"""

import os

__all__ = ["SETTINGS", "apply"]

SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "DO_NOT_TRACK": "true",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""MLflow's own defaults are 7 retries of up to 2 minutes, usage reports to its makers and progress bars in logs; Ray prints
lines twice, draws progress bars too, and after the loss of a node waits 60 s for room on it before it looks again what there
is; Tune draws tables, writes files of its own and swallows Ctrl-C."""


def apply() -> None:
    """Set what the environment does not already say."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
