"""Structures that share their composition and differ in geometry: what only geometry answers can be asked of them.

Every structure says which fact tells it from its partners (groups `fact`, `answer`, `pair`); partners have the same
atoms in the same order, and each answer is as frequent as the others, so who sees no geometry is right by chance:

- handedness: a molecule with one stereocentre, and its mirror image (R, S);
- double_bond: the two arrangements around the one double bond that has two (E, Z);
- extent: two conformers of a flexible molecule, one at least a fifth wider than the other (extended, compact);
- coordination: two elements in three arrangements (4, 6, 8 neighbours), in the same order of atoms;
- contact: two molecules that touch, or stand apart (touching, apart);
- fold: two sequences on each of two backbones (helical, not helical).

Molecules of `extent` beyond those of the package are chains that were put together here, of two ends and three parts.
Geometries of molecules are RDKit's (ETKDGv3, MMFF94), those of crystals ideal prototypes with bond lengths
by covalent radii, strained and rattled; none is measured, nor relaxed by quantum mechanics.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product

import numpy as np
from ase.build import bulk
from ase.data import covalent_radii
from biotite.structure import AtomArray, annotate_sse
from rdkit import Chem, rdBase
from rdkit.Chem import AllChem, FindPotentialStereo, rdMolDescriptors
from rdkit.Chem.EnumerateStereoisomers import EnumerateStereoisomers

from moiety.data.build import load_recipe
from moiety.data.download import Archive
from moiety.data.molecule_keys import constitution
from moiety.data.splits import SPLITS, even_share, place, shuffled, split_of
from moiety.data.structure import Array, Structure
from moiety.models.vocabulary_moiety import ELEMENT_ID

SMILES = "robocrys/condense/molecule_db.json.gz"
FACTS = ("handedness", "double_bond", "extent", "coordination", "contact", "fold")
HEAVY = 4, 12  # atoms of a molecule that are no hydrogens
NUMBERS = frozenset((1, 6, 7, 8, 9, 15, 16, 17, 35))
SEED = 20261128
LINKS, MIDDLES = ("CC", "CCC", "CCCC"), ("C", "O", "N", "S", "C(=O)", "C(F)")  # chains of five parts
STARTS, ENDS = (
    ("O", "N", "F", "Cl", "N#C", "CO", "CS", "CC(=O)"),
    ("O", "N", "F", "Cl", "C#N", "OC", "C(=O)N", "C(=O)O"),
)
ROTATABLE = 3  # bonds of a flexible molecule
CONFORMERS, WIDER = 40, 1.2  # how many are tried, and how much wider the extended one is
CATIONS = [
    "Li", "Na", "K", "Rb", "Cs", "Be", "Mg", "Ca", "Sr", "Ba", "Sc", "Y", "Ti", "Zr", "Mn", "Fe", "Co", "Ni", "Cu",
    "Ag", "Zn", "Cd", "Al", "Ga", "In",
]  # fmt: skip
ANIONS = ["N", "P", "As", "O", "S", "Se", "Te", "F", "Cl", "Br", "I"]
LATTICES = {
    "4": ("zincblende", 4 / 3**0.5),
    "6": ("rocksalt", 2.0),
    "8": ("cesiumchloride", 2 / 3**0.5),
}
COPIES = 12  # of a pair of elements
HELD_OUT = 0.1, 0.2  # shares of constitutions and of pairs of elements that are for val and test
STRAIN, RATTLE, BREATHES = 0.03, 0.05, 0.06  # shares of the cell, Å, and of the bond length
DISTANCES = {"touching": (0.95, 1.05), "apart": (1.5, 1.9)}  # of the closest two atoms, in sums of van der Waals radii
FOLD_LENGTHS, LONGEST = (40, 120), 64  # residues of chains that are taken, and what is read of them
HELICAL, NOT_HELICAL = 0.55, 0.15  # shares of the residues that are in helices
Partners = list[Structure]
Offer = tuple[str, Callable[[], Partners]]  # a split, and what makes partners for it


def parts(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[str]:
    """One a fact; `fold`, which needs the clusters of all proteins, may be left out."""
    return [fact for fact in FACTS if options.get(fact, 1)]


def structures(archives: Mapping[str, Archive], options: Mapping[str, int], part: str) -> Iterator[Structure]:
    """Yields partners one after the other, `options[split]` structures of all facts together, or a few less."""
    facts = parts(archives, options)
    share = even_share(options, facts.index(part), len(facts))
    left = {split: share.get(split, 0) if share else 10**9 for split in SPLITS}
    for split, make in MAKERS[part](archives):
        if left[split] >= 2 and (partners := make()) and len(partners) <= left[split]:
            left[split] -= len(partners)
            yield from partners
        if max(left.values()) < 2:
            return


def handedness(archives: Mapping[str, Archive]) -> Iterator[Offer]:
    for smiles, molecule, split in _molecules(archives, "Atom_Tetrahedral"):
        yield split, partial(_hands, smiles, molecule, split)


def _hands(smiles: str, molecule: Chem.Mol, split: str) -> Partners:
    placed = _placed(molecule)
    centres = Chem.FindMolChiralCenters(placed, useLegacyImplementation=False) if placed else []
    if [hand for _, hand in centres] not in (["R"], ["S"]):
        return []
    here, mirrored = _structure(placed, smiles), _structure(placed, smiles)
    mirrored.positions = mirrored.positions * [-1, 1, 1]
    hand = centres[0][1]
    return _partners("handedness", smiles, split, {hand: here, "S" if hand == "R" else "R": mirrored})


def double_bond(archives: Mapping[str, Archive]) -> Iterator[Offer]:
    for smiles, molecule, split in _molecules(archives, "Bond_Double"):
        yield split, partial(_arranged, smiles, molecule, split)


def _arranged(smiles: str, molecule: Chem.Mol, split: str) -> Partners:
    found = {}
    for isomer in EnumerateStereoisomers(molecule):
        placed = _placed(isomer)
        if placed is None:
            return []
        stereo = [b.GetStereo().name for b in placed.GetBonds() if b.GetStereo() != Chem.BondStereo.STEREONONE]
        if stereo in (["STEREOE"], ["STEREOZ"]):
            found[stereo[0][-1]] = _structure(placed, smiles)
    return _partners("double_bond", smiles, split, found) if len(found) == 2 else []


def extent(archives: Mapping[str, Archive]) -> Iterator[Offer]:
    for smiles, molecule, split in _molecules(archives, ""):
        if rdMolDescriptors.CalcNumRotatableBonds(molecule) >= ROTATABLE:
            yield split, partial(_stretched, smiles, molecule, split)
    chains = sorted({Chem.CanonSmiles("".join(parts)) for parts in product(STARTS, LINKS, MIDDLES, LINKS, ENDS)})
    for index in shuffled(chains, salt="isomers"):
        key = constitution(chains[index])
        assert key is not None
        split = split_of(key, "isomers", *HELD_OUT)
        yield split, partial(_stretched, chains[index], Chem.MolFromSmiles(chains[index]), split)


def _stretched(smiles: str, molecule: Chem.Mol, split: str) -> Partners:
    full = Chem.AddHs(molecule)
    settings = AllChem.ETKDGv3()
    settings.randomSeed = SEED
    with rdBase.BlockLogs():
        AllChem.EmbedMultipleConfs(full, CONFORMERS, settings)
    found = [_structure(full, smiles, conformer.GetId()) for conformer in full.GetConformers()]
    found.sort(key=lambda one: _width(one.positions))
    if not found or _width(found[-1].positions) < WIDER * _width(found[0].positions):
        return []
    return _partners("extent", smiles, split, {"extended": found[-1], "compact": found[0]})


def coordination(archives: Mapping[str, Archive]) -> Iterator[Offer]:
    pairs = [*product(CATIONS, ANIONS)] * COPIES
    names = [f"{''.join(pair)}:{index // len(CATIONS) // len(ANIONS)}" for index, pair in enumerate(pairs)]
    for index in shuffled(names, salt="isomers"):
        split = split_of("".join(pairs[index]), "isomers", *HELD_OUT)
        yield split, partial(_surrounded, names[index], pairs[index], split)


def _surrounded(name: str, pair: tuple[str, str], split: str) -> Partners:
    rng = np.random.default_rng(int(place(name, "isomers") * 2**53))
    bond = covalent_radii[[ELEMENT_ID[symbol] for symbol in pair]].sum()
    found = {}
    for neighbours, (lattice, edge) in LATTICES.items():
        atoms = bulk("".join(pair), lattice, a=edge * bond * rng.uniform(1 - BREATHES, 1 + BREATHES))
        strain = rng.uniform(-STRAIN, STRAIN, (3, 3))
        deformation = np.eye(3) + (strain + strain.T) / 2
        found[neighbours] = Structure(
            node_type=atoms.numbers,
            positions=atoms.positions @ deformation + rng.normal(0, RATTLE, (2, 3)),
            domain="crystal",
            cell=atoms.cell.array @ deformation,
            pbc=np.ones(3, dtype=bool),
        )
    return _partners("coordination", name, split, found)


def contact(archives: Mapping[str, Archive]) -> Iterator[Offer]:
    recipe, ccd = load_recipe("interactions").module(), load_recipe("ccd").module()
    found = ccd.structures({"biotite": archives["biotite"]}, {})
    members = recipe.distinct(molecule for molecule in found if recipe.is_small(molecule))
    for split in SPLITS[::-1]:
        for first, second in recipe.pairs(len(members[split])):
            yield split, partial(_beside, members[split][first], members[split][second], split)


def _beside(first: Structure, second: Structure, split: str) -> Partners:
    placed = load_recipe("interactions").module().placed
    name = f"{first.id}+{second.id}"
    rng = np.random.default_rng(int(place(name, "isomers") * 2**53))
    found = {answer: placed(first, second, rng.uniform(*span)) for answer, span in DISTANCES.items()}
    return _partners("contact", name, split, found)


def fold(archives: Mapping[str, Archive]) -> Iterator[Offer]:
    """Of chains in a hashed order: a helical one and one that is not, cut to one length, with both sequences."""
    proteins = load_recipe("proteins")
    own = {source.package: archives[source.package] for source in proteins.sources if source.package in archives}
    waiting: dict[tuple[str, bool], list[Structure]] = defaultdict(list)
    for chain in proteins.module().unlabelled(own, {}):
        if not FOLD_LENGTHS[0] <= chain.num_nodes <= FOLD_LENGTHS[1]:
            continue
        share, split = _helix_share(chain), chain.groups["split"]
        if not NOT_HELICAL < share < HELICAL:
            helical = share >= HELICAL
            waiting[split, helical].append(chain)
            if waiting[split, not helical]:
                pair = waiting[split, True].pop(), waiting[split, False].pop()
                for sequence in pair:
                    yield split, partial(_threaded, sequence, *pair, split)


def _threaded(sequence: Structure, helical: Structure, other: Structure, split: str) -> Partners:
    size = min(helical.num_nodes, other.num_nodes, LONGEST)
    found = {"helical": _first(helical, size), "not helical": _first(other, size)}
    if _helix_share(found["helical"]) < HELICAL or _helix_share(found["not helical"]) > NOT_HELICAL:
        return []
    for backbone in found.values():
        backbone.node_type = sequence.node_type[:size]
    return _partners("fold", f"{sequence.id}:{helical.id}+{other.id}", split, found)


MAKERS: dict[str, Callable[[Mapping[str, Archive]], Iterator[Offer]]] = {
    maker.__name__: maker for maker in (handedness, double_bond, extent, coordination, contact, fold)
}


def _partners(fact: str, name: str, split: str, found: Mapping[str, Structure]) -> Partners:
    """In a hashed order, so that none is the first more often."""
    for answer, structure in found.items():
        structure.id = f"{fact}:{name}:{answer}"
        structure.source = "isomers"
        structure.groups = {"split": split, "fact": fact, "answer": answer, "pair": f"{fact}:{name}"}
    partners = list(found.values())
    return [partners[index] for index in shuffled((one.id for one in partners), salt="isomers")]


def _molecules(archives: Mapping[str, Archive], stereo: str) -> Iterator[tuple[str, Chem.Mol, str]]:
    """SMILES, molecule and split of what has one stereo element, of that kind, or any; in a hashed order."""
    pairs = json.loads(gzip.decompress(archives["robocrys"].read(SMILES)))
    names = list(pairs)
    for index in shuffled(names, salt="isomers"):
        with rdBase.BlockLogs():
            molecule = Chem.MolFromSmiles(names[index])
        if molecule is None or not _is_plain(molecule):
            continue
        if not stereo or [element.type.name for element in FindPotentialStereo(molecule)] == [stereo]:
            key = constitution(names[index])
            assert key is not None
            yield key, molecule, split_of(key, "isomers", *HELD_OUT)


def _is_plain(molecule: Chem.Mol) -> bool:
    """One neutral closed-shell molecule of a few light atoms."""
    atoms = molecule.GetAtoms()
    return (
        HEAVY[0] <= molecule.GetNumHeavyAtoms() <= HEAVY[1]
        and {atom.GetAtomicNum() for atom in atoms} <= NUMBERS
        and not any(atom.GetFormalCharge() or atom.GetNumRadicalElectrons() for atom in atoms)
        and len(Chem.GetMolFrags(molecule)) == 1
    )


def _placed(molecule: Chem.Mol) -> Chem.Mol | None:
    """With hydrogens, in one conformer; None where RDKit finds none."""
    full = Chem.AddHs(molecule)
    settings = AllChem.ETKDGv3()
    settings.randomSeed = SEED
    with rdBase.BlockLogs():
        if AllChem.EmbedMolecule(full, settings) != 0:
            return None
        if AllChem.MMFFHasAllMoleculeParams(full):
            AllChem.MMFFOptimizeMolecule(full)
    Chem.AssignStereochemistryFrom3D(full)
    return full


def _structure(placed: Chem.Mol, smiles: str, conformer: int = -1) -> Structure:
    return Structure(
        node_type=np.array([atom.GetAtomicNum() for atom in placed.GetAtoms()]),
        positions=placed.GetConformer(conformer).GetPositions(),
        charge=Chem.GetFormalCharge(placed),
        text=[smiles],
    )


def _width(positions: Array) -> float:
    """Radius of gyration, Å."""
    return float(np.sqrt(positions.var(axis=0).sum()))


def _helix_share(chain: Structure) -> float:
    return float((_sse(chain) == "a").mean())


def _sse(chain: Structure) -> Array:
    atoms = AtomArray(chain.num_nodes)
    atoms.coord = chain.positions.astype(np.float32)
    atoms.atom_name[:], atoms.res_name[:], atoms.element[:] = "CA", "ALA", "C"
    atoms.res_id = np.arange(1, chain.num_nodes + 1)
    return annotate_sse(atoms)


def _first(chain: Structure, size: int) -> Structure:
    """The first residues of a chain."""
    assert chain.node_vectors is not None
    return Structure(
        node_type=chain.node_type[:size],
        positions=chain.positions[:size],
        domain="protein",
        id=chain.id,
        node_vectors=chain.node_vectors[:size],
        role=chain.role[:size] if chain.role is not None else None,
    )
