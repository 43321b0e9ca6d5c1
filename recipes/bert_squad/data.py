"""Calibration, fine-tuning and evaluation batches of SQuAD."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from .questions import Question, read_questions
from .windows import Window, WindowMaker, answer_span, pad, report_too_long

log = logging.getLogger(__name__)


class SquadData(pl.LightningDataModule):
    """Windows of questions, as batches.

    A calibration sample is one window: of each calibration question, chosen at random among the training questions, one
    window chosen at random. All are padded to the maker's ``max_length``.

    Args:
        maker: Cuts questions into windows.
        train: Dataset on the hub or SQuAD v1.1 JSON file to calibrate and fine-tune on.
        validation: The same to evaluate on.
        calibration_samples: Number of calibration windows.
        split: ``"validation"`` to evaluate on the validation questions; ``"train"`` on the training questions that are
            not calibrated on, for choosing settings.
        seed: Random seed of the choice of windows and of the order of fine-tuning.
        batch_size: Batch size of calibration.
        eval_batch_size: Batch size of evaluation.
        fine_tuning_batch_size: Batch size of fine-tuning.

    Raises:
        ValueError: If there are fewer questions than calibration samples, or none is left to evaluate on.
    """

    def __init__(
        self,
        maker: WindowMaker,
        train: str = "squad",
        validation: str = "squad",
        calibration_samples: int = 256,
        split: Literal["validation", "train"] = "validation",
        seed: int = 0,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        fine_tuning_batch_size: int = 12,
    ) -> None:
        super().__init__()
        if calibration_samples < 1:
            raise ValueError(f"calibration_samples must be at least 1, got {calibration_samples}.")
        self.maker, self.train, self.validation = maker, train, validation
        self.calibration_samples, self.split, self.seed = calibration_samples, split, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.fine_tuning_batch_size = fine_tuning_batch_size

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The maker's."""
        return self.maker.tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Read the questions and cut those to calibrate and to evaluate on into windows."""
        training = read_questions(self.train, "train")
        self.training_questions = training.questions
        self.calibration, rest, too_long = self._choose(training.questions)
        if self.split == "validation":
            if Path(self.train).is_file() and Path(self.train).resolve() == Path(self.validation).resolve():
                log.warning("%s is both calibrated and evaluated on: the scores are too good.", self.train)
            source, evaluation = self.validation, read_questions(self.validation, "validation")
            questions = evaluation.questions
        else:
            source, evaluation, questions = self.train, training, tuple(rest)
        if not questions:
            raise ValueError(
                f"calibration_samples={self.calibration_samples} leaves no question of {self.train} to evaluate on; "
                "calibrate on fewer, or use split=validation."
            )
        self.evaluation = self.maker.cut(questions)
        report_too_long(self.evaluation, source, "get the empty answer")
        self.skipped = {
            "calibration": {"answer_not_in_context": len(training.misplaced), "question_too_long": too_long},
            "evaluation": {
                "answer_not_in_context": len(evaluation.misplaced),
                "question_too_long": len(self.evaluation.too_long),
            },
        }

    def _choose(self, questions: Sequence[Question]) -> tuple[list[Window], list[Question], int]:
        """Calibration windows, the questions that they are not of, and the number of those too long to calibrate on."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(questions), generator=generator).tolist()
        chosen: list[Window] = []
        used: set[int] = set()
        too_long = 0
        # Tokenizing all of SQuAD for a few hundred windows would take minutes.
        for start in range(0, len(order), self.calibration_samples):
            part = order[start : start + self.calibration_samples]
            found = self.maker.cut([questions[index] for index in part])
            report_too_long(found, self.train, "are not calibrated on")
            too_long += len(found.too_long)
            for index, windows in found.windows_of.items():
                if len(chosen) < self.calibration_samples:
                    drawn = int(torch.randint(len(windows), (), generator=generator))
                    chosen.append(found.windows[windows[drawn]])
                    used.add(part[index])
            if len(chosen) == self.calibration_samples:
                rest = [question for index, question in enumerate(questions) if index not in used]
                return chosen, rest, too_long
        raise ValueError(
            f"calibration_samples={self.calibration_samples}, but {self.train} has {len(chosen)} questions that can be "
            "calibrated on (one window each)."
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Calibration batches."""

        def collate(windows: list[Window]) -> dict[str, Tensor]:
            return pad(windows, self.tokenizer, self.maker.max_length)

        return DataLoader(self.calibration, self.batch_size, collate_fn=collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches to evaluate on: windows of about the same length together, so that little is padded."""
        windows = self.evaluation.windows
        order = sorted(range(len(windows)), key=lambda index: len(windows[index]), reverse=True)

        def collate(indices: list[int]) -> dict[str, Tensor]:
            batch = self._padded([windows[index] for index in indices])
            return {**batch, "window": torch.tensor(indices)}

        return DataLoader(order, self.eval_batch_size, collate_fn=collate)  # type: ignore[arg-type]

    def fine_tuning_dataloader(self) -> DataLoader[Any]:
        """Shuffled windows of all training questions, with the first and last token of the answer."""
        found = self.maker.cut(self.training_questions)
        report_too_long(found, self.train, "are not fine-tuned on")

        def collate(windows: list[Window]) -> dict[str, Tensor]:
            batch = self._padded(windows)
            spans = [
                answer_span(window, found.questions[window.question], self.tokenizer.cls_token_id) for window in windows
            ]
            # Padding on the left moves the tokens.
            moved = batch["attention_mask"].argmax(1)
            batch["start_positions"], batch["end_positions"] = (torch.tensor(spans) + moved[:, None]).unbind(1)
            return batch

        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            found.windows,  # type: ignore[arg-type]
            self.fine_tuning_batch_size,
            shuffle=True,
            collate_fn=collate,
            generator=generator,
        )

    def _padded(self, windows: list[Window]) -> dict[str, Tensor]:
        """A batch as short as possible. Padding on the left moves the positions, so there it is always the same."""
        longest = max(map(len, windows))
        return pad(windows, self.tokenizer, longest if self.maker.question_first else self.maker.max_length)
