"""Which vision-language families mmkd works with, seen on tiny random models of their classes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # the zoo
