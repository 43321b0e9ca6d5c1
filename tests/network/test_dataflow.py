"""Walks over the structure of models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_calibtip.network.dataflow import (
    is_closed,
    layers_feeding_an_add,
    layers_sharing_an_input,
    live_modules,
    output_storages,
    shared_operands,
)
from lightning_calibtip.network.layer_types import quantizable_layers
from lightning_calibtip.network.observe import record


class Net(nn.Module):
    """Some linear layers of 4 features, and a ``forward`` given as a function."""

    def __init__(self, forward, names="abcd"):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def observe(model, x=None):
    model.eval()
    x = torch.randn(2, 4) if x is None else x
    return record(model, lambda: model(x))


def shared(forward, names="abcd"):
    return shared_operands(observe(Net(forward, names)), dict.fromkeys(names, 1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        weights = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1)
        return x + self.out(weights @ self.value(x))


class Joins(nn.Module):
    """Two convolutions meet after a BatchNorm and a ReLU; a sum and a layer meet as well."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right, self.after = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        joined = torch.relu_(self.norm(self.left(x))) + self.right(x)
        return self.last(joined + self.after(joined))


class Product(nn.Module):
    def forward(self, left, right):
        return left * right


# Shared operands.


def test_query_key_and_value_share_their_input():
    structure = observe(Attention(), torch.randn(2, 5, 8))
    operands = dict.fromkeys(["query", "key", "value", "out"], 1)
    assert shared_operands(structure, operands) == [[("query", 0), ("key", 0), ("value", 0)]]
    assert shared_operands(structure, {"query": 1, "key": 0, "out": 1}) == []


def test_the_branches_of_a_residual_fork_share_their_input():
    assert shared(lambda net, x: net.b(net.a(x)) + net.c(x)) == [[("a", 0), ("c", 0)]]


@pytest.mark.parametrize(
    "change",
    [F.relu_, lambda x: x.mul_(2), lambda x: x[:, :2].zero_()],
    ids=["in-place ReLU", "in-place product", "in-place change of a part"],
)
def test_an_input_that_changes_in_place_between_two_layers_is_not_shared(change):
    def forward(net, x):
        x = net.a(x)
        left = net.b(x)
        change(x)
        return left + net.c(x) + net.d(x)

    assert shared(forward) == [[("c", 0), ("d", 0)]]


def test_different_views_of_one_tensor_are_not_shared_and_the_same_view_is():
    def forward(net, x):
        both = torch.cat([x, x + 1], -1)
        return net.a(both[:, :4]) + net.b(both[:, 4:]) + net.c(both[:, 4:])

    assert shared(forward) == [[("b", 0), ("c", 0)]]


def test_equal_values_in_different_tensors_are_not_shared():
    assert shared(lambda net, x: net.a(x) + net.b(x.clone())) == []


def test_layers_that_are_called_twice_share_only_what_is_the_same_at_all_calls():
    def same(net, x):
        y = x + 1
        return net.a(x) + net.b(x) + net.a(y) + net.b(y)

    def other_at_the_second_call(net, x):
        return net.a(x) + net.b(x) + net.a(x + 1) + net.b(x + 1)

    def in_another_order(net, x):
        y = x + 1
        return net.a(x) + net.b(y) + net.a(y) + net.b(x)

    assert shared(same) == [[("a", 0), ("b", 0)]]
    assert shared(other_at_the_second_call) == []
    assert shared(in_another_order) == []


def test_a_layer_called_twice_and_one_called_once_share_nothing():
    assert shared(lambda net, x: net.a(x) + net.b(x) + net.a(x)) == []


def test_keyword_inputs_count_after_positional_ones():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.product, self.other = nn.Linear(4, 4), Product(), Product()

        def forward(self, x):
            y = self.fc(input=x)
            return self.product(right=x, left=y) + self.other(y, right=x)

    structure = observe(Keywords())
    assert shared_operands(structure, {"fc": 1, "product": 2, "other": 2}) == [
        [("fc", 0), ("product", 0), ("other", 1)],
        [("product", 1), ("other", 0)],
    ]
    assert shared_operands(structure, {"fc": 1, "product": 1, "other": 1}) == [[("fc", 0), ("product", 0)]]


def test_integer_tensors_do_not_count():
    class Gather(nn.Module):
        def forward(self, indices, x):
            return x[indices]

    class WithIndices(nn.Module):
        def __init__(self):
            super().__init__()
            self.gather, self.fc = Gather(), nn.Linear(4, 4)

        def forward(self, x):
            return self.gather(torch.tensor([0]), x) + self.fc(x)

    structure = observe(WithIndices())
    assert len(structure.calls_of["gather"][0].reads) == 2
    assert shared_operands(structure, {"gather": 1, "fc": 1}) == [[("gather", 0), ("fc", 0)]]
    assert shared_operands(structure, {"gather": 5, "fc": 5}) == [[("gather", 0), ("fc", 0)]]


def test_a_layer_that_is_given_one_tensor_twice_shares_it_with_itself():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = Product()

        def forward(self, x):
            return self.product(x, x)

    assert shared_operands(observe(Square()), {"product": 2}) == [[("product", 0), ("product", 1)]]


def test_tensors_without_a_storage_of_their_own_are_not_shared():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Product(), Product()

        def forward(self, x):
            sparse = x.to_sparse()
            return self.a(sparse, x).to_dense() + self.b(sparse, x).to_dense()

    assert shared_operands(observe(Sparse()), {"a": 2, "b": 2}) == [[("a", 1), ("b", 1)]]


def test_layers_that_do_not_run_share_nothing():
    assert shared(lambda net, x: net.a(x)) == []


# Layers that belong together.


def test_layers_that_read_one_tensor():
    structure = observe(Attention(), torch.randn(2, 5, 8))
    names = ["query", "key", "value", "out"]
    assert layers_sharing_an_input(structure, names) == [["query", "key", "value"]]
    assert layers_sharing_an_input(structure, ["value", "key", "out"]) == [["value", "key"]]
    assert layers_feeding_an_add(structure, names) == []


def test_one_common_call_is_enough_to_agree_on_an_input():
    structure = observe(Net(lambda net, x: net.a(x) + net.b(x) + net.a(x + 1)))
    assert layers_sharing_an_input(structure, "abcd") == [["a", "b"]]


def test_layers_that_feed_one_add():
    model = Joins()
    structure = observe(model, torch.randn(2, 4, 6, 6))
    names = quantizable_layers(model)
    assert layers_feeding_an_add(structure, names) == [["left", "right"]]
    assert layers_sharing_an_input(structure, names) == [["left", "right"]]


def test_an_identity_shortcut_of_a_sum_makes_no_group(tiny_resnet, images):
    structure = observe(tiny_resnet, images[:2])
    groups = layers_feeding_an_add(structure, quantizable_layers(tiny_resnet))
    # The first block's shortcut is the stem's output, the second's is a sum.
    assert [set(group) for group in groups] == [{"stem", "blocks.0.conv2"}]


def test_an_addition_inside_a_layer_is_its_own_affair():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) + super().forward(x * 2)

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4))
    assert layers_feeding_an_add(observe(model), ["0", "1"]) == []


# What can be stored, and what is still needed.


class Leaks(nn.Module):
    """Leaves something behind that another module reads."""

    def __init__(self):
        super().__init__()
        self.fc, self.kept = nn.Linear(4, 4), None

    def forward(self, x):
        self.kept = x * 2
        return self.fc(x)


class Reads(nn.Module):
    def __init__(self, leaking):
        super().__init__()
        self.leaking = [leaking]

    def forward(self, x):
        return x + self.leaking[0].kept


def test_a_module_that_leaves_something_behind_is_not_closed():
    leaking = Leaks()
    structure = observe(nn.Sequential(leaking, Reads(leaking)))
    assert not is_closed(structure, "0") and is_closed(structure, "0.fc") and is_closed(structure, "1")
    assert is_closed(observe(nn.Sequential(Leaks(), nn.ReLU())), "0")


def test_a_module_that_changes_its_input_or_is_called_again_or_never_is_not_closed():
    structure = observe(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.ReLU()))
    assert [is_closed(structure, name) for name in "012"] == [True, False, True]
    twice = observe(Net(lambda net, x: net.a(net.a(net.b(x)))))
    assert [is_closed(twice, name) for name in "abc"] == [False, True, False]


def test_only_what_something_to_come_depends_on_is_live():
    def forward(net, x):
        x = net.a(x)
        return net.d(net.c(net.b(x)) + x)

    structure = observe(Net(forward))
    assert live_modules(structure, ["a"], ["b"], False) == {"a"}
    assert live_modules(structure, ["a", "b"], ["c"], False) == {"b"}
    assert live_modules(structure, ["a", "b"], ["c", "d"], False) == {"a", "b"}
    assert live_modules(structure, ["a", "b", "c"], ["d"], False) == {"a", "c"}
    assert live_modules(structure, ["a", "b", "c", "d"], [], False) == set()
    assert live_modules(structure, ["a", "b", "c", "d"], [], True) == {"d"}


def test_a_stored_parent_stands_for_everything_inside():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    structure = observe(model)
    assert live_modules(structure, ["0"], ["1"], False) == {"0"}
    assert live_modules(structure, ["0"], ["0.1"], False) == set()


def test_the_output_may_be_what_is_returned_or_what_nothing_reads():
    model = Net(lambda net, x: (net.a(x), net.b(net.a.weight)))
    structure = record(model, lambda: model(torch.randn(2, 4))[0].exp())
    ends = output_storages(structure)
    returned = [value.storage for value in structure.calls_of[""][0].writes]
    assert set(returned) < set(ends) and structure.operators[-1].writes[0].storage in ends
    assert len(ends) == len(set(ends)) == 3
