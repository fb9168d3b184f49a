"""The subcommands of `python -m experiments.plan`, and what they compute with."""
