"""FP8 matrix multiplication per group of rows: the routed experts (DeepSeek-V3 report, sections 3.3.2 and 3.4)."""
