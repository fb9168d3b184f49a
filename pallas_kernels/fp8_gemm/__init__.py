"""FP8 matrix multiplication with fine-grained scales (DeepSeek-V3 report, section 3.3.2)."""
