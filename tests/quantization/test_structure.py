import torch
import torch.nn.functional as F
from torch import nn

from lightning_calibtip.quantization.structure import observe_structure


def observe(model, *inputs):
    model.eval()
    return observe_structure(model, lambda: model(*inputs))


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


def test_blocks_are_the_deepest_modules_in_which_paths_fork_and_join():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.fc(x)

    class AddsTwoInputs(nn.Module):
        """Joins two paths that forked outside: not a block by itself."""

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, skip):
            return self.fc(x) + skip

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), AddsTwoInputs()

        def forward(self, x):
            return self.out(self.fc(x), x)

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Inner(), Outer()), nn.Linear(4, 4))
    assert observe(model, torch.randn(2, 4)).blocks(lambda name: True) == ["1.0", "1.1"]


def test_attention_is_a_block():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))

    model = nn.Sequential(nn.Linear(8, 8), Attention())
    assert observe(model, torch.randn(2, 5, 8)).blocks(lambda name: True) == ["1"]


def test_a_flat_model_is_never_one_block():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.fc(x)

    assert observe(Flat(), torch.randn(2, 4)).blocks(lambda name: True) == []
