"""Hopper kernels of DeepSeek-V3 in Pallas (Mosaic GPU), each with a float32 reference and a portable XLA path.

Each op is a folder: `reference.py` (what it means), `fallback.py` (XLA, any device), `kernel.py` (Mosaic GPU, sm_90a),
`ops.py` (the public functions) and `shapes.py` (named shapes and tile configurations).
"""
