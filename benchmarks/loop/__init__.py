"""Worlds, arms and the bandit of benchmarks/closed_loop.py."""
