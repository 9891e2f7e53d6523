"""msgpack as GEOM packs it: a stream of mappings, name of the molecule -> its facts and a list of conformers.

Options: `conformers`, the field that holds the list (each conformer becomes a record, with the facts of its molecule);
`most`, how many of them. Rows [Z, x, y, z] of a field `xyz` become its `elements` and `positions`. Extension types are
refused, lengths are bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import IO, Any, NoReturn

from moiety.errors import InputError

MAX_BUFFER = 1 << 30  # bytes of one mapping: GEOM packs 1,000 molecules in one
MAX_ITEMS = 1 << 22


def records(stream: IO[bytes], options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Streams the molecules, or their conformers. The name of the molecule is the field `name`."""
    import msgpack

    unpacker = msgpack.Unpacker(
        stream, raw=False, strict_map_key=False, ext_hook=_refuse, max_buffer_size=MAX_BUFFER,
        max_str_len=1 << 24, max_bin_len=1 << 24, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS, max_ext_len=0,
    )  # fmt: skip
    try:
        for batch in unpacker:
            if not isinstance(batch, dict):
                raise InputError(f"msgpack: a {type(batch).__name__} where molecules by name are expected")
            for name, facts in batch.items():
                yield from _conformers(str(name), facts, options)
    except (msgpack.UnpackException, msgpack.BufferFull, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"msgpack: cannot be read ({type(error).__name__}: {error}); copy the file again") from None


def _conformers(name: str, facts: Any, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(facts, dict):
        raise InputError(f"msgpack: {name} holds a {type(facts).__name__}, not the facts of a molecule")
    if "conformers" not in options:
        yield name, {"name": name, **facts}
        return
    shared = {key: value for key, value in facts.items() if key != options["conformers"]}
    conformers = facts.get(options["conformers"], [])
    if not isinstance(conformers, list):
        raise InputError(f"msgpack: {name} has a {type(conformers).__name__} for conformers; copy the file again")
    for index, conformer in enumerate(conformers[: options.get("most")]):
        if not isinstance(conformer, dict):
            raise InputError(f"msgpack: {name} has a {type(conformer).__name__} for a conformer; copy the file again")
        rows = conformer.get("xyz")
        if isinstance(rows, list) and rows and all(len(row) == 4 for row in rows):
            conformer = conformer | {"xyz": {"elements": [r[0] for r in rows], "positions": [r[1:] for r in rows]}}
        yield f"{name}/{index}", {"name": name, **shared, **conformer}


def _refuse(code: int, _: bytes) -> NoReturn:
    raise InputError(f"msgpack: an extension type (number {code}); none is known, none is run")
