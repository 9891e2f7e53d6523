"""Who is to blame when a run hangs."""

from __future__ import annotations

import os
import socket
from typing import Any

from moiety.training.watchdog import diagnosis


def report(rank: int, beats: int | None, phase: str = "step") -> dict[str, Any]:
    own: dict[str, Any] = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname()}
    return own if beats is None else own | {"beats": beats, "phase": phase, "stack": [f"  in rank {rank}\n"]}


def test_the_rank_that_is_behind_is_named_with_its_stack():
    said = diagnosis([report(0, 107), report(1, 104, "data"), report(2, 107)], timeout=9)
    assert "no rank went on for 9 s" in said
    assert f"rank 1 is stuck: process {os.getpid()} on {socket.gethostname()}, 3 phases behind, in 'data':" in said
    assert "in rank 1" in said and "rank 0" not in said and "rank 2" not in said


def test_a_rank_that_says_nothing_is_what_the_others_wait_for():
    said = diagnosis([report(0, 107), report(1, None), report(2, 106)], timeout=9)
    assert f"rank 1 does not answer: process {os.getpid()} on {socket.gethostname()} is " in said
    assert "stuck" not in said


def test_ranks_that_are_equally_far_are_all_shown():
    said = diagnosis([report(0, 107), report(1, 107)], timeout=9)
    assert "rank 0 is stuck" in said and "rank 1 is stuck" in said
