"""Where alerts go: a sink takes what waits for it in the store's outbox, in order, each once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Protocol

from finetune.applications.monitor.store import Store
from finetune.recipe.files import build_disk_error, sync_path


class Sink(Protocol):
    """What takes alerts."""

    @property
    def name(self) -> str:
        """Of its outbox; the same after a restart."""

    def deliver(self, store: Store) -> None:
        """Take what waits, as far as possible now; never wait for better times."""


class JsonlSink:
    """A file with one alert a line, each on the disk before it leaves the outbox.

    A crash between these two leaves an alert in both. Before the first line is written, the file is therefore read:
    what it holds is not written again, and a last line that a crash has torn is cut off.
    """

    name = "file"
    trouble: str | None = None  # a disk that refuses ends the loop

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: set[str] | None = None

    def deliver(self, store: Store) -> None:
        """Append what waits.

        Raises:
            ResourceError: the disk refuses; the alerts stay in the outbox.
        """
        while parcels := store.read_outbox(self.name):
            for parcel in parcels:
                try:
                    self._append(parcel.id, parcel.body)
                except OSError as error:
                    raise build_disk_error(self.path, error, needed_bytes=len(parcel.body)) from error
                store.mark_delivered(self.name, parcel)

    def _append(self, name: str, body: str) -> None:
        if self._known is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._known = _read_ids(self.path)
        if name in self._known:
            return
        is_made = not self.path.exists()
        with self.path.open("ab") as file:
            file.write(body.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if is_made:
            sync_path(self.path.parent)


def _read_ids(path: Path) -> set[str]:
    """The ids of the alerts in a file, after its torn last line has been cut off."""
    if not path.exists():
        return set()
    names, whole = set(), 0
    with path.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(whole)
                break
            whole += len(line)
            try:
                names.add(json.loads(line)["id"])
            except (ValueError, TypeError, KeyError):
                continue  # not ours: it hinders nobody
    return names
