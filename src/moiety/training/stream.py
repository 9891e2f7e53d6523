"""Micro-batches in the order in which a rank needs them, prepared ahead by processes of its own where there are any."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moiety.data.structure import Structure
from moiety.objectives import Objective
from moiety.tokens.batch import Batch, collate, with_neighbors
from moiety.training.mixture import Mixture

MakeBatch = Callable[[Sequence[Structure], torch.Generator], Batch]


class Prepared(Dataset[Batch]):
    """Micro-batches by number: read, collated, corrupted. Random numbers belong to the number, whoever draws them."""

    def __init__(
        self,
        mixture: Mixture,
        objectives: Sequence[Objective],
        cutoff: float,
        seed: int,
        make: MakeBatch | None = None,
    ) -> None:
        """`make` turns whole structures into a batch; without it they are packed with the labels of the objectives."""
        self._mixture, self._objectives, self._cutoff, self._seed, self._make = mixture, objectives, cutoff, seed, make
        self._labels = [label for objective in objectives for label in objective.labels]

    def __getitem__(self, number: int) -> Batch:
        whole = bool(self._labels) or self._make is not None
        structures = self._mixture.structures(number, whole)
        rng = torch.Generator().manual_seed(own_seed(self._seed, number))
        batch = self._make(structures, rng) if self._make else collate(structures, labels=self._labels)
        for objective in self._objectives:
            batch = objective.corrupt(batch, rng)
        return with_neighbors(batch, self._cutoff)


class Stream:
    """Hands out micro-batches one after the other; its processes end with it."""

    def __init__(self, prepared: Prepared, workers: int) -> None:
        self._prepared, self._workers = prepared, workers

    def start(self, numbers: range) -> None:
        loader = DataLoader(
            self._prepared,
            batch_size=None,
            sampler=numbers,
            num_workers=self._workers,
            collate_fn=_as_arrays if self._workers else None,  # type: ignore[arg-type]
            worker_init_fn=_belong_to_the_rank,
            multiprocessing_context="fork" if self._workers else None,  # shares the opened corpora
            generator=torch.Generator(),  # the process's own random numbers stay what they are
        )
        self._batches = iter(loader)

    def __next__(self) -> Batch:
        batch = next(self._batches)
        return batch.map(torch.from_numpy) if self._workers else batch

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batches = iter(())


def own_seed(seed: int, number: int) -> int:
    """Of a micro-batch: its noise, and its dropout, are the same on whichever rank."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)


def _as_arrays(batch: Batch) -> Batch:
    """Goes through a pipe in one piece; tensors are handed over one by one, at half a millisecond each."""
    return batch.map(Tensor.numpy)


def _belong_to_the_rank(worker: int) -> None:
    """A worker lives as long as its rank.

    A signal to all processes asks for a checkpoint, and without workers a rank cannot end the step. And a worker whose
    rank was killed would wait for ever for somebody to read what it has prepared.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(rank: int) -> None:
    while os.getppid() == rank:
        time.sleep(1)
    os._exit(1)
