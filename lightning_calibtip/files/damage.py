"""What is said of files that cannot be read."""


def describe_error(error: Exception) -> str:
    """Type of an error, and the first line of its message if it has one.

    Example:
        >>> describe_error(KeyError("config")), describe_error(EOFError())
        ("KeyError: 'config'", 'EOFError')
    """
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
