"""How a recipe names a base model: a folder, a Hub id, or `id@revision`."""

from __future__ import annotations

from pathlib import Path

SCRATCH_BASE = "scratch"
"""What `model.base` says where there is none."""


def split_revision(reference: str) -> tuple[str, str | None]:
    """`acme/base@v1` -> (`acme/base`, `v1`); a folder stays whole, for its name may hold an @."""
    if Path(reference).expanduser().is_dir():
        return reference, None
    name, _, revision = reference.partition("@")
    return name, revision or None
