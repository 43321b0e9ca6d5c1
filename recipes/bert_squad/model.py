"""A transformers network for extractive question answering as a LightningModule; logs ``f1`` and ``exact_match``."""

import inspect
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics.functional.text import squad
from transformers import (
    AutoModelForQuestionAnswering,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from .answers import Logits, best_answer
from .windows import WindowSet

log = logging.getLogger(__name__)

LEARNING_RATE, WARMUP = 3e-5, 0.1


class QuestionAnswering(pl.LightningModule):
    """Any network of ``AutoModelForQuestionAnswering``, as a user would write it.

    Validation batches are those of ``SquadData``: they say which windows of ``evaluation`` they hold, and the answers
    are scored at the end of the epoch, all windows of a question together.

    Args:
        model: Folder or name on the hub.
        evaluation: Questions to validate on; may be set later.

    Raises:
        ValueError: If the checkpoint is of another architecture.
    """

    def __init__(self, model: str, evaluation: WindowSet | None = None) -> None:
        super().__init__()
        self.net, self.has_trained_head = load_network(model)
        self.takes_token_types = "token_type_ids" in inspect.signature(self.net.forward).parameters
        self.evaluation = evaluation
        self._logits: dict[int, Logits] = {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Windows (N, tokens) to an output with ``start_logits`` and ``end_logits``, (N, tokens) each."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.takes_token_types and token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        return self.net(**inputs)

    def _run(self, batch: dict[str, Tensor]) -> Any:
        return self(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of first and last token of the answer."""
        output = self._run(batch)
        losses = [
            torch.nn.functional.cross_entropy(logits, batch[positions])
            for logits, positions in (
                (output.start_logits, "start_positions"),
                (output.end_logits, "end_positions"),
            )
        ]
        loss = (losses[0] + losses[1]) / 2
        self.log("train_loss", loss, batch_size=len(batch["input_ids"]))
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, its learning rate rising over the first tenth of the steps and then falling to 0."""
        optimizer = torch.optim.AdamW(self.parameters(), LEARNING_RATE, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation has left."""
        self._logits.clear()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Keep the logits of each window."""
        output = self._run(batch)
        present = batch["attention_mask"].bool().cpu()
        starts, ends = output.start_logits.float().cpu(), output.end_logits.float().cpu()
        for row, window in enumerate(batch["window"].tolist()):
            self._logits[window] = (starts[row][present[row]].numpy(), ends[row][present[row]].numpy())

    def on_validation_epoch_end(self) -> None:
        """Score the answers to all questions; nothing is logged unless all windows were seen.

        Raises:
            RuntimeError: If there are no questions.
        """
        logits = dict(self._logits)
        self._logits.clear()
        if self.evaluation is None:
            raise RuntimeError("There are no questions to score: set evaluation= to those of the validation batches.")
        if len(logits) < len(self.evaluation.windows):
            log.warning(
                "Validation saw %d of %d windows (a sanity check, limit_val_batches, or several devices): nothing is "
                "scored.",
                len(logits),
                len(self.evaluation.windows),
            )
            return
        predictions = predict_answers(self.evaluation, logits)
        scores = squad(
            [{"id": identity, "prediction_text": text} for identity, text in predictions.items()],
            [
                {
                    "id": question.id,
                    "answers": {
                        "text": [text for text, _ in question.answers],
                        "answer_start": [start for _, start in question.answers],
                    },
                }
                for question in self.evaluation.questions
            ],
        )
        self.log_dict({name: scores[name] / 100 for name in ("f1", "exact_match")})

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write network and tokenizer, to be given as the model of another run."""
        self.net.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def predict_answers(evaluation: WindowSet, logits: dict[int, Logits]) -> dict[str, str]:
    """Answer to each question by its id; the empty string for a question without windows.

    Raises:
        ValueError: If the logits of a question hold NaN.
    """
    answers = {question.id: "" for question in evaluation.questions}
    for index, windows in evaluation.windows_of.items():
        question = evaluation.questions[index]
        try:
            answers[question.id] = best_answer(
                question.context, [evaluation.windows[w] for w in windows], [logits[w] for w in windows]
            )
        except ValueError as error:
            raise ValueError(f"Question {question.id}: {error}") from error
    return answers


def load_network(model: str) -> tuple[PreTrainedModel, bool]:
    """Load a network, and tell whether its question answering head comes from the checkpoint.

    Raises:
        ValueError: If other weights than the head's are missing, or a layer has another shape.
    """
    net, loading = AutoModelForQuestionAnswering.from_pretrained(model, num_labels=2, output_loading_info=True)
    missing = sorted(loading["missing_keys"])
    encoder = [key for key in missing if key.startswith(f"{net.base_model_prefix}.")]
    if encoder:
        raise ValueError(
            f"The checkpoint {model} is not of a {type(net).__name__}: it has no {', '.join(encoder[:3])}"
            f"{', ...' if len(encoder) > 3 else ''} ({len(encoder)} weights are missing)."
        )
    # Checkpoints may be in half precision.
    return net.float(), not missing
