"""Folding layers into stacks, and finding them again."""

# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megajax.transformer.stack import fold_layers, locate


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("aaaa", [["layers"]]),
        ("a", [["layers"]]),
        ("abab", [["layers_0", "layers_1"]]),
        ("abbb", [["layers_0"], ["layers_1"]]),
        ("aabbb", [["layers_0"], ["layers_2"]]),
        ("aabaabaab", [["layers_0", "layers_1", "layers_2"]]),
        ("abcd", [["layers_0"], ["layers_1"], ["layers_2"], ["layers_3"]]),
    ],
)
def test_names(layers: str, names: list[list[str]]) -> None:
    assert [[stack.name for stack in segment.stacks] for segment in fold_layers(layers)] == names


@settings(max_examples=200, deadline=None)
@given(st.text("abc", min_size=1, max_size=24))
def test_every_layer_has_one_place_among_its_equals_in_order_of_execution(layers: str) -> None:
    segments = fold_layers(layers)
    places = [locate(segments, i) for i in range(len(layers))]
    assert len(set(places)) == len(layers)
    kinds: dict[str, set[str]] = {}
    for (name, _), layer in zip(places, layers, strict=True):
        kinds.setdefault(name, set()).add(layer)
    assert all(len(kind) == 1 for kind in kinds.values())
    executed = [
        stack.first + stack.period * repeat
        for segment in segments
        for repeat in range(segment.repeats)
        for stack in segment.stacks
    ]
    assert executed == list(range(len(layers)))
    with pytest.raises(IndexError):
        locate(segments, len(layers))
