"""BF16 matrix multiplication per group of rows: the routed experts without FP8."""
