"""Matrix products that stay float because no quantized layer computes them, found by running."""

from collections.abc import Collection

from .structure import Structure, is_fused_attention

_OPERATORS = {
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "convolution", "embedding",
    "embedding_bag", "grouped_mm", "scaled_mm", "int_mm", "native_multi_head_attention",
    "transformer_encoder_layer_fwd", "mkldnn_rnn_layer", "cudnn_rnn", "miopen_rnn", "lstm", "gru", "rnn_tanh",
    "rnn_relu", "thnn_fused_lstm_cell", "thnn_fused_gru_cell",
}  # fmt: skip


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
        if not operator.scope or not (is_fused_attention(operator) or operator.name in _OPERATORS):
            continue
        scope = [structure.calls[index].name for index in operator.scope]
        if not any(name in known for name in scope):
            fused = is_fused_attention(operator)
            found.setdefault(scope[-1], set()).add("scaled_dot_product_attention" if fused else operator.name)
    return {
        name: f"computes {', '.join(sorted(operators))} outside of a quantizable layer"
        for name, operators in found.items()
    }
