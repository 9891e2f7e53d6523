"""Files that hit a limit at random sizes in a save; about 2 minutes for 10.

python tests/campaigns/full_disks.py [--count 10]
"""

from moiety.testing.reliability.faults import disk_full
from moiety.testing.reliability.selfcheck import campaign

if __name__ == "__main__":
    campaign(__doc__, disk_full, count="offsets", default=10)
