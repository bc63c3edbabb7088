"""LOOP: leave-one-out PPO on imagined rollouts."""
