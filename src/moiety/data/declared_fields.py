"""One record of a container, with the fields of a recipe, as a Structure."""
# Shapes: N nodes.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moiety.data.containers import check_keys
from moiety.data.residues import node_types
from moiety.data.structure import Array, Structure
from moiety.data.unit_names import factor
from moiety.data.validate import Rejected
from moiety.errors import InputError
from moiety.models.conversion_moiety import element_numbers, virtual_cb
from moiety.models.vocabulary_moiety import ROLE_ID

FIELDS = {  # field -> unit it is stored in; "" has none
    "node_type": "", "positions": "Å", "cell": "Å", "pbc": "", "charge": "", "spin": "", "energy": "eV",
    "forces": "eV/Å", "stress": "eV/Å^3", "dipole": "e*Å", "scalars": "", "node_scalars": "", "tensors": "",
    "node_tensors": "", "text": "", "groups": "",
}  # fmt: skip
NAMED = ("scalars", "node_scalars", "tensors", "node_tensors", "groups")  # name -> field
FIELD = ("from", "constant", "unit", "factor", "optional", "voigt", "symbols", "smiles", "count")
MAX_WHOLE = 2.0**53  # beyond, a double does not tell whole numbers apart
VOIGT = {"xx": (0, 0), "yy": (1, 1), "zz": (2, 2), "yz": (1, 2), "xz": (0, 2), "xy": (0, 1)}
FORMATS = ("pymatgen", "jarvis")
RESIDUES = ("sequence", "coords")
BACKBONE = ("N", "CA", "C", "O")


class Absent(Exception):
    """A field that the recipe needs and the record does not have."""


class FieldReader:
    """Makes Structures of records. The recipe is checked once, when this is made."""

    def __init__(self, reader: Mapping[str, Any], units: Mapping[str, str], where: str) -> None:
        self.reader, self.where = reader, where
        self.fields: Mapping[str, Any] = reader.get("fields", {})
        self.factors: dict[str, float] = {}
        for name, spec in self.fields.items():
            if name in NAMED:
                for inner, inner_spec in spec.items():
                    self._check(f"{name}.{inner}", inner_spec, units.get(inner, ""))
            elif name != "text":
                self._check(name, spec, FIELDS[name])
        if (known := reader.get("structure", {}).get("as", FORMATS[0])) not in FORMATS:
            raise InputError(f"{where}: structure as {known!r}; use one of {', '.join(FORMATS)}")
        check_keys(reader.get("residues", {}), RESIDUES, f"{where}: residues")

    def _check(self, name: str, spec: Any, to: str) -> None:
        if not isinstance(spec, dict):
            raise InputError(f"{self.where}: {name} is a mapping, such as {{from: NAME}}")
        check_keys(spec, FIELD, f"{self.where}: {name}")
        if ("from" in spec) == ("constant" in spec):
            raise InputError(f"{self.where}: {name} has either `from` or `constant`")
        if "voigt" in spec and sorted(spec["voigt"].split()) != sorted(VOIGT):
            raise InputError(f"{self.where}: {name}: voigt is the order of {' '.join(VOIGT)}")
        if spec.get("unit") and not to:
            raise InputError(f"{self.where}: {name} has a unit, and `units` does not say in which one it is stored")
        self.factors[name] = float(spec.get("factor", 1)) * (factor(spec["unit"], to) if spec.get("unit") else 1.0)

    def key(self, record: Any, key: str) -> str:
        """The name of a record within its file."""
        return str(value_at(record, self.reader["key"]["from"])) if "key" in self.reader else key

    def structure(self, record: Any, view: Any) -> Structure:
        """A record as a Structure.

        Args:
            record: what the container gave; the Structure of a file keeps its geometry and gets the fields on top.
            view: what the paths of fields lead into: the record itself, or with the row that was joined to it.

        Raises:
            Absent: a field that is needed is not there.
            Rejected: a field is not what the recipe says.
        """
        if isinstance(record, Rejected):
            raise record
        fields = {} if isinstance(record, Structure) else self._geometry(view)
        fields |= {name: self._value(name, self.fields[name], view) for name in FIELDS if self._is_plain(name)}
        for name in NAMED:
            fields[name] = self._named(name, view)
        fields["text"] = [str(value_at(view, path)) for path in self.fields.get("text", ())]
        if not isinstance(record, Structure):
            return _made(fields)
        return _labelled(record, fields)

    def _is_plain(self, name: str) -> bool:
        return name in self.fields and name not in NAMED and name != "text"

    def _named(self, name: str, record: Any) -> dict[str, Any]:
        found = {}
        for inner, spec in self.fields.get(name, {}).items():
            value = self._value(f"{name}.{inner}", spec, record)
            if value is not None:
                found[inner] = str(value) if name == "groups" else _number(value) if name == "scalars" else value
        return found

    def _value(self, name: str, spec: Mapping[str, Any], record: Any) -> Any:
        try:
            value = spec["constant"] if "constant" in spec else value_at(record, spec["from"])
            if value is None or (isinstance(value, str) and not value.strip()):
                raise Absent(f"{spec['from']} is empty")
        except Absent:
            if spec.get("optional"):
                return None
            raise
        if spec.get("symbols"):
            return _elements(value)
        if spec.get("smiles"):
            return _formal_charge(value)
        if name in ("groups", "text") or name.startswith("groups."):
            return value
        try:
            values = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            if spec.get("optional"):
                return None  # JARVIS writes na
            raise Rejected("bad-label", f"{name} should be numbers, it is {str(value)[:40]!r}") from None
        if spec.get("optional") and not np.isfinite(values).all():
            return None
        if "count" in spec:
            values = np.broadcast_to(values, (len(value_at(record, spec["count"])), *values.shape))
        values = values * self.factors[name]
        return _full_stress(values, spec["voigt"]) if "voigt" in spec else values

    def _geometry(self, record: Any) -> dict[str, Any]:
        spec = self.reader.get("structure", {})
        try:
            if "residues" in self.reader:
                return _residues(record, self.reader["residues"])
            if not spec:
                return {}
            found = value_at(record, spec["from"])
            return _jarvis(found) if spec.get("as") == "jarvis" else _pymatgen(found)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise Rejected("unreadable", f"no structure of the format it should have ({error!r})") from None


def value_at(record: Any, path: Any) -> Any:
    """What stands at a dotted path: names into mappings, numbers into lists; a list of paths is stacked, last axis.

    A name that holds dots itself is found first.
    """
    if isinstance(path, list):
        return np.stack([np.asarray(value_at(record, item)) for item in path], axis=-1)
    if isinstance(record, Mapping) and path in record:
        return record[path]
    value = record
    for step in str(path).split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list | tuple) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise Absent(f"there is no field {path}")
    return value


def _made(fields: dict[str, Any]) -> Structure:
    """A Structure of fields whose shapes are made to fit, where that is no guess."""
    for name in ("node_type", "positions"):
        if name not in fields:
            raise Absent(f"there is no {name}")
    try:
        fields["node_type"] = _whole(np.asarray(fields["node_type"]).reshape(-1), "node_type")
        fields["positions"] = np.asarray(fields["positions"], dtype=np.float64).reshape(-1, 3)
    except ValueError as error:
        raise Rejected("wrong-shape", str(error)) from None
    _shape(fields)
    if fields.get("pbc") is not None:
        fields["pbc"] = np.broadcast_to(np.asarray(fields["pbc"]).astype(bool).reshape(-1), (3,)).copy()
        if not fields["pbc"].any():
            fields["pbc"] = fields["cell"] = None
    return Structure(**fields)


def _labelled(structure: Structure, fields: dict[str, Any]) -> Structure:
    """The Structure of a file with labels from elsewhere; what it has itself stays where there are none."""
    _shape(fields)
    for name, value in fields.items():
        if name in NAMED:
            getattr(structure, name).update(value)
        elif name == "text":
            structure.text = structure.text + value
        elif value is not None:
            setattr(structure, name, value)
    return structure


def _shape(fields: dict[str, Any]) -> None:
    """Gives labels their shapes, in place; charge and spin that are not known are left to their defaults."""
    try:
        if fields.get("energy") is not None:
            fields["energy"] = _number(fields["energy"])
        for name, shape in (("cell", (3, 3)), ("stress", (3, 3)), ("dipole", (3,)), ("forces", (-1, 3))):
            if fields.get(name) is not None:
                fields[name] = np.asarray(fields[name], dtype=np.float64).reshape(shape)
    except ValueError as error:
        raise Rejected("wrong-shape", str(error)) from None
    for name in ("charge", "spin"):
        if fields.get(name) is None:
            fields.pop(name, None)
        else:
            fields[name] = int(_whole(np.asarray(fields[name]), name))


def _whole(values: Array, name: str) -> Array:
    """Numbers that have to be whole: OC20 keeps elements as floats."""
    rounded = np.rint(values)
    if not (np.abs(values) < MAX_WHOLE).all() or np.abs(rounded - values).max(initial=0) > 1e-3:
        raise Rejected("bad-label", f"{name} should be whole numbers")
    return rounded.astype(np.int64)


def _number(value: Any) -> float:
    values = np.asarray(value, dtype=np.float64)
    if values.size != 1:
        raise Rejected("wrong-shape", f"one number is expected, not {values.shape}")
    return float(values.reshape(()))


def _full_stress(values: Array, order: str) -> Array:
    if values.shape != (6,):
        raise Rejected("wrong-shape", f"six stresses are expected, not {values.shape}")
    stress = np.zeros((3, 3))
    for name, value in zip(order.split(), values, strict=True):
        i, j = VOIGT[name]
        stress[i, j] = stress[j, i] = value
    return stress


def _elements(symbols: Any) -> Array:
    numbers = element_numbers([str(symbol).strip() for symbol in symbols])
    if np.any(numbers == 0):
        raise Rejected("unknown-element", f"{symbols[int(np.flatnonzero(numbers == 0)[0])]!r} is no element")
    return numbers


def _formal_charge(smiles: Any) -> int:
    """The sum of the formal charges in a SMILES; HDF5 keeps one as an array of one."""
    from rdkit import Chem, rdBase

    text = np.asarray(smiles).reshape(-1)[0]
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(text.decode() if isinstance(text, bytes) else str(text), sanitize=False)
    if molecule is None:
        raise Rejected("bad-label", f"{text!r} is no SMILES")
    return sum(atom.GetFormalCharge() for atom in molecule.GetAtoms())


def _pymatgen(found: Mapping[str, Any]) -> dict[str, Any]:
    """pymatgen's dictionary, read by hand: its own reader imports the classes that the file names."""
    cell = np.asarray(found["lattice"]["matrix"], dtype=np.float64)
    symbols = []
    for site in found["sites"]:
        if len(site["species"]) != 1 or abs(site["species"][0].get("occu", 1) - 1) > 1e-3:
            raise Rejected("partial-occupancy", "a site is shared by species or partly empty")
        symbols.append(site["species"][0]["element"])
    fractions = np.asarray([site["abc"] for site in found["sites"]], dtype=np.float64).reshape(-1, 3)
    return {"node_type": _elements(symbols), "positions": fractions @ cell, "cell": cell, "pbc": True}


def _jarvis(found: Mapping[str, Any]) -> dict[str, Any]:
    cell = np.asarray(found["lattice_mat"], dtype=np.float64)
    positions = np.asarray(found["coords"], dtype=np.float64)
    cartesian = str(found["cartesian"]).lower() == "true"
    return {
        "node_type": _elements(found["elements"]),
        "positions": positions if cartesian else positions @ cell,
        "cell": cell,
        "pbc": True,
    }


def _residues(record: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """A chain of residues; those without a backbone (NaN in CATH) are left out, the others keep their numbers."""
    sequence, coords = value_at(record, names["sequence"]), value_at(record, names["coords"])
    backbone = np.stack([np.asarray(coords[atom], dtype=np.float64) for atom in BACKBONE], axis=1)
    if len(sequence) != len(backbone):
        raise Rejected("wrong-counts", f"{len(sequence)} letters and {len(backbone)} residues with coordinates")
    whole = np.isfinite(backbone).all(axis=(1, 2))
    if not whole.any():
        raise Rejected("no-usable-residues", "no residue has its whole backbone")
    n, ca, c, o = (backbone[whole, atom] for atom in range(4))
    letters = [sequence[place] for place in np.flatnonzero(whole)]
    return {
        "node_type": node_types(letters),
        "positions": ca,
        "node_vectors": np.stack([n - ca, c - ca, o - ca, virtual_cb(n, ca, c) - ca], axis=1),
        "role": np.full(len(letters), ROLE_ID["protein"]),
        "residue_index": np.flatnonzero(whole) + 1,
        "chain": ["A"] * len(letters),
    }
