"""Small images in the layouts that the ImageNet recipe reads."""

import io

import datasets
import numpy as np
from PIL import Image


def encoded(mode="RGB", size=(60, 40), seed=0, kind="JPEG"):
    """Bytes of an image of random pixels."""
    file = io.BytesIO()
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], bands), dtype=np.uint8)
    Image.frombytes(mode, size, pixels.tobytes()).save(file, kind)
    return file.getvalue()


def write_rows(path, contents, labels=None):
    """A parquet file of encoded images, in the hub's format."""
    as_dataset(contents, labels).to_parquet(path)


def as_dataset(contents, labels=None):
    rows = [{"bytes": content, "path": None} for content in contents]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    labels = list(range(len(rows))) if labels is None else labels
    return datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features)


def write_tree(folder, train=(("n02", 3), ("n01", 2), ("n03", 4)), val=(("n01", 1), ("n02", 2), ("n03", 1)), **image):
    """``train/<class>/<i>.JPEG`` and ``val/<class>/<i>.JPEG``, each of other pixels."""
    seed = 0
    for split, classes in (("train", train), ("val", val)):
        for name, count in classes:
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                seed += 1
                (place / f"{index}.JPEG").write_bytes(encoded(seed=seed, **image))
    return folder
