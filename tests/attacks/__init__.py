"""Hostile inputs: one table of attacks that a command refuses in one line."""

from tests.attacks.table import attacks

__all__ = ["attacks"]
