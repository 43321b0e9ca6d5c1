"""Folding a copy of a model, and seeing to it that proving folds changes nothing."""

import copy

import torch

from lightning_calibtip.network.folding import apply_fold, prove_folds
from lightning_calibtip.network.observe import record
from lightning_calibtip.network.tying import bake_parametrizations, find_ties, own_parameter
from tests.conftest import randomize_batch_norms


def fold(model, *inputs):
    """Fold a copy; returns it, the folds as pairs, and what was left with the reason."""
    model.eval()
    randomize_batch_norms(model, torch.Generator().manual_seed(1))
    folded = copy.deepcopy(model)
    folds, left = proved(folded, *inputs)
    layers = {fold.layer: folded.get_submodule(fold.layer) for fold in folds}
    ties = find_ties(folded, layers)
    for name, layer in layers.items():
        bake_parametrizations(layer)
        for parameter in ties.copies.get(name, ()):
            own_parameter(layer, parameter)
    for pair in folds:
        apply_fold(folded, pair)
    with torch.no_grad():
        for got, wanted in zip(_tuple(folded(*inputs)), _tuple(model(*inputs)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    return folded, [(f.layer, f.normalization) for f in folds], left


def proved(model, *inputs):
    """Prove folds and see to it that the model has not changed in any way."""
    before = state_of(model)
    folds, left = prove_folds(model, record(model, lambda: model(*inputs)), lambda: model(*inputs))
    after = state_of(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key], key
    return folds, left


def state_of(model):
    """Classes, hooks and tensors by identity, and all values."""
    state = {f"value {name}": value.clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        state[f"class {name}"] = (id(module), type(module))
        state[f"hooks {name}"] = (list(module._forward_pre_hooks), list(module._forward_hooks))
        state[f"children {name}"] = {key: id(child) for key, child in module._modules.items()}
        state[f"parameters {name}"] = {key: (id(p), getattr(p, "_version", 0)) for key, p in module._parameters.items()}
    return state


def _tuple(output):
    return output if isinstance(output, tuple) else (output,)
