"""Products on a sparse pattern say what dense ones say, and so do their first and second derivatives."""

from collections.abc import Callable

import pytest
import torch
from ase.build import molecule
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from moiety.models import blocks_moiety
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.feature_extraction_moiety import MoietyFeatureExtractor
from moiety.models.modeling_moiety import MoietyModel
from moiety.models.processing_moiety import MoietyProcessor
from moiety.models.sparse_moiety import Pattern, SampledProduct, SparseProduct, available

pytestmark = pytest.mark.skipif(not available(torch.device("cpu")), reason="torch has no MKL here")

NUM_NODES, WIDTH, HEADS, FEATURES = 6, 4, 2, 3


@pytest.fixture
def pattern() -> Pattern:
    generator = torch.Generator().manual_seed(0)
    column = torch.randint(0, NUM_NODES, (NUM_NODES * WIDTH,), generator=generator)  # one neighbour may come twice
    assert any(len(row.unique()) < WIDTH for row in column.view(NUM_NODES, WIDTH))
    return Pattern.build(column, WIDTH, HEADS)


def random(*shape: int) -> Tensor:
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))
    ).requires_grad_()


def rows_and_columns(pattern: Pattern) -> tuple[Tensor, Tensor]:
    return torch.arange(NUM_NODES * HEADS).repeat_interleave(WIDTH), pattern.column.long()


def test_the_sparse_product_is_the_dense_one(pattern: Pattern) -> None:
    row, column = rows_and_columns(pattern)
    a, x = random(len(row)), random(NUM_NODES * HEADS, FEATURES)
    dense = torch.zeros_like(x).index_add(0, row, a[:, None] * x[column])
    torch.testing.assert_close(SparseProduct.apply(a, x, pattern), dense)
    across = torch.zeros_like(x).index_add(0, column, a[:, None] * x[row])
    torch.testing.assert_close(SparseProduct.apply(pattern.transpose(a), x, pattern.transposed), across)


def test_the_sampled_product_is_the_dense_one(pattern: Pattern) -> None:
    row, column = rows_and_columns(pattern)
    x, y = random(NUM_NODES * HEADS, FEATURES), random(NUM_NODES * HEADS, FEATURES)
    torch.testing.assert_close(SampledProduct.apply(x, y, pattern), (x[row] * y[column]).sum(-1))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_are_exact(pattern: Pattern, check: Callable[..., bool]) -> None:
    a, x, y = (
        random(len(pattern.column)),
        random(NUM_NODES * HEADS, FEATURES),
        random(NUM_NODES * HEADS, FEATURES).detach().requires_grad_(),
    )
    assert check(lambda a, x: SparseProduct.apply(a, x, pattern), (a, x))
    assert check(lambda x, y: SampledProduct.apply(x, y, pattern), (x, y))


@pytest.mark.parametrize("edges_at_once", [1, 40])  # a row at a time, a few
def test_edges_a_few_at_a_time_say_what_all_together_say(monkeypatch: pytest.MonkeyPatch, edges_at_once: int) -> None:
    torch.manual_seed(0)
    model = MoietyModel(MoietyConfig(hidden_size=16, num_layers=2, num_heads=2, edge_channels=8)).double()
    inputs = MoietyProcessor(MoietyFeatureExtractor())([molecule("CH3CH2OH"), molecule("H2O")])
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    positions = inputs["positions"].requires_grad_()

    def features_and_slope() -> tuple[Tensor, Tensor]:
        features = model(**inputs).node_features
        return features, torch.autograd.grad(features.square().sum(), positions)[0]

    expected = features_and_slope()
    monkeypatch.setattr(blocks_moiety, "EDGES_AT_ONCE", edges_at_once)
    torch.testing.assert_close(features_and_slope(), expected)


@pytest.mark.slow
def test_a_compiled_trunk_says_what_the_plain_one_says() -> None:
    model = MoietyModel(MoietyConfig(hidden_size=16, num_layers=2, num_heads=2, edge_channels=8)).eval()
    inputs = MoietyProcessor(MoietyFeatureExtractor())([molecule("CH3CH2OH")])
    plain = model(**inputs).node_features
    torch.testing.assert_close(torch.compile(model)(**inputs).node_features, plain, rtol=1e-4, atol=1e-5)
