"""Text of a continuation while its tokens arrive: what is final, and where a stop string ends it.

The text of a continuation is decode(prompt + new tokens) without decode(prompt). If new tokens change the end of the
prompt's text (they complete a character), it is what follows their common prefix.
"""

from collections.abc import Sequence

from flexolmo_jax.data.tokenization.decoding import IncrementalDecoder, common_prefix
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer

_BLOCK = 64  # tokens of a prompt decoded at once


class TextStream:
    """The text that new tokens add to a prompt, up to the first stop string.

    Attributes:
      prompt: the text of the prompt that new tokens cannot change.
      text: the final part of the new text.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], prompt_ids: Sequence[int] = ()):
        """Starts after a prompt; without a tokenizer the text stays empty."""
        self._decoder = IncrementalDecoder(tokenizer) if tokenizer else None
        self._stop, self._read = tuple(stop), 0
        self.prompt, self.text = "", ""
        if self._decoder:
            blocks = (prompt_ids[start : start + _BLOCK] for start in range(0, len(prompt_ids), _BLOCK))
            self.prompt = "".join(map(self._decoder.add, blocks))
        self._prompt_tail = self._decoder.tail if self._decoder else ""
        self._settled = ""  # text after `prompt`

    def read(self, token_ids: Sequence[int], ended: bool) -> tuple[str, bool]:
        """Takes all tokens so far; `ended` says that no other will follow.

        Returns:
          (the new part of `text`, whether a stop string was found). `text` excludes what may still change, such as half
          a character, and a possible beginning of a stop string.
        """
        if self._decoder is None:
            return "", False
        self._settled += self._decoder.add(token_ids[self._read :])
        self._read = len(token_ids)
        whole = self._settled + self._decoder.tail if ended else self._settled
        text = whole[len(common_prefix(whole, self._prompt_tail)) :]
        found = min((at for stop in self._stop if (at := text.find(stop, len(self.text))) >= 0), default=len(text))
        # Where a stop string may have begun. Until that is known, one that begins later does not end the text.
        begun = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        stopped = found < len(text) and (ended or found <= begun)
        text = text[:found] if stopped or ended else text[:begun]
        new, self.text = text[len(self.text) :], text
        return new, stopped


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that is a suffix of `text`."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
