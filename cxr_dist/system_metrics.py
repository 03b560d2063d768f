"""The use of a node, as MLflow's own monitor samples it, in a run that somebody else owns."""

import threading

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

__all__ = ["SystemMetrics", "start_system_metrics"]


class SystemMetrics:
    """CPU, memory, disk, network and GPU use of this node, written to a run as system/<node>/… until stopped.

    MLflow's monitor ends by itself when the server is gone or the run is no longer RUNNING.
    """

    def __init__(self, monitor: SystemMetricsMonitor) -> None:
        self._monitor = monitor

    @property
    def alive(self) -> bool:
        """Whether samples are still taken."""
        thread = self._monitor._process
        return thread is not None and thread.is_alive()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop and send the last samples; never raises, never waits longer than `timeout_s` seconds."""
        stopping = threading.Thread(target=self._monitor.finish, daemon=True)
        stopping.start()
        stopping.join(timeout_s)


def start_system_metrics(tracking_uri: str, run_id: str, node_id: str, *, interval_s: float = 10.0) -> SystemMetrics:
    """Sample this node every `interval_s` seconds; one call a node, from its first rank."""
    monitor = SystemMetricsMonitor(
        run_id, sampling_interval=interval_s, resume_logging=True, node_id=node_id, tracking_uri=tracking_uri
    )
    monitor.start()
    return SystemMetrics(monitor)
