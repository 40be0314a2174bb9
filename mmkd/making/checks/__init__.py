"""Checks of answers that a model has made. Each refuses answers, and some score them."""

from mmkd.making.checks.agreement import Agreement
from mmkd.making.checks.base import AnswerCheck, Ask, Candidate, Verdict
from mmkd.making.checks.build import build_checks
from mmkd.making.checks.form import Cut, Empty, Repeats
from mmkd.making.checks.judge import Judge
from mmkd.making.checks.objects import Objects
from mmkd.making.checks.reference import Reference

__all__ = [
    "Agreement",
    "AnswerCheck",
    "Ask",
    "Candidate",
    "Cut",
    "Empty",
    "Judge",
    "Objects",
    "Reference",
    "Repeats",
    "Verdict",
    "build_checks",
]
