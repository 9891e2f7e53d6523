"""The same with forces that are derivatives; about two minutes for 100 steps.

python tests/campaigns/exact_forces.py [--count 100]
"""

from moiety.testing.reliability.sameness import conservative_parity
from moiety.testing.reliability.selfcheck import campaign

if __name__ == "__main__":
    campaign(__doc__, conservative_parity, count="steps", default=100)
