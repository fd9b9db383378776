"""Files of a model folder, which may come from a stranger: regular, inside the folder, and of a size that fits.

A link to a file elsewhere would hand out what the account may read; a device or a pipe has no end.
"""

import os
import stat
from pathlib import Path

from helixflow.engine.base import DamagedFileError

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""What the tokeniser and the chat template are made of; each may be absent."""
LARGEST_TOKENIZER = 64 << 20
"""Bytes: the largest tokenizer.json in use has 35 MB. The extension has the same limit."""


def contained(path: Path) -> Path:
    """`path`, when it leads to a regular file of its own folder. Raises DamagedFileError.

    The snapshots of a Hugging Face cache link into the `blobs` of the same repository, and may.
    """
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise DamagedFileError(path, "", f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    folder = path.parent.resolve()
    if not stat.S_ISREG(mode):
        raise DamagedFileError(path, "", "is not a regular file")
    if not target.is_relative_to(folder) and not _is_blob(folder, target):
        raise DamagedFileError(
            path, "", "is a link that leads out of the model's folder; put a copy of the file in its place"
        )
    return path


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises DamagedFileError."""
    contained(path)
    try:
        # Without O_NONBLOCK a pipe that took the file's place meanwhile would hold up the process.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
            content = file.read(limit + 1)
    except OSError as error:
        raise DamagedFileError(path, "", f"cannot be read: {error.strerror or error}") from error
    if len(content) > limit:
        raise DamagedFileError(path, "", f"is larger than {limit} bytes, more than a file of this kind has")
    return content


def _is_blob(folder: Path, target: Path) -> bool:
    """Whether `folder` is `<repository>/snapshots/<revision>` and `target` lies in `<repository>/blobs`."""
    return folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
