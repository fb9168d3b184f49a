"""Rows between the GPUs of one node, written into each other's memory."""
