import io

import datasets
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from recipes.resnet_imagenet.choice import MOST_WITHOUT_A_NUMBER, choose_per_class, choose_samples
from recipes.resnet_imagenet.data import ImageNetData
from recipes.resnet_imagenet.preprocessing import Preprocessing, to_rgb

from .image_files import as_dataset, encoded, write_rows, write_tree

SMALL = Preprocessing(32, 37, (0.498, 0.498, 0.498), (0.502, 0.502, 0.502), "bicubic")


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "calib-5.parquet", [encoded(mode) for mode in ("RGB", "L", "CMYK", "RGB", "RGB")])
    write_rows(tmp_path / "eval-2.parquet", [encoded("RGB"), encoded("L")])
    return tmp_path


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path)


def labels_of(loader):
    return [int(label) for _, labels in loader for label in labels]


def test_images_of_any_mode_become_normalised_crops(folder):
    data = ImageNetData(folder, SMALL, batch_size=4)
    batches = [batch[0] for batch in data.train_dataloader()]
    assert [tuple(batch.shape) for batch in batches] == [(4, 3, 32, 32), (1, 3, 32, 32)]
    assert -1.01 < float(batches[0].min()) < -0.5 and 0.5 < float(batches[0].max()) < 1.01
    ((images, labels),) = data.val_dataloader()
    assert images.shape == (2, 3, 32, 32) and labels.tolist() == [0, 1]


@pytest.mark.parametrize("samples", [None, 5])
def test_all_calibration_images_stay_in_the_order_of_the_files(folder, samples):
    data = ImageNetData(folder, SMALL, calibration_samples=samples)
    assert labels_of(data.train_dataloader()) == [0, 1, 2, 3, 4]


def test_fewer_images_are_drawn_by_a_seed_of_their_own(folder):
    torch.manual_seed(1)
    first, again, other = (
        labels_of(ImageNetData(folder, SMALL, calibration_samples=3, calibration_seed=seed).train_dataloader())
        for seed in (0, 0, 1)
    )
    assert first == again and first != other and len(set(first)) == 3


def test_settings_can_be_chosen_on_calibration_images_that_are_left(folder):
    data = ImageNetData(folder, SMALL, calibration_samples=3, split="train")
    calibrated, evaluated = labels_of(data.train_dataloader()), labels_of(data.val_dataloader())
    assert len(evaluated) == 2 and sorted(calibrated + evaluated) == [0, 1, 2, 3, 4]


def test_one_image_of_each_class_is_drawn_and_all_are_equally_likely():
    labels = [5, 2, 5, 2, 2, 9]
    draws = [choose_per_class(labels, seed) for seed in range(600)]
    assert all(sorted(labels[index] for index in draw) == [2, 5, 9] for draw in draws)
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=6)
    expected = torch.tensor([300, 200, 300, 200, 200, 600])
    # Five standard deviations of a binomial.
    assert ((counts - expected).abs() <= 5 * (600 * 0.25) ** 0.5).all() and counts[5] == 600


def test_per_class_takes_one_training_image_of_each_folder(tree):
    chosen = {}
    for seed in range(6):
        data = ImageNetData(tree, SMALL, calibration_set="per_class", calibration_seed=seed, split="train")
        assert sorted(labels_of(data.train_dataloader())) == [0, 1, 2]
        assert sorted(labels_of(data.val_dataloader())) == [0, 1, 1, 2, 2, 2]
        chosen[seed] = tuple(data.calibration.indices)
    assert len(set(chosen.values())) > 1


def test_a_tree_is_read_as_torchvision_reads_it(tree):
    data = ImageNetData(tree, SMALL, batch_size=9)
    for part, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        images, labels = next(iter(loader))
        reference = ImageFolder(tree / part, transform=SMALL)
        assert labels.tolist() == reference.targets
        assert torch.equal(images, torch.stack([image for image, _ in reference]))


def test_the_preprocessing_is_that_of_torchvisions_weights():
    from torchvision.models import Inception_V3_Weights

    image = Image.open(io.BytesIO(encoded(size=(500, 400))))
    weights = Inception_V3_Weights.IMAGENET1K_V1
    prepare = Preprocessing.of_weights(weights)
    assert (prepare.crop, prepare.resize) == (299, 342)
    assert torch.allclose(prepare(image), weights.transforms()(image), atol=1e-6)


def test_another_crop_shows_the_same_share_of_the_image_and_all_can_be_changed():
    assert Preprocessing(299, 342).changed(image_size=75) == Preprocessing(75, 86)
    changed = Preprocessing().changed(100, 120, [0.5] * 3, [0.4] * 3, "bicubic")
    assert changed == Preprocessing(100, 120, [0.5] * 3, [0.4] * 3, "bicubic")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"image_size": 0}, "image_size must be at least 1 pixel, got 0"),
        ({"resize_size": 100}, "resize_size must be at least image_size=224, .* got 100"),
        ({"mean": [0.5]}, r"mean must be three numbers, .* got \[0.5\]"),
        ({"std": [0.5, 0, 0.5]}, "std must be above 0"),
        ({"interpolation": "box"}, "interpolation must be one of nearest, bilinear, bicubic, lanczos, got 'box'"),
    ],
)
def test_preprocessing_out_of_range_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing().changed(**options)


def test_every_mode_becomes_the_right_colours():
    red, white, grey = (255, 0, 0), (255, 255, 255), (119, 119, 119)
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, *red])
    hole = palette.copy()
    hole.info["transparency"] = 1
    images = {
        "L": (Image.new("L", (1, 1), 119), grey),
        "16 bits": (Image.new("I;16", (1, 1), 119 * 256 + 7), grey),
        "CMYK": (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), red),
        "palette": (palette, red),
        "palette with a hole": (hole, white),
        "opaque": (Image.new("RGBA", (1, 1), (*red, 255)), red),
        "transparent": (Image.new("RGBA", (1, 1), (*red, 0)), white),
        "half": (Image.new("RGBA", (1, 1), (*red, 51)), (255, 204, 204)),
        "transparent grey": (Image.new("LA", (1, 1), (0, 0)), white),
    }
    for name, (image, expected) in images.items():
        converted = to_rgb(image)
        assert (converted.mode, converted.getpixel((0, 0))) == ("RGB", expected), name


def test_transparency_and_palettes_survive_decoding(tree, tmp_path):
    image = Image.new("P", (40, 40), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tree / "val/n01/0.png", transparency=1)
    (tree / "val/n01/0.JPEG").unlink()
    data = ImageNetData(tree, Preprocessing(32, 32, (0, 0, 0), (1, 1, 1)))
    assert torch.equal(data.evaluation[0][0], torch.ones(3, 32, 32))


@pytest.mark.parametrize("layout", ["tree", "parquet"])
def test_the_orientation_in_exif_is_ignored(tmp_path, layout):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (40, 40))
    image.paste((255, 255, 255), (0, 0, 40, 20))
    image.save(file, "PNG", exif=exif)
    if layout == "tree":
        write_tree(tmp_path, (("a", 1),), (("a", 1),))
        (tmp_path / "train/a/0.JPEG").write_bytes(file.getvalue())
    else:
        write_rows(tmp_path / "train.parquet", [file.getvalue()])
        write_rows(tmp_path / "val.parquet", [encoded()])
    prepared = ImageNetData(tmp_path, Preprocessing(40, 40, (0, 0, 0), (1, 1, 1))).calibration[0][0]
    assert bool((prepared[:, :20] == 1).all()) and bool((prepared[:, 20:] == 0).all())


@pytest.mark.parametrize(
    "content,workers",
    [(b"", 0), (b"no image", 0), (encoded()[:400], 0), (encoded(kind="PNG")[:3000], 0), (encoded()[:400], 1)],
)
def test_an_image_that_cannot_be_read_is_named(tree, content, workers):
    (tree / "train/n02/1.JPEG").write_bytes(content)
    with pytest.raises(ValueError, match=r"train/n02/1.JPEG cannot be read as an image: .*Replace it or take it out"):
        list(ImageNetData(tree, SMALL, workers=workers).train_dataloader())


def test_a_row_that_cannot_be_read_is_named_by_its_file(tmp_path):
    write_rows(tmp_path / "train-0.parquet", [encoded()] * 3)
    write_rows(tmp_path / "train-1.parquet", [encoded(), encoded()[:400]])
    write_rows(tmp_path / "val.parquet", [encoded()])
    with pytest.raises(ValueError, match=r"train-1.parquet, row 1, cannot be read as an image: OSError: Trunc"):
        list(ImageNetData(tmp_path, SMALL).train_dataloader())


def test_workers_give_the_same_batches(tree, folder):
    for options in ({}, {"calibration_samples": 4}):
        none, two = (ImageNetData(tree, SMALL, batch_size=3, workers=workers, **options) for workers in (0, 2))
        for one, other in (
            (none.train_dataloader(), two.train_dataloader()),
            (none.val_dataloader(), two.val_dataloader()),
        ):
            assert (one.num_workers, other.num_workers) == (0, 2)
            for (images, labels), (same_images, same_labels) in zip(one, other, strict=True):
                assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


def test_evaluation_can_be_limited_to_a_draw_that_is_always_the_same(tree):
    first, again = (
        ImageNetData(tree, SMALL, limit_evaluation=2, calibration_seed=seed).evaluation.indices for seed in (0, 1)
    )
    assert first == again and len(set(first)) == 2
    with pytest.raises(ValueError, match="limit_evaluation=5, but there are 4 images"):
        ImageNetData(tree, SMALL, limit_evaluation=5)


def test_the_hub_is_read_by_load_dataset(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        count = {"train": 6, "validation": 2}[split]
        return as_dataset(
            [encoded(seed=index) for index in range(count - 1)] + [b"broken"], [i // 2 for i in range(count)]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    data = ImageNetData("imagenet-1k", SMALL, calibration_set="per_class")
    assert asked == [("imagenet-1k", "train"), ("imagenet-1k", "validation")]
    assert sorted(data.calibration.dataset.labels[index] for index in data.calibration.indices) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"imagenet-1k \(validation\), row 1, cannot be read"):
        list(data.val_dataloader())


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    def load_dataset(name, split):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'imagenet-1k' is a gated dataset")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConnectionError, match=r"imagenet-1k \(train\) .* gated dataset.* log in"):
        ImageNetData("imagenet-1k", SMALL)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"calibration_samples": 6}, "calibration_samples=6, but .* has 5 calibration images"),
        ({"calibration_samples": 0}, "calibration_samples=0"),
        ({"split": "train"}, "there are no others"),
        ({"calibration_set": "per_class", "calibration_samples": 3}, "leave out calibration_samples=3"),
        ({"calibration_set": "each"}, "calibration_set must be samples or per_class, got 'each'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
    ],
)
def test_images_that_are_not_there_and_wrong_settings_are_errors(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ImageNetData(folder, SMALL, **options)


def test_all_of_a_very_large_set_is_not_taken_by_mistake():
    with pytest.raises(ValueError, match=r"x has 10001 calibration images, .* give calibration_samples"):
        choose_samples(MOST_WITHOUT_A_NUMBER + 1, None, 0, "x")


def test_folders_that_lack_something_are_errors_that_name_it(tmp_path, tree):
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no train\*.parquet or calib\*.parquet"):
        ImageNetData(empty, SMALL)
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
        ImageNetData(tmp_path / "nowhere", SMALL)
    (tree / "train/n01b").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No image is in .*train/n01b: put images"):
        ImageNetData(tree, SMALL)
    (tree / "train/n01b/0.JPEG").write_bytes(encoded())
    (tree / "val/n04").mkdir()
    with pytest.raises(ValueError, match=r"only .*train has n01b and only .*val has n04"):
        ImageNetData(tree, SMALL)


def test_evaluation_images_that_are_not_in_class_folders_are_an_error(tmp_path):
    write_tree(tmp_path, val=())
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*val; images of a class are expected in"):
        ImageNetData(tmp_path, SMALL)
    (tmp_path / "val").mkdir()
    (tmp_path / "val/0.JPEG").write_bytes(encoded())
    with pytest.raises(FileNotFoundError, match=r"val has no class folders; sort the images into"):
        ImageNetData(tmp_path, SMALL)
    assert len(ImageNetData(tmp_path, SMALL, calibration_set="per_class", split="train").evaluation) == 6


def test_tables_that_are_not_of_labelled_images_are_errors(tmp_path):
    datasets.Dataset.from_dict({"picture": ["a"], "label": [0]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train.parquet must have the columns image and label, .* picture, label"):
        ImageNetData(tmp_path, SMALL)
    write_rows(tmp_path / "train.parquet", [encoded()] * 2, [0, -1])
    with pytest.raises(ValueError, match=r"train.parquet, row 1, must have a label of 0 or more, got -1"):
        ImageNetData(tmp_path, SMALL)
    (tmp_path / "train.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="has a file that is not parquet"):
        ImageNetData(tmp_path, SMALL)
