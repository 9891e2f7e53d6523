"""One vocabulary for every node of every domain: elements, then residue types, then specials.

The id of an element is its atomic number, so `ase.Atoms.numbers` are token ids already.
`tokenizers/structure` holds the same table as a `PreTrainedTokenizerFast` artifact.
"""

from __future__ import annotations

import math
from typing import Any

_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu "
    "Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr "
    "Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
)
_NAMES = (
    "hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine neon sodium magnesium aluminium silicon "
    "phosphorus sulfur chlorine argon potassium calcium scandium titanium vanadium chromium manganese iron cobalt "
    "nickel copper zinc gallium germanium arsenic selenium bromine krypton rubidium strontium yttrium zirconium "
    "niobium molybdenum technetium ruthenium rhodium palladium silver cadmium indium tin antimony tellurium iodine "
    "xenon caesium barium lanthanum cerium praseodymium neodymium promethium samarium europium gadolinium terbium "
    "dysprosium holmium erbium thulium ytterbium lutetium hafnium tantalum tungsten rhenium osmium iridium platinum "
    "gold mercury thallium lead bismuth polonium astatine radon francium radium actinium thorium protactinium "
    "uranium neptunium plutonium americium curium berkelium californium einsteinium fermium mendelevium nobelium "
    "lawrencium rutherfordium dubnium seaborgium bohrium hassium meitnerium darmstadtium roentgenium copernicium "
    "nihonium flerovium moscovium livermorium tennessine oganesson"
)
_RESIDUES = "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL SEC PYL UNK"

ELEMENTS = _SYMBOLS.split()
ELEMENT_NAMES = _NAMES.split()
RESIDUES = _RESIDUES.split()
AMINO_ACIDS = RESIDUES[:20]  # the genetic code's own

PAD = 0
FIRST_RESIDUE = 1 + len(ELEMENTS)  # 119
RESIDUE_MASK = FIRST_RESIDUE + len(RESIDUES)  # 142: a residue to be recovered; still as large as a residue
MASK = RESIDUE_MASK + 1  # 143: an element to be recovered
POINT = MASK + 1  # 144: a point of a continuum field

TOKENS = ("[PAD]", *ELEMENTS, *(f"<{name}>" for name in RESIDUES), "<MASK>", "[MASK]", "[POINT]")
VOCAB_SIZE = len(TOKENS)  # 145

ELEMENT_ID = {symbol: number for number, symbol in enumerate(ELEMENTS, start=1)}
RESIDUE_ID = {name: FIRST_RESIDUE + index for index, name in enumerate(RESIDUES)}

DOMAINS = ("molecule", "crystal", "surface", "complex", "protein", "field")
DOMAIN_ID = {name: index for index, name in enumerate(DOMAINS)}

ROLES = ("unspecified", "protein", "ligand", "slab", "adsorbate", "solvent", "framework")
ROLE_ID = {name: index for index, name in enumerate(ROLES)}

RESIDUE_SCALE = 2.0  # a residue is a larger thing than an atom: its distances count half


_RADII = (  # pm, Cordero et al. 2008 (doi:10.1039/b801115j), low spin; the last one for what comes after Cm
    "31 28 128 96 84 76 71 66 57 58 166 141 121 111 107 105 102 106 203 176 170 160 153 139 139 132 126 124 132 122 "
    "122 120 119 120 120 116 220 195 190 175 164 154 147 146 142 139 145 144 142 139 139 138 139 140 244 215 207 204 "
    "203 201 199 198 198 196 194 192 192 189 190 187 187 175 170 162 151 144 141 136 136 132 145 146 148 140 150 150 "
    "260 221 215 206 200 196 190 187 180 169"
)


def _covalent_radii() -> list[float]:
    known = [int(radius) / 100 for radius in _RADII.split()]
    elements = known + known[-1:] * (len(ELEMENTS) - len(known))
    return [math.nan, *elements, *[math.nan] * (VOCAB_SIZE - FIRST_RESIDUE)]


COVALENT_RADII = _covalent_radii()  # [V] Å, NaN for what is no element


def node_scale(node_type: Any) -> Any:
    """[N] length scale of each node (array or tensor): an edge ij ends at cutoff * (scale_i + scale_j) / 2."""
    return 1.0 + (RESIDUE_SCALE - 1.0) * ((node_type >= FIRST_RESIDUE) & (node_type < MASK))
