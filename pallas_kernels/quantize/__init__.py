"""Fine-grained FP8 quantisation (DeepSeek-V3 report, section 3.3.2)."""
