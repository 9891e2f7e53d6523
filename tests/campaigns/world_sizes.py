"""1-2-4-2-1 processes at changing ZeRO stages; about a minute for 100 steps.

python tests/campaigns/world_sizes.py [--count 100]
"""

from moiety.testing.reliability.sameness import world_walk
from moiety.testing.reliability.selfcheck import campaign

if __name__ == "__main__":
    campaign(__doc__, world_walk, count="steps", default=100)
