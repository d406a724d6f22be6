"""Chaos: agents that are killed for real at every moment, and the promise that is checked after it."""
