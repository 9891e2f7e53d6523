"""Molecules per second of a full pretraining step on one core.

    python benchmarks/throughput.py [--config pretrain/configs/tiny.yaml] [--corpus corpora/tiny/qm9] [--steps 20]

Collation, corruption, neighbour lists, forward, backward and AdamW are all counted, as CPU seconds of the best step and
of the median one. Set the allocator as the Makefile does: without it, every tensor over 128 KiB is page-faulted anew.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch

from moiety.data.shards import Corpus
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.objectives import build_objectives
from moiety.tokens.batch import collate, with_neighbors
from moiety.training.config import PretrainConfig, load_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="pretrain/configs/tiny.yaml")
    parser.add_argument("--corpus", default="corpora/tiny/qm9")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    config = load_config(PretrainConfig, args.config)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MoietyForPreTraining(config.model_config())
    objectives = build_objectives(config.objectives)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rng = torch.Generator().manual_seed(0)

    corpus = Corpus.open(args.corpus, split="train")
    sizes = np.asarray(corpus.num_nodes)[:4096]
    order = np.argsort(sizes, kind="stable")  # structures of like size stand together in training too
    num = int(config.data.node_budget * len(corpus) / corpus.num_nodes.sum())
    seconds = []
    for step in range(args.steps):
        indices = order[(step * num) % (len(order) - num) :][:num]
        times = [time.process_time()]
        batch = collate(corpus.read(indices))
        for objective in objectives:
            batch = objective.corrupt(batch, rng)
        batch = with_neighbors(batch, model.config.cutoff)
        times.append(time.process_time())
        output = model(**batch.inputs())
        loss = torch.stack([o.loss_sum(output, batch).sum() / o.scored(batch).sum().clamp(min=1) for o in objectives])
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        times.append(time.process_time())
        seconds.append(np.diff(times))
    total = np.sum(seconds, axis=1)[2:]
    data = np.array(seconds)[2:, 0].sum() / total.sum()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {num} molecules a micro-batch")
    print(f"{num / total.min():.0f} molecules/s at best, {num / np.median(total):.0f} at the median, one core")
    print(f"collation, corruption and neighbour lists: {data:.1%} of a step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
