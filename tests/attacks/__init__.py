"""Hostile inputs: one table of attacks that a command refuses in one line."""

from tests.attacks.table import ATTACKS, attack

__all__ = ["ATTACKS", "attack"]
