"""From an image of any mode to the tensor a network was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

# What a 16-bit grey PNG or TIFF is opened as, depending on Pillow's version and on the byte order.
_GREY_16_BITS = ("I", "I;16", "I;16L", "I;16B")


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side, cut out the centre, normalise.

    The defaults are those of most of torchvision's weights.

    Args:
        crop: Side of the central crop in pixels.
        resize: The shorter side before, in pixels.
        mean: Mean of each channel, for pixels from 0 to 1.
        std: Standard deviation of each channel.
        interpolation: ``"nearest"``, ``"bilinear"``, ``"bicubic"`` or ``"lanczos"``.

    Raises:
        ValueError: If a value is out of its range.
    """

    crop: int = 224
    resize: int = 256
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if self.crop < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {self.crop}.")
        if self.resize < self.crop:
            raise ValueError(
                f"resize_size must be at least image_size={self.crop}, or the crop would have a black border, got "
                f"{self.resize}."
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3:
                raise ValueError(f"{name} must be three numbers, of red, green and blue, got {list(values)}.")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {list(self.std)}.")
        known = get_args(Interpolation)
        if self.interpolation not in known:
            raise ValueError(f"interpolation must be one of {', '.join(known)}, got {self.interpolation!r}.")

    @classmethod
    def of_weights(cls, weights: Any) -> "Preprocessing":
        """What an entry of a weights enum of torchvision was evaluated with."""
        preset = weights.transforms()
        return cls(preset.crop_size[0], preset.resize_size[0], preset.mean, preset.std, preset.interpolation.value)

    def changed(
        self,
        image_size: int | None = None,
        resize_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: Interpolation | None = None,
    ) -> "Preprocessing":
        """The same but for what is given; another crop alone shows the same share of the image.

        Example:
            >>> Preprocessing().changed(image_size=112).resize
            128
        """
        crop = self.crop if image_size is None else image_size
        resize = round(self.resize * crop / self.crop) if resize_size is None else resize_size
        return replace(
            self,
            crop=crop,
            resize=resize,
            mean=self.mean if mean is None else mean,
            std=self.std if std is None else std,
            interpolation=self.interpolation if interpolation is None else interpolation,
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """An image of any mode to float values (3, crop, crop)."""
        image = F.resize(to_rgb(image), [self.resize], InterpolationMode(self.interpolation))
        pixels = F.to_tensor(F.center_crop(image, [self.crop]))
        normalised: Tensor = F.normalize(pixels, list(self.mean), list(self.std))
        return normalised


def to_rgb(image: Image.Image) -> Image.Image:
    """Grey, CMYK, palette and transparent images as RGB.

    Transparent pixels are laid on white, the paper that such pictures are drawn on; whatever colour lies hidden
    under them does not show. Of 16-bit grey the upper 8 bits are taken, where Pillow would cut all off at 255. The
    orientation in EXIF is ignored, as it is by torchvision, with which the networks were trained.

    Example:
        >>> to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    if image.mode in _GREY_16_BITS:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info or {"A", "a"} & set(image.getbands()):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
