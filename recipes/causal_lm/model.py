"""A causal language model of transformers as a LightningModule; logs ``perplexity``."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics.text import Perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


class LanguageModel(pl.LightningModule):
    """Any network of ``AutoModelForCausalLM``, as a user would write it.

    Args:
        model: Folder or name on the hub.
        gguf_file: Name of a GGUF file in it, whose weights are then dequantized; None for the usual files.
    """

    def __init__(self, model: str, gguf_file: str | None = None) -> None:
        super().__init__()
        self.net = load_network(model, gguf_file)
        self.perplexity = Perplexity()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Windows (N, tokens) to logits of the next token, (N, tokens, vocabulary)."""
        logits: Tensor = self.net(input_ids=input_ids, use_cache=False).logits
        return logits

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Perplexity of each token but the first of its window, given those before it."""
        self.perplexity(self(batch)[:, :-1].float(), batch[:, 1:])
        self.log("perplexity", self.perplexity, on_epoch=True)


def load_network(model: str, gguf_file: str | None = None) -> PreTrainedModel:
    """Load a network in float32.

    Args:
        model: Folder or name on the hub.
        gguf_file: See ``LanguageModel``.

    Raises:
        ImportError: If a GGUF file is given without the packages ``gguf`` and ``accelerate``.
    """
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **_of_gguf(model, gguf_file))
    return net.eval()


def load_tokenizer(model: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a network. See ``load_network``."""
    return AutoTokenizer.from_pretrained(model, **_of_gguf(model, gguf_file))


def _of_gguf(model: str, gguf_file: str | None) -> dict[str, Any]:
    if gguf_file is None:
        return {}
    if Path(model).is_dir() and not Path(model, gguf_file).is_file():
        raise FileNotFoundError(f"There is no GGUF file {gguf_file} in {model}.")
    return {"gguf_file": gguf_file}
