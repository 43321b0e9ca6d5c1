"""What the recorder writes down while a model runs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_calibtip.network.observe import observe, record


class Echo(nn.Module):
    def forward(self, *args, **kwargs):
        return args


class Passing(nn.Module):
    """Gives what ``arguments`` makes of the input to a module."""

    def __init__(self, arguments):
        super().__init__()
        self.echo, self.arguments = Echo(), arguments

    def forward(self, x):
        args, kwargs = self.arguments(x)
        return self.echo(*args, **kwargs)


def call_of_echo(arguments, x):
    model = Passing(arguments)
    structure = record(model, lambda: model(x))
    outer, inner = structure.calls
    assert (outer.name, inner.name) == ("", "echo") and outer.outermost and not inner.outermost
    return outer, inner


def test_operands_are_the_floating_point_arguments_in_the_order_in_which_they_are_passed():
    outer, inner = call_of_echo(lambda x: ((torch.arange(3), x), {"mask": x > 0, "late": x * 2}), torch.randn(3))
    assert len(inner.reads) == 4
    assert inner.operands == (inner.reads[1], inner.reads[3]) and inner.operands[0] == outer.operands[0]


def test_nested_arguments_are_read_but_are_no_operands():
    _, inner = call_of_echo(lambda x: (([x, x], x * 2), {}), torch.randn(3))
    assert len(inner.reads) == 3 and inner.operands == (inner.reads[2],)


def test_a_tensor_without_a_storage_of_its_own_keeps_its_place_among_the_operands():
    _, inner = call_of_echo(lambda x: ((x.to_sparse(), x), {}), torch.eye(3))
    assert inner.operands == (None, *inner.reads)


def test_versions_tell_apart_what_was_changed_in_place_and_views_what_was_sliced():
    class Versions(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Echo(), Echo()

        def forward(self, x):
            x = x * 1
            self.first(x, x[1:], x.view(3, 1), x)
            x.mul_(2)
            self.second(x)

    model = Versions()
    structure = record(model, lambda: model(torch.randn(3)))
    whole, sliced, reshaped, again = structure.calls_of["first"][0].reads
    changed = structure.calls_of["second"][0].reads[0]
    assert whole == again
    assert len({value.storage for value in (whole, sliced, reshaped, changed)}) == 1
    assert len({whole, sliced, reshaped, changed}) == 4
    assert (changed.view, changed.version) == (whole.view, whole.version + 1)


def test_memory_that_is_freed_and_used_again_is_another_value():
    class Frees(nn.Module):
        def __init__(self):
            super().__init__()
            self.echo = Echo()

        def forward(self, x):
            for _ in range(20):
                self.echo(x + 1)

    model = Frees()
    structure = record(model, lambda: model(torch.randn(1000)))
    assert len({call.reads[0].storage for call in structure.calls_of["echo"]}) == 20


def test_every_operator_knows_the_modules_it_ran_in():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    structure = record(model, lambda: F.softmax(model(torch.randn(1, 2)), -1))
    names = {o.name: [structure.calls[index].name for index in o.scope] for o in structure.operators}
    assert names["addmm"] == ["", "0", "0.0"] and names["relu"] == ["", "0", "0.1"] and names["softmax"] == []
    for call in structure.calls:
        inside = structure.operators[call.start : call.stop]
        assert [o for o in structure.operators if call.index in o.scope] == inside


def test_recording_leaves_no_hook_behind_even_where_the_run_fails():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError):
        record(model, lambda: model(torch.randn(1, 3)))
    record(model, lambda: model(torch.randn(1, 2)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_recording_changes_neither_mode_nor_gradients():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    output = []
    record(model, lambda: output.append(model(torch.randn(1, 2))))
    assert model.training and not output[0].requires_grad and model[0].weight.requires_grad


def test_observing_a_model_also_tells_its_batch_norms_that_fold_from_those_that_do_not():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2)).eval()
    structure = observe(model, lambda: model(torch.randn(2, 1, 5, 5)))
    assert [(fold.layer, fold.normalization) for fold in structure.folds] == [("0", "1")]
    assert structure.unfolded_norms == {"3": "no convolution or linear layer right before it"}
    assert isinstance(model[1], nn.BatchNorm2d)
