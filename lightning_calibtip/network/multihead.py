"""``torch.nn.MultiheadAttention`` with its projections and its matrix products as modules, so that each can be
quantized.

PyTorch's own computes all of them from parameters inside of one function, which no module hook sees.
"""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import PRODUCTS, add_products, additive_mask, masked_softmax
from .preparations import Preparation, register_preparation

PROJECTIONS = ("q_proj", "k_proj", "v_proj")

# What PyTorch's attention has instead.
_PACKED = ("in_proj_weight", "in_proj_bias", *(f"{name}_weight" for name in PROJECTIONS))


class SplitMultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention that computes what ``torch.nn.MultiheadAttention`` does by modules: three linear layers
    ``q_proj``, ``k_proj`` and ``v_proj``, two matrix products and ``out_proj``.

    It is made by ``split_multihead_attention`` only. State dicts of ``torch.nn.MultiheadAttention`` can be loaded.

    Example:
        >>> attention = nn.MultiheadAttention(4, 2)
        >>> _ = split_multihead_attention(attention)
        >>> [name for name, _ in attention.named_children()]
        ['out_proj', 'q_proj', 'k_proj', 'v_proj', 'query_key_product', 'probability_value_product']
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    query_key_product: nn.Module
    probability_value_product: nn.Module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what ``torch.nn.MultiheadAttention.forward`` does, with the same arguments and results.

        Raises:
            RuntimeError: If ``is_causal`` is given without the mask that it is a hint about.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask, which is None: give the causal mask, too.")
        is_batched = query.dim() == 3
        q, k, v = (
            self._batch_first(projection(x), is_batched)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        given_keys = k.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], 1)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        scores = self.query_key_product(q, k.transpose(-2, -1)) * (1 / math.sqrt(self.head_dim))
        masks = self._masks(attn_mask, key_padding_mask, q, k.shape[2] - given_keys)
        probabilities = F.dropout(masked_softmax(scores, masks), self.dropout, self.training)
        attended = self.probability_value_product(probabilities, v).transpose(1, 2).flatten(2)
        if not is_batched:
            attended = attended.squeeze(0)
        elif not self.batch_first:
            attended = attended.transpose(0, 1)
        output = self.out_proj(attended)
        if not need_weights:
            return output, None
        weights = probabilities.mean(1) if average_attn_weights else probabilities
        return output, weights if is_batched else weights.squeeze(0)

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """What ``torch.nn.MultiheadAttention`` has under this name, for code that reads it; as rounded as the
        projections are."""
        same = self.kdim == self.vdim == self.embed_dim
        return torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]) if same else None

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """What ``torch.nn.MultiheadAttention`` has under this name, for code that reads it."""
        biases = (self.q_proj.bias, self.k_proj.bias, self.v_proj.bias)
        return None if biases[0] is None else torch.cat(biases)

    def _batch_first(self, x: Tensor, is_batched: bool) -> Tensor:
        """The projection of shape (N, L, E)."""
        if not is_batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, added_keys: int
    ) -> list[Tensor]:
        """What is added to the scores of shape (N, heads, L, S): minus infinity where a key does not count."""
        masks = []
        if attn_mask is not None:
            mask = F.pad(additive_mask(attn_mask, q.dtype), (0, added_keys))
            masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads)))
        if key_padding_mask is not None:
            mask = F.pad(additive_mask(key_padding_mask, q.dtype), (0, added_keys))
            masks.append(mask.reshape(q.shape[0], 1, 1, -1))
        return masks

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for kind in ("weight", "bias"):
            if (packed := state_dict.pop(f"{prefix}in_proj_{kind}", None)) is not None:
                for name, part in zip(PROJECTIONS, packed.chunk(3), strict=True):
                    state_dict[f"{prefix}{name}.{kind}"] = part
        for name in PROJECTIONS:
            if (weight := state_dict.pop(f"{prefix}{name}_weight", None)) is not None:
                state_dict[f"{prefix}{name}.weight"] = weight
        super()._load_from_state_dict(state_dict, prefix, *args)


class UnpackedEncoder(nn.TransformerEncoder):
    """An encoder that computes what ``torch.nn.TransformerEncoder`` does in eval mode without packing tokens into a
    nested tensor, in which no quantizer could work.

    It is made by ``split_multihead_attention`` only.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, batch_first=True), 1).eval()
        >>> split_multihead_attention(encoder)
        >>> type(encoder).__name__
        'UnpackedEncoder'
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Compute what ``torch.nn.TransformerEncoder.forward`` does, with the same arguments and results.

        The packed form leaves zeros at padding, and so does this, where PyTorch's would pack.
        """
        masks = [None if each is None else additive_mask(each, src.dtype) for each in (mask, src_key_padding_mask)]
        output = src
        for layer in self.layers:
            # Without the hint, split attention computes what the mask says.
            output = layer(output, src_mask=masks[0], is_causal=is_causal is True, src_key_padding_mask=masks[1])
        packs = self.use_nested_tensor and not self.training and src.dim() == 3 and mask is None
        if packs and src_key_padding_mask is not None:
            padding = src_key_padding_mask != 0
            if self.mask_check:
                # Only samples that end with their padding, all of them, are packed.
                padding = padding & (padding[:, 1:] >= padding[:, :-1]).all()
            output = output.masked_fill(padding.unsqueeze(-1), 0)
        return output if self.norm is None else self.norm(output)


class UnhintedDecoder(nn.TransformerDecoder):
    """A decoder that computes what ``torch.nn.TransformerDecoder`` does, and does not look whether a mask is causal:
    no exported graph can hold that question.

    It is made by ``split_multihead_attention`` only.

    Example:
        >>> decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2), 1).eval()
        >>> split_multihead_attention(decoder)
        >>> type(decoder).__name__
        'UnhintedDecoder'
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what ``torch.nn.TransformerDecoder.forward`` does, with the same arguments and results."""
        given = inspect.signature(nn.TransformerDecoder.forward).bind(self, *args, **kwargs).arguments
        given["tgt_is_causal"] = given.get("tgt_is_causal") is True
        del given["self"]
        output: Tensor = super().forward(**given)
        return output


def _splittable(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """The attention modules that can be split, by name: not those of derived classes or with a ``forward`` of their
    own, which may compute otherwise, and not those whose projections are computed (by parametrizations or hooks)."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.MultiheadAttention and "forward" not in vars(module) and _has(module, _PACKED)
    }


def _has(module: nn.Module, parameters: Iterable[str]) -> bool:
    return all(name in module._parameters for name in parameters)


def _is_split(layer: nn.Module) -> bool:
    """Whether a layer of a transformer is PyTorch's, around split attention."""
    is_known = isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    return is_known and isinstance(layer.self_attn, SplitMultiheadAttention)


def split_multihead_attention(model: nn.Module) -> None:
    """Split every ``torch.nn.MultiheadAttention`` of a model into modules; what the model computes stays the same.

    Those of derived classes, those with a ``forward`` of their own and those whose projections are parametrized are
    left as they are.

    Args:
        model: Changed in place: the modules become ``SplitMultiheadAttention``, and encoders and decoders of PyTorch's
            layers ``UnpackedEncoder`` and ``UnhintedDecoder``. Encoders of derived classes do not pack their tokens
            any longer, so that positions of padding hold there what they hold in training.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
        >>> x = torch.randn(3, 1, 4)
        >>> before, _ = model[1](x, x, x)
        >>> split_multihead_attention(model)
        >>> torch.allclose(model[1](x, x, x)[0], before, atol=1e-6)
        True
    """
    for attention in _splittable(model).values():
        _split(attention)
    for module in model.modules():
        if type(module) is nn.TransformerEncoder and all(map(_is_split, module.layers)):
            module.__class__ = UnpackedEncoder
        elif type(module) is nn.TransformerDecoder and all(map(_is_split, module.layers)):
            module.__class__ = UnhintedDecoder
        elif isinstance(module, nn.TransformerEncoder) and not isinstance(module, UnpackedEncoder):
            has_split = any(isinstance(part, SplitMultiheadAttention) for part in module.modules())
            module.use_nested_tensor = module.use_nested_tensor and not has_split


def _split(module: nn.MultiheadAttention) -> None:
    packed = module.in_proj_weight
    weights = packed.chunk(3) if packed is not None else [getattr(module, f"{name}_weight") for name in PROJECTIONS]
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
        projection = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        projection.weight = _parameter(weight)
        if bias is not None:
            projection.bias = _parameter(bias)
        module.add_module(name, projection.train(module.training))
    for name in _PACKED:
        setattr(module, name, None)
    # The encoder layers of PyTorch ask for it before they take their fused path, which calls no module.
    module._qkv_same_embed_dim = False
    add_products(module)
    module.__class__ = SplitMultiheadAttention


def _parameter(part: Tensor) -> nn.Parameter:
    return nn.Parameter(part.detach().clone(), requires_grad=part.requires_grad)


def possible_projections(model: nn.Module) -> list[str]:
    """List the names of the layers that ``split_multihead_attention`` would make.

    Example:
        >>> possible_projections(nn.Sequential(nn.MultiheadAttention(4, 2)))[:3]
        ['0.q_proj', '0.k_proj', '0.v_proj']
    """
    return [f"{name}.{child}".removeprefix(".") for name in _splittable(model) for child in (*PROJECTIONS, *PRODUCTS)]


class MultiheadPreparation(Preparation):
    """Splits every ``torch.nn.MultiheadAttention``.

    Example:
        >>> MultiheadPreparation().possible_names(nn.MultiheadAttention(4, 2))[:1]
        ['q_proj']
    """

    def prepare(self, model: nn.Module) -> None:
        """See ``split_multihead_attention``."""
        split_multihead_attention(model)

    def possible_names(self, model: nn.Module) -> list[str]:
        """See ``possible_projections``."""
        return possible_projections(model)


register_preparation(MultiheadPreparation())
