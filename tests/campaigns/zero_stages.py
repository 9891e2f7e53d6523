"""Two ranks at every ZeRO stage against one process; about a minute for 100 steps.

python tests/campaigns/zero_stages.py [--count 100]
"""

from moiety.testing.reliability.sameness import parity
from moiety.testing.reliability.selfcheck import campaign

if __name__ == "__main__":
    campaign(__doc__, parity, count="steps", default=100)
