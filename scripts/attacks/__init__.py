"""Attacks drawn by chance: recipes, records, images, chat templates and damaged folders.

make attacks MINUTES=10 SEED=0

Each attack spoils a copy of a good world and runs a command there, in a process of its own with a
limit of time and memory. `judge` says what must hold. What broke is printed with the command that
repeats it.
"""
