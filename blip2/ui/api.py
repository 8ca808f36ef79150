"""What programs may ask of the app: captions, answers, chats, comparisons and matches, each call by itself.

The same through `gradio_client`, curl and MCP; the page's own events stay private. Docstrings are what
callers read. Nothing of a call is kept.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import gradio as gr

from blip2.chat import Turn
from blip2.checkpoint import Loaded
from blip2.generation import Generation, describe, generate, num_descriptions
from blip2.model import Blip2
from blip2.representation import Blip2Representation
from blip2.ui.compare import pair
from blip2.ui.models import Models
from blip2.ui.picture import Picture
from blip2.ui.session import EXPECTED, Session, friendly, question

MATCHING = "scenes-itm"
File = tuple[str | None, str]


class Api:
    """The functions over a shelf of models; `add` makes them endpoints of the page being built."""

    def __init__(self, models: Models):
        self.models = models

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
            self._endpoint(self.chat, [picture, gr.JSON(label="messages", visible=False), model, force])
            pickers = [
                gr.Textbox(name, label=label, visible=False)
                for name, label in ((first, "first_model"), (second, "second_model"))
            ]
            self._endpoint(self.compare, [picture, asked, *pickers, force])
            texts = gr.JSON(label="texts", visible=False)
            matching = gr.Textbox(MATCHING, label="model", visible=False)
            self._endpoint(self.match, [picture, texts, matching, force])

    def _endpoint(self, function: Callable[..., Any], inputs: list[Any]) -> None:
        # JSON takes a text for JSON to be parsed
        output = gr.Textbox if function.__annotations__["return"] is str else gr.JSON

        @wraps(function)
        def guarded(*values: Any) -> Any:
            try:
                return function(*values)
            except EXPECTED as error:
                raise gr.Error(friendly(error), print_exception=False) from None

        gr.Button(visible=False).click(
            guarded,
            inputs,
            output(label="result", visible=False),
            api_name=function.__name__,
            api_visibility="public",
            concurrency_id="model",
            concurrency_limit=2,
        )

    def _open(self, image: File, model: str, force: bool) -> tuple[Session, Loaded]:
        loaded = self.models.get((model or self.models.default).strip())
        session = Session()
        session.look(*image)
        session.anyway = bool(force)
        return session, loaded

    def caption(
        self, image: File, prompt: str = "", num_captions: int = 1, model: str = "", force: bool = False
    ) -> list[str]:
        """Describe a picture in one or more captions, by beam search.

        Args:
            image: the picture file.
            prompt: words that the captions go on from, such as "a photo of"; may be empty.
            num_captions: how many captions, 1 to 5.
            model: name of the model; empty for the app's default.
            force: caption a picture of a kind that the model does not know, too.

        Returns:
            The captions, likeliest first.
        """
        session, loaded = self._open(image, model, force)
        assert isinstance(loaded.model, Blip2)
        settings = Generation.caption(num_captions=int(num_captions))
        prompt = loaded.processor.prompt(prompt or "", "caption")
        return generate(loaded.model, loaded.processor, session.features(loaded), prompt, settings)[0]

    def answer(self, image: File, question: str, model: str = "", force: bool = False) -> str:
        """Answer a question about a picture in a few words.

        Args:
            image: the picture file.
            question: what to ask about it.
            model: name of the model; empty for the app's default.
            force: answer about a picture of a kind that the model does not know, too.

        Returns:
            The answer.
        """
        session, loaded = self._open(image, model, force)
        return self._answer(session, loaded, question)["answer"]

    def chat(self, image: File, messages: list[dict[str, str]], model: str = "", force: bool = False) -> str:
        """Go on with a conversation about a picture.

        Args:
            image: the picture file.
            messages: the conversation so far, a list of {"role": "user" or "assistant", "content": text},
                taking turns, the user's last.
            model: name of the model; empty for the app's default.
            force: answer about a picture of a kind that the model does not know, too.

        Returns:
            The model's reply.
        """
        turns = _turns(messages)
        session, loaded = self._open(image, model, force)
        chat = session.conversation(loaded)
        for asked, answered in turns[:-1]:
            chat.turns.append(Turn(asked, answered))
        return chat.ask(turns[-1][0])

    def compare(
        self, image: File, question: str, first_model: str = "", second_model: str = "", force: bool = False
    ) -> list[dict[str, str]]:
        """Ask two models the same question about a picture, each in the frame it was evaluated with.

        Args:
            image: the picture file.
            question: what to ask about it.
            first_model: name of a model; empty for an OPT.
            second_model: name of another; empty for a Flan-T5.
            force: answer about a picture of a kind that the models do not know, too.

        Returns:
            For each: model, prompt as it was sent, and answer.
        """
        first, second = pair(self.models)
        names = (first_model or first, second_model or second)
        found = []
        for name in names:
            session, loaded = self._open(image, name, force)
            found.append(self._answer(session, loaded, question))
        return found

    def match(
        self, image: File, texts: list[str], model: str = "", force: bool = False
    ) -> list[dict[str, Any]]:
        """Score how well texts fit a picture.

        Args:
            image: the picture file.
            texts: a list of texts that may describe it.
            model: name of a model with a matching head; empty for the embedded one.
            force: score a picture of a kind that the model does not know, too.

        Returns:
            For each text: text, match (probability that it fits) and cosine (similarity), the best first.
        """
        fine = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
        if not texts or not fine:
            raise ValueError("texts must be a list of one or more texts that are not empty.")
        loaded = self.models.get((model or MATCHING).strip(), "match")
        assert isinstance(loaded.model, Blip2Representation)
        session = Session()
        session.look(*image)
        session.anyway = bool(force)
        features = session.features(loaded)
        tokens = {name: ids.to(loaded.device) for name, ids in loaded.processor.text(texts).items()}
        itm, itc = (loaded.model.score(features, **tokens, head=head)[0].tolist() for head in ("itm", "itc"))
        rows = [
            {"text": text, "match": match, "cosine": cosine}
            for text, match, cosine in zip(texts, itm, itc, strict=True)
        ]
        return sorted(rows, key=lambda row: -row["match"])

    def _answer(self, session: Session, loaded: Loaded, asked: str) -> dict[str, str]:
        model, processor = loaded.model, loaded.processor
        assert isinstance(model, Blip2)
        asked, features = question(asked), session.features(loaded)
        [description] = describe(model, processor, features, num_descriptions(model))
        prompt = processor.prompt(asked, processor.question_style, description=description)
        [[answer]] = generate(model, processor, features, prompt, Generation.answer(), questions=[asked])
        return {"model": loaded.name, "prompt": prompt, "answer": answer}


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
    return [(question(asked), answered) for asked, answered in zip(said[::2], said[1::2], strict=True)]
