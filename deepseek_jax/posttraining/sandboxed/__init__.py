"""What runs inside the sandbox (`posttraining/sandbox.py`): in processes of their own, with the standard library alone.

The files import each other relatively and nothing else of the project: they start in milliseconds, and a process that
will run a model's program holds nothing of the run.
"""
