"""Policy and world together: collecting rollouts, and keeping the finished ones."""
