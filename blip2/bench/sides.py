"""The two that are compared: this package, and transformers as someone who knows it well would run it.

Both offer the same few actions, from a picture (PIL) to text or scores, so that each is timed with all it
does itself: preprocessing, tokenizing, moving to the device. Transformers runs in eval mode without
gradients, with its fused attention (its default) and prompts padded on the side that the model needs, and
prepares a picture once a chat; an encoded picture cannot be handed to it, so each call encodes it again.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from blip2.chat import Chat
from blip2.checkpoint import Loaded, load, quiet
from blip2.generation import Generation, generate
from blip2.layout import read_json, read_layout
from blip2.processing import Processor


class Side(Protocol):
    """What is timed; see `Ours` for the arguments."""

    precision: str

    def preprocess(self, picture: Image) -> Tensor: ...  # noqa: D102
    def encode(self, pixel_values: Tensor) -> Tensor: ...  # noqa: D102
    def caption(self, pictures: list[Image], prompt: str, tokens: int, beams: int = 1) -> list[str]: ...  # noqa: D102
    def chat(self, picture: Image, questions: list[str], tokens: int) -> list[str]: ...  # noqa: D102
    def match(self, picture: Image, texts: list[str]) -> Tensor: ...  # noqa: D102
    def contrast(self, picture: Image, texts: list[str]) -> Tensor: ...  # noqa: D102


class Ours:
    """This package, through its public functions."""

    def __init__(self, folder: Path, precision: str, device: torch.device):
        self.loaded: Loaded = load(folder, precision=precision, device=device)
        self.model: Any = self.loaded.model
        self.processor = self.loaded.processor
        self.device, self.precision = self.loaded.device, self.loaded.precision

    def preprocess(self, picture: Image) -> Tensor:
        """A picture as float (1, 3, S, S)."""
        return self.processor.images(picture)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """What the language model reads of pictures, float (B, Q, L); of a stage-1 model, (B, Q, D)."""
        image = self.model.encode_image(pixel_values.to(self.device))
        return image.query_output if image.language_inputs is None else image.language_inputs

    def caption(self, pictures: list[Image], prompt: str, tokens: int, beams: int = 1) -> list[str]:
        """So many new tokens for each picture, whatever ends a text; greedy, or with beams."""
        image = self.model.encode_image(self.processor.images(pictures).to(self.device))
        settings = Generation(
            method="beam" if beams > 1 else "greedy",
            num_beams=beams,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
        )
        said = generate(self.model, self.processor, image, [prompt] * len(pictures), settings)
        return [text for [text] in said]

    def chat(self, picture: Image, questions: list[str], tokens: int) -> list[str]:
        """The answers of one conversation, so many tokens each."""
        chat = Chat(self.model, self.processor, describe=0)
        chat.set_image(picture)
        settings = Generation(max_new_tokens=tokens, min_new_tokens=tokens)
        return [chat.ask(question, settings) for question in questions]

    def match(self, picture: Image, texts: list[str]) -> Tensor:
        """Probability that a picture and each text belong together, float (N,)."""
        return self._score(picture, texts, "itm")

    def contrast(self, picture: Image, texts: list[str]) -> Tensor:
        """Cosine similarity of a picture and each text, float (N,)."""
        return self._score(picture, texts, "itc")

    def _score(self, picture: Image, texts: list[str], head: str) -> Tensor:
        image = self.model.encode_image(self.processor.images(picture).to(self.device))
        tokens = {name: value.to(self.device) for name, value in self.processor.text(texts).items()}
        return self.model.score(image, **tokens, head=head)[0].float().cpu()


class Theirs:
    """transformers.

    Attributes:
        batch: how many pictures or texts of one call are best, by the action's name; all where none is set.
    """

    def __init__(self, folder: Path, precision: str, device: torch.device):
        import transformers

        layout = read_layout(folder)
        kind = read_json(folder / "config.json")["model_type"]
        if kind != "blip-2":
            raise ValueError(
                f"{folder.name} is of type {kind}: only blip-2 is compared with transformers; add --side ours"
            )
        name = "Blip2ForImageTextRetrieval" if layout.stage1 else "Blip2ForConditionalGeneration"
        self.dtype = torch.bfloat16 if precision in ("int8", "nf4") else getattr(torch, precision)
        options: dict[str, Any] = {"dtype": self.dtype, "local_files_only": True}
        if precision == "int8":
            options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
        elif precision == "nf4":
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        if device.type != "cpu":
            options["device_map"] = {"": device}
        with quiet():
            self.model: Any = getattr(transformers, name).from_pretrained(folder, **options).eval()
            # the backend without torchvision: its pixels are this package's, so the answers can be, too
            self.processor: Any = transformers.Blip2Processor.from_pretrained(
                folder, backend="pil", local_files_only=True
            )
        self.device, self.precision = device, precision
        decoder_only = not layout.stage1 and layout.config.use_decoder_only_language_model
        self.skip_prompt = decoder_only  # its answers begin with the prompt
        self.processor.tokenizer.padding_side = "left" if decoder_only else "right"
        self.image_ids = torch.full((1, layout.config.num_query_tokens), layout.config.image_token_index)
        self.frame = Processor.from_pretrained(folder, layout.config, local_files_only=True)
        self.batch: dict[str, int] = {}

    def preprocess(self, picture: Image) -> Tensor:
        """See `Ours`."""
        return self.processor.image_processor(picture, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """See `Ours`."""
        pixel_values = pixel_values.to(self.device, self.dtype)
        return self.model.get_image_features(pixel_values, return_dict=True).pooler_output

    def caption(self, pictures: list[Image], prompt: str, tokens: int, beams: int = 1) -> list[str]:
        """See `Ours`."""
        said: list[str] = []
        step = self.batch.get("caption", len(pictures))
        for start in range(0, len(pictures), step):
            some = pictures[start : start + step]
            inputs = self.processor(images=some, text=[prompt] * len(some), padding=True, return_tensors="pt")
            said += self._generate(dict(inputs), tokens, beams)
        return said

    def chat(self, picture: Image, questions: list[str], tokens: int) -> list[str]:
        """See `Ours`: each question is sent with all that was said before, and with the picture."""
        pixel_values = self.preprocess(picture)
        turns: list[tuple[str, str]] = []
        for question in questions:
            text = self.frame.prompt(question, self.frame.question_style, turns)
            ids = self.processor.tokenizer(text, return_tensors="pt")["input_ids"]
            ids = torch.cat([self.image_ids, ids], dim=1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values}
            turns.append((question, self._generate(inputs, tokens)[0]))
        return [answer for _, answer in turns]

    @torch.no_grad()
    def _generate(self, inputs: dict[str, Tensor], tokens: int, beams: int = 1) -> list[str]:
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        ids = self.model.generate(
            **inputs, do_sample=False, num_beams=beams, max_new_tokens=tokens, min_new_tokens=tokens
        )
        ids = ids[:, inputs["input_ids"].shape[1] if self.skip_prompt else 0 :]
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def match(self, picture: Image, texts: list[str]) -> Tensor:
        """See `Ours`; pairs alone are taken, so the picture goes in as often as there are texts."""
        return self._score(picture, texts, "match").softmax(-1)[:, 1]

    def contrast(self, picture: Image, texts: list[str]) -> Tensor:
        """See `Ours`; one picture serves a whole batch of texts."""
        return self._score(picture, texts, "contrast")

    @torch.no_grad()
    def _score(self, picture: Image, texts: list[str], action: str) -> Tensor:
        pixel_values = self.preprocess(picture).to(self.device, self.dtype)
        step = self.batch.get(action, len(texts))
        scores = []
        for start in range(0, len(texts), step):
            ids = self.processor.tokenizer(texts[start : start + step], padding=True, return_tensors="pt")
            rows = len(ids["input_ids"])
            images = self.image_ids.expand(rows, -1)
            logits = self.model(
                pixel_values.expand(rows if action == "match" else 1, -1, -1, -1),
                torch.cat([images, ids["input_ids"]], dim=1).to(self.device),
                torch.cat([torch.ones_like(images), ids["attention_mask"]], dim=1).to(self.device),
                use_image_text_matching_head=action == "match",
            ).logits_per_image
            scores.append(logits.float().cpu() if action == "match" else logits[0].float().cpu())
        return torch.cat(scores)
