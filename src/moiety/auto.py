"""Makes transformers' Auto classes know Moiety without importing transformers (seconds) until somebody else does.

`import moiety` stays light: each registration runs right after the transformers module that needs it was loaded, or at
once if it is loaded already. Modules of Moiety that load Auto classes in the middle of their own import are waited for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def _config(auto: Any) -> None:
    from moiety.models.configuration_bridge_moiety import MoietyBridgeConfig
    from moiety.models.configuration_moiety import MoietyConfig

    auto.AutoConfig.register("moiety", MoietyConfig, exist_ok=True)
    auto.AutoConfig.register("moiety_bridge", MoietyBridgeConfig, exist_ok=True)


def _models(auto: Any) -> None:
    from moiety.models.configuration_bridge_moiety import MoietyBridgeConfig
    from moiety.models.configuration_moiety import MoietyConfig
    from moiety.models.modeling_bridge_moiety import MoietyForConditionalGeneration
    from moiety.models.modeling_moiety import MoietyForPreTraining, MoietyModel

    auto.AutoModel.register(MoietyConfig, MoietyModel, exist_ok=True)
    auto.AutoModelForPreTraining.register(MoietyConfig, MoietyForPreTraining, exist_ok=True)
    auto.AutoModelForMultimodalLM.register(MoietyBridgeConfig, MoietyForConditionalGeneration, exist_ok=True)


def _feature_extractor(auto: Any) -> None:
    from moiety.models.configuration_bridge_moiety import MoietyBridgeConfig
    from moiety.models.configuration_moiety import MoietyConfig
    from moiety.models.feature_extraction_moiety import MoietyFeatureExtractor

    for config in (MoietyConfig, MoietyBridgeConfig):
        auto.AutoFeatureExtractor.register(config, MoietyFeatureExtractor, exist_ok=True)


def _processor(auto: Any) -> None:
    from moiety.models.configuration_bridge_moiety import MoietyBridgeConfig
    from moiety.models.configuration_moiety import MoietyConfig
    from moiety.models.processing_bridge_moiety import MoietyBridgeProcessor
    from moiety.models.processing_moiety import MoietyProcessor

    auto.AutoProcessor.register(MoietyConfig, MoietyProcessor, exist_ok=True)
    auto.AutoProcessor.register(MoietyBridgeConfig, MoietyBridgeProcessor, exist_ok=True)


def _pipelines(pipelines: Any) -> None:
    from moiety.inference.pipeline import StructurePropertyPipeline
    from moiety.models.modeling_moiety import MoietyForPrediction

    pipelines.PIPELINE_REGISTRY.register_pipeline(
        "structure-property", pipeline_class=StructurePropertyPipeline, pt_model=(MoietyForPrediction,)
    )


REGISTRATIONS: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": _config,
    "transformers.models.auto.modeling_auto": _models,
    "transformers.models.auto.feature_extraction_auto": _feature_extractor,
    "transformers.models.auto.processing_auto": _processor,
    "transformers.pipelines": _pipelines,
}
LOADING_AUTO = {  # module -> what it has when it is through
    "moiety.models.configuration_bridge_moiety": "MoietyBridgeConfig",
    "moiety.models.modeling_bridge_moiety": "MoietyForConditionalGeneration",
}
_postponed: list[str] = []


class _AfterImport(MetaPathFinder):
    """Runs the registration of a module once that module has been executed, and so has what the registration needs."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTRATIONS and fullname not in LOADING_AUTO:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if fullname in REGISTRATIONS:
                _postponed.append(fullname)
            if all(hasattr(sys.modules[name], own) for name, own in LOADING_AUTO.items() if name in sys.modules):
                while _postponed:
                    name = _postponed.pop(0)
                    REGISTRATIONS[name](sys.modules[name])

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Registers with what is loaded already, and arranges for the rest."""
    for name, registration in REGISTRATIONS.items():
        if name in sys.modules:
            registration(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
