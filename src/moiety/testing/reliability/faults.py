"""Promises about what breaks: processes, disks, files, numbers, ranks, launchers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from moiety.testing.launched import gone, read_log, repeatable
from moiety.testing.reliability.workspace import Row, Workspace
from moiety.training.checkpoint import Damaged, complete, verify

STOPS = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}  # and the exit codes
SHORT = ("steps=20",)
LONG = ("steps=100000", "checkpoint_every=4")  # stopped when it has gone far enough


def killed(space: Workspace, kills: int, ranks: int = 2) -> Row:
    """SIGKILL at random times, every other one aimed at a checkpoint being written; one rank, or all of them."""
    rng = random.Random(0)
    out = space.folder / f"killed_{ranks}"
    checkpoints = out / "checkpoints"
    inside = unreadable = 0
    for number in range(kills):
        for leftover in checkpoints.glob("*.partial"):  # of the kill before; this one is not inside a save for it
            shutil.rmtree(leftover)
        run = space.start(out.name, *LONG, ranks=ranks)
        if number % 2:
            run.until(lambda: any(checkpoints.glob("*.partial")))
            time.sleep(rng.uniform(0, 0.02))
        else:
            time.sleep(rng.uniform(0.0, 6.0))
        victims = rng.choice([[rng.randrange(ranks)], list(range(ranks))])
        for rank in victims:
            run.ranks()[rank].kill()
        inside += any(checkpoints.glob("*.partial"))
        if run.wait() == 0:
            raise AssertionError(f"{out}: ended before it was killed")
        unreadable += not readable(checkpoints)
    run = space.start(out.name, *LONG, ranks=ranks)
    logged = len(read_log(out))
    run.until_logged(logged + 8)
    run.stop(signal.SIGTERM)
    found = repeatable(read_log(out))
    expected = repeatable(_first(space, len(found), *LONG, ranks=ranks))
    same = found == expected
    figure = f"{kills} kills, {inside} inside a save; {unreadable} unreadable; {len(found)} steps "
    return Row("SIGKILL at any time", figure + ("bit-identical" if same else "DIFFER"), same and not unreadable)


def readable(checkpoints: Path) -> bool:
    """Whether `latest`, where there is one, names a checkpoint that is what was written."""
    latest = checkpoints / "latest"
    if not latest.exists():
        return True
    try:
        verify(checkpoints / latest.read_text())
    except Damaged:
        return False
    return True


def _first(space: Workspace, lines: int, *arguments: object, ranks: int) -> list[dict[str, object]]:
    """The first records of an undisturbed run that is stopped when it has gone as far."""
    name = f"undisturbed_{ranks}_" + "_".join(str(a).replace("=", "") for a in arguments)
    run = space.start(name, *arguments, ranks=ranks)
    run.until_logged(lines)
    run.stop(signal.SIGTERM)
    return read_log(space.folder / name)[:lines]


def asked_to_stop(space: Workspace, signals: Sequence[signal.Signals] = tuple(STOPS)) -> Row:
    """SIGTERM, SIGUSR1 and Ctrl-C: a checkpoint within half a minute, the right exit code, nothing lost."""
    codes, slowest = {}, 0.0
    for number in signals:
        name = f"stopped_{number.name}"
        run = space.start(name, "checkpoint_every=1000", ranks=2)
        run.until_logged(5)
        started = time.perf_counter()
        codes[number] = run.stop(number)
        slowest = max(slowest, time.perf_counter() - started)
        records = space.run(name, "checkpoint_every=1000", ranks=2)
        same = repeatable(records) == repeatable(space.undisturbed(ranks=2))
        if not same:
            return Row("asked to stop", f"{number.name}: another run than the undisturbed one", False)
    expected = {number: STOPS[number] for number in signals}
    figure = f"checkpoint and exit in {slowest:.1f} s; codes {', '.join(map(str, codes.values()))}; bit-identical"
    return Row("SIGTERM, SIGUSR1, Ctrl-C", figure, codes == expected and slowest < 30)


def disk_full(space: Workspace, offsets: int) -> Row:
    """Files that cannot grow beyond a random size: the save fails, the earlier checkpoint stays, nothing is lost."""
    rng = random.Random(1)
    started, size = _stopped_run(space)
    kept = 0
    for number in range(offsets):
        name = f"disk_full_{number}"
        shutil.copytree(started, space.folder / name)
        code = space.start(name, *SHORT, "--file-limit", rng.randrange(1, size)).wait()
        kept += code == 1 and _nothing_lost(space, started, name)
    figure = f"{kept} of {offsets} offsets: the last checkpoint intact, resumed bit-identically"
    return Row("disk full inside a save", figure, kept == offsets)


def file_system_full(space: Workspace, offsets: int) -> Row:
    """The same on a file system that really is full, whatever is written there next; needs the right to mount one."""
    rng = random.Random(2)
    started, size = _stopped_run(space)
    mount = space.folder / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", mount], check=True)
    kept = 0
    try:
        for number in range(offsets):
            name = f"small/run_{number}"
            shutil.copytree(started, space.folder / name)
            filler = mount / "filler"
            with filler.open("wb") as file:
                file.truncate(0)
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(mount).free - rng.randrange(1, 2 * size))
            code = space.start(name, *SHORT, "--blind").wait()
            filler.unlink()
            kept += code == 1 and _nothing_lost(space, started, name)
            shutil.rmtree(space.folder / name)
    finally:
        subprocess.run(["umount", mount], check=True)
    figure = f"{kept} of {offsets} times: the last checkpoint intact, resumed bit-identically"
    return Row("a full file system", figure, kept == offsets)


def _stopped_run(space: Workspace) -> tuple[Path, int]:
    """A run that was stopped after its first checkpoint, and the size of its largest file."""
    out = space.folder / "stopped"
    if not out.exists():
        started = space.start(out.name, *SHORT)
        started.until(lambda: len(complete(out / "checkpoints")) == 1)
        started.stop(signal.SIGTERM)
    newest = out / "checkpoints" / complete(out / "checkpoints")[-1]
    return out, max(path.stat().st_size for path in newest.iterdir())


def _nothing_lost(space: Workspace, before: Path, name: str) -> bool:
    """Whether a copy of a run, in which a save has failed, has the checkpoints it had and goes on from them."""
    checkpoints = space.folder / name / "checkpoints"
    intact = complete(checkpoints) == complete(before / "checkpoints") and readable(checkpoints)
    return intact and repeatable(space.run(name, *SHORT)) == repeatable(space.undisturbed(*SHORT))


def flipped_bytes(space: Workspace, each: int) -> Row:
    """Every file of a checkpoint, bytes flipped at random places: refused, with the file's name."""
    rng = random.Random(2)
    space.run("flipped", "steps=5", ranks=2)
    folder = space.folder / "flipped/checkpoints/step_00000005"
    tried = refused = 0
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for _ in range(each):
            place = rng.randrange(len(content))
            path.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
            tried += 1
            try:
                verify(folder)
            except Damaged as error:
                refused += str(path) in str(error)
        path.write_bytes(content)
    verify(folder)
    figure = f"{refused} of {tried} refused by name, in {len(list(folder.iterdir()))} files"
    return Row("a flipped byte in a checkpoint", figure, refused == tried)


def not_finite(space: Workspace, stages: Sequence[int] = (0, 2)) -> Row:
    """A loss or a gradient of one rank that is not finite is skipped by both; weights that are not end the run."""
    said = []
    for kind, words in (("loss", "loss not finite"), ("gradient", "gradient not finite")):
        for stage in stages:
            name = f"not_finite_{kind}_{stage}"
            records = space.run(name, "--fault", f"{kind}:5:1", f"ds=zero{stage}", "steps=8", ranks=2)
            events = (space.folder / name / "events.jsonl").read_text()
            good = records[-1]["skipped_steps"] == 1 and words in events and '"step": 5' in events
            said.append((f"{kind}, ZeRO-{stage}", good))
    run = space.start("not_finite_weight", "--fault", "weight:8:1", ranks=2)
    code = run.wait()
    intact = readable(space.folder / "not_finite_weight/checkpoints")
    said.append(("weights", code == 1 and "20 steps in a row not finite" in run.output and intact))
    bad = [name for name, good in said if not good]
    figure = "skipped on both ranks, structures logged; weights: given up after 20, last checkpoint intact"
    return Row("NaN in loss, gradient, weights", figure if not bad else f"not so: {', '.join(bad)}", not bad)


def hung(space: Workspace) -> Row:
    """A rank that is stuck in its own code, and one that the system has stopped: named, with the stack of the first."""
    stuck = space.start("stuck", "--fault", "stuck:4:1", "hang_timeout_s=2", ranks=2)
    processes = stuck.ranks()
    code = stuck.wait()
    named = code == 70 and "rank 1 is stuck" in stuck.output and "time.sleep(FOREVER)" in stuck.output
    silent = space.start("silent", *LONG, "hang_timeout_s=2", ranks=2)
    silent.until_logged(3)
    processes = processes | {2: silent.ranks()[0], 3: silent.ranks()[1]}
    processes[3].suspend()
    code = silent.wait()
    unanswered = code == 70 and f"rank 1 does not answer: process {processes[3].pid}" in silent.output
    left = not gone(processes.values())
    figure = f"stuck rank {'named with its stack' if named else 'NOT named'}, "
    figure += f"silent rank {'named' if unanswered else 'NOT named'}, {'processes LEFT' if left else 'nothing left'}"
    return Row("a rank that hangs", figure, named and unanswered and not left)


def orphaned(space: Workspace, launcher: str) -> Row:
    """The front of a launcher is killed and nothing else: its ranks write a checkpoint and end, and their workers."""
    run = space.start(f"orphaned_{launcher}", *LONG, "workers=1", ranks=2, launcher=launcher)
    run.until_logged(3)
    ranks = run.ranks().values()
    processes = [*ranks, *(worker for rank in ranks for worker in rank.children())]
    run.process.kill()  # type: ignore[union-attr]
    ended = gone(processes)
    kept = readable(space.folder / f"orphaned_{launcher}/checkpoints")
    figure = f"{launcher}: {'no rank outlives it' if ended else 'ranks LEFT'}, checkpoint {'intact' if kept else 'BAD'}"
    return Row("orphaned ranks", figure, ended and kept)


def damaged_shard(space: Workspace) -> Row:
    """A shard that is damaged between two parts of a run is left out and named; too many of them are refused."""
    corpus = space.corpus_in_shards()
    arguments = (f"data.sources=[{{path: {corpus}}}]", "steps=20")
    run = space.start("damaged_shard", *arguments)
    run.until_logged(6)
    run.stop(signal.SIGTERM)
    shards = sorted(corpus.glob("*.parquet"))
    _damage(shards[3])
    records = space.run("damaged_shard", *arguments)
    said = space.folder.joinpath("damaged_shard.output").read_text()
    goes_on = len(records) == 20 and f"left out: {shards[3]}: checksum mismatch" in said
    for shard in shards[4:8]:
        _damage(shard)
    refused = space.start("damaged_shard", *arguments, "steps=21")
    code = refused.wait()
    stops = code == 2 and "5 damaged shards hold" in refused.output
    figure = f"1 of {len(shards)} shards {'left out and named' if goes_on else 'NOT left out'}, "
    figure += f"5 of them {'refused' if stops else 'NOT refused'}"
    return Row("a damaged shard", figure, goes_on and stops)


def _damage(shard: Path) -> None:
    content = shard.read_bytes()
    shard.write_bytes(content[:60] + bytes([content[60] ^ 4]) + content[61:])
    (shard.parent / ".arrow" / f"{shard.stem}.arrow").unlink(missing_ok=True)


def stale_lock(space: Workspace) -> Row:
    """A lock that a killed compilation left two hours ago, where the next one would wait for it."""
    cache = space.folder / "extensions"
    folder = cache / "py/fused_adam"
    folder.mkdir(parents=True)
    for path in (folder / "main.cpp", folder / "lock"):
        path.touch()
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    run = space.start("stale_lock", "steps=2", environment={"TORCH_EXTENSIONS_DIR": str(cache)})
    cured = run.wait() == 0 and not (folder / "lock").exists() and "left by a build that was killed" in run.output
    return Row("a stale lock of a compilation", "reported and removed" if cured else "NOT removed", cured)
