"""Does a fine-tuned force field conserve energy? A relaxed molecule, 300 K, no thermostat, and the drift that is left.

    python benchmarks/nve.py [--model runs/quickstart/export --adapter runs/forces/adapter] [--ps 5] [--step 0.5]

Drift is the slope of a straight line through the total energy; what fluctuates about it is the integrator's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from ase import units
from ase.build import molecule
from ase.md.velocitydistribution import Stationary, ZeroRotation, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from peers.progress import tracked

import moiety
from moiety.errors import InputError
from moiety.inference import MoietyCalculator

CHUNK = 100  # steps between two updates of the bar


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=moiety.weights())
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--molecule", default="CH3CH2OH", help="a name of ase.build.molecule")
    parser.add_argument("--ps", type=float, default=5.0)
    parser.add_argument("--step", type=float, default=0.5, help="fs")
    args = parser.parse_args()
    try:
        calculator = MoietyCalculator(args.model, args.adapter)
    except InputError as error:
        print(f"nve.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"molecule": args.molecule, "ps": args.ps, **measured(args, calculator)}))
    return 0


def measured(args: argparse.Namespace, calculator: MoietyCalculator) -> dict[str, float]:
    atoms = molecule(args.molecule)
    atoms.calc = calculator
    BFGS(atoms, logfile=None).run(fmax=0.02, steps=200)
    thermalize_momenta(atoms, temperature_K=600, rng=np.random.default_rng(0))  # half goes to the potential
    Stationary(atoms)
    ZeroRotation(atoms)
    times, totals, kinetic = [], [], []
    dynamics = VelocityVerlet(atoms, args.step * units.fs)

    def note() -> None:
        times.append(dynamics.get_time() / (1000 * units.fs))
        totals.append(1000 * atoms.get_total_energy() / len(atoms))
        kinetic.append(atoms.get_temperature())

    dynamics.attach(note, interval=4)
    started = time.perf_counter()
    steps = CHUNK * max(1, round(1000 * args.ps / args.step / CHUNK))
    for _ in tracked(range(steps // CHUNK), "NVE", steps // CHUNK):
        dynamics.run(CHUNK)
    slope, middle = np.polyfit(times, totals, 1)
    return {
        "drift_meV_per_atom_per_ps": round(float(slope), 4),
        "fluctuation_meV_per_atom": round(float(np.std(np.array(totals) - middle - slope * np.array(times))), 4),
        "mean_temperature_K": round(float(np.mean(kinetic)), 1),
        "ms_per_step": round(1000 * (time.perf_counter() - started) / steps, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
