"""Decoding one image."""

from collections.abc import Callable

from PIL import Image


def read_image(opened: Callable[[], Image.Image], source: str) -> Image.Image:
    """Open an image and decode all of it.

    Args:
        opened: Opens it.
        source: Where it is, for the message.

    Raises:
        ValueError: If it cannot be opened or decoded, to its end.
    """
    try:
        # Closes the file, also when decoding breaks off.
        with opened() as image:
            image.load()
            return image.copy()
    # Pillow's plugins raise whatever their parsers stumble over: OSError, SyntaxError, struct.error, EOFError, ...
    except Exception as error:
        raise ValueError(
            f"{source} cannot be read as an image: {type(error).__name__}: {error}. Replace it or take it out."
        ) from error
