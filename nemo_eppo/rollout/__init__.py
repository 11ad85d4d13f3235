"""The types that pass from generation to training: sampling settings, rollouts and experience."""
