"""What lies in the folder of a run's checkpoints, for training, conversion and inference.

files.py      which steps there are, whether one is whole, metadata      inventory.py  names, sizes, digests of files
arrays.py     arrays, onto a mesh or into host memory                  changes.py    how two configs differ
"""
