"""Preparations: what makes the insides of a user's kind of modules quantizable, from outside the package."""

import torch
from torch import nn

from lightning_calibtip import Operand, QuantizationModule, quantize, register_layer
from lightning_calibtip.network.preparations import Preparation, register_preparation

CPU = {"trainer_options": {"accelerator": "cpu"}}


class Entry(nn.Module):
    def forward(self, x):
        return x


class Cosine(nn.Module):
    """Computes something that no module of its own reads."""

    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        entry = self._modules.get("entry")
        return torch.cos((x if entry is None else entry(x)) + self.phase)


register_layer(Entry, None, [Operand()], part=True)


class CosinePreparation(Preparation):
    """Gives modules their entry where running shows that they run."""

    def settle(self, model, run):
        ran = []
        hooks = [
            module.register_forward_hook(lambda module, args, output: ran.append(module))
            for module in model.modules()
            if type(module) is Cosine
        ]
        run()
        for hook in hooks:
            hook.remove()
        for module in ran:
            module.add_module("entry", Entry())

    def restore(self, model, layers):
        for name, module in model.named_modules():
            if type(module) is Cosine and f"{name}.entry" in layers:
                module.add_module("entry", Entry())

    def possible_names(self, model):
        return [f"{name}.entry" for name, module in model.named_modules() if type(module) is Cosine]

    def float_part(self, module):
        return "its phase stays float" if type(module) is Cosine and "entry" in module._modules else ""


register_preparation(CosinePreparation())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Cosine(), nn.Linear(4, 2)).eval()


def test_a_users_preparation_is_found_named_and_restored_from_a_checkpoint(generator, tmp_path):
    batch = torch.randn(16, 4, generator=generator)
    run = quantize(net(), [batch], pipeline="calibrate", overrides={"1.entry": (None, 4)}, **CPU)
    layer = run.module.network.layers["1.entry"]
    assert layer.config.bit_widths.activation == 4
    assert {each.name: each.reason for each in run.module.network.plan.modules}["1"] == "its phase stays float"
    run.save(tmp_path / "quantized.ckpt")
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "quantized.ckpt", model=net())
    with torch.no_grad():
        assert torch.equal(loaded(batch), run.module(batch))


def test_a_layer_is_known_by_the_full_name_of_its_class(generator):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    name = f"{Doubled.__module__}.{Doubled.__qualname__}"
    register_layer(name, operands=[Operand(), Operand()])
    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 2))
    run = quantize(model, [torch.randn(4, 4, generator=generator)], pipeline="calibrate", **CPU)
    # Its own registration, before that of the class that it is derived from.
    assert "fewer operands" in run.module.network.float_layers["0"]
