"""What programs may ask of the app: captions, answers, chats, comparisons and matches, each call by itself.

The same through `gradio_client`, curl and MCP; the page's own events stay private. Docstrings are what
callers read. Nothing of a call is kept.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import gradio as gr

from blip2.conversation import Turn
from blip2.settings import Generation
from blip2.ui import errors
from blip2.ui.compare import pair
from blip2.ui.json_input import MESSAGES, TEXTS, JsonInput
from blip2.ui.picture import Picture
from blip2.ui.stop import Stop
from blip2.ui.subject import Subject
from blip2.ui.tab import AT_ONCE
from blip2.ui.work import Work

MATCHING = "scenes-itm"
File = tuple[str | None, str]


class Api:
    """The functions over a shelf of models; `add` makes them endpoints of the page being built."""

    def __init__(self, work: Work):
        self.work, self.models = work, work.models

    def add(self) -> None:
        """Add the endpoints /caption, /answer, /chat, /compare and /match."""
        first, second = pair(self.models)
        with gr.Row(visible=False):
            picture = Picture(label="image", visible=False)
            asked = gr.Textbox(label="question", visible=False)
            force = gr.Checkbox(False, label="force", visible=False)
            model = gr.Textbox(self.models.default, label="model", visible=False)
            self._endpoint(
                self.caption,
                [
                    picture,
                    gr.Textbox("", label="prompt", visible=False),
                    gr.Number(1, label="num_captions", precision=0, visible=False),
                    model,
                    force,
                ],
            )
            self._endpoint(self.answer, [picture, asked, model, force])
            self._endpoint(self.chat, [picture, JsonInput("messages", MESSAGES), model, force])
            pickers = [
                gr.Textbox(name, label=label, visible=False)
                for name, label in ((first, "first_model"), (second, "second_model"))
            ]
            self._endpoint(self.compare, [picture, asked, *pickers, force])
            texts = JsonInput("texts", TEXTS)
            matching = gr.Textbox(MATCHING, label="model", visible=False)
            self._endpoint(self.match, [picture, texts, matching, force])

    def _endpoint(self, function: Callable[..., Any], inputs: list[Any]) -> None:
        # JSON takes a text for JSON to be parsed
        output = gr.Textbox if function.__annotations__["return"] is str else gr.JSON

        @wraps(function)
        def guarded(*values: Any) -> Any:
            try:
                return function(*values)
            except errors.EXPECTED as error:
                raise gr.Error(errors.friendly(error), print_exception=False) from None

        gr.Button(visible=False).click(
            guarded,
            inputs,
            output(label="result", visible=False),
            api_name=function.__name__,
            api_visibility="public",
            concurrency_id="model",
            concurrency_limit=AT_ONCE,
        )

    def _open(self, image: File, model: str, force: bool) -> tuple[str, Subject]:
        subject = Subject.of_file(*image)
        subject.anyway = bool(force)
        return (model or self.models.default).strip(), subject

    def caption(
        self, image: File, prompt: str = "", num_captions: int = 1, model: str = "", force: bool = False
    ) -> list[str]:
        """Describe a picture in one or more captions, by beam search.

        Args:
            image: the picture: a file, or over MCP a data URL such as data:image/png;base64,...
            prompt: words that the captions go on from, such as "a photo of"; may be empty.
            num_captions: how many captions, 1 to 5.
            model: name of the model; empty for the app's default.
            force: caption a picture of a kind that the model does not know, too.

        Returns:
            The captions, likeliest first.
        """
        name, subject = self._open(image, model, force)
        settings = Generation.caption(num_captions=int(num_captions))
        return self.work.last("caption", [name], subject, prompt or "", settings, stop=Stop())

    def answer(self, image: File, question: str, model: str = "", force: bool = False) -> str:
        """Answer a question about a picture in a few words.

        Args:
            image: the picture: a file, or over MCP a data URL such as data:image/png;base64,...
            question: what to ask about it.
            model: name of the model; empty for the app's default.
            force: answer about a picture of a kind that the model does not know, too.

        Returns:
            The answer.
        """
        asked, (name, subject) = errors.question(question), self._open(image, model, force)
        task = ("instruct", [name], subject, asked, Generation.answer(), None, None)
        return self.work.last(*task, stop=Stop()).answer

    def chat(self, image: File, messages: list[dict[str, str]], model: str = "", force: bool = False) -> str:
        """Go on with a conversation about a picture.

        Args:
            image: the picture: a file, or over MCP a data URL such as data:image/png;base64,...
            messages: the conversation so far, a list of {"role": "user" or "assistant", "content": text},
                taking turns, the user's last.
            model: name of the model; empty for the app's default.
            force: answer about a picture of a kind that the model does not know, too.

        Returns:
            The model's reply.
        """
        turns = _turns(messages)
        name, subject = self._open(image, model, force)
        subject.conversation.turns += [Turn(asked, answered) for asked, answered in turns[:-1]]
        task = ("talk", [name], subject, turns[-1][0], Generation.answer(), None, None)
        return self.work.last(*task, stop=Stop()).answer

    def compare(
        self, image: File, question: str, first_model: str = "", second_model: str = "", force: bool = False
    ) -> list[dict[str, str]]:
        """Ask two models the same question about a picture, each in the frame it was evaluated with.

        Args:
            image: the picture: a file, or over MCP a data URL such as data:image/png;base64,...
            question: what to ask about it.
            first_model: name of a model; empty for an OPT.
            second_model: name of another; empty for a Flan-T5.
            force: answer about a picture of a kind that the models do not know, too.

        Returns:
            For each: model, prompt as it was sent, and answer.
        """
        first, second = pair(self.models)
        names = [(first_model or first).strip(), (second_model or second).strip()]
        asked, (_, subject) = errors.question(question), self._open(image, "", force)
        task = ("compare", names, subject, asked, Generation.answer(), None, None)
        turns: dict[int, Turn] = {}
        for item in self.work.run(*task, stop=Stop()):
            side, said = item if isinstance(item, tuple) else (0, item)
            if isinstance(said, BaseException):
                raise said
            if isinstance(said, Turn):
                turns[side] = said
        return [
            {"model": name, "prompt": turns[side].prompt, "answer": turns[side].answer}
            for side, name in enumerate(names)
        ]

    def match(
        self, image: File, texts: list[str], model: str = "", force: bool = False
    ) -> list[dict[str, Any]]:
        """Score how well texts fit a picture.

        Args:
            image: the picture: a file, or over MCP a data URL such as data:image/png;base64,...
            texts: a list of texts that may describe it.
            model: name of a model with a matching head; empty for the embedded one.
            force: score a picture of a kind that the model does not know, too.

        Returns:
            For each text: text, match (probability that it fits) and cosine (similarity), the best first.
        """
        fine = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
        if not texts or not fine:
            raise ValueError("texts must be a list of one or more texts that are not empty.")
        name, subject = self._open(image, model or MATCHING, force)
        scores = self.work.last("match", [name], subject, texts, stop=Stop(), kinds=["match"])
        rows = [
            {"text": text, "match": match, "cosine": cosine}
            for text, (match, cosine) in zip(texts, scores, strict=True)
        ]
        return sorted(rows, key=lambda row: -row["match"])


def _turns(messages: Any) -> list[tuple[str, str]]:
    """Questions and answers; the last question has none yet.

    Raises:
        ValueError: no such conversation.
    """
    roles = ("user", "assistant")
    fine = isinstance(messages, list) and len(messages) % 2 == 1
    for place, message in enumerate(messages if fine else ()):
        fine &= isinstance(message, dict) and message.get("role") == roles[place % 2]
        fine = fine and isinstance(message.get("content"), str)
    if not fine:
        raise ValueError(
            'messages must be a list of {"role": ..., "content": text} with the roles user and assistant '
            "taking turns, beginning and ending with user."
        )
    said = [message["content"] for message in messages] + [""]
    return [(errors.question(asked), answered) for asked, answered in zip(said[::2], said[1::2], strict=True)]
