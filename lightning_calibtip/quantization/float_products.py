"""Matrix products that stay float because no quantized layer computes them, found by running."""

from collections.abc import Collection

from .structure import Structure

_PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "convolution", "embedding",
    "native_multi_head_attention", "transformer_encoder_layer_fwd",
}  # fmt: skip
# The fused kernels of attention have names of their own (``scaled_dot_product_flash_attention_for_cpu``).
_ATTENTION = "scaled_dot_product"


def float_products(structure: Structure, known: Collection[str]) -> dict[str, str]:
    """Modules that compute matrix products of their own, and which.

    Args:
        structure: As observed.
        known: Names of the layers whose products are accounted for, quantized or not.

    Returns:
        Name of the innermost module (empty for the model itself) -> why it is listed.
    """
    found: dict[str, set[str]] = {}
    for operator in structure.operators:
        is_attention = operator.name.startswith(_ATTENTION)
        if not operator.scope or not (is_attention or operator.name in _PRODUCTS):
            continue
        scope = [structure.calls[index].name for index in operator.scope]
        if not any(name in known for name in scope):
            found.setdefault(scope[-1], set()).add("scaled_dot_product_attention" if is_attention else operator.name)
    return {
        name: f"computes {', '.join(sorted(operators))} outside of a quantizable layer"
        for name, operators in found.items()
    }
