"""Images that are rows of a table: of local parquet files, or of a dataset on the hub."""

import io
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .preprocessing import Preprocessing
from .reading import read_image


class RowImages(Dataset[tuple[Tensor, int]]):
    """Prepared images and labels of the columns ``image`` and ``label``.

    Args:
        rows: A dataset of the ``datasets`` library.
        parts: Name and number of rows of each file in turn, or of the whole, for messages.
        prepare: Makes a tensor of an image.

    Raises:
        ValueError: If a column is missing, or there is an image without a label.
    """

    def __init__(self, rows: Any, parts: Sequence[tuple[str, int]], prepare: Preprocessing) -> None:
        from datasets import Image as EncodedImage

        self.names = [name for name, _ in parts]
        self.ends = list(accumulate(count for _, count in parts))
        missing = [name for name in ("image", "label") if name not in rows.column_names]
        if missing:
            raise ValueError(
                f"{', '.join(self.names)} must have the columns image and label, but {' and '.join(missing)} is not "
                f"among {', '.join(rows.column_names) or 'none'}."
            )
        # Decoded here, to say which one cannot be; datasets would also turn images by their EXIF orientation.
        self.rows = rows.cast_column("image", EncodedImage(decode=False))
        self.prepare = prepare
        self.labels: list[int] = rows["label"][:]
        for index, label in enumerate(self.labels):
            if not isinstance(label, int) or label < 0:
                raise ValueError(f"{self._place(index)} must have a label of 0 or more, got {label!r}.")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        encoded = self.rows[index]["image"]
        return self.prepare(read_image(lambda: _open(encoded), self._place(index))), self.labels[index]

    def _place(self, index: int) -> str:
        part = bisect_right(self.ends, index)
        first = self.ends[part - 1] if part else 0
        return f"{self.names[part]}, row {index - first},"


def _open(encoded: Any) -> Image.Image:
    if encoded is None:
        raise ValueError("there is no image")
    content = encoded["bytes"]
    return Image.open(encoded["path"] if content is None else io.BytesIO(content))


def parquet_images(folder: Path, patterns: Sequence[str], prepare: Preprocessing) -> RowImages:
    """Images of all files of a folder whose names match, in the order of their names.

    Raises:
        FileNotFoundError: If no file matches.
        ValueError: See ``RowImages``.
    """
    import pyarrow.parquet
    from datasets import load_dataset

    files = sorted(str(path) for pattern in patterns for path in folder.glob(pattern))
    if not files:
        raise FileNotFoundError(
            f"{folder} has no {' or '.join(patterns)}; give a folder with parquet files, or with train/<class> and "
            "val/<class> full of images."
        )
    try:
        parts = [(file, pyarrow.parquet.read_metadata(file).num_rows) for file in files]
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{folder} has a file that is not parquet ({', '.join(files)}): {error}.") from error
    return RowImages(load_dataset("parquet", data_files=files, split="train"), parts, prepare)


def hub_images(name: str, split: str, prepare: Preprocessing) -> RowImages:
    """Images of a split of a dataset on the hub.

    Raises:
        ConnectionError: If it cannot be loaded.
        ValueError: See ``RowImages``.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    # Not found and not reachable are one for datasets: which, its message says.
    except OSError as error:
        raise ConnectionError(
            f"{name} ({split}) is no local folder and cannot be loaded from the hub: {error}. Of imagenet-1k, accept "
            "the terms on its page and log in (hf auth login), or give a folder."
        ) from error
    return RowImages(rows, [(f"{name} ({split})", len(rows))], prepare)
