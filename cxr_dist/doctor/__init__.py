"""Whether a cluster is ready for a run: what is asked of nodes, ranks, store and tracking server, judged, and shown."""
