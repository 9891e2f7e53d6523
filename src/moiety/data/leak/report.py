"""What `moiety data leak` does and says."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from moiety.data.leak.scan import KINDS, Report, scan
from moiety.data.leak.sources import load
from moiety.errors import InputError

NUM_SHOWN = 5  # findings of each kind


def compare(train: str, test: str, out: Path | None = None) -> Report:
    """Scans two places (see `load`), and writes the findings to out, one JSON object a line.

    Raises:
        InputError: a place holds nothing to compare, or the folder of out does not exist.
    """
    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out}: the folder {out.parent} does not exist; make it first")
    (in_train, rejected_train), (in_test, rejected_test) = load(train), load(test)
    report = scan(in_train, in_test)
    report.rejected = {"train": rejected_train, "test": rejected_test}
    if out is not None:
        out.write_text("".join(json.dumps(asdict(leak)) + "\n" for leak in report.leaks))
    return report


def lines(report: Report) -> list[str]:
    """The report for people: counts, the first findings of each kind, what is shared."""
    rejected = sum(report.rejected.values())
    told = [
        f"{report.num_test:,} structures looked for in {report.num_train:,}"
        + (f" ({rejected:,} more could not be read: moiety data check)" if rejected else "")
    ]
    counts = report.counts()
    for kind in KINDS:
        told.append(f"{kind:<14}{counts[kind]:,}")
        found = [leak for leak in report.leaks if leak.kind == kind]
        for leak in found[:NUM_SHOWN]:
            evidence = ", ".join(f"{name} {value}" for name, value in leak.evidence.items())
            told.append(f"  {leak.test} = {leak.train}: {evidence}")
        if len(found) > NUM_SHOWN:
            told.append(f"  and {len(found) - NUM_SHOWN:,} more (--out FILE.jsonl)")
    for label, shared in report.shared.items():
        if shared["structures"]:
            told.append(
                f"same {label}: {shared['structures_with_label_in_train']:,} of {shared['structures']:,} structures, "
                f"{shared['labels_in_train']:,} of {shared['labels']:,} {label}s"
            )
    return told
