"""Simulated local chains for tests, the demo and development. Nothing here has value or leaves this machine."""
