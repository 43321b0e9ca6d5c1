"""Matrix products that stay float because no quantized layer computes them, found by running."""

from collections.abc import Collection

from .product_parameters import follow_moves
from .structure import Structure, is_fused_attention

_OPERATORS = {
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "convolution", "embedding",
    "embedding_bag", "embedding_bag_forward_only", "grouped_mm", "scaled_mm", "int_mm", "sparse_mm", "trilinear",
    "cdist_forward", "torchvision::deform_conv2d", "native_multi_head_attention",
    "transformer_encoder_layer_fwd", "transformers::grouped_mm_fallback", "mkldnn_rnn_layer", "cudnn_rnn", "miopen_rnn",
    "sparse_mm_reduce_impl", "sparse_addmm", "torch_sparse::spmm_sum", "torch_sparse::spmm_mean",
    "torch_sparse::spmm_min", "torch_sparse::spmm_max", "pyg::spmm_sum", "pyg::segment_matmul", "pyg::grouped_matmul",
    "lstm", "gru", "rnn_tanh", "rnn_relu", "thnn_fused_lstm_cell", "thnn_fused_gru_cell",
}  # fmt: skip


def find_float_matmuls(structure: Structure, known: Collection[str]) -> dict[str, str]:
    """Find the modules that compute matrix products of their own.

    Args:
        structure: As observed.
        known: Names of the layers whose products are accounted for, quantized or not; those of weights that are modules
            of their own are accounted for wherever they are computed.

    Returns:
        The reason why a module is listed, with the operators that it computes, by the name of the innermost module
        (``""`` for the model itself).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.observe import record
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> structure = record(model, lambda: model(torch.ones(1, 2)))
        >>> find_float_matmuls(structure, known=["0"])
        {'1': 'computes addmm outside of a quantizable layer'}
    """
    found: dict[str, set[str]] = {}
    # Only a module that gives a weight reads nothing.
    calls = [call for name in known for call in structure.calls_of.get(name, ()) if not call.reads]
    weights = follow_moves(structure.operators, {write.storage for call in calls for write in call.writes})
    for operator in structure.operators:
        if not operator.scope or not (is_fused_attention(operator) or operator.name in _OPERATORS):
            continue
        if any(read.storage in weights for read in operator.reads):
            continue
        scope = [structure.calls[index].name for index in operator.scope]
        if not any(name in known for name in scope):
            fused = is_fused_attention(operator)
            found.setdefault(scope[-1], set()).add("scaled_dot_product_attention" if fused else operator.name)
    return {
        name: f"computes {', '.join(sorted(operators))} outside of a quantizable layer"
        for name, operators in found.items()
    }
