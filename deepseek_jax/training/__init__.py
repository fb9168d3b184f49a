"""Training: state, schedules, optimizer, average of parameters, checkpoints, metrics and the report of a run."""
