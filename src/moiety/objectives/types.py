"""Masked types: name the elements and residues that were hidden, from the noised geometry around them.

The answer must not leak: hydrogens of a hidden atom, whose number tells the element, are taken away with it; the
CB of a residue node is the idealised one of its backbone for every residue type.

Of a chain any share may be hidden, up to all of it: its backbone alone says something of every residue. So the same
weights fill one gap in a sequence, and design a whole one (inverse folding, in any order of decoding).
"""
# Shapes: B structures, N nodes, V vocabulary.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moiety.models.vocabulary_moiety import FIRST_RESIDUE, MASK, RESIDUE_MASK
from moiety.objectives.base import Objective, sum_by_structure
from moiety.tokens.batch import Batch

HYDROGEN_BOND_LENGTH = 1.35  # Å: longest bond of a hydrogen to the atom that carries it, with room for B-H and Si-H


@dataclass(frozen=True)
class MaskedTypesConfig:
    share: float = 0.12  # of the heavy atoms; of a chain's residues between this and 1, drawn for each chain
    weight: float = 0.1


class MaskedTypes(Objective):
    """Hides some heavy atoms and residues; cross-entropy (nats) of the type head on them."""

    name = "types"
    config: MaskedTypesConfig

    def corrupt(self, batch: Batch, rng: torch.Generator) -> Batch:
        types = batch.node_type
        is_residue, share = types >= FIRST_RESIDUE, self.config.share
        of_chain_B = share + (1 - share) * torch.rand(batch.num_structures, generator=rng)
        share_N = torch.where(is_residue, of_chain_B[batch.graph_index], share)
        hidden = (torch.rand(len(types), generator=rng) < share_N) & (types > 1) & (types < RESIDUE_MASK)
        # one element alone in its crystal says nothing about itself: keep at least one atom of every structure
        visible_B = torch.zeros(batch.num_structures, dtype=torch.bool).index_fill(
            0, batch.graph_index[~hidden & (types > 1)], True
        )
        hidden &= is_residue | visible_B[batch.graph_index]
        mask_token = torch.where(is_residue, RESIDUE_MASK, MASK)
        target = torch.where(hidden, types, -1)
        spoiled = batch.replace(
            node_type=torch.where(hidden, mask_token, types), node_targets=batch.node_targets | {"types": target}
        )
        return spoiled.select_nodes(~self._hydrogens_of(hidden, batch))

    def scored(self, batch: Batch) -> Tensor:
        return sum_by_structure((batch.node_targets["types"] >= 0).to(batch.positions), batch)

    def loss_sum(self, output: Any, batch: Batch) -> Tensor:
        target = batch.node_targets["types"]
        # every node enters the graph, the unscored ones with factor zero: the same graph on every rank
        loss_N = F.cross_entropy(output.type_logits, target.clamp(min=0), reduction="none") * (target >= 0)
        return sum_by_structure(loss_N, batch)

    def trivial_loss(self, node_type: Tensor) -> float:
        """Entropy of the sample's own distribution of heavy atoms and residues, nats."""
        counts = torch.bincount(node_type[(node_type > 1) & (node_type < RESIDUE_MASK)]).double()
        share = counts[counts > 0] / counts.sum()
        return float(-(share * share.log()).sum())

    @staticmethod
    def _hydrogens_of(hidden: Tensor, batch: Batch) -> Tensor:
        """[N] bool: hydrogens whose nearest atom of the same structure is hidden; none across a cell wall."""
        hydrogen = (batch.node_type == 1).nonzero().squeeze(1)
        heavy = ((batch.node_type > 1) & (batch.node_type < FIRST_RESIDUE)).nonzero().squeeze(1)
        dropped = torch.zeros_like(hidden)
        if len(hydrogen) and len(heavy):
            # structures moved far apart, so that one distance table serves the batch
            apart = batch.positions.double() + 1e3 * batch.graph_index[:, None].double()
            distance, nearest = torch.cdist(apart[hydrogen], apart[heavy]).min(dim=1)
            dropped[hydrogen] = (distance < HYDROGEN_BOND_LENGTH) & hidden[heavy[nearest]]
        return dropped
