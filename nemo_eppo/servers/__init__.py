"""Critic and reward servers on PyTriton, and the clients that the actor uses."""
