"""Who does the parts of a build: this process, worker processes, or a Ray cluster. What comes out is the same.

Work is a callable `work(number, report) -> result` that can be pickled; results come back in the order of the numbers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from traceback import format_exc
from typing import Any, TypeVar

from moiety.errors import InputError

ENGINES = ("processes", "ray")
REPORT_SECONDS = 0.5  # between two counts that a worker sends
CANCEL_SECONDS = 60.0  # for the tasks of a cluster to end when one has failed
Result = TypeVar("Result")
Work = Callable[[int, Callable[[int], None]], Result]
Progress = Callable[[int, int, bool], None]  # number of the part, structures seen in it, is it done


class WorkerDied(RuntimeError):
    """A worker ended without an answer; the message names its part."""


def run_parts(
    work: Work[Result], names: Sequence[str], engine: str, workers: int | None, progress: Progress
) -> list[Result]:
    """Runs work(0) ... work(n - 1).

    Args:
        work: what to do for one part.
        names: of the n parts, for messages.
        engine: "processes" or "ray".
        workers: at most so many at a time; the cores of this machine (Ray: of the cluster) when None.
        progress: told about every part.

    Raises:
        InputError: an unknown engine, Ray is not installed, or whatever the work raises.
        WorkerDied: a worker was killed. The others are ended.
    """
    if engine not in ENGINES:
        raise InputError(f"--engine {engine}: use one of {', '.join(ENGINES)}")
    if engine == "ray":
        return _run_on_ray(work, names, workers, progress)
    workers = min(workers or len(os.sched_getaffinity(0)), len(names))
    if workers > 1:
        return _run_in_processes(work, names, workers, progress)
    results = []
    for number in range(len(names)):
        results.append(work(number, lambda seen, number=number: progress(number, seen, False)))
        progress(number, 0, True)
    return results


def _run_in_processes(work: Work[Result], names: Sequence[str], workers: int, progress: Progress) -> list[Result]:
    context = get_context("spawn")  # a fork would inherit the threads of torch
    results: dict[int, Result] = {}
    waiting = iter(range(len(names)))
    busy: dict[Connection, tuple[BaseProcess, int]] = {}
    processes: list[BaseProcess] = []
    try:
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, work), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            _hand_out(here, process, waiting, busy)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                process, number = busy[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    raise WorkerDied(_obituary(names[number], process.exitcode)) from None
                if kind == "seen":
                    progress(number, value, False)
                elif kind == "error":
                    raise value
                else:
                    results[number] = value
                    progress(number, 0, True)
                    del busy[connection]
                    _hand_out(connection, process, waiting, busy)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
    return [results[number] for number in range(len(names))]


def _hand_out(connection: Connection, process: BaseProcess, waiting: Any, busy: dict) -> None:
    number = next(waiting, None)
    if number is not None:
        with suppress(BrokenPipeError):  # it has died: found out where the answer is awaited
            connection.send(number)
        busy[connection] = (process, number)


def _obituary(name: str, exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        cause = f"was killed by {signal.Signals(-exitcode).name}"
        if exitcode == -signal.SIGKILL:
            cause += " (out of memory? use fewer --workers)"
    else:
        cause = f"ended with exit code {exitcode}"
    return f"the worker of part {name} {cause}; nothing was written"


def _serve(connection: Connection, work: Work[Any]) -> None:
    """A worker: does the parts it is handed until it is ended. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are shared out already
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return  # the parent is gone
        last = monotonic()

        def report(seen: int) -> None:
            nonlocal last
            if monotonic() - last > REPORT_SECONDS:
                last = monotonic()
                connection.send(("seen", seen))

        try:
            answer = ("done", work(number, report))
        except Exception as error:
            error.add_note(f"in a worker:\n{format_exc()}")
            answer = ("error", error)
        connection.send(answer)


def _run_on_ray(work: Work[Result], names: Sequence[str], workers: int | None, progress: Progress) -> list[Result]:
    """One task a part. Joins the cluster of RAY_ADDRESS, else starts one here; the folder of the build is shared."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError, RayTaskError  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("--engine ray needs Ray: pip install 'moiety[ray]'") from None
    started = not ray.is_initialized()
    if started and os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    elif started:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    workers = workers or int(ray.cluster_resources().get("CPU", 1))

    def one_part(number: int) -> Result:
        return work(number, lambda seen: None)

    task: Any = ray.remote(num_cpus=1, max_retries=0)(one_part)
    results: dict[int, Result] = {}
    waiting = iter(range(len(names)))
    running: dict[Any, int] = {}
    try:
        while len(results) < len(names):
            while len(running) < workers and (number := next(waiting, None)) is not None:
                running[task.remote(number)] = number
            ready, _ = ray.wait(list(running))
            for reference in ready:
                number = running.pop(reference)
                try:
                    results[number] = ray.get(reference)
                except RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Exception) else error from None
                except RayError as error:
                    reason = str(error).strip().splitlines()[0]
                    raise WorkerDied(
                        f"the worker of part {names[number]} died: {reason}; nothing was written"
                    ) from None
                progress(number, 0, True)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if running:  # nobody may write any more when the folder is taken away
            ray.wait(list(running), num_returns=len(running), timeout=CANCEL_SECONDS)
        if started:
            ray.shutdown()
    return [results[number] for number in range(len(names))]
