"""Parameters that modules multiply with in products of their own, found by running."""

from collections import Counter
from collections.abc import Collection, Container, Iterable

import torch
from torch import nn

from .layer_types import layer_type_of
from .product_inputs import hold_inputs, input_name
from .product_weights import hold_weights, module_name
from .structure import Operator, Structure, Value

# Position of the first factor among the tensors that an operator reads; the second one follows.
PRODUCTS = {
    "mm": 0, "bmm": 0, "mv": 0, "grouped_mm": 0, "transformers::grouped_mm_fallback": 0, "addmm": 1, "baddbmm": 1,
    "addmv": 1,
}  # fmt: skip

# Operators that only move numbers, from the first tensor that they read.
_MOVES = {"clone", "to_copy", "index", "index_select"}


def find_product_parameters(
    model: nn.Module, structure: Structure, known: Collection[str]
) -> dict[str, dict[str, int]]:
    """Find the parameters of modules that are factors of matrix products outside of quantizable layers.

    They may be sliced, transposed, expanded or picked from (experts) on the way there, but not computed with. Those
    that several modules hold, those of quantizable layers, and those of 16 bits, in which scales would be lost, are
    left out.

    Args:
        model: The model.
        structure: As observed.
        known: Names of the layers whose products are accounted for.

    Returns:
        For each module by name: the dimension that the products sum over, by the name of the parameter.

    Example:
        >>> from lightning_calibtip.network.observe import record
        >>> class Experts(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up = nn.Parameter(torch.ones(2, 3, 5))
        ...     def forward(self, x):
        ...         return torch.einsum("bd,edh->beh", x, self.up)
        >>> model = Experts()
        >>> find_product_parameters(model, record(model, lambda: model(torch.ones(1, 3))), [])
        {'': {'up': 1}}
    """
    names = {structure.parameters[name]: name for name in _own_parameters(model) if name in structure.parameters}
    parameters = dict(model.named_parameters())
    # By storage: the parameter that it holds numbers of, and the parameter's dimension for each stride.
    sources = {
        storage: (name, _by_stride(parameters[name].shape, parameters[name].stride(), range(parameters[name].dim())))
        for storage, name in names.items()
    }
    found: dict[str, dict[str, int]] = {}
    for operator in structure.operators:
        _follow(operator, sources)
        if operator.name not in PRODUCTS or _is_known(operator, structure, known):
            continue
        factors = factors_of(operator)
        for value, axis, other in zip(factors, (-1, -2), reversed(factors), strict=False):
            name, dims = sources.get(value.storage, ("", {}))
            _, shape, strides = value.view
            if not name or other.storage in sources or structure.is_fixed(other) or len(shape) < 2:
                continue
            if (dim := dims.get(strides[axis])) is not None and shape[axis] > 1:
                owner, _, parameter = name.rpartition(".")
                found.setdefault(owner, {}).setdefault(parameter, dim)
    return found


def hold_product_parameters(model: nn.Module, found: dict[str, dict[str, int]], inputs: Container[str]) -> None:
    """Give modules of their own to what ``find_product_parameters`` has found, and to what that is multiplied with,
    where that has not been done; what the model does not have is passed over.

    Args:
        model: Changed in place.
        found: Dimensions that products sum over, by the names of the module and of its parameter.
        inputs: Names of the modules whose ``forward`` computes the products, so that it can be told what is multiplied.

    Example:
        >>> model = nn.Sequential(nn.ParameterList([torch.ones(2, 2)]))
        >>> hold_product_parameters(model, {"0": {"0": 1}}, inputs=[])
        >>> list(model.state_dict())
        ['0.0_matrix.weight']
    """
    modules = dict(model.named_modules())
    for name, sums_over in found.items():
        own = modules[name]._parameters if name in modules else {}
        present = {
            key: axis for key, axis in sums_over.items() if (each := own.get(key)) is not None and each.dim() > axis
        }
        if present:
            hold_weights(modules[name], present)
            if name in inputs:
                hold_inputs(modules[name], list(present))


def possible_product_parameters(model: nn.Module) -> list[str]:
    """Names of the modules that ``hold_product_parameters`` may make once running has shown the factors of products.

    Example:
        >>> possible_product_parameters(nn.Bilinear(2, 2, 2))
        ['weight_matrix', 'weight_input']
    """
    return [name(parameter) for parameter in _own_parameters(model) for name in (module_name, input_name)]


def factors_of(operator: Operator) -> tuple[Value, ...]:
    """The two factors of a matrix product.

    Example:
        >>> a, b, c = (Value(i, 0, (0, (2, 2), (2, 1))) for i in range(3))
        >>> factors_of(Operator("addmm", (a, b, c), (), (), None)) == (b, c)
        True
    """
    first = PRODUCTS[operator.name]
    return operator.reads[first : first + 2]


def follow_moves(operators: Iterable[Operator], storages: set[int]) -> set[int]:
    """Storages that hold numbers of the given ones, which operators have only moved.

    Args:
        operators: Operators in the order of execution.
        storages: Where the numbers are at first.

    Example:
        >>> a, b = (Value(i, 0, (0, (2,), (1,))) for i in range(2))
        >>> follow_moves([Operator("clone", (a,), (b,), (), None)], {0})
        {0, 1}
    """
    found = set(storages)
    for operator in operators:
        if operator.name in _MOVES and operator.reads and operator.reads[0].storage in found:
            found.update(write.storage for write in operator.writes)
    return found


def _own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their full names that may become modules of their own."""
    holders = Counter(id(each) for module in model.modules() for each in module._parameters.values())
    return {
        f"{name}.{key}".removeprefix("."): parameter
        for name, module in model.named_modules()
        if layer_type_of(module) is None and not isinstance(module, torch.jit.ScriptModule)
        for key, parameter in module._parameters.items()
        if parameter is not None and holders[id(parameter)] == 1 and parameter.dim() > 1
        if parameter.dtype in (torch.float32, torch.float64) and ".parametrizations." not in f".{name}."
    }


def _is_known(operator: Operator, structure: Structure, known: Collection[str]) -> bool:
    return any(structure.calls[index].name in known for index in operator.scope)


def _by_stride(shape: Iterable[int], strides: Iterable[int], dims: Iterable[int | None]) -> dict[int, int]:
    """Dimensions by their strides, without those of one element or one value, whose strides tell nothing."""
    found: dict[int, int] = {}
    for length, stride, dim in zip(shape, strides, dims, strict=True):
        if length > 1 and stride > 0 and dim is not None:
            found[stride] = dim
    return found


def _follow(operator: Operator, sources: dict[int, tuple[str, dict[int, int]]]) -> None:
    """Note what an operator has moved of a parameter; what it has computed otherwise is none any longer."""
    source = sources.get(operator.reads[0].storage) if operator.reads and operator.name in _MOVES else None
    read = {each.storage for each in operator.reads}
    for write in operator.writes:
        if write.storage in read:
            continue
        if source is None:
            sources.pop(write.storage, None)
            continue
        name, dims = source
        (_, shape, strides), (_, shape_read, strides_read) = write.view, operator.reads[0].view
        # Dimensions that are picked from come first, and may be of any number then.
        moved: list[int | None] = [None] * len(shape)
        for i in range(1, min(len(shape), len(shape_read)) + 1):
            if shape[-i] != shape_read[-i]:
                break
            moved[-i] = dims.get(strides_read[-i])
        sources[write.storage] = (name, _by_stride(shape, strides, moved))
