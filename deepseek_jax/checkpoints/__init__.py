"""What lies in the folder of a run's checkpoints, for training, conversion and inference.

files.py      which steps there are, their metadata and arrays      inventory.py  names, sizes, digests of files
changes.py    how two configs differ
"""
