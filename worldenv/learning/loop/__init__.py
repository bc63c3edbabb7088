"""LOOP: leave-one-out PPO (paper, section 4.3; Chen et al. 2025, arXiv:2502.01600)."""
