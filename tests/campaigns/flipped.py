"""Bytes flipped in every file of a checkpoint; a minute for 500 in each.

python tests/campaigns/flipped.py [--count 500]
"""

from moiety.testing.reliability.faults import flipped_bytes
from moiety.testing.reliability.selfcheck import campaign

if __name__ == "__main__":
    campaign(__doc__, flipped_bytes, count="each", default=500)
