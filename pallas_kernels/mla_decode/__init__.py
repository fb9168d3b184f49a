"""Decoding of Multi-head Latent Attention over a paged latent cache."""
