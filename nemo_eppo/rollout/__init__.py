"""What passes between generation, scoring and training: sampling settings, rollouts and experience."""
