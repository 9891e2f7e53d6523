"""Units by name, as recipes write them: hartree/bohr, eV/Å^3, kcal/mol, kbar, cal/(mol K)."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from ase import units as ase

from moiety.errors import InputError

TOKEN = re.compile(r"\s*(?:(?P<name>[^\W\d]\w*|%|Å|1)(?:\^(?P<power>-?\d+))?|(?P<sign>[/*·()]))")


class Unit(NamedTuple):
    """A factor to eV, Å, e, fs and K, and the powers of these."""

    factor: float
    powers: tuple[int, int, int, int, int]  # eV, Å, e, fs, K


def _of(factor: float, energy: int = 0, length: int = 0, charge: int = 0, time: int = 0, temperature: int = 0) -> Unit:
    return Unit(factor, (energy, length, charge, time, temperature))


UNITS = {
    **{name: _of(1.0, energy=1) for name in ("eV",)},
    "meV": _of(1e-3, energy=1),
    "hartree": _of(ase.Hartree, energy=1),
    "Ha": _of(ase.Hartree, energy=1),
    "rydberg": _of(ase.Rydberg, energy=1),
    "kcal": _of(ase.kcal, energy=1),
    "cal": _of(ase.kcal / 1000, energy=1),
    "kJ": _of(ase.kJ, energy=1),
    "J": _of(ase.J, energy=1),
    "mol": _of(ase.mol),
    "invcm": _of(ase.invcm, energy=1),
    "GHz": _of(ase._hplanck * ase.J * 1e9, energy=1),
    **{name: _of(1.0, length=1) for name in ("Å", "Angstrom", "angstrom")},
    "bohr": _of(ase.Bohr, length=1),
    "nm": _of(ase.nm, length=1),
    "pm": _of(1e-2, length=1),
    "m": _of(1e10, length=1),
    "GPa": _of(ase.GPa, energy=1, length=-3),
    "kbar": _of(0.1 * ase.GPa, energy=1, length=-3),
    "Pa": _of(ase.Pascal, energy=1, length=-3),
    "e": _of(1.0, charge=1),
    "D": _of(ase.Debye, charge=1, length=1),
    "debye": _of(ase.Debye, charge=1, length=1),
    "fs": _of(1.0, time=1),
    "ps": _of(1e3, time=1),
    "s": _of(1e15, time=1),
    "K": _of(1.0, temperature=1),
    "1": _of(1.0),
}


def parse(text: str) -> Unit:
    """The unit of a text such as "hartree/bohr".

    Raises:
        InputError: a name that is not known, with the nearest; a text that is no quotient of units.
    """
    factor, powers, place, sign, grouped = 1.0, [0] * 5, 0, 1, False
    while place < len(text.rstrip()):
        token = TOKEN.match(text, place)
        if token is None:
            raise InputError(f"unit {text!r}: {text[place:]!r} is no unit; write quotients such as eV/Å^3")
        place = token.end()
        if token["sign"]:
            grouped = token["sign"] == "(" or (grouped and token["sign"] != ")")
            if token["sign"] != "(" and not grouped:
                sign = -1 if token["sign"] == "/" else 1
            continue
        unit = _known(token["name"], text)
        power = sign * int(token["power"] or 1)
        factor *= unit.factor**power
        powers = [old + power * new for old, new in zip(powers, unit.powers, strict=True)]
        sign = sign if grouped else 1
    return Unit(factor, (powers[0], powers[1], powers[2], powers[3], powers[4]))


def factor(unit: str, to: str) -> float:
    """What a number in `unit` is multiplied by to be one in `to`.

    Raises:
        InputError: a name that is not known, or units of different things.
    """
    first, second = parse(unit), parse(to)
    if first.powers != second.powers:
        raise InputError(f"unit {unit!r} cannot be converted to {to!r}: they measure different things")
    return first.factor / second.factor


def _known(name: str, text: str) -> Unit:
    if name not in UNITS:
        folded = {known.lower(): known for known in UNITS}
        close = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.5)
        hint = f"; did you mean {folded[close[0]]!r}?" if close else f"; known: {', '.join(UNITS)}"
        raise InputError(f"unit {text!r}: {name!r} is not known{hint}")
    return UNITS[name]
