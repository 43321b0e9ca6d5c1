"""Images of a folder with a folder for each class, as torchvision's ImageFolder reads them."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from .preprocessing import Preprocessing
from .reading import read_image


class FolderImages(Dataset[tuple[Tensor, int]]):
    """Prepared images, with the position of their class among the sorted class folders as label.

    Args:
        folder: With a folder for each class.
        prepare: Makes a tensor of an image.

    Raises:
        FileNotFoundError: If there is no such folder, it has no class folders, or one of them holds no image.
    """

    def __init__(self, folder: Path, prepare: Preprocessing) -> None:
        self.classes = class_folders(folder)
        self.prepare = prepare
        indices = {name: index for index, name in enumerate(self.classes)}
        self.samples = make_dataset(folder, indices, IMG_EXTENSIONS, allow_empty=True)
        self.labels = [label for _, label in self.samples]
        found = set(self.labels)
        empty = [str(folder / name) for name, index in indices.items() if index not in found]
        if empty:
            raise FileNotFoundError(
                f"No image is in {_some(empty)}: put images ({', '.join(IMG_EXTENSIONS)}) into each class folder, or "
                "remove it; the classes are numbered by the sorted folders."
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.prepare(read_image(lambda: Image.open(path), path)), label


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the class folders.

    Raises:
        FileNotFoundError: If there is no such folder, or it has no class folders.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; images of a class are expected in {folder}/<class>.")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise FileNotFoundError(f"{folder} has no class folders; sort the images into {folder}/<class>.")
    return classes


def check_same_classes(train: Path, evaluation: Path) -> None:
    """Both folders must have the same class folders: otherwise one label would mean two classes.

    Raises:
        FileNotFoundError: If a folder is missing or has no class folders.
        ValueError: If they differ.
    """
    first, second = set(class_folders(train)), set(class_folders(evaluation))
    if first != second:
        differences = " and ".join(
            f"only {folder} has {_some(sorted(names))}"
            for folder, names in ((train, first - second), (evaluation, second - first))
            if names
        )
        raise ValueError(
            f"The classes are numbered by the sorted folders, so both must have the same, but {differences}."
        )


def _some(names: Sequence[str], count: int = 5) -> str:
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
