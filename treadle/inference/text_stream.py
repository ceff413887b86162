"""Text from tokens that come one at a time."""

from collections.abc import Sequence

from treadle.data.tokenizer import Tokenizer


class TextStream:
    """Shows text as soon as it is certain: characters are never split, and no part of a stop text is shown.

    text: all that was shown. stopped: a stop text came; it and what follows are not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.text, self.stopped = "", False
        self._tokens: list[int] = []
        self._before, self._decoded = 0, 0  # tokens[before:decoded] are decoded; again with them, what follows is right
        self._held = ""  # it may be the beginning of a stop text

    def push(self, token: int) -> str:
        """The text that is certain by now, and was not before."""
        self._tokens.append(token)
        return self._show(self._decode(), last=False)

    def end(self) -> str:
        """What was held back, when no token follows. Half a character is left out."""
        return self._show("", last=True)

    def _decode(self) -> str:
        decode = self.tokenizer.decode
        context, text = decode(self._tokens[self._before : self._decoded]), decode(self._tokens[self._before :])
        if len(text) <= len(context) or text.endswith("\ufffd"):  # it ends inside a character
            return ""
        self._before, self._decoded = self._decoded, len(self._tokens)
        return text[len(context) :]

    def _show(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped, self._held, shown = True, "", text[:found]
        else:
            keep = 0 if last else max((_overlap(text, stop) for stop in self.stop), default=0)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters may be the first of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
