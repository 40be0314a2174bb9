"""Recipes that try to stop or mislead their reader."""

from pathlib import Path

from attacks.table import attack

THEME = "recipes"


@attack(THEME, "gave a key twice, so that a reader sees the other value", "recipe.yaml", "twice")
def key_given_twice(world):
    Path("recipe.yaml").write_text("name: good\nname: other\n")
