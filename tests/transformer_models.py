"""Small transformers with random weights, each as its library has it."""

import torch
import transformers
from torch import nn

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {"vocab_size": 50, "max_position_embeddings": 40, **_SIZES}


# Older releases of transformers compute the angles of rotary embeddings as a matrix product.
ROTATIONS = {"model.rotary_emb"}


def _sharpened(model: nn.Module) -> nn.Module:
    """Random weights are so small that attention hardly attends: larger ones make every product matter."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5 * 1.5
        elif "norm" not in name.lower() and "ln_" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.tie_weights()
    return model.eval()


def bert() -> nn.Module:
    return _sharpened(transformers.BertForQuestionAnswering(transformers.BertConfig(**_TEXT)))


def bert_classifier() -> nn.Module:
    return _sharpened(transformers.BertForSequenceClassification(transformers.BertConfig(**_TEXT, num_labels=3)))


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(**_TEXT, type_vocab_size=1, pad_token_id=1)
    return _sharpened(transformers.RobertaForMaskedLM(config))


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=50, max_position_embeddings=40, dim=32, n_layers=2, n_heads=4, hidden_dim=48
    )
    return _sharpened(transformers.DistilBertForQuestionAnswering(config))


def vit() -> nn.Module:
    config = transformers.ViTConfig(**_SIZES, image_size=16, patch_size=4, num_channels=1, num_labels=4)
    return _sharpened(transformers.ViTForImageClassification(config))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=50, n_positions=40, n_embd=32, n_layer=2, n_head=4)
    return _sharpened(transformers.GPT2LMHeadModel(config))


def llama() -> nn.Module:
    return _sharpened(transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT, num_key_value_heads=2)))


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return _sharpened(transformers.T5EncoderModel(config))


def bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=50,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=40,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return _sharpened(transformers.BartForConditionalGeneration(config))


TEXT_MODELS = (bert, bert_classifier, roberta, distilbert, gpt2, llama, t5)


def padded_tokens(count: int = 12, length: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random sequences of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (count, 1), generator=generator)
    tokens = torch.randint(2, 50, (count, length), generator=generator)
    return {"input_ids": torch.where(mask, tokens, 1), "attention_mask": mask.long()}


def batches_of(tokens: dict[str, torch.Tensor], size: int = 4) -> list[dict[str, torch.Tensor]]:
    """The same in batches."""
    count = len(tokens["input_ids"])
    return [{key: value[start : start + size] for key, value in tokens.items()} for start in range(0, count, size)]
