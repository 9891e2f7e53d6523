"""Promises about what must not matter: interruptions, the number of processes, ZeRO stages, how a step is cut."""

from __future__ import annotations

import signal

from moiety.testing.launched import Record, largest_difference, read_log, repeatable
from moiety.testing.reliability.faults import stop
from moiety.testing.reliability.workspace import Row, Workspace

ROUNDING = 1e-6  # relative: other orders of the same fp32 sums


def resumed_twice(space: Workspace, steps: int, ranks: int = 2) -> Row:
    """A run stopped twice at steps that are no round numbers, against one that went through."""
    name, arguments = f"resumed_{ranks}", (f"steps={steps}", "log_every=1")
    for part in (steps // 3, 2 * steps // 3):
        run = space.start(name, *arguments, ranks=ranks)
        run.until_logged(part)
        stop(run, signal.SIGTERM)
    records = space.run(name, *arguments, ranks=ranks)
    same = repeatable(records) == repeatable(space.undisturbed(*arguments, ranks=ranks))
    figure = f"{len(records)} steps {'bit-identical' if same else 'DIFFER'}"
    return Row("resumed, and resumed again", figure, same and len(records) == steps)


def world_walk(space: Workspace, steps: int) -> Row:
    """1-2-4-2-1 processes, each at another ZeRO stage, against one process."""
    path = ((1, 0), (2, 3), (4, 2), (2, 1), (1, 3))
    for number, (ranks, stage) in enumerate(path):
        run = space.start("walk", f"steps={steps}", f"ds=zero{stage}", ranks=ranks)
        if number + 1 < len(path):
            run.until_logged((number + 1) * steps // len(path))
            stop(run, signal.SIGTERM)
        else:
            assert run.wait() == 0, run.output
    off_by = largest_difference(read_log(space.folder / "walk"), space.undisturbed(f"steps={steps}"))
    return Row("1-2-4-2-1 processes, ZeRO 0-3-2-1-3", f"{steps} steps within {off_by:.1e}", off_by < ROUNDING)


def parity(space: Workspace, steps: int, stages: tuple[int, ...] = (0, 1, 2, 3)) -> Row:
    """Two ranks at every ZeRO stage, mixed domains across them, against one process."""
    return _parity(space, steps, stages, "domains mixed")


def conservative_parity(space: Workspace, steps: int, stages: tuple[int, ...] = (0, 1, 2)) -> Row:
    """The same with exact forces, which are derivatives inside the forward pass."""
    return _parity(space, steps, stages, "exact forces", "--forces")


def _parity(space: Workspace, steps: int, stages: tuple[int, ...], what: str, *arguments: object) -> Row:
    words = (*arguments, f"steps={steps}")
    alone = space.undisturbed(*words)
    off_by = {s: largest_difference(space.undisturbed(*words, f"ds=zero{s}", ranks=2), alone) for s in stages}
    worst = max(off_by.values())
    figure = f"{steps} steps: " + ", ".join(f"ZeRO-{stage} {value:.1e}" for stage, value in off_by.items())
    return Row(f"two ranks are one process ({what})", figure, worst < ROUNDING)


def activation_checkpointing(space: Workspace, steps: int) -> Row:
    """Activations computed again instead of kept."""
    words = (f"steps={steps}",)
    off_by = largest_difference(space.undisturbed(*words, "checkpoint_activations=true"), space.undisturbed(*words))
    return Row("activation checkpointing", f"{steps} steps within {off_by:.1e}", off_by < ROUNDING)


def same_structures(space: Workspace, steps: int) -> Row:
    """The structures of every step, by digest, whatever the number of processes."""
    digests = {ranks: _digests(space.undisturbed(f"steps={steps}", ranks=ranks)) for ranks in (1, 2, 4)}
    same = digests[1] == digests[2] == digests[4]
    return Row("the same structures on 1, 2, 4 ranks", f"{steps} digests {'equal' if same else 'DIFFER'}", same)


def _digests(records: list[Record]) -> list[str]:
    return [record["samples"] for record in records]
