"""What old runs, checkpoints and feature sets may go: facts of what there is, a plan from them, and its execution."""
