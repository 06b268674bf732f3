"""Checkpoint storage for home clusters."""

__version__ = "0.1.0"
