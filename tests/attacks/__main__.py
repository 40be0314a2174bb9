"""Print the number of distinct attacks of the table: of each theme, and of all.

python -m tests.attacks
python -m tests.attacks --list    # each of them too
"""

import sys
from collections import Counter

from tests.attacks import attacks

found = attacks()
if "--list" in sys.argv:
    for case in found:
        print(f"{case.kind}: {case.did} ({case.name})")
for theme, count in Counter(case.kind for case in found).items():
    print(f"{theme} {count}")
print(f"all {len({case.name for case in found})}")
