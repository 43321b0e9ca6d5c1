import functools
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_calibtip.files.digest import UnrecognizableError, digest

OFFSET = 1.0


def helper(x):
    return x + OFFSET


def names_a_global(x):
    return helper(x)


def make(factor, exponent=2):
    def loss(output, batch, scale=1.0):
        return factor * scale * output.square().sum()

    return loss


@dataclass
class Weighted:
    weight: float

    def __call__(self, output, batch):
        return self.weight * output.sum()


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Graph:
    """Like a batch of PyTorch Geometric: its text tells shapes, not values."""

    def __init__(self, x):
        self.x = x
        self.lock = threading.Lock()

    def __repr__(self):
        return f"Graph(x={list(self.x.shape)})"

    def to_dict(self):
        return {"x": self.x}


def net(seed, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 2), nn.Dropout(dropout))


class Node:
    def __init__(self, value):
        self.value, self.itself = value, self


@pytest.mark.parametrize("one, same, other", [
    (lambda: make(2.0), lambda: make(2.0), lambda: make(3.0)),
    (lambda: make(torch.ones(2)), lambda: make(torch.ones(2)), lambda: make(torch.zeros(2))),
    (lambda: functools.partial(make(2.0), scale=1.0), lambda: functools.partial(make(2.0), scale=1.0),
     lambda: functools.partial(make(2.0), scale=2.0)),
    (lambda: Weighted(1.0), lambda: Weighted(1.0), lambda: Weighted(2.0)),
    (lambda: Weighted(1.0).__call__, lambda: Weighted(1.0).__call__, lambda: Weighted(2.0).__call__),
    (lambda: Slotted([1]), lambda: Slotted([1]), lambda: Slotted([2])),
    (lambda: nn.CrossEntropyLoss(), lambda: nn.CrossEntropyLoss(), lambda: nn.CrossEntropyLoss(label_smoothing=0.1)),
    (lambda: net(0), lambda: net(0), lambda: net(1)),
    (lambda: net(0), lambda: net(0), lambda: net(0, 0.5)),
    (lambda: Graph(torch.ones(2)), lambda: Graph(torch.ones(2)), lambda: Graph(torch.zeros(2))),
    (lambda: np.ones(2), lambda: np.ones(2), lambda: np.zeros(2)),
    (lambda: {"a": [1, (2, None)]}, lambda: {"a": [1, (2, None)]}, lambda: {"a": [1, (3, None)]}),
    (lambda: {"a", "b", "c"}, lambda: {"c", "b", "a"}, lambda: {"a", "b"}),
    (lambda: (lambda x: x + 1), lambda: (lambda x: x + 1), lambda: (lambda x: x + 2)),
    (lambda: Node(1), lambda: Node(1), lambda: Node(2)),
    (lambda: torch.ones(2), lambda: torch.ones(2), lambda: torch.ones(2, dtype=torch.float64)),
    (lambda: torch.eye(2).to_sparse(), lambda: torch.eye(2).to_sparse(), lambda: (2 * torch.eye(2)).to_sparse()),
])  # fmt: skip
def test_alike_is_alike_and_different_is_different(one, same, other):
    assert digest([one()]) == digest([same()]) != digest([other()])


def test_what_a_function_names_counts(monkeypatch):
    before = digest([names_a_global])
    monkeypatch.setattr(f"{__name__}.OFFSET", 2.0)
    assert digest([names_a_global]) != before


@pytest.mark.parametrize("value, what", [
    (threading.Lock(), "lock"), ((n for n in "ab"), "generator"), (make(threading.Lock()), "lock"),
    (iter([1]), "iterator"),
])  # fmt: skip
def test_what_has_no_content_is_refused(value, what):
    with pytest.raises(UnrecognizableError, match=f"a .*{what} cannot be recognised"):
        digest([value])


_values = st.recursive(
    st.one_of(st.integers(0, 30), st.text("ab1", max_size=3), st.none()), lambda inner: st.lists(inner, max_size=3)
)


@given(_values, _values)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_different_values_have_different_digests(one, other):
    assert (digest([one]) == digest([other])) == (repr(one) == repr(other))


@pytest.mark.parametrize("one, other", [
    ([1, 23], [12, 3]), ([[1], 2], [[1, 2]]), ([{"a": 1}, "b"], [{"a": 1, "b": 2}]), (["ab", "c"], ["a", "bc"]),
])  # fmt: skip
def test_values_do_not_run_into_each_other(one, other):
    assert digest(one) != digest(other)


def test_what_is_odd_is_read_or_refused():
    class NeedsMore:
        def to_dict(self, path):
            raise AssertionError

    assert digest([NeedsMore()]) == digest([NeedsMore()])
    objects = [np.array([1, "a", None], dtype=object) for _ in range(2)]
    assert digest(objects[:1]) == digest(objects[1:])
    conjugate = torch.ones(2, dtype=torch.complex64).conj()
    assert digest([conjugate]) == digest([conjugate.resolve_conj()])
    with pytest.raises(UnrecognizableError, match="has no content to read"):
        digest([torch.empty(2, device="meta")])
