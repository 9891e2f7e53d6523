"""Two launchers on two network namespaces, stopped and started again; a minute.

python tests/campaigns/machines.py [--count 20]
"""

from moiety.testing.reliability.machines import two_nodes
from moiety.testing.reliability.selfcheck import campaign

if __name__ == "__main__":
    campaign(__doc__, two_nodes, count="steps", default=20)
