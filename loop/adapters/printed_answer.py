"""Prints a generated answer with its reasoning and tool calls apart, also while it is generated."""

from typing import Any

from torch import Tensor

from data.dialogues.conversation import Turn
from data.encoding.generated import AnswerMarks, printed, without_closers


def as_json(answer: Turn) -> dict[str, Any]:
    """Return an answer as JSON values; reasoning and tool calls are there if it has any."""
    calls = [{"name": call.name, "arguments": call.arguments} for call in answer.calls]
    return {
        "answer": answer.text,
        **({"reasoning": answer.reasoning} if answer.reasoning else {}),
        **({"tool_calls": calls} if calls else {}),
    }


class AnswerPrinter:
    """A streamer for `generate`: prints what no later token changes; tool calls are last."""

    def __init__(self, marks: AnswerMarks, tokenizer: Any, tools: Any) -> None:
        self.marks, self.tokenizer, self.tools = marks, tokenizer, tools
        self.ids: list[int] | None = None  # None until the prompt is put
        self.shown = ""

    def put(self, ids: Tensor) -> None:
        """Take the prompt first, then each new token."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += ids.flatten().tolist()
        self._print(self.marks.split_unfinished(self._text()))

    def end(self) -> None:
        """Print the rest of the answer."""
        self._print(self.marks.split(self._text(), self.tools))
        print()
        self.ids, self.shown = None, ""

    def _text(self) -> str:
        return without_closers(self.tokenizer.decode(self.ids or []), self.tokenizer)

    def _print(self, answer: Turn) -> None:
        text = printed(answer)
        if text.startswith(self.shown):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text
