"""The processor: structures in, tensors out. Text comes with the bridge's tokenizer."""

from __future__ import annotations

from typing import Any

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .feature_extraction_moiety import MoietyFeatureExtractor


class MoietyProcessor(ProcessorMixin):
    """`processor([obj, ...])` gives the keyword arguments of a Moiety model's forward.

    Accepts ase.Atoms, rdkit.Mol, pymatgen Structure/Molecule, biotite AtomArray, torch_geometric Data,
    moiety.Structure or a path.
    """

    attributes = ["feature_extractor"]

    def __init__(self, feature_extractor: MoietyFeatureExtractor):
        super().__init__(feature_extractor)

    def __call__(self, structures: Any, **kwargs: Any) -> BatchFeature:
        return self.feature_extractor(structures, **kwargs)


MoietyProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["MoietyProcessor"]
