"""Texts: paragraphs from a file, or from a dataset on the hub."""

import json
from collections.abc import Iterator
from pathlib import Path

# What lies between two paragraphs.
SEPARATOR = "\n\n"


def read_text(source: str, split: str) -> str:
    """Read a file, or a split of a dataset on the hub; between paragraphs is an empty line.

    Args:
        source: Path of a text file in UTF-8; of a SQuAD v1.1 JSON file, whose contexts are taken, each once; or a name
            that ``datasets.load_dataset`` knows, with its configuration after a colon
            (``"Salesforce/wikitext:wikitext-2-raw-v1"``), whose column ``text`` is taken.
        split: ``"train"`` or ``"validation"``; of the hub's dataset only, since a file is one split.

    Raises:
        FileNotFoundError: If ``source`` is named like a file and is none.
        ValueError: If it holds no text, or not in this form.
    """
    path = Path(source)
    if path.is_file():
        found = _from_json(path) if path.suffix == ".json" else iter([_content(path)])
    elif path.suffix in (".json", ".txt"):
        raise FileNotFoundError(
            f"There is no file {source}; give a text file, a SQuAD v1.1 JSON file, or a dataset of the hub."
        )
    else:
        found = _from_hub(source, split)
    text = SEPARATOR.join(found)
    if not text.strip():
        raise ValueError(f"{source} holds no text.")
    return text


def _content(path: Path) -> str:
    try:
        # Files written on Windows may start with a byte order mark.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}.") from error


def _from_json(path: Path) -> Iterator[str]:
    try:
        articles = json.loads(_content(path))["data"]
        yield from dict.fromkeys(str(each["context"]).strip() for article in articles for each in article["paragraphs"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not SQuAD v1.1 ({type(error).__name__}: {error}): data, paragraphs and context were expected."
        ) from error


def _from_hub(source: str, split: str) -> Iterator[str]:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    rows = load_dataset(name, configuration or None, split=split)
    if "text" not in rows.column_names:
        raise ValueError(f"{source} has no column text, only {', '.join(rows.column_names)}.")
    return iter(rows["text"])
