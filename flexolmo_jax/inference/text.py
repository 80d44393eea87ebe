"""Text as it is being written: what is final, and where a stop string ends it."""

from collections.abc import Sequence

from flexolmo_jax.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what bytes decode to that are no whole character, or none yet


class TextStream:
    """The text of tokens that come one after another, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]):
        """Starts an empty text; without a tokenizer it stays empty."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self.text = ""

    def read(self, token_ids: Sequence[int], ended: bool) -> tuple[str, bool]:
        """Takes all tokens so far; `ended` says that no more will come.

        Returns:
          (what is new in `text`, whether a stop string was found). `text` holds back what may still change:
          half a character, and the beginning of a stop string.
        """
        text = self._tokenizer.decode(token_ids) if self._tokenizer else ""
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            text = text[: min(found)]
        elif not ended:
            text = text.rstrip(REPLACEMENT)
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)]
        new, self.text = text[len(self.text) :], text
        return new, bool(found)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop`, short of all of it, that `text` ends with."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
