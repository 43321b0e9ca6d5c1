"""The user's model: what is refused of it, and how it is copied."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .lightning_types import is_a, overrides

_COMPILED = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def check_model(model: Any) -> nn.Module:
    """Refuse what is no trained module in eager mode; of a compiled one, give the module that was compiled.

    Args:
        model: What the user has given.

    Returns:
        The model.

    Raises:
        TypeError: If it is a class, no module, or a TorchScript module.
        ValueError: If it has no layers yet, or parameters without values.

    Example:
        >>> check_model(nn.Linear)
        Traceback (most recent call last):
        ...
        TypeError: The model must be an instance, got the class Linear: pass Linear(...) with its trained weights.
    """
    if isinstance(model, type):
        name = model.__name__
        load = f", or {name}.load_from_checkpoint(path)" if hasattr(model, "load_from_checkpoint") else ""
        raise TypeError(
            f"The model must be an instance, got the class {name}: pass {name}(...) with its trained weights{load}."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model must be a torch.nn.Module or a LightningModule, got {type(model).__name__}.")
    model = getattr(model, "_orig_mod", model)
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{name} is a TorchScript module, whose layers cannot be given quantizers: quantize the module that it was "
            "made from, and script or export the result."
        )
    if (
        is_a(model, "LightningModule")
        and overrides(model, "configure_model")
        and next(model.parameters(), None) is None
    ):
        raise ValueError(
            f"{name} has no parameters yet: it makes its layers in configure_model(), so call model.configure_model() "
            "and load its weights first."
        )
    for what, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(parameter):
            raise ValueError(f"{what} of {name} is not initialized yet: run the model on one batch first.")
        if parameter.device.type == "meta":
            raise ValueError(
                f"{what} of {name} is on the meta device and has no values: call model.to_empty(device=...) and load "
                "its weights first."
            )
    return model


def require_quantized_module(module: Any, what: str) -> None:
    """Refuse a model that was not quantized.

    Args:
        module: What the user has given for a QuantizationModule.
        what: Name of the function, for the message.

    Raises:
        TypeError: If it is something else.

    Example:
        >>> require_quantized_module(nn.Linear(2, 2), "export_onnx")
        Traceback (most recent call last):
        ...
        TypeError: export_onnx takes a QuantizationModule, got a Linear: quantize it first, and give run.module.
    """
    if not hasattr(module, "network"):
        raise TypeError(
            f"{what} takes a QuantizationModule, got a {type(module).__name__}: quantize it first, and give run.module."
        )


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside, a module has no traces of ``torch.compile``, whose functions would still run the original's code."""
    kept = []
    for module in model.modules():
        own, marks = module.__dict__, ["_compiled_call_impl", "_compiler_ctx"]
        # Lightning has put compiled functions in the places of these methods.
        methods = _COMPILED if own.get("_compiler_ctx") is not None else ()
        values = {name: own[name] for name in (*marks, *methods) if own.get(name) is not None}
        kept.append((own, values))
        for name in values:
            if name in marks:
                own[name] = None
            else:
                del own[name]
    try:
        yield
    finally:
        for own, values in kept:
            own.update(values)


def copy_of(model: nn.Module) -> nn.Module:
    """Deep copy without the Trainer that a LightningModule may hold, and without gradients.

    Args:
        model: The model.

    Raises:
        ValueError: If it cannot be copied.

    Example:
        >>> copy_of(nn.Linear(2, 2)).weight.requires_grad
        False
    """
    holders: list[Any] = [module for module in model.modules() if is_a(module, "LightningModule")]
    trainers = [module._trainer for module in holders]
    for module in holders:
        module._trainer = None
    try:
        with _uncompiled(model):
            duplicate = copy.deepcopy(model)
    except RuntimeError as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied: {error} Detach tensors that the module keeps as attributes "
            "(losses, outputs), and replace torch.nn.utils.weight_norm by torch.nn.utils.parametrizations.weight_norm."
        ) from error
    finally:
        for module, trainer in zip(holders, trainers, strict=True):
            module._trainer = trainer
    for parameter in duplicate.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return duplicate
