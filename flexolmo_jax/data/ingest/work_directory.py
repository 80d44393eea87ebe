"""Where finished units of tokenizing lie until a corpus is complete, so that an interruption loses little."""

import contextlib
import json
import os
import shutil
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import platformdirs
import tokenizers
from etils import epath

from flexolmo_jax.data.ingest.units import RECORD_SUFFIX, Settings, Unit
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.paths import is_remote

_SETTINGS, _TOKENIZER, _LOCK = "settings.json", "tokenizer.json", ".lock"


class WorkDirectory:
    """The work directory of an output: beside it, or in the user's cache directory where that is remote.

    Attributes:
      path: where it is.
    """

    def __init__(self, out: epath.PathLike):
        if is_remote(out):
            name = urllib.parse.quote(os.fspath(out), safe="")
            self.path = platformdirs.user_cache_path("flexolmo-jax") / "tokenize" / name
        else:
            out = Path(out)
            self.path = out.parent / f"{out.name}.incomplete"

    @property
    def tokenizer(self) -> Path:
        """The copy of the tokenizer that processes load."""
        return self.path / _TOKENIZER

    @contextlib.contextmanager
    def opened(self, settings: Settings, tokenizer: Tokenizer) -> Iterator[None]:
        """Makes or resumes the directory, for this process alone.

        It is removed when the block ends well, and on an error if nothing in it is finished.

        Raises:
          UserError: it is of other settings, or another process works in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(self.path / _LOCK, timeout=0):
                self._check_settings(settings)
                try:
                    tokenizer.save(self.tokenizer)
                    yield
                except BaseException:
                    if not self.holds_finished:
                        self.remove()
                    raise
                self.remove()
        except filelock.Timeout:
            raise UserError(
                f"{self.path}: another process tokenizes there; wait for it, or name another output"
            ) from None

    @property
    def holds_finished(self) -> bool:
        """Whether there is a finished unit."""
        return any(self.path.glob(f"*{RECORD_SUFFIX}"))

    def record(self, unit: Unit) -> dict[str, Any] | None:
        """The record of a finished unit; None where it is not finished, or cannot be known to be the same."""
        file = self.path / unit.record
        return None if unit.pipes or not file.exists() else json.loads(file.read_bytes())

    def remove(self) -> None:
        """Removes the directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _check_settings(self, settings: Settings) -> None:
        """Stores the settings of a new directory, or compares those of an old one."""
        file = self.path / _SETTINGS
        current = {**settings.description(), "tokenizers": tokenizers.__version__}
        if not file.exists():
            others = [path.name for path in self.path.iterdir() if path.name not in (_LOCK, f"{_SETTINGS}.incomplete")]
            if others:
                raise UserError(f"{self.path}: exists, and `flexolmo tokenize` did not make it; name another output")
            unfinished = self.path / f"{_SETTINGS}.incomplete"
            unfinished.write_text(json.dumps(current))
            unfinished.replace(file)
        before = json.loads(file.read_bytes())
        changed = sorted(key for key in before.keys() | current.keys() if before.get(key) != current.get(key))
        if changed:
            raise UserError(
                f"{self.path}: was begun with another {' and '.join(changed)}; use the same again to resume from it, "
                "or remove it"
            )
