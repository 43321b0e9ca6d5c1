"""What to say where a package is missing that an extra of this one brings."""


def needs_extra(what: str, package: str | None, extra: str) -> str:
    """Say which package is missing and which extra brings it.

    Args:
        what: What needs the package.
        package: Name of the missing package.
        extra: Name of the extra, as in pyproject.toml.

    Example:
        >>> needs_extra("Exporting", "onnx", "export")
        'Exporting needs onnx: pip install "lightning-calibtip[export]"'
    """
    return f'{what} needs {package}: pip install "lightning-calibtip[{extra}]"'
