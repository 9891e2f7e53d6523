"""The engine's promises in short; `moiety selfcheck --full` and tests/campaigns try them harder."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from moiety.testing.reliability import faults, machines, sameness
from moiety.testing.reliability.selfcheck import FULL, QUICK
from moiety.testing.reliability.workspace import Row, Workspace

CHECKS = [getattr(check, "func", check) for check in FULL] + [faults.file_system_full]
CAMPAIGNS = sorted((Path(__file__).parent / "campaigns").glob("*.py"))


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("reliability"))


def holds(row: Row) -> None:
    assert row.ok, f"{row.promise}: {row.figure}"


def test_a_run_that_is_killed_at_any_time_loses_nothing(space: Workspace):
    holds(faults.killed(space, kills=2))


def test_a_disk_that_is_full_loses_nothing(space: Workspace):
    holds(faults.disk_full(space, offsets=1))


def test_a_flipped_byte_anywhere_is_refused(space: Workspace):
    holds(faults.flipped_bytes(space, each=10))


@pytest.mark.slow
def test_every_signal_stops_a_run(space: Workspace):
    holds(faults.asked_to_stop(space))


def test_what_is_not_finite_is_skipped_on_all_ranks(space: Workspace):
    holds(faults.not_finite(space, stages=(2,)))


def test_a_damaged_shard_is_left_out(space: Workspace):
    holds(faults.damaged_shard(space))


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(space: Workspace):
    holds(faults.hung(space))


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_no_rank_outlives_its_launcher(space: Workspace, launcher: str):
    holds(faults.orphaned(space, launcher))


def test_a_run_resumed_twice_is_the_same_run(space: Workspace):
    holds(sameness.resumed_twice(space, steps=20))


def test_a_run_walks_over_processes_and_zero_stages(space: Workspace):
    holds(sameness.world_walk(space, steps=9, path=((1, "0"), (2, "3_offload"), (1, "2_offload"))))


def test_two_ranks_at_any_zero_stage_are_one_process(space: Workspace):
    holds(sameness.parity(space, steps=10, stages=("1",)))


def test_workers_prepare_the_same_micro_batches(space: Workspace):
    holds(sameness.prepared_ahead(space, steps=10))


def test_two_ranks_are_plain_ddp(space: Workspace):
    holds(sameness.plain_ddp(space, steps=10))


def test_two_ranks_with_exact_forces_are_one_process(space: Workspace):
    holds(sameness.conservative_parity(space, steps=6, stages=("1",)))


@pytest.mark.slow
def test_how_a_step_is_cut_does_not_matter(space: Workspace):
    holds(sameness.accumulation(space, steps=20))
    holds(sameness.activation_checkpointing(space, steps=20))
    holds(sameness.same_structures(space, steps=20))


def test_every_structure_comes_once_an_epoch(space: Workspace):
    holds(sameness.exactly_once(space))


@pytest.mark.slow
def test_bfloat16_stays_close(space: Workspace):
    holds(sameness.bfloat16(space, steps=20))


@pytest.mark.slow
def test_two_nodes_train_stop_and_go_on(space: Workspace):
    holds(machines.two_nodes(space, steps=20))


def test_the_full_check_tries_all_that_the_quick_one_does():
    def names(checks: list[object]) -> set[str]:
        return {getattr(check, "func", check).__name__ for check in checks}

    assert names([*QUICK]) < names([*FULL])


@pytest.mark.parametrize("path", CAMPAIGNS, ids=lambda path: path.stem)
def test_a_campaign_tries_one_promise(path: Path):
    script = runpy.run_path(str(path))
    assert "minute" in script["__doc__"] and f"python tests/campaigns/{path.name}" in script["__doc__"]
    assert any(getattr(script.get(check.__name__), "__module__", "") == check.__module__ for check in CHECKS)
