"""Leak guard: what a test set shares with a training set, from the same geometry to the same scaffold."""

from moiety.data.leak.scan import DUPLICATES, KINDS, TOLERANCE, Leak, Report, scan
from moiety.data.leak.sources import load

__all__ = ["DUPLICATES", "KINDS", "TOLERANCE", "Leak", "Report", "load", "scan"]
