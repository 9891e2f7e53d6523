"""What a large corpus costs to open and to read: python benchmarks/corpus_scale.py [--structures N] [--folder DIR]

Repeats the molecules of a real sample under new ids in as many shards as a build would write (the rows of a shard are
copied in Arrow, so that a million take minutes), and measures in fresh processes: verifying and converting at the first
open, opening after that, random access with pages that are not mapped yet and once more, and resident memory; then what
a mixture of the corpus needs in each of two ranks, for an epoch's plan and its first micro-batches. A corpus of 10,000
stands beside it: what grows with the corpus shows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SAMPLE = Path(__file__).parents[1] / "tests/data/corpora/qm9"
ROWS = 27_500  # molecules in a shard of NODES_PER_SHARD nodes
READS = 10_000
STEPS, RANKS = 100, 2


def write(folder: Path, num_structures: int) -> None:
    """A corpus of that many structures, whose shards hold the sample again and again."""
    from moiety.data.parts import sha256

    manifest = json.loads((SAMPLE / "manifest.json").read_text())
    sample = pa.concat_tables(
        [pq.read_table(path) for path in sorted(SAMPLE.glob("*.parquet"))], promote_options="default"
    )
    folder.mkdir(parents=True)
    shards = []
    for number, start in enumerate(range(0, num_structures, ROWS)):
        size = min(ROWS, num_structures - start)
        table = pa.concat_tables([sample] * -(-size // len(sample))).slice(0, size).combine_chunks()
        ids = pa.array([f"copy-{index}" for index in range(start, start + size)])
        table = table.set_column(table.schema.get_field_index("id"), "id", ids)
        path = folder / f"train-{number:05d}-00000.parquet"
        pq.write_table(table, path, compression="zstd")
        entry = {"file": path.name, "split": "train", "structures": size}
        shards.append({**entry, "bytes": path.stat().st_size, "sha256": sha256(path)})
    manifest |= {"splits": {"train": num_structures}, "shards": shards}
    manifest.pop("rejected", None)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def measure(folder: Path) -> dict[str, float]:
    """Times and memory of this process, which must be a fresh one."""
    from moiety.data.shards import Corpus

    before = memory()
    start = time.perf_counter()
    corpus = Corpus.open(folder, "train")
    result = {"structures": len(corpus), "open_s": time.perf_counter() - start, "open_mb": memory() - before}
    indices = np.random.default_rng(0).integers(0, len(corpus), READS)
    for name in ("first", "second"):
        start = time.perf_counter()
        for index in indices:
            corpus.read([index])
        result[f"{name}_read_ms"] = (time.perf_counter() - start) / READS * 1e3
    result["read_mb"] = memory() - before
    start = time.perf_counter()
    corpus.read(indices)
    result["batch_read_us"] = (time.perf_counter() - start) / READS * 1e6
    return result


def measure_mixture(folder: Path, rank: int) -> dict[str, float]:
    """Times and memory of one rank, a fresh process, that plans an epoch and reads its part of the first steps."""
    from moiety.training.config import DataConfig, SourceConfig
    from moiety.training.mixture import Mixture

    before = memory()
    start = time.perf_counter()
    mixture = Mixture.open(DataConfig((SourceConfig(str(folder)),), node_budget=4000, edge_budget=200_000))
    result = {"rank": rank, "micro_batches_an_epoch": mixture.sources[0].num_batches}
    result |= {"plan_s": time.perf_counter() - start, "plan_mb": memory() - before}
    for step in range(STEPS):
        mixture.read(mixture.micro_batch(RANKS * step + rank))
        mixture.digest("", RANKS * step, RANKS * (step + 1))
    return result | {"steps_mb": memory() - before}


def memory() -> float:
    """MB of this process that are its own: pages of mapped files are the system's cache, and given back at need."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--structures", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the corpora go for the time of the run")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure) if args.rank is None else measure_mixture(args.measure, args.rank)))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="corpus-scale-", dir=args.folder))
    try:
        for num_structures in (10_000, args.structures):
            corpus = folder / str(num_structures)
            start = time.perf_counter()
            write(corpus, num_structures)
            written = time.perf_counter() - start
            command = [sys.executable, __file__, "--measure", str(corpus)]
            for what in ("first open (hashes and converts)", "open"):
                found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                print(what, json.dumps({name: round(value, 4) for name, value in found.items()}), flush=True)
            ranks = [
                subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True)
                for rank in range(RANKS)
            ]
            for process in ranks:
                found = json.loads(process.communicate()[0])
                print("mixture", json.dumps({name: round(value, 4) for name, value in found.items()}), flush=True)
            for kind, pattern in (("Parquet", "*.parquet"), ("Arrow", ".arrow/*.arrow")):
                size = sum(path.stat().st_size for path in corpus.glob(pattern))
                print(f"{kind}: {size / 1e6:.0f} MB, {size / num_structures:.0f} bytes a structure", flush=True)
            print(f"written in {written:.0f} s", flush=True)
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
