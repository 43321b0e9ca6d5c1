import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_calibtip.calibration.activation_store import ActivationStore
from lightning_calibtip.calibration.placeholders import Placeholders, holds_placeholder
from lightning_calibtip.calibration.recording import Recording
from lightning_calibtip.calibration.replay import NotReachedError, Replay
from lightning_calibtip.network.layer_types import layer_type_of
from lightning_calibtip.network.observe import record
from tests.conftest import TinyResNet
from tests.networks import calibration_set


@pytest.fixture(autouse=True, params=[1, 10**9], ids=["placeholders", "zeros"])
def smallest_placeholder(request, monkeypatch):
    monkeypatch.setattr("lightning_calibtip.calibration.placeholders._SMALLEST_BYTES", request.param)
    return request.param


class UNet(nn.Module):
    """Skip connections across blocks; keyword and tuple arguments; in-place activations."""

    class Stage(nn.Module):
        def __init__(self, channels_in, channels):
            super().__init__()
            self.conv = nn.Conv2d(channels_in, channels, 3, padding=1)

        def forward(self, pair, *, scale):
            x, mask = pair
            return F.relu_(self.conv(x)) * scale, mask

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = self.Stage(1, 4), self.Stage(4, 4)
        self.up1, self.up2 = self.Stage(8, 4), self.Stage(5, 4)

    def forward(self, x):
        mask = torch.ones_like(x)
        a, mask = self.down1((x, mask), scale=2.0)
        b, mask = self.down2((F.max_pool2d(a, 2), mask), scale=1.0)
        up = F.interpolate(b, scale_factor=2)
        c, mask = self.up1((torch.cat([a, up], 1), mask), scale=0.5)
        return self.up2((torch.cat([c, x], 1), mask), scale=1.0)[0]


class SideEffect(nn.Module):
    """A block that hands a value on behind the return value's back: it must not be skipped as a whole."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            self.memory = torch.tanh(self.fc(x))
            return self.memory * 2

    def __init__(self):
        super().__init__()
        self.encoder, self.middle, self.last = self.Encoder(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.middle(self.encoder(x))
        return self.last(y + self.encoder.memory)


class InPlace(nn.Module):
    """Changes a finished layer's output in place in every pass, long after that layer is done."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        x = self.a(x).add_(1)
        return self.d(self.c(self.b(x)) + x)


class Shared(nn.Module):
    """One layer used at three places."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            x = torch.tanh(self.shared(x))
        return self.last(x)


def everything_each_unit_saw(model, calibration, names):
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, kwargs, name=name: seen[name].append(
                torch.utils._pytree.tree_leaves((args, kwargs))[0].clone()
            ),
            with_kwargs=True,
        )
        for name in names
    ]
    with torch.no_grad():
        for index in range(len(calibration)):
            calibration.run(index)
    for handle in handles:
        handle.remove()
    return seen


def finish_all(replay, model, names):
    """Capture and finish one unit after the other, as reconstruction does; returns each unit's inputs."""
    seen = {}
    for name in names:
        inputs, outputs = replay.record(name, keep_inputs=True)
        seen[name] = [torch.utils._pytree.tree_leaves(call)[0] for call in inputs]
        inputs.forget()
        replay.finish(name, outputs)
    return seen


@pytest.mark.parametrize(
    "model,shape",
    [
        (UNet(), (3, 1, 8, 8)),
        (SideEffect(), (3, 4)),
        (Shared(), (3, 4)),
        (InPlace(), (3, 4)),
        (TinyResNet(), (3, 1, 8, 8)),
    ],
    ids=["unet", "side effect", "shared layer", "in place", "resnet"],
)
def test_replayed_inputs_equal_those_of_full_passes(model, shape):
    torch.manual_seed(0)
    model.eval()
    calibration = calibration_set(model, torch.randn(shape), torch.randn(shape))
    structure = record(model, lambda: calibration.run(0))
    names = [n for n in structure.calls_of if layer_type_of(model.get_submodule(n))]
    wanted = everything_each_unit_saw(model, calibration, names)
    seen = finish_all(Replay(model, structure, calibration, names), model, names)
    for name in names:
        assert len(seen[name]) == len(wanted[name])
        for ours, theirs in zip(seen[name], wanted[name], strict=True):
            assert torch.equal(ours, theirs), name


def test_each_layer_computes_a_constant_number_of_times_whatever_the_depth(monkeypatch):
    counts = {}
    for blocks in (2, 8):
        model = TinyResNet(blocks=blocks).eval()
        calibration = calibration_set(model, torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8))
        structure = record(model, lambda calibration=calibration: calibration.run(0))
        names = [n for n in structure.calls_of if layer_type_of(model.get_submodule(n))]
        replay = Replay(model, structure, calibration, names)
        calls = []
        convolve = nn.Conv2d._conv_forward

        def counting(self, *args, calls=calls, convolve=convolve):
            calls.append(self)
            return convolve(self, *args)

        monkeypatch.setattr(nn.Conv2d, "_conv_forward", counting)
        finish_all(replay, model, names)
        monkeypatch.undo()
        counts[blocks] = len(calls) / (len(calibration) * (1 + 2 * blocks))
    assert counts[2] == counts[8] == 1.0


def test_only_what_is_still_needed_is_kept():
    model = TinyResNet(blocks=12).eval()
    calibration = calibration_set(model, torch.randn(2, 1, 8, 8))
    structure = record(model, lambda: calibration.run(0))
    names = [n for n in structure.calls_of if layer_type_of(model.get_submodule(n))]
    replay = Replay(model, structure, calibration, names)
    one = 2 * 6 * 8 * 8 * 4
    for name in names[:-1]:
        finish_all(replay, model, [name])
        assert one <= replay.store.in_memory <= 4 * one, name
    # What was held at most: two outputs across a block, the one in work and a block's own.
    assert replay.store.most_held <= 5 * one


def test_model_is_as_before_after_a_capture():
    model = Shared().eval()
    calibration = calibration_set(model, torch.randn(3, 4))
    structure = record(model, lambda: calibration.run(0))
    wanted = calibration.run(0)
    replay = Replay(model, structure, calibration, ["first", "shared", "last"])
    list(replay.outputs("first"))
    outputs = replay.recording("first")
    outputs.append(torch.zeros(3, 4))
    replay.finish("first", outputs)
    list(replay.outputs("shared"))
    assert torch.equal(calibration.run(0), wanted)
    assert "forward" not in model.first.__dict__


def test_a_batch_that_does_not_reach_the_unit_is_an_error_that_says_so():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.b(self.a(x)) if x.sum() > 0 else self.a(x)

    model = Sometimes().eval()
    calibration = calibration_set(model, torch.ones(1, 2), -torch.ones(1, 2))
    structure = record(model, lambda: calibration.run(0))
    with pytest.raises(NotReachedError, match="calibration batch 1 calls it 0 times, the first batch 1 times"):
        Replay(model, structure, calibration, ["b"]).record("b")


class Branching(nn.Module):
    """Looks at the values of what is finished, wherever they come from."""

    def __init__(self, look):
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.look = look
        self.looked = 0

    def forward(self, x):
        x = self.first(x)
        if self.look(x) > 1e9:
            return x
        self.looked += 1
        return self.last(self.middle(x).relu())


@pytest.mark.parametrize(
    "look,is_seen", [(lambda x: float(x.sum()), True), (lambda x: x.numpy().sum(), False)], ids=["item", "numpy"]
)
def test_a_model_that_needs_values_gets_them_or_zeros_and_goes_on(smallest_placeholder, look, is_seen, caplog):
    torch.manual_seed(0)
    model = Branching(look).eval()
    calibration = calibration_set(model, torch.randn(3, 4), torch.randn(3, 4))
    structure = record(model, lambda: calibration.run(0))
    names = ["first", "middle", "last"]
    wanted = everything_each_unit_saw(model, calibration, names)
    replay = Replay(model, structure, calibration, names)
    with caplog.at_level("DEBUG"):
        seen = finish_all(replay, model, names)
    for name in names:
        for got, target in zip(seen[name], wanted[name], strict=True):
            torch.testing.assert_close(got, target)
    # What operators look at is kept; of NumPy they know nothing.
    assert ("goes on with zeros" in caplog.text) == (smallest_placeholder == 1 and not is_seen)


class Wide(nn.Module):
    """What lies between finished layers costs nothing any more."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.types = []

        def forward(self, x):
            self.types.append(type(x))
            return torch.relu(x)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.between = self.Counting()

    def forward(self, x):
        for layer in self.layers:
            x = self.between(layer(x))
        return x


def test_what_nothing_depends_on_is_computed_with_placeholders(smallest_placeholder):
    torch.manual_seed(0)
    model = Wide().eval()
    calibration = calibration_set(model, torch.randn(3, 4))
    structure = record(model, lambda: calibration.run(0))
    names = [f"layers.{index}" for index in range(4)]
    wanted = everything_each_unit_saw(model, calibration, names)
    replay = Replay(model, structure, calibration, names)
    model.between.types.clear()
    seen = finish_all(replay, model, names)
    for name in names:
        torch.testing.assert_close(seen[name][0], wanted[name][0])
    # One relu, two, and three before the second, third and fourth layer, of which only the last counts.
    placeholders = [found is not torch.Tensor for found in model.between.types]
    expected = [False, True, False, True, True, False] if smallest_placeholder == 1 else [False] * 6
    assert placeholders == expected


class Caching(nn.Module):
    """Keeps a tensor made for the last shape, and its last output in a buffer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.mask = None
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if self.mask is None or self.mask.shape != x.shape:
                self.mask = x.new_ones(x.shape)
            self.last = x
            x = (x * self.mask).relu()
        return x


def test_a_model_that_keeps_tensors_gets_zeros_and_keeps_no_placeholder(smallest_placeholder, caplog):
    torch.manual_seed(0)
    model = Caching().eval()
    calibration = calibration_set(model, *(torch.randn(samples, 4) for samples in (3, 2, 3)))
    # When the structure is observed, the mask is there already: nothing says that it comes from the first layer.
    calibration.run(0)
    structure = record(model, lambda: calibration.run(0))
    names = [f"layers.{index}" for index in range(3)]
    wanted = everything_each_unit_saw(model, calibration, names)
    calibration.run(1)
    with caplog.at_level("DEBUG"):
        seen = finish_all(Replay(model, structure, calibration, names), model, names)
    for name in names:
        for got, target in zip(seen[name], wanted[name], strict=True):
            torch.testing.assert_close(got, target)
    assert ("Caching keeps mask" in caplog.text) == (smallest_placeholder == 1)
    assert not holds_placeholder([model.mask, model.last])


def test_a_pass_that_is_repeated_stores_the_outputs_of_parents_once(smallest_placeholder):
    """The model branches on a value only in its second batch, behind a parent that is stored meanwhile."""

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x) * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.parent, self.second, self.last = (
                nn.Linear(4, 4),
                Parent(),
                nn.Linear(4, 4),
                nn.Linear(4, 4),
            )

        def forward(self, x):
            shape = x.shape[0]
            x = self.first(x)
            y = self.parent(x)
            if shape == 2 and float(x.sum()) > 1e9:
                return x
            return self.last(self.second(y).relu())

    torch.manual_seed(0)
    model = Model().eval()
    calibration = calibration_set(model, *(torch.randn(samples, 4) for samples in (3, 2, 3)))
    structure = record(model, lambda: calibration.run(0))
    names = ["first", "parent.inner", "second", "last"]
    wanted = everything_each_unit_saw(model, calibration, names)
    seen = finish_all(Replay(model, structure, calibration, names), model, names)
    for name in names:
        for got, target in zip(seen[name], wanted[name], strict=True):
            torch.testing.assert_close(got, target)


def test_placeholders_are_not_recorded(monkeypatch):
    monkeypatch.setattr("lightning_calibtip.calibration.placeholders._SMALLEST_BYTES", 1)
    made = Placeholders().like(torch.Size([10**6, 2]), torch.float32, torch.device("cpu"))
    with pytest.raises(TypeError, match="A placeholder has no values"):
        Recording(ActivationStore(), 1).append(made)
