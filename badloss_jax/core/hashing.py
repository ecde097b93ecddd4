"""Hashes that name things by their content."""

import hashlib
import json
from pathlib import Path
from typing import Any


def digest(*parts: Any) -> str:
    """Hashes JSON-able parts to 16 hexadecimal digits; equal parts give equal digests on every machine."""
    # Keys in order and no spaces: the text, and so the hash, is the same however the parts were made.
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """Hashes a file's bytes to 64 hexadecimal digits; raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_hash() -> str:
    """Hashes the source of this package to 16 hexadecimal digits."""
    root = Path(__file__).parents[1]
    content = hashlib.sha256()
    # Sorted, as file systems list files in any order.
    for path in sorted(root.rglob("*.py")):
        content.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:16]
