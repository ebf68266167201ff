"""pyrlk inside a training framework: trl · verl · slime, one module each.

Each maps the framework's own options to an objective, a normalizer and a correction, and gives the
framework a loss of the signature that it asks for. Nothing is patched and nothing else of pyrlk
imports these modules. They import without their framework, because a mapping needs none; the one
name that needs it raises an ImportError that says what to install.
"""

from __future__ import annotations

from typing import NoReturn


def missing(name: str, install: str, error: ImportError) -> NoReturn:
    raise ImportError(f"{name} needs {install} ({error})") from error
