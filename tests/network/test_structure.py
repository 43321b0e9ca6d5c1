"""Facts about a model that its record answers by itself."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_calibtip.network.observe import record
from lightning_calibtip.network.structure import Operator, is_fused_attention


def observe(model, *inputs):
    model.eval()
    return record(model, lambda: model(*inputs))


def test_execution_order_is_that_of_running_not_of_registration():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.first(x))

    order = list(observe(Reversed(), torch.ones(1, 3)).calls_of)
    assert order.index("first") < order.index("last")


def test_activation_after_a_layer_is_found_as_module_as_function_and_in_place():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
            self.act = nn.ReLU6()

        def forward(self, x):
            x = self.act(self.a(x))
            x = F.leaky_relu(self.b(x), 0.3)
            x = F.relu_(self.c(x))
            return torch.sigmoid(self.d(x)) * 2

    structure = observe(Net(), torch.randn(2, 4))
    x = torch.linspace(-9, 9, 7)
    wanted = {
        "a": F.relu6(x),
        "b": F.leaky_relu(x, 0.3),
        "c": F.relu(x),
        "d": torch.sigmoid(x),
    }
    for name, value in wanted.items():
        before = x.clone()
        torch.testing.assert_close(structure.activation_after(name)(x), value)
        assert torch.equal(x, before), "the activation must not change its input"


def test_no_activation_is_reported_where_something_else_reads_the_output_too():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.a(x)
            x = x * torch.sigmoid(x)
            return F.relu(self.b(x)), self.b.weight

    structure = observe(Gate(), torch.randn(2, 4))
    assert structure.activation_after("a") is None
    assert structure.activation_after("b") is not None


def test_no_activation_is_reported_for_an_output_that_the_model_returns_or_that_different_functions_follow():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.returned, self.twice = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.returned(x)
            return y, F.relu(y), F.relu(self.twice(x)), torch.tanh(self.twice(x))

    structure = observe(Net(), torch.randn(2, 4))
    assert structure.activation_after("returned") is None
    assert structure.activation_after("twice") is None
    assert structure.activation_after("no such module") is None


def test_parameters_are_fixed_and_inputs_and_results_are_not():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return torch.tanh(x * self.shift)

    structure = observe(Shift(), torch.randn(2, 4))
    product = next(operator for operator in structure.operators if operator.name == "mul")
    assert [structure.is_fixed(value) for value in product.reads] == [False, True]
    assert not any(structure.is_fixed(value) for value in product.writes)


def test_fused_attention_is_known_by_its_operator():
    q = torch.randn(1, 2, 5, 8)

    class Attention(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    assert [o.name for o in observe(Attention(), q).operators if is_fused_attention(o)]
    assert not is_fused_attention(Operator("bmm", (), (), (), None))
