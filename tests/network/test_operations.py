import copy
import inspect
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from lightning_calibtip import quantize
from lightning_calibtip.network import routing
from lightning_calibtip.network.operations import Addition, find_operations
from lightning_calibtip.network.routing import Routes, not_routed, route
from tests.networks import calibrated_network, calibration_set


def found(model, *batch):
    return list(find_operations(model.eval(), lambda: model(*batch)).operations)


def route_operations(model, names):
    route(model, Routes(tuple(names)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return x + self.conv(x)


class Net(nn.Module):
    """Sums in a block that runs twice, in a helper, in place, and of things that are no activations."""

    def __init__(self):
        super().__init__()
        self.block, self.pool = Block(), nn.AdaptiveAvgPool2d(1)
        self.offset, self.fc = nn.Parameter(torch.randn(1, 2, 1, 1)), nn.Linear(2, 3)

    def helper(self, x):
        return torch.add(x, torch.relu(x))

    def forward(self, x):
        x = self.block(self.block(x)) + self.offset
        out = self.helper(x) + 1.0
        out += x
        return self.fc(self.pool(out).flatten(1)) + self.fc(out.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(3, 2, 4, 4)


def test_sums_and_pools_of_activations_are_found_where_they_are_computed(net, x):
    assert found(net, x) == [
        "block.addition_0", "addition_0", "addition_1", "pool.average_pool_0", "average_pool_0", "addition_2"
    ]  # fmt: skip
    assert not [module for module in net.modules() if isinstance(module, Addition)]


def test_the_number_of_samples_does_not_change_what_is_found(net):
    assert found(net, torch.randn(1, 2, 4, 4)) == found(net, torch.randn(5, 2, 4, 4))


def test_routed_operations_run_in_their_modules_and_change_nothing(net, x):
    wanted, names = net(x), found(net, x)
    route_operations(net, names)
    seen = []
    for name in names:
        net.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: seen.append(name))
    assert torch.equal(net(x), wanted)
    assert seen == ["block.addition_0", "block.addition_0", *names[1:]]
    route_operations(net, names[:1])
    assert torch.equal(net(x), wanted) and not hasattr(net, "addition_0")
    assert not any(name.startswith("addition") for name in dict(net.named_modules()))


def test_a_sum_in_place_that_is_needed_there_stays_there():
    class InPlace(nn.Module):
        def forward(self, x):
            y = x.relu()
            y.add_(x)
            return y + x.abs()

    model = InPlace()
    assert found(model, torch.randn(2, 3)) == ["addition_1"]
    route_operations(model, ["addition_1"])
    x = torch.randn(4, 3)
    assert torch.equal(model(x), x.relu() + x + x.abs())


def test_parts_copies_and_failures_leave_the_routing_in_order(net, x):
    route_operations(net, found(net, x))
    duplicate = copy.deepcopy(net)
    calls = []
    duplicate.block.addition_0.register_forward_hook(lambda m, a, o: calls.append(1))
    duplicate(x)
    assert len(calls) == 2
    # A block alone, as reconstruction calls it.
    assert torch.equal(net.block(x), x + net.block.conv(x))
    with pytest.raises(RuntimeError):
        net(torch.randn(1, 7, 4, 4))
    assert torch.equal(duplicate(x), net(x)) and len(calls) == 4


def test_a_pass_that_is_broken_off_leaves_nothing_behind(net, x):
    class Stop(BaseException):
        pass

    def stop(module, args):
        raise Stop

    route_operations(net, found(net, x))
    handle = net.block.conv.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        net(x)
    handle.remove()
    assert getattr(routing._routing, "mode", None) is None
    a = torch.randn(2, 3, 4, 4)
    net.addition_0.register_forward_hook(lambda m, args, out: out * 0)
    assert torch.equal(a + a, 2 * a)


@pytest.mark.parametrize("pipeline", ["light", "advanced", "sequential", "mixed"])
def test_no_pipeline_leaves_the_routing_at_work(pipeline):
    torch.manual_seed(0)
    options = {
        "adaquant": {"iterations": 3, "batch_size": 8}, "preparation": {"iterations": 2, "batch_size": 8},
        "allocation": {"compression": 0.24, "checks": 2}, "bias_tuning": {"epochs": 1},
    }  # fmt: skip
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), *(ReluBlock(8) for _ in range(2)), nn.Conv2d(8, 4, 1))
    images = torch.randn(32, 2, 8, 8)
    run = quantize(
        model, [images], pipeline=pipeline, options=options, target="onnxruntime",
        trainer_options={"accelerator": "cpu"},
    )  # fmt: skip
    assert getattr(routing._routing, "mode", None) is None
    # Outside the model sums are sums.
    a = 100 * torch.randn(8, 8, 4, 4)
    assert torch.equal(a + a, 2 * a)
    assert "2.addition_0" in run.module.network.layers
    with run.module.quantized(False), torch.no_grad():
        # Nothing is folded here.
        assert torch.equal(run.module.model(images), model(images))


class ReluBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x) + x)


def test_without_a_tensor_to_compare_no_sum_in_place_is_moved():
    @dataclass
    class Output:
        value: torch.Tensor

    class Aliased(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.a, self.wrap = nn.Linear(3, 3), wrap

        def forward(self, x):
            h = torch.relu(self.a(x))
            kept = h
            h.add_(x)
            return self.wrap(kept)

    x = torch.randn(4, 3)
    assert found(Aliased(Output), x) == []
    model = Aliased(lambda value: value).eval()
    # A calibration step that returns nothing.
    assert not find_operations(model, lambda: [model(x)].clear())


def test_positions_depend_on_no_shape():
    class Broadcast(nn.Module):
        def forward(self, x):
            x = x + F.adaptive_avg_pool2d(x, 1)
            return x + x.relu()

    model = Broadcast().eval()
    assert found(model, torch.randn(2, 3, 6, 6)) == found(model, torch.randn(2, 3, 1, 1))


def test_another_number_of_sums_is_told(caplog):
    class Depends(nn.Module):
        def forward(self, x):
            if len(x) > 1:
                x = x + x.abs()
            return x + x.relu()

    model = Depends().eval()
    route_operations(model, found(model, torch.randn(4, 3)))
    for samples in (4, 5, 1, 1):
        model(torch.randn(samples, 3))
    assert caplog.text.count("Depends has computed {'addition': 2} and now computes {'addition': 1}") == 1


def test_forward_called_by_name_is_routed_too(net, x):
    route_operations(net, found(net, x))
    seen = []
    net.addition_0.register_forward_hook(lambda m, a, o: seen.append(1))
    net.forward(x)
    assert seen == [1] and list(inspect.signature(net.forward).parameters) == ["x"]


def test_a_part_of_what_a_layer_reads_counts_once_for_the_observer():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.c = nn.Conv2d(2, 2, 1, stride=2), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.c(self.b(x) + x[:, :, ::2, ::2])

    model = Sliced().eval()
    network = calibrated_network(model, calibration_set(model, torch.randn(4, 2, 6, 6)), target="onnxruntime")
    shared = network.layers["addition_0"].tensors[1]
    updates = []
    shared.observer.update = lambda value: updates.append(value.shape)
    with network.observing():
        model(torch.randn(4, 2, 6, 6))
    assert updates == [(4, 2, 6, 6)]


def test_what_observers_and_quantizers_compute_is_not_the_models(x):
    class Twice(nn.Module):
        def forward(self, x):
            return (x + x.abs()) + x.relu()

    model = Twice()
    route_operations(model, found(model, x))

    def observer(module, args):
        with not_routed():
            _ = args[0] + args[0]

    model.addition_0.register_forward_pre_hook(observer)
    model.register_forward_pre_hook(observer)
    seen = []
    model.addition_1.register_forward_hook(lambda m, a, o: seen.append(a[1]))
    model(x)
    assert torch.equal(seen[0], x.relu())


def test_operations_inside_layers_are_the_layers_own():
    class Residual(nn.Linear):
        def forward(self, x):
            return x + super().forward(x)

    assert found(nn.Sequential(Residual(3, 3)), torch.randn(2, 3)) == []


def test_both_operands_of_a_sum_are_on_their_grids_and_a_skip_reads_the_next_layers_quantizer():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(2, 2, 1) for _ in range(3))

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.c(F.relu(self.b(x) + x))

    torch.manual_seed(0)
    model, x = Skip().eval(), torch.randn(64, 2, 4, 4)
    network = calibrated_network(
        model, calibration_set(model, x), target="onnxruntime", weight_bits=8, activation_bits=8
    )
    layer = network.layers["addition_0"]
    assert [tensor.name for tensor in layer.tensors] == ["addition_0 input", "b input"]
    assert layer.input_quantizers[1] is network.layers["b"].input_quantizers[0]
    assert "addition_0" not in network.searchable_layers
    seen = []
    model.addition_0.register_forward_hook(lambda m, args, out: seen.extend([*args, out]))
    model(x)
    for value, quantizer in zip(seen, layer.input_quantizers, strict=False):
        assert torch.equal(quantizer.fake_quantize(value), value)
    # The last convolution's output has a quantizer: nothing reads it.
    assert [name for name, layer in network.layers.items() if layer.output_quantizer is not None] == ["c"]
    assert len(model(x).unique()) <= 256


def test_sums_that_something_reads_in_float_stay_float():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            x = self.a(x) + x
            return self.b(self.norm(x)) + x

    model = Mixed().eval()
    network = calibrated_network(model, calibration_set(model, torch.randn(16, 4)), target="onnxruntime")
    assert list(network.layers) == ["a", "b"]
    assert not any(isinstance(module, Addition) for module in model.modules())


@pytest.mark.parametrize("pattern, bits", [("1.addition_0", 5), ("*addition_*", 5), ("1*", 8)])
def test_overrides_reach_operations_by_their_names_only(pattern, bits):
    model = nn.Sequential(nn.Conv2d(2, 2, 1), Block(), nn.Conv2d(2, 2, 1)).eval()
    calibration = calibration_set(model, torch.randn(8, 2, 4, 4))
    network = calibrated_network(model, calibration, target="onnxruntime", overrides={pattern: 5})
    assert [spec.bits for spec in network.layers["1.addition_0"].config.inputs] == [bits, bits]


def test_what_a_frozen_batch_norm_adds_is_its_own(x):
    net = nn.Sequential(nn.Conv2d(2, 2, 3), FrozenBatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    assert found(net, x) == []
    network = calibrated_network(net, calibration_set(net, x), target="onnxruntime")
    assert [fold.normalization for fold in network.plan.folds] == ["1"] and set(network.layers) == {"0", "3"}
