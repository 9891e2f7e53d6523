"""The DeepSpeed side of training: start-up without its traps, the JSON's blanks filled, weights averaged.

The same code runs under `deepspeed`, `torchrun` and plain `python`, which is a group of one process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from moiety.errors import InputError
from moiety.training.config import OptimizerConfig, TrainingConfig
from moiety.training.fragments import master_weights

STALE = 600  # s without a change in the folder of a build
REPOSITORY = Path(__file__).parents[3]
REMOVED_KEYS = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
)
REMOVED_ZERO_KEYS = ("mics_hierarchical_params_gather", "mics_shard_size", "zeropp_loco_param")
OWNED_KEYS = {
    "optimizer": "optimizer",
    "scheduler": "optimizer",
    "bf16": "training.precision",
    "fp16": "training.precision",
}


def start_distributed() -> tuple[int, int]:
    """Joins the launcher's processes, or makes a group of one. Returns rank and world size; may be called again."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no search, no warning
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # On a CPU, DeepSpeed would compile this collective at every first start (most of a minute; a killed build leaves a
    # lock on which later starts hang without a word). gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    alone = "RANK" not in os.environ
    if alone:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = None
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(
            max(1, len(os.sched_getaffinity(0)) // on_this_machine)
        )  # else every rank takes all cores
    if alone:  # without a port, which another process might take in the moment between its choice and its use
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, device_id=device)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    # DeepSpeed calls these thousands of times
    warnings.filterwarnings("ignore", message=".*_tensor. is deprecated", category=FutureWarning)
    if os.environ["LOCAL_RANK"] == "0":
        cure_stale_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions")))
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def start_engine(model: nn.Module, optimizer: OptimizerConfig, training: TrainingConfig, micro_batches: int) -> Any:
    """The DeepSpeed engine for a model.

    Args:
        model: any module.
        optimizer: of AdamW, see `adamw`.
        training: `ds` names the DeepSpeed JSON.
        micro_batches: per optimizer step, over all ranks.

    Raises:
        InputError: `micro_batches` that the ranks cannot share, a DeepSpeed JSON with leftover or unknown parts, ZeRO-3
            with conservative forces.
    """
    import deepspeed

    _, world = start_distributed()
    if micro_batches % world:
        raise InputError(
            f"data.micro_batches={micro_batches} cannot be shared by {world} processes; "
            f"set data.micro_batches={-(-micro_batches // world) * world}"
        )
    settings = load_ds_config(training.ds, optimizer, training, micro_batches // world)
    refuse_zero3_forces(model, settings, training.ds)
    refuse_to_compile(model, settings, training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about CUDA features, on machines without CUDA
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model, optimizer), config=settings)
    return engine


def adamw(model: nn.Module, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over what requires a gradient: matrices decay, biases, norms and other vectors do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, fused=True)


def optimizer_bytes(engine: Any) -> int:
    """Bytes of the moments that the optimizer of this process keeps; offloaded ones count."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(value.numel() * value.element_size() for value in moments if value.dim())


def refuse_disagreement(what: str, facts: Any, device: torch.device) -> None:
    """InputError where the ranks do not all see the same; every process calls it."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
    own = torch.tensor(list(digest), dtype=torch.int64, device=device)
    least, most = own.clone(), own.clone()
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    if not torch.equal(least, most):
        raise InputError(f"the {what} that the ranks see differ; do all machines mount the same files?")


def refuse_zero3_forces(model: nn.Module, settings: dict[str, Any], name: str) -> None:
    """InputError where forces are derivatives taken inside the forward pass, and ZeRO-3 would shard the weights."""
    if settings.get("zero_optimization", {}).get("stage") == 3 and getattr(model, "energy", None) is not None:
        raise InputError(
            f"training.ds={name}: the forces of a head of kind energy are derivatives taken inside the forward pass; "
            "their own backward needs every weight again after ZeRO-3 has let go of it. Use zero2, or a head of direct "
            "forces (kind: vector)"
        )


def refuse_to_compile(model: nn.Module, settings: dict[str, Any], training: TrainingConfig) -> None:
    """InputError where `training.compile` meets what it cannot be combined with."""
    if not training.compile:
        return
    if settings.get("zero_optimization", {}).get("stage") == 3:
        raise InputError(
            f"training.compile=true with training.ds={training.ds}: ZeRO-3 fetches weights in hooks that a compiled "
            "block does not run. Use zero2, or leave one of the two out"
        )
    if training.checkpoint_activations and getattr(model, "energy", None) is not None:
        raise InputError(
            "training.compile=true with training.checkpoint_activations=true: forces are written out as one graph, in "
            "which the compiler chooses what is computed again. Leave checkpoint_activations out"
        )


def find_ds_config(name: str) -> Path:
    """The JSON that `training.ds` means: a path, or a name in launch/ds of the working directory or the repository."""
    candidates = [Path(name), *(root / "launch/ds" / f"{name}.json" for root in (Path.cwd(), REPOSITORY))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for root in (Path.cwd(), REPOSITORY) for path in (root / "launch/ds").glob("*.json"))
    raise InputError(f"training.ds={name}: no such file, and launch/ds has {', '.join(dict.fromkeys(known)) or 'none'}")


def load_ds_config(
    name: str, optimizer: OptimizerConfig, training: TrainingConfig, accumulation: int
) -> dict[str, Any]:
    """A DeepSpeed JSON with every "auto" filled from the recipe.

    Raises:
        InputError: not JSON; an "auto" that nothing fills; a key that DeepSpeed removed, or that the recipe owns.
    """
    path = find_ds_config(name)
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    for key in settings:
        if key in REMOVED_KEYS:
            raise InputError(f"{path}: {key!r} was removed from DeepSpeed and would be ignored; delete it")
        if key in OWNED_KEYS:
            raise InputError(f"{path}: {key!r} belongs to the recipe; set {OWNED_KEYS[key]} there and delete it here")
    zero_settings = settings.get("zero_optimization", {})
    for key in REMOVED_ZERO_KEYS:
        if key in zero_settings:
            raise InputError(f"{path}: 'zero_optimization.{key}' was removed from DeepSpeed; delete it")
    for key in ("offload_optimizer", "offload_param"):
        if zero_settings.get(key, {}).get("device") == "nvme":
            raise InputError(f"{path}: zero_optimization.{key} to nvme: checkpoints do not reach it; use cpu")
    zero = zero_settings.get("stage", 0) in (1, 2, 3)
    fillings = {
        "train_micro_batch_size_per_gpu": 1,  # a micro-batch is counted in nodes and edges, not in structures
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.grad_clip if zero else 0.0,  # without ZeRO, apply_step clips
        "torch_autocast.enabled": training.precision == "bf16",
    }
    return _fill(settings, fillings, path, "")


def _fill(node: dict[str, Any], fillings: dict[str, Any], path: Path, prefix: str) -> dict[str, Any]:
    filled = {}
    for key, value in node.items():
        if isinstance(value, dict):
            value = _fill(value, fillings, path, f"{prefix}{key}.")
        elif value == "auto":
            if prefix + key not in fillings:
                raise InputError(f'{path}: {prefix}{key} is "auto"; only {", ".join(fillings)} are filled in')
            value = fillings[prefix + key]
        filled[key] = value
    return filled


def set_lr(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def apply_step(engine: Any, grad_clip: float) -> tuple[bool, float]:
    """Ends a micro-batch, and after the last one of a step updates the weights.

    Gradients that are not finite are never applied. They are summed over the ranks first, so every rank decides the
    same: ZeRO 1-3 look at the norm (and clip it) themselves; without ZeRO this function does.

    Returns:
        whether the weights were updated, and the norm of the gradient (meaningful after the last micro-batch).
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return False, 0.0
    if engine.zero_optimization_stage() > 0:
        engine.step()
        return engine.was_step_applied(), float(engine.get_global_grad_norm())
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    finite = bool(torch.isfinite(norm))
    if finite and grad_clip:
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    if not finite:
        engine.module.zero_grad(set_to_none=True)  # AdamW leaves parameters without a gradient alone
    engine.step()
    return finite, float(norm)


class WeightAverage:
    """Exponential moving average of the fp32 weights, held as each rank's own partition under ZeRO.

    The decay grows from 0 as (1 + t) / (10 + t), so early averages forget the initial weights.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        self.means = [master.detach().clone() for master in master_weights(engine)] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, master in zip(self.means, master_weights(self._engine), strict=True):
            mean.lerp_(master, 1 - decay)


def cure_stale_locks(cache: Path) -> None:
    """Removes the locks of killed compilations, on which the next ones would wait forever and in silence.

    A lock is stale when nobody on this machine works in its folder and nothing there has changed for ten minutes, so
    that no other machine does either.
    """
    locks = list(cache.glob("**/lock"))
    if not locks:
        return
    busy = {process.info["cwd"] for process in psutil.process_iter(["cwd"])}
    for lock in locks:
        quiet = time.time() - max(path.stat().st_mtime for path in lock.parent.iterdir())
        if str(lock.parent) in busy or quiet < STALE:
            hint = "a build is going on; if none is, delete it, or builds of this extension wait for it"
            print(f"{lock}: {hint}", file=sys.stderr)
        else:
            lock.unlink(missing_ok=True)
            print(f"{lock}: left by a build that was killed {quiet / 3600:.1f} h ago; removed", file=sys.stderr)
