"""Names, IUPAC names, UniProt headers and crystal descriptions, each with the structure it belongs to.

Molecules are recognised by their constitution (canonical SMILES without stereo), crystals by themselves, proteins by a
chain that lies in the sequence (90 % identity over 80 % of the chain, ungapped).

Splits never leak: all texts of a key have one split, the strictest (test, then val, then train) among the structures
of that key in qm9 and ccd. Sequences that share a word of 12 residues are one cluster; a cluster has the strictest
split of the chains that lie in its sequences and of the held-out chains related to one of them. What has no structure
is dealt by a hash of its scaffold (IUPAC names) or of its cluster (headers).
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from biotite.structure.io.pdbx import BinaryCIFFile

from moiety.data.build import load_recipe
from moiety.data.containers import fasta
from moiety.data.crystal_texts import describe, formula
from moiety.data.download import Archive
from moiety.data.leak.proteins import relatives, sequence
from moiety.data.molecule_keys import component_constitutions, constitution, scaffold
from moiety.data.sequence_words import clusters, contained
from moiety.data.splits import SPLITS, select, shuffled, split_of
from moiety.data.structure import Structure
from moiety.data.texts import Text
from moiety.data.validate import REMEDIES, Rejected, Verdict, check

PAIRS = "robocrys/condense/molecule_db.json.gz"
SEQUENCES = "usr/share/doc/mmseqs2/example-data/*.fasta.gz"
COMPONENTS = "biotite/structure/info/components.bcif"
BATCH = 2000  # sequences of like length whose relatives are searched at a time
KINDS = 4
Key = TypeVar("Key", str, int)


class Holder(NamedTuple):
    """A structure that has some key."""

    corpus: str
    id: str
    split: str


def strictest(splits: Iterable[str]) -> str:
    """The last of train, val and test that occurs."""
    return max(splits, key=SPLITS.index)


def keep_strictest(holders: dict[Key, Holder], key: Key, holder: Holder) -> None:
    """Enters a structure under its key, unless one of the same or a stricter split is there."""
    if key not in holders or SPLITS.index(holder.split) > SPLITS.index(holders[key].split):
        holders[key] = holder


def parts(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[str]:
    """What is read together: names and IUPAC names share the keys of molecules."""
    return ["molecules", *(["headers"] if {"promod3-data", "mmseqs2-examples"} <= set(archives) else []), "crystals"]


def texts(archives: Mapping[str, Archive], options: Mapping[str, int], part: str) -> Iterator[Text | Verdict]:
    """Yields names and IUPAC names, headers, or descriptions. Each kind has an even share of what `options` want.

    Names and descriptions come in the order of their corpora, so that a small profile speaks of the structures of small
    profiles; the others in a hashed order.
    """
    shares = [
        {split: (options[split] + place) // KINDS for split in SPLITS if split in options} for place in range(KINDS)
    ]
    if part == "molecules":
        yield from _molecules(archives, *shares[:2])
    elif part == "headers":
        yield from _chosen(_mixed(_headers(archives)), shares[2])
    else:
        found = load_recipe("crystals").module().unlabelled(archives, {})
        crystals = [crystal for crystal in found if check(crystal) is None]
        for index in select([crystal.groups["split"] for crystal in crystals], shares[3]):
            yield _description(crystals[index])


def _molecules(
    archives: Mapping[str, Archive], of_names: Mapping[str, int], of_iupac: Mapping[str, int]
) -> Iterator[Text | Verdict]:
    holders: dict[str, Holder] = {}
    for molecule in _structures("qm9", archives):
        if key := constitution(molecule.text[0]):
            keep_strictest(holders, key, Holder("qm9", molecule.id, molecule.groups["split"]))
    components = list(_structures("ccd", archives))
    keys = _component_keys(archives["biotite"], components)
    for component in components:
        keep_strictest(holders, keys[component.id], Holder("ccd", component.id, component.groups["split"]))
    yield from _chosen(list(_names(components, keys, holders)), of_names)
    yield from _chosen(_mixed(_iupac(archives["robocrys"], holders)), of_iupac)


def _structures(name: str, archives: Mapping[str, Archive]) -> Iterator[Structure]:
    """All structures that stand in another corpus, from its recipe."""
    recipe = load_recipe(name)
    own = {source.package: archives[source.package] for source in recipe.sources if source.package in archives}
    for part in recipe.parts(own, {}):
        for structure in recipe.structures(own, {}, part):
            if isinstance(structure, Structure) and check(structure) is None:
                yield structure


def _chosen(found: Sequence[Text | Verdict], share: Mapping[str, int]) -> Iterator[Text | Verdict]:
    """The first texts of every split; verdicts only where everything is wanted."""
    if not share:
        yield from found
        return
    texts = [item for item in found if isinstance(item, Text)]
    yield from (texts[index] for index in select([text.split for text in texts], share))


def _mixed(found: Iterable[Text | Verdict]) -> list[Text | Verdict]:
    """In a hashed order: every prefix is a fair sample."""
    items = list(found)
    names = [item.id if isinstance(item, Text) else f"{item.file}#{item.index}" for item in items]
    return [items[index] for index in shuffled(names, salt="texts")]


def _component_keys(archive: Archive, components: list[Structure]) -> dict[str, str]:
    block = BinaryCIFFile.read(io.BytesIO(archive.read(COMPONENTS))).block
    return dict(component_constitutions(block, {component.id for component in components}))


def _names(components: list[Structure], keys: Mapping[str, str], holders: Mapping[str, Holder]) -> Iterator[Text]:
    for component in components:
        key = keys[component.id]
        for number, name in enumerate(dict.fromkeys(component.text)):
            identity = f"ccd:{component.id}:{number}"
            yield Text(identity, "name", name, key, holders[key].split, corpus="ccd", structure=component.id)


def _iupac(archive: Archive, holders: Mapping[str, Holder]) -> Iterator[Text | Verdict]:
    pairs: dict[str, dict[str, str]] = json.loads(gzip.decompress(archive.read(PAIRS)))
    for index, (smiles, names) in enumerate(pairs.items()):
        name, key = names.get("name_iupac"), constitution(smiles)
        if name is None or key is None:
            problem = (
                Rejected("unreadable", f"RDKit reads no molecule from {smiles}")
                if key is None
                else Rejected("missing-field", f"{smiles} has no IUPAC name")
            )
            yield Verdict(PAIRS, index, False, problem.code, problem.reason, REMEDIES[problem.code])
        elif holder := holders.get(key):
            yield Text(f"iupac:{smiles}", "iupac", name, key, holder.split, corpus=holder.corpus, structure=holder.id)
        else:
            yield Text(f"iupac:{smiles}", "iupac", name, key, split_of(scaffold(smiles) or key, salt="texts"))


def _headers(archives: Mapping[str, Archive]) -> Iterator[Text]:
    entries = list(_entries(archives["mmseqs2-examples"]))
    sequences = [letters for _, _, letters in entries]
    chains = [c for c in load_recipe("proteins").module().unlabelled(archives, {}) if check(c) is None]
    letters_of = [sequence(chain) for chain in chains]
    holders: dict[int, Holder] = {}  # sequence -> the chain that lies in it, of the strictest split
    splits: dict[int, list[str]] = {}  # sequence -> splits of the chains it is related to
    for chain, place in contained(letters_of, sequences):
        split = chains[chain].groups["split"]
        splits.setdefault(place, []).append(split)
        keep_strictest(holders, place, Holder("proteins", chains[chain].id, split))
    held_out = [chain for chain in range(len(chains)) if chains[chain].groups["split"] != "train"]
    for chain, place in _related([letters_of[chain] for chain in held_out], sequences):
        splits.setdefault(place, []).append(chains[held_out[chain]].groups["split"])

    labels = clusters(sequences).tolist()
    representative: dict[int, str] = {}
    of_cluster: dict[int, list[str]] = {}
    for place, (accession, _, _) in enumerate(entries):
        representative[labels[place]] = min(representative.get(labels[place], accession), accession)
        of_cluster.setdefault(labels[place], []).extend(splits.get(place, []))
    for place, (accession, header, letters) in enumerate(entries):
        label, holder = labels[place], holders.get(place)
        split = strictest(of_cluster[label] or [split_of(representative[label], salt="texts")])
        joined = {"corpus": holder.corpus, "structure": holder.id} if holder else {}
        yield Text(f"uniprot:{accession}", "header", header, letters, split, **joined)


def _entries(archive: Archive) -> Iterator[tuple[str, str, str]]:
    """(accession, header without its identifiers, sequence) of every entry."""
    for _, stream in archive.members():
        for key, record in fasta.records(io.BytesIO(gzip.decompress(stream.read())), {}):
            assert isinstance(record, dict), key  # the files are pinned
            identifiers, header = record["header"].split(maxsplit=1)
            yield identifiers.split("|")[1], header.split(" Split=")[0].strip(), record["sequence"]


def _related(chains: list[str], sequences: list[str]) -> Iterator[tuple[int, int]]:
    """(chain, sequence) pairs with an alignment that chance would not give; long sequences cost most."""
    order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        for found in relatives(chains, [sequences[place] for place in batch]):
            yield found.first, batch[found.second]


def _description(crystal: Structure) -> Text:
    """Of a real crystal only: a guess has the neighbours of the prototype it was made from."""
    return Text(
        f"crystal:{crystal.id}",
        "description",
        describe(crystal),
        f"{formula(crystal)} {crystal.groups['prototype']}",
        crystal.groups["split"],
        corpus="crystals",
        structure=crystal.id,
    )
