"""English prose: the definitions and examples of WordNet, and the paragraphs of the Debian Reference."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from moiety.data.download import Archive
from moiety.data.splits import SPLITS, even_share, shuffled, split_of
from moiety.data.texts import Text

HANDBOOK = "usr/share/debian-reference/debian-reference.en.txt.gz"
PARTS = ("definitions", "paragraphs")
KINDS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
HELD_OUT = 0.01, 0.01  # for val and test
MARKER = re.compile(r"\((a|p|ip)\)$")  # of an adjective's place in a sentence
SENTENCE = re.compile(r"[A-Z].*[a-z].*[.?!:]$")
SHORTEST = 80  # letters of a paragraph


def parts(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[str]:
    """Definitions and paragraphs."""
    return list(PARTS)


def texts(archives: Mapping[str, Archive], options: Mapping[str, int], part: str) -> Iterator[Text]:
    """Yields the texts of a part in a hashed order, `options[split]` of both parts together where there are so many."""
    found = dict(
        _definitions(archives["wordnet-base"]) if part == PARTS[0] else _paragraphs(archives["debian-reference-en"])
    )
    names = list(found)
    share = even_share(options, PARTS.index(part), len(PARTS))
    left = {split: share.get(split, 0) if share else len(names) for split in SPLITS}
    for index in shuffled(names, salt="english"):
        text = found[names[index]]
        split = split_of(text, "english", *HELD_OUT)
        if left[split] > 0:
            left[split] -= 1
            yield Text(names[index], part.removesuffix("s"), text, "", split)


def _definitions(archive: Archive) -> Iterator[tuple[str, str]]:
    """(id, "words (noun): what they mean; examples") of every set of synonyms."""
    for name, stream in archive.members():
        kind = KINDS[PurePosixPath(name).suffix[1:]]
        for line in stream.read().decode().splitlines():
            if line.startswith("  "):  # the licence
                continue
            data, _, gloss = line.partition(" | ")
            offset, _, _, number, *rest = data.split(" ")
            words = [MARKER.sub("", word).replace("_", " ") for word in rest[: 2 * int(number, 16) : 2]]
            yield f"wordnet:{kind}:{offset}", f"{', '.join(words)} ({kind}): {gloss.strip()}"


def _paragraphs(archive: Archive) -> Iterator[tuple[str, str]]:
    """(id, text) of every block of lines that reads as sentences."""
    blocks = gzip.decompress(archive.read(HANDBOOK)).decode().split("\n\n")
    for number, block in enumerate(blocks):
        text = " ".join(block.split())
        if len(text) >= SHORTEST and SENTENCE.match(text):
            yield f"debian-reference:{number}", text
