"""Causal softmax attention with keys wider than values, as in the expanded form of MLA: training and prefill."""
