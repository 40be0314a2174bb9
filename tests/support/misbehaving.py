"""Checks of the doctor that fail, in a module that other processes import quickly."""

import os
import time

from mmkd.commands.doctor.isolated import Finding


def answer():
    return [Finding("ok", "1.0")]


def raising():
    raise ImportError("undefined symbol\n_ZN3c10")


def leaving():
    raise SystemExit(3)


def crashing():
    print("what a library says before it goes")
    os.abort()


def hanging():
    time.sleep(100)
