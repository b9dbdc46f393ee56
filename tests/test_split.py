from __future__ import annotations

from collections import OrderedDict
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from piecework.models import mlp
from piecework.split import _balanced, split
from piecework.training import BadInput


def _network() -> nn.Sequential:
    return nn.Sequential(OrderedDict(scaling=nn.Identity(), network=mlp(5, [24, 3, 7], 2, seed=3)))


def _sizes(blocks: nn.Sequential) -> list[int]:
    return [len(block) for block in blocks]


@pytest.mark.parametrize("into", [1, 2, 3, 4])
def test_the_blocks_in_a_row_are_the_model(into: int) -> None:
    model = _network()
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    blocks = split(model, into=into)
    assert len(blocks) == into
    assert all(isinstance(block, nn.Sequential) for block in blocks)
    assert torch.equal(blocks(x), model(x))


def test_a_place_may_be_the_name_of_a_module_or_of_a_sequence() -> None:
    model = nn.Sequential(OrderedDict(scaling=nn.Identity(), network=mlp(5, [24], 2), last=nn.Linear(2, 2)))
    assert _sizes(split(model, at=["network", "network.2", "last"])) == [1, 2, 1, 1]
    whole = nn.Sequential(nn.Linear(5, 5), nn.Bilinear(5, 5, 2), nn.ModuleList([nn.Linear(2, 2)]))
    with pytest.raises(
        BadInput, match=r"2\.0 is inside 2 \(ModuleList\), which is one module; cut before or behind it"
    ):
        split(whole, at=["2.0"])


def test_the_blocks_share_the_models_parameters() -> None:
    model = _network()
    own = [id(parameter) for parameter in model.parameters()]
    assert [id(parameter) for parameter in split(model, into=3).parameters()] == own


def test_nested_sequences_are_opened_and_cut_where_asked() -> None:
    # Identity, Linear, ReLU, Linear, ReLU, Linear, ReLU, Linear
    assert _sizes(split(_network(), at=[3, 5])) == [3, 2, 3]
    assert _sizes(split(_network(), at=[])) == [8]


def test_every_block_begins_with_parameters_and_the_scaling_goes_with_the_first() -> None:
    blocks = split(_network(), into=4)
    assert [type(block[0]) for block in blocks] == [nn.Identity, nn.Linear, nn.Linear, nn.Linear]
    assert _sizes(blocks) == [3, 2, 2, 1]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.data())
def test_the_largest_block_is_as_small_as_any_cut_makes_it(costs: list[int], data: st.DataObject) -> None:
    places = [number for number, cost in enumerate(costs) if cost]
    if not places:
        return
    into = data.draw(st.integers(1, len(places)))

    def largest(starts: list[int]) -> int:
        ends = [*starts[1:], len(costs)]
        return max(sum(costs[start:end]) for start, end in zip(starts, ends, strict=True))

    brute = min(largest([0, *cuts]) for cuts in combinations(places[1:], into - 1))
    assert largest(_balanced(costs, into)) == brute


def test_an_example_weighs_convolutions_by_their_multiplications() -> None:
    # 4*3*9 = 108 weights at 24*24 places against 4*24*24*5 = 11,520 weights at one: by parameters the linear layer is
    # far the largest, by multiplications the first convolution is.
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 24 * 24, 5)
    )
    assert _sizes(split(model, into=2)) == [5, 1]
    modes = [module.training for module in model.modules()]
    assert _sizes(split(model, into=2, example=torch.zeros(1, 3, 24, 24))) == [2, 4]
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_a_module_that_is_more_than_its_children_stays_whole() -> None:
    class Skip(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    model = nn.Sequential(nn.Linear(5, 5), Skip(nn.Linear(5, 5), nn.ReLU()), nn.Linear(5, 3))
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    blocks = split(model, into=3)
    assert _sizes(blocks) == [1, 1, 1]
    assert torch.equal(blocks(x), model(x))


def test_a_module_used_twice_keeps_both_places() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(5, 5), relu, nn.Linear(5, 3), relu)
    assert _sizes(split(model, into=2)) == [2, 2]


def test_tied_weights_are_not_torn_apart() -> None:
    one, other = nn.Linear(5, 5), nn.Linear(5, 5)
    other.weight = one.weight
    with pytest.raises(BadInput, match=r"blocks 0 and 1 share a parameter of shape \(5, 5\)"):
        split(nn.Sequential(one, nn.ReLU(), other), into=2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "either at=, the places to cut, or into="),
        ({"at": [2], "into": 2}, "either at=, the places to cut, or into="),
        ({"into": 0}, "has 4 modules with parameters, so it can be cut into 1 to 4 blocks, got 0"),
        ({"into": 5}, "cut into 1 to 4 blocks, got 5"),
        ({"at": [3, 3]}, "rising positions from 1 to 7"),
        ({"at": [8]}, "rising positions from 1 to 7"),
        ({"at": [-1]}, "rising positions from 1 to 7"),
        ({"at": [2.0]}, "at= takes whole numbers"),
        ({"at": ["network.8"]}, "no module 'network.8' to cut before; there are scaling, network.0"),
        ({"at": ["network.4", "network.2"]}, "rising positions from 1 to 7"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_a_sentence(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        split(_network(), **arguments)  # type: ignore[arg-type]


def test_a_model_that_is_no_sequence_is_refused() -> None:
    with pytest.raises(BadInput, match=r"split cuts an nn\.Sequential, got Linear"):
        split(nn.Linear(3, 3), into=1)
