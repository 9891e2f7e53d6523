"""Promises about what must not matter: interruptions, the number of processes, ZeRO stages, how a step is cut."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Sequence

from moiety.testing.launched import Record, gone, largest_difference, read_log, repeatable, train
from moiety.testing.reliability.workspace import SUBJECT, Row, Workspace
from moiety.training.config import PretrainConfig, load_config
from moiety.training.mixture import Mixture

ROUNDING = 1e-6  # relative: other orders of the same fp32 sums
STAGES = ("0", "1", "2", "3", "2_offload", "3_offload")  # zero0 ... in launch/ds
WALK = ((1, "0"), (2, "3_offload"), (4, "2"), (2, "1"), (1, "3"))  # processes, ZeRO stage
BF16_MEAN, BF16_STEP = 0.001, 0.01  # relative, of losses


def resumed_twice(space: Workspace, steps: int, ranks: int = 2) -> Row:
    """A run stopped twice at steps that are no round numbers, against one that went through."""
    name, arguments = f"resumed_{ranks}", (f"steps={steps}", "log_every=1")
    for part in (steps // 3, 2 * steps // 3):
        run = space.start(name, *arguments, ranks=ranks)
        run.until_logged(part)
        run.stop(signal.SIGTERM)
    records = space.run(name, *arguments, ranks=ranks)
    same = repeatable(records) == repeatable(space.undisturbed(*arguments, ranks=ranks))
    figure = f"{len(records)} steps {'bit-identical' if same else 'DIFFER'}"
    return Row("resumed, and resumed again", figure, same and len(records) == steps)


def world_walk(space: Workspace, steps: int, path: Sequence[tuple[int, str]] = WALK) -> Row:
    """1-2-4-2-1 processes, each at another ZeRO stage, against one process."""
    for number, (ranks, stage) in enumerate(path):
        run = space.start("walk", f"steps={steps}", f"ds=zero{stage}", ranks=ranks)
        if number + 1 < len(path):
            run.until_logged((number + 1) * steps // len(path))
            run.stop(signal.SIGTERM)
        else:
            assert run.wait() == 0, run.output
    off_by = largest_difference(read_log(space.folder / "walk"), space.undisturbed(f"steps={steps}"))
    processes, stages = ("-".join(map(str, part)) for part in zip(*path, strict=True))
    return Row(f"{processes} processes, ZeRO {stages}", f"{steps} steps within {off_by:.1e}", off_by < ROUNDING)


def parity(space: Workspace, steps: int, stages: Sequence[str] = STAGES) -> Row:
    """Two ranks at every ZeRO stage, mixed domains across them, against one process."""
    return _parity(space, steps, stages, "domains mixed")


def conservative_parity(space: Workspace, steps: int, stages: Sequence[str] = STAGES[:3]) -> Row:
    """The same with exact forces, which are derivatives inside the forward pass.

    At a tenth of the learning rate: at the full one a difference in rounding grows from 1e-7 to 2e-4 in 100 steps.
    """
    return _parity(space, steps, stages, "exact forces", "--forces", "lr=1e-4")


def _parity(space: Workspace, steps: int, stages: Sequence[str], what: str, *arguments: object) -> Row:
    words = (*arguments, f"steps={steps}")
    alone = space.undisturbed(*words)
    off_by = {s: largest_difference(space.undisturbed(*words, f"ds=zero{s}", ranks=2), alone) for s in stages}
    worst = max(off_by.values())
    figure = f"{steps} steps: " + ", ".join(f"ZeRO-{stage} {value:.1e}" for stage, value in off_by.items())
    return Row(f"two ranks are one process ({what})", figure, worst < ROUNDING)


def plain_ddp(space: Workspace, steps: int) -> Row:
    """Two ranks of the engine against torch's DistributedDataParallel and AdamW in a loop of its own."""
    words = ("--config", space.config, "--loop", "ddp", f"steps={steps}")
    plain = train(SUBJECT.with_name("plain.py"), words, space.folder / "plain_ddp", ranks=2)
    off_by = largest_difference(space.undisturbed(f"steps={steps}", ranks=2), plain)
    return Row("two ranks are plain DDP", f"{steps} steps within {off_by:.1e}", off_by < ROUNDING)


def activation_checkpointing(space: Workspace, steps: int) -> Row:
    """Activations computed again instead of kept."""
    words = (f"steps={steps}",)
    off_by = largest_difference(space.undisturbed(*words, "checkpoint_activations=true"), space.undisturbed(*words))
    return Row("activation checkpointing", f"{steps} steps within {off_by:.1e}", off_by < ROUNDING)


def accumulation(space: Workspace, steps: int) -> Row:
    """One process that takes four micro-batches a step, against four that take one each."""
    words = (f"steps={steps}",)
    off_by = largest_difference(space.undisturbed(*words, ranks=4), space.undisturbed(*words))
    return Row("gradient accumulation, 4 x 1 and 1 x 4", f"{steps} steps within {off_by:.1e}", off_by < ROUNDING)


def bfloat16(space: Workspace, steps: int) -> Row:
    """Matrix products in bfloat16, at the same learning rate on the same structures."""
    words = (f"steps={steps}",)
    exact, rounded = space.undisturbed(*words), space.undisturbed(*words, "precision=bf16")
    pairs = [(a["loss"], b["loss"]) for a, b in zip(exact, rounded, strict=True)]
    mean, worst = (sum(b for _, b in pairs) / sum(a for a, _ in pairs) - 1, max(abs(b / a - 1) for a, b in pairs))
    skipped = rounded[-1]["skipped_steps"]
    figure = f"{steps} steps: mean loss {mean:+.2%}, single steps within {worst:.1%}, {skipped} skipped"
    return Row("bfloat16", figure, abs(mean) < BF16_MEAN and worst < BF16_STEP and not skipped)


def exactly_once(space: Workspace) -> Row:
    """Every structure once an epoch, however the micro-batches are dealt to ranks."""
    config = load_config(PretrainConfig, space.config)
    wrong = total = 0
    for ranks in (1, 2, 3, 4):
        mixture = Mixture.open(config.data)
        seen = Counter(
            (batch.source, int(index))
            for rank in range(ranks)
            for number in range(rank, 4 * sum(s.num_batches for s in mixture.sources), ranks)
            if (batch := mixture.micro_batch(number)).epoch == 0
            for index in batch.indices
        )
        expected = {(source, i) for source, s in enumerate(mixture.sources) for i in range(len(s.corpus))}
        total += len(expected)
        wrong += len(expected ^ seen.keys()) + sum(count != 1 for count in seen.values())
    return Row("exactly once an epoch, on 1 to 4 ranks", f"{total - wrong} of {total} structures", wrong == 0)


def prepared_ahead(space: Workspace, steps: int) -> Row:
    """Micro-batches from workers, while a rank is killed and all processes are asked to stop; against none."""
    words = ("prepared_ahead", f"steps={steps}")
    run = space.start(*words, "workers=1", ranks=2)
    run.until_logged(steps // 3)
    workers = [worker for rank in run.ranks().values() for worker in rank.children()]
    run.ranks()[0].kill()
    run.wait()
    ended = gone(workers, within=20)
    run = space.start(*words, "workers=2", ranks=2)
    run.until_logged(2 * steps // 3)
    for rank in run.ranks().values():
        for process in (*rank.children(), rank):
            process.send_signal(signal.SIGTERM)
    code = run.wait()
    records = space.run(*words, ranks=2)
    same = repeatable(records) == repeatable(space.undisturbed(f"steps={steps}", ranks=2))
    figure = f"{len(records)} steps {'bit-identical' if same else 'DIFFER'}; stopped with {code}; "
    figure += f"{'none outlives' if ended else 'SOME OUTLIVE'} a killed rank"
    return Row("1, 2 and no workers", figure, same and code == 75 and ended)


def same_structures(space: Workspace, steps: int) -> Row:
    """The structures of every step, by digest, whatever the number of processes."""
    digests = {ranks: _digests(space.undisturbed(f"steps={steps}", ranks=ranks)) for ranks in (1, 2, 4)}
    same = digests[1] == digests[2] == digests[4]
    return Row("the same structures on 1, 2, 4 ranks", f"{steps} digests {'equal' if same else 'DIFFER'}", same)


def _digests(records: list[Record]) -> list[str]:
    return [record["samples"] for record in records]
