"""A run resumed twice against one that went through; about 2 minutes for 200 steps.

python tests/campaigns/resumes.py [--count 200]
"""

from moiety.testing.reliability.sameness import resumed_twice
from moiety.testing.reliability.selfcheck import campaign

if __name__ == "__main__":
    campaign(__doc__, resumed_twice, count="steps", default=200)
