"""A file system that is really full; needs root; about 2 minutes for 10.

python tests/campaigns/full_file_systems.py [--count 10]
"""

from moiety.testing.reliability.faults import file_system_full
from moiety.testing.reliability.selfcheck import campaign

if __name__ == "__main__":
    campaign(__doc__, file_system_full, count="offsets", default=10)
