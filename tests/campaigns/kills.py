"""SIGKILL at uniformly random times, half of them aimed at a save; about 5 minutes for 50.

python tests/campaigns/kills.py [--count 50]
"""

from moiety.testing.reliability.faults import killed
from moiety.testing.reliability.selfcheck import campaign

if __name__ == "__main__":
    campaign(__doc__, killed, count="kills", default=50)
