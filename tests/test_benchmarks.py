"""The comparison with other models: its structures, its protocol and its tables. No peer is needed here."""

from __future__ import annotations

import importlib
import io
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.neighborlist import neighbor_list

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CASES = ["molecules 3", "silicon", "dense 20", "sparse 64"]


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def peers(name: str) -> Any:
    return importlib.import_module(f"peers.{name}")


def speed() -> Any:
    return importlib.import_module("speed")


class Canned:
    """A model whose steps cost what it was told."""

    def __init__(self, *seconds: float | str):
        self.seconds = list(seconds)
        self.asked: list[Any] = []

    def ask(self, request: Any) -> dict[str, Any]:
        self.asked.append(request)
        value = self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return {"error": value} if isinstance(value, str) else {"seconds": value, "nodes": 2, "edges": 2, "peak": 2**30}


@pytest.mark.parametrize("case", CASES)
def test_structures_are_the_same_each_time(case: str):
    systems = peers("systems")
    first, second = (systems.batch_of(systems.structures_of(case)) for _ in range(2))
    for field in fields(first):
        assert torch.equal(getattr(first, field.name), getattr(second, field.name))


@pytest.mark.parametrize("case", CASES)
def test_edges_are_those_that_ase_finds(case: str):
    systems = peers("systems")
    structures = systems.structures_of(case)
    batch = systems.batch_of(structures, torch.float64)
    source, destination = batch.edge_index
    assert (destination.diff() >= 0).all()
    found = torch.cat(
        [batch.edge_index.T, batch.positions[source] + batch.edge_shift - batch.positions[destination]], 1
    )
    expected, start = [], 0
    for atoms in structures:
        i, j, vector = neighbor_list("ijD", atoms, systems.CUTOFF)
        expected.append(np.column_stack([j + start, i + start, vector]))
        start += len(atoms)
    rows = [np.round(table, 6) + 0.0 for table in (found.numpy(), np.concatenate(expected))]
    one, other = (table[np.lexsort(table.T)] for table in rows)
    np.testing.assert_allclose(one, other, atol=2e-6)


def test_dense_boxes_have_organic_density_and_sparse_ones_few_uneven_neighbours():
    systems = peers("systems")
    for kind, least, most in (("dense", 45, 65), ("sparse", 2, 8)):
        batch = systems.batch_of(systems.structures_of(f"{kind} 512"))
        degree = torch.bincount(batch.edge_index[1], minlength=512).double()
        assert 512 / torch.linalg.det(batch.cell[0]) == pytest.approx(systems.DENSITIES[kind])
        assert least < degree.mean() < most
        assert kind == "dense" or degree.std() > 0.3 * degree.mean()


def test_a_case_that_is_none_is_refused():
    with pytest.raises(ValueError, match="dense many"):
        peers("systems").structures_of("dense many")


@pytest.mark.parametrize("name", ["moiety-l1", "moiety-l2", "moiety-l1-global", "moiety-l2-global"])
@pytest.mark.parametrize("wanted", [400_000, 3_000_000])
def test_widths_give_the_wanted_number_of_parameters(name: str, wanted: int):
    models = peers("models")
    assert models.count_parameters(models.build(name, wanted)) == pytest.approx(wanted, rel=0.05)


def test_the_nearest_width_is_found_whatever_the_step():
    def count(width: int) -> int:
        return 7 * width**2 + 300 * width + 1000 + width % 3

    for step in (1, 2, 4, 8):
        width = peers("models").nearest_width(count, 500_000, step)
        best = min(range(step, 1000, step), key=lambda w: abs(count(w) - 500_000))
        assert width == best


def test_a_model_answers_for_every_task_and_outlives_a_bad_request():
    worker = peers("worker")
    requests = [worker.Request("molecules 2", task, warm=1) for task in worker.TASKS]
    requests += [
        worker.Request("molecules 2", "nonsense"),
        worker.Request("dense 20", "direct", want="flops"),
        worker.Request("dense 20", "direct", want="profile"),
        worker.Request("dense 20", "direct", with_global=False, want="flops"),
        worker.Request("dense 20", "direct", bf16=True),
    ]
    answers_file = io.StringIO()
    lines = io.StringIO("".join(json.dumps(asdict(request)) + "\n" for request in requests))
    worker.serve("moiety-l1-global", 400_000, "cpu", lines, answers_file)
    words, *answers = (json.loads(line) for line in answers_file.getvalue().splitlines())
    assert words["parameters"] == pytest.approx(400_000, rel=0.05) and words["versions"]["torch"]
    assert len(answers) == len(requests)
    for answer in answers[:3]:
        assert answer["seconds"] > 0 and answer["peak"] > 2**20 and answer["nodes"] > 10 < answer["edges"]
    assert "nonsense" in answers[3]["error"]
    assert answers[4]["flops"] > answers[6]["flops"] > 0
    assert 0 < sum(row["share"] for row in answers[5]["profile"]) <= 1.001
    assert answers[7]["seconds"] > 0


def test_conservative_steps_reach_the_weights_through_the_forces():
    models, worker, systems = peers("models"), peers("worker"), peers("systems")
    torch.manual_seed(0)
    model = models.build("moiety-l2-global", 400_000)
    batch = systems.batch_of(systems.structures_of("molecules 2"))
    worker.loss_of(model, batch, "conservative", model.vector).backward()
    assert all(block.local_attention.filter.weight.grad.abs().sum() > 0 for block in model.trunk.blocks)
    assert not batch.positions.requires_grad


def test_models_take_turns_and_the_best_step_counts():
    crew = {"a": Canned(3.0, 1.0, 2.0), "b": Canned(4.0, 5.0, 6.0), "slow": Canned(60.0)}
    request = peers("worker").Request("silicon", "energy", warm=1)
    best = peers("crew").in_turns(crew, request, 3)
    assert {name: cost["seconds"] for name, cost in best.items()} == {"a": 1.0, "b": 4.0, "slow": 60.0}
    assert [request.warm for request in crew["a"].asked] == [1, 0, 0]
    assert len(crew["slow"].asked) == 1


def test_a_model_stops_growing_where_it_fails_or_takes_too_long():
    request = peers("worker").Request("silicon", "energy")
    crew = {"good": Canned(1.0), "weak": Canned(1.0, "out of memory"), "slow": Canned(4.0, 50.0)}
    found = peers("crew").growing(crew, dict.fromkeys((10, 20, 40, 80), request), 1, most_seconds=60)
    assert ["seconds" in found[size]["good"] for size in found] == [True] * 4
    assert found[20]["weak"]["error"] == "out of memory" and "failed at 20" in found[40]["weak"]["error"]
    assert "100 s" in found[40]["slow"]["error"] and "100 s" in found[80]["slow"]["error"]
    assert [len(crew[name].asked) for name in crew] == [4, 2, 2]


def test_models_grow_one_after_the_other(monkeypatch):
    script, crews = speed(), []

    class Alone(dict):
        def __init__(self, names, _):
            crews.append(names)
            super().__init__({name: Canned(1.0) for name in names if name != "b"})
            self.lost = {name: {"error": "no memory"} for name in names if name == "b"}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            crews.append("ended")

    monkeypatch.setattr(script, "Crew", Alone)
    request = peers("worker").Request("silicon", "energy")
    found = script.one_by_one(["a", "b"], "boxes", {10: request, 20: request})
    assert crews == [["a"], "ended", ["b"], "ended"]
    for costs in (found[10], found[20]):
        assert costs["a"]["seconds"] == 1.0 and costs["b"] == {"error": "no memory"}


def test_the_table_of_ratios_is_right():
    tables = peers("tables")
    costs = {"torchmd-et": {"seconds": 2.0}, "moiety-l1": {"seconds": 0.9}, "mace": {"error": "no vectors"}}
    (found,) = tables.sheets({"bars": {"cell": {"direct": costs}}, "broken": {"esen": "ImportError: fairchem"}})
    assert found.rows == [["torchmd-et", "1.00"], ["moiety-l1", "0.45"], ["mace", "–"]]
    notes = " ".join(found.notes)
    assert "2.000 s" in notes and "mace: no vectors (cell: direct)" in notes and "esen could not be built" in notes


def test_without_the_reference_there_are_no_ratios():
    (found,) = peers("tables").sheets({"bars": {"cell": {"direct": {"moiety-l1": {"seconds": 0.9}}}}})
    assert found.rows == [["moiety-l1", "–"]] and "torchmd-et was not measured" in found.notes[0]


def example_results() -> dict[str, Any]:
    cost = {"seconds": 0.5, "nodes": 250, "edges": 9, "peak": 3 * 2**30, "rise": 2**29}
    costs = {"torchmd-et": cost, "moiety-l1-global": cost | {"seconds_without": 0.4}, "mace": {"error": "no memory"}}
    return {
        "broken": {},
        "models": {name: {"parameters": 3_000_000} for name in costs},
        "bars": {"cell": {"energy": costs}},
        **{key: {20: costs, 64: costs} for key in ("dense", "sparse", "molecules")},
        "memory": {"energy": costs},
        "global": {128: {"energy": {"moiety-l1-global": costs["moiety-l1-global"]}}},
        "machine": peers("crew").machine({}) | {"load": [0.0, 0.1]},
    }


def test_the_page_is_filled_from_the_results(tmp_path: Path):
    tables, results = peers("tables"), json.loads(json.dumps(example_results()))
    page = tmp_path / "speed.md"
    page.write_text(f"# Speed\n{tables.BEGIN}\nold\n{tables.END}\nthe rest\n")
    tables.fill(page, tables.page(results))
    text = page.read_text()
    assert "old" not in text and text.endswith("the rest\n")
    assert "| torchmd-et | 0.50 | 3.00 |" in text  # memory
    assert "| torchmd-et | 2 | 2 |" in text  # ms an atom
    assert "+25.0%" in text and "3,000,000" in text
    tables.plot(results, tmp_path / "plot.svg")
    assert "moiety-l1-global" in (tmp_path / "plot.svg").read_text()


def test_a_page_without_marks_is_refused_before_anything_is_measured(tmp_path: Path, monkeypatch, capsys):
    page = tmp_path / "speed.md"
    page.write_text("# Speed\n")
    script = speed()
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr(script, "measure", lambda *_: pytest.fail("measured"))
    assert script.main([]) == 2
    assert "speed.md" in capsys.readouterr().err


def test_the_real_page_has_its_marks():
    peers("tables").around_marks(speed().PAGE)


def test_a_broken_model_is_named_and_the_others_are_measured(tmp_path: Path, monkeypatch, capsys):
    crew, script = peers("crew"), speed()
    monkeypatch.setattr(crew, "PEERS_PYTHON", tmp_path / "envs/bin/python")
    monkeypatch.setattr(script, "NUM_PARAMETERS", 400_000)
    monkeypatch.setattr(script, "BARS", {"2 molecules": "molecules 2"})
    out = tmp_path / "speed.json"
    assert script.main(["--quick", "--models", "moiety-l1,torchmd-et", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert "make bench" in results["broken"]["torchmd-et"]
    assert results["bars"]["2 molecules"]["conservative"]["moiety-l1"]["seconds"] > 0
    assert "torchmd-et could not be built" in " ".join(capsys.readouterr().out.split())


def test_a_process_that_dies_is_told(monkeypatch):
    crew = peers("crew")
    monkeypatch.setattr(crew, "PEERS_PYTHON", Path("/bin/false"))
    with crew.Crew(["torchmd-et"], 400_000) as found:
        assert not found and "exit code 1" in found.broken["torchmd-et"]


def test_a_process_that_is_killed_between_steps_is_told():
    crew = peers("crew")
    with crew.Crew(["moiety-l1"], 400_000) as found:
        found["moiety-l1"].process.kill()
        found["moiety-l1"].process.wait()
        answer = found["moiety-l1"].ask(peers("worker").Request("molecules 2", "energy"))
        assert "exit code -9" in answer["error"]


def test_an_unknown_model_is_refused(capsys):
    assert speed().main(["--quick", "--models", "gpt"]) == 2
    assert "'gpt' is not one of torchmd-et" in capsys.readouterr().err


def test_the_global_attention_is_measured_against_the_same_model_without():
    crew = {"moiety-l1": Canned(1.0), "moiety-l1-global": Canned(1.2, 1.0)}
    costs = speed().cost_of_global(crew)[128]["energy"]["moiety-l1-global"]
    asked = [request.with_global for request in crew["moiety-l1-global"].asked]
    assert asked[:4] == [True, False, True, False] and not crew["moiety-l1"].asked
    assert costs["seconds_without"] == 1.0


def test_plain_and_compiled_steps_stand_side_by_side(tmp_path: Path, monkeypatch, capsys):
    compiled = importlib.import_module("compiled")
    seen = []
    monkeypatch.setattr(compiled, "compile_model", seen.append)  # compiling takes a minute
    out = tmp_path / "compiled.json"
    assert compiled.main(["--parameters", "400000", "--cases", "molecules 2", "--out", str(out)]) == 0
    steps = json.loads(out.read_text())["steps"]
    assert set(steps) == {"direct", "conservative"} and len(seen) == 2
    for step in steps.values():
        cost = step["cases"]["molecules 2"]
        assert cost["ratio"] == cost["compiled"] / cost["plain"] > 0
    assert "conservative" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_run_says_so(capsys):
    assert speed().main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("room", [100, 128, 300, 1000])
def test_the_largest_batch_is_found_to_an_eighth(room: int):
    size = peers("gpu").largest(lambda n: n <= room, 128, 2**17)
    assert size == 0 if room < 128 else room * 8 / 9 - 1 <= size <= room


def test_the_gpu_tables_hold_what_was_measured():
    gpu = peers("gpu")

    class Device(Canned):
        def ask(self, request):
            extra = {"rise": 2**29, "flops": 989e9} | {"profile": [{"name": "aten::mm", "calls": 3, "share": 0.5}]}
            fails = request.case.startswith("molecules") and int(request.case.split()[1]) > 200
            return {"error": "out of memory"} if fails else super().ask(request) | extra

    results = gpu.measure({"moiety-l1": Device(0.01)}) | {"device": "NVIDIA H100 80GB HBM3", "broken": {"mace": "x"}}
    results["planned"] = gpu.planned(results["steps"], 400_000)
    text = "\n\n".join(found.markdown() for found in gpu.sheets(results))
    assert "| moiety-l1 | 10.00 |" in text and "mace could not be built" in text
    assert "10.0%" in text  # 989 GFLOP in 10 ms of 989 TFLOP/s
    assert "| moiety-l1 | 192 |" in text and "| aten::mm | 3 | 50.0% |" in text
    assert results["planned"]["moiety-l1"]["planned"] > 0
    assert gpu.utilisation(1.0, 1.0, "a device of tomorrow") is None
