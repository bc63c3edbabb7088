"""Observations in, action chunks out: OpenVLA-OFT and its Laplace density."""
