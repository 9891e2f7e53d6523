"""Many questions at once: what the model says to rows of text about structures, and how sure it is."""
# Shapes: R rows, T tokens, P properties, S structures, D channels.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moiety.bridge.dialogue import Asking, Dialogue, packed
from moiety.bridge.rows import Row
from moiety.data.structure import Structure
from moiety.tokens.batch import with_neighbors

Array = np.ndarray
TOGETHER = 64  # rows, or structures
MOST_TOKENS = 16  # of a short answer


@dataclass(frozen=True)
class Said:
    """An answer to a row: the words, their probability, and numbers [P] with their sigmas where one was to be said."""

    answer: str
    confidence: float
    values: Array | None = None
    sigmas: Array | None = None


@torch.no_grad()
def answers(model: Any, asking: Asking, structures: Sequence[Structure], rows: Sequence[Row]) -> list[Said]:
    """The most likely words after each question; numbers in their own units. Rows name places in `structures`."""
    order = sorted(range(len(rows)), key=lambda number: sum(structures[p].num_nodes for p in rows[number].read))
    said: dict[int, Said] = {}
    for start in range(0, len(order), TOGETHER):
        chosen = order[start : start + TOGETHER]
        batch = dialogue_of([rows[number] for number in chosen], structures, asking, model.config.cutoff)
        for number, one in zip(chosen, _said(model, asking, batch, [rows[n] for n in chosen]), strict=True):
            said[number] = one
    return [said[number] for number in range(len(rows))]


def dialogue_of(rows: Sequence[Row], structures: Sequence[Structure], asking: Asking, cutoff: float) -> Dialogue:
    """A batch of these rows, with the structures alone that they read."""
    places = sorted({place for row in rows for place in (*row.read, row.about)})
    own = {place: number for number, place in enumerate(places)}
    moved = [replace(row, about=own[row.about], read=tuple(own[place] for place in row.read), right=-1) for row in rows]
    batch = asking.dialogue([structures[place] for place in places], moved)
    return with_neighbors(batch, cutoff)  # type: ignore[return-value]


def _said(model: Any, asking: Asking, batch: Dialogue, rows: Sequence[Row]) -> Iterator[Said]:
    tokenizer = asking.tokenizer
    prompts, mask = prompts_of(batch, tokenizer.pad_token_id)
    inputs = batch.inputs() | {"input_ids": prompts, "attention_mask": mask}
    del inputs["logits_to_keep"]
    made = model.generate(
        **inputs, max_new_tokens=MOST_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    words_RT = made.sequences[:, prompts.shape[1] :]
    logits = torch.stack(made.logits, dim=1).float() / model.calibration.temperature
    logs_RT = logits.log_softmax(-1).gather(2, words_RT.unsqueeze(-1)).squeeze(-1)
    ends_RT = (words_RT == tokenizer.eos_token_id).cumsum(1)
    logs_R = torch.where((ends_RT == 0) | ((ends_RT == 1) & (words_RT == tokenizer.eos_token_id)), logs_RT, 0.0).sum(1)
    about = batch.targets["about"].tolist()
    numbers = in_units(model, model(**batch.inputs())) if any(row.number for row in rows) else ()
    for number, text in enumerate(tokenizer.batch_decode(words_RT, skip_special_tokens=False)):
        answer = text.split(tokenizer.eos_token)[0].strip()
        own = [found[about[number]] for found in numbers] if rows[number].number else []
        yield Said(answer, math.exp(float(logs_R[number])), *own)


def prompts_of(batch: Dialogue, pad: int) -> tuple[Tensor, Tensor]:
    """The rows without their answers, padded on the left: [R,T] tokens and mask."""
    assert batch.input_ids is not None and batch.attention_mask is not None
    lengths = (batch.targets["answer"] >= 0).sum(1).tolist()
    rows = [
        ids[mask.bool()][: int(mask.sum()) - length]
        for ids, mask, length in zip(batch.input_ids, batch.attention_mask, lengths, strict=True)
    ]
    longest = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :], mask[number, longest - len(row) :] = row, 1
    return ids, mask


def in_units(model: Any, output: Any) -> tuple[Array, Array]:
    """[S,P] values and calibrated sigmas that heads say of the structures of an output, in units."""
    scales = list(model.config.numbers.values())
    mean, std = (np.array([scale[key] for scale in scales]) for key in ("mean", "std"))
    sigmas = output.number_log_sigmas.exp() * model.calibration.sigma_scale
    return mean + std * output.number_values.numpy(), std * sigmas.numpy()


@torch.no_grad()
def readings(model: Any, structures: Sequence[Structure]) -> Iterator[tuple[Array, Any]]:
    """For some structures at a time: their places, and what the model makes of them where they stand alone."""
    order = np.argsort([structure.num_nodes for structure in structures], kind="stable")
    for start in range(0, len(order), TOGETHER):
        places = order[start : start + TOGETHER]
        batch = with_neighbors(packed([structures[place] for place in places]), model.config.cutoff)
        yield places, model(**batch.inputs())
