"""From pictures and questions to tensors and back: pixel values, prompt frames, tokens.

The frames are the paper's (Sec. 4.1) and LAVIS's: `Question: ... Answer:` for OPT, `Question: ... Short
answer:` for Flan-T5. A bare question makes OPT answer with a line break, that is, with nothing, so frames are
put on here. A decoder that was tuned to chat gets the frame of its tokenizer's chat template instead.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase

from .errors import CheckpointError, PromptError
from .images import CLIP_MEAN, CLIP_STD, ImageSource, open_image, preprocess
from .settings import FRAMES, Style

Family = Literal["opt", "t5", "bert"]
Turn = tuple[str, str]

LAST_CALL = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id")
MAX_PROMPT_CHARACTERS = 100_000  # beyond it even tokenizing is a burden; far above any model's context


class Processor:
    """Everything between a user and the tensors of one model.

    Attributes:
        family: "opt" for decoder-only, "t5" for encoder-decoder language models, "bert" for stage-1 models.
        tokenizer: of the language model, or the Q-Former's own for stage 1.
        image_size: pixels a side.
        num_query_tokens: how many soft tokens stand for an image.
        qformer_tokenizer: for models whose Q-Former reads the question too.
        context: how many tokens the language model reads and writes in all, queries included; None: no limit.
        end: what ends a caption in a decoder's training, see `blip2.language.Manners`.
        question_prompt: the frame that the model was fine-tuned with, {} where the question goes; or None.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        family: Family,
        image_size: int,
        num_query_tokens: int = 32,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        context: int | None = None,
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
        end: str = "\n",
        question_prompt: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.family: Family = family
        self.image_size = image_size
        self.num_query_tokens = num_query_tokens
        self.mean, self.std = tuple(mean), tuple(std)
        self.context = context
        self.qformer_tokenizer = qformer_tokenizer
        self.end = end
        self.question_prompt = question_prompt
        tokenizer.padding_side = "left" if family == "opt" else "right"

    # --- loading and saving ---

    @classmethod
    def from_pretrained(cls, name: str | Path, config: Any = None, **options: Any) -> "Processor":
        """Read a folder's or a hub repository's tokenizer and image settings, of transformers 4 or 5.

        Args:
            name: folder or hub id.
            config: the model's configuration if it is at hand.
            options: for the library, such as revision or local_files_only.
        """
        config = config or AutoConfig.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        image_size, mean, std = config.vision_config.image_size, CLIP_MEAN, CLIP_STD
        try:
            settings = AutoImageProcessor.from_pretrained(name, **options)
            mean, std = settings.image_mean, settings.image_std
            if config.vision_config.model_type != "blip_2_vision_model":  # some take images of any size
                image_size = pixel_size(settings)
        except (OSError, ValueError):
            pass  # very old folders have no image settings: the released models all share LAVIS's
        qformer_tokenizer = None
        text = config.text_config
        if getattr(config, "architectures", None) == ["Blip2ForImageTextRetrieval"]:
            family: Family = "bert"
        else:
            family = "opt" if config.use_decoder_only_language_model else "t5"
            if config.qformer_config.use_qformer_text_input or config.model_type == "instructblip":
                qformer_tokenizer = AutoTokenizer.from_pretrained(
                    name, subfolder="qformer_tokenizer", **options
                )
        context = getattr(text, "max_position_embeddings", getattr(text, "n_positions", None))
        if family == "bert":  # its positions count text alone
            context = config.qformer_config.max_position_embeddings + config.num_query_tokens
        return cls(
            tokenizer,
            family=family,
            image_size=image_size,
            num_query_tokens=config.num_query_tokens,
            mean=mean,
            std=std,
            context=context,
            qformer_tokenizer=qformer_tokenizer,
            end=_end(tokenizer, text) if family == "opt" else "\n",
            question_prompt=question_prompt(config),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer and image settings so that transformers 4 and 5 read them."""
        folder = Path(folder)
        self._save_tokenizer(self.tokenizer, folder)
        if self.qformer_tokenizer is not None:
            self._save_tokenizer(self.qformer_tokenizer, folder / "qformer_tokenizer")
        image = {
            "image_processor_type": "BlipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": Image.Resampling.BICUBIC.value,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        instruct = self.qformer_tokenizer is not None
        name = "InstructBlipProcessor" if instruct else "Blip2Processor"
        for file, content in {
            "preprocessor_config.json": {**image, "processor_class": name},
            # 5.x would put the image settings in here too; 4.x then fails, and 5.x reads the other file
            "processor_config.json": {"processor_class": name, "num_query_tokens": self.num_query_tokens},
        }.items():
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Without the cutting and padding of its last call, which would be saved and cut prompts later."""
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        for setting in LAST_CALL:
            tokenizer.init_kwargs.pop(setting, None)
        tokenizer.save_pretrained(folder)

    # --- pictures ---

    def images(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """One or many pictures in any form `open_image` takes -> pixel_values: float (B, 3, S, S)."""
        many: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
        return preprocess([open_image(image) for image in many], self.image_size, self.mean, self.std)

    # --- text ---

    def prompt(
        self, text: str = "", style: Style = "question", history: Sequence[Turn] = (), description: str = ""
    ) -> str:
        """The exact text a model is sent.

        Args:
            text: a question, a caption's beginning, or with style "raw" anything.
            style: "question" and "short" frame a question and the turns before it ("short" is Flan-T5's
                default: "Question: ... Short answer:"), "own" as the model was fine-tuned; "caption" and
                "raw" leave text as it is.
            history: earlier questions and their answers, oldest first.
            description: of the picture, put before the questions ("describe, then answer").

        Raises:
            PromptError: no question, or a text of more than MAX_PROMPT_CHARACTERS.
        """
        if not isinstance(text, str):
            raise PromptError(f"a prompt is text, not {type(text).__name__}")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise PromptError(
                f"the prompt has {len(text):,} characters; at most {MAX_PROMPT_CHARACTERS:,} fit"
            )
        if style == "raw":
            return text
        text = " ".join(text.split())
        if style == "caption":
            return text
        if style not in ("own", *FRAMES):
            raise PromptError(f"unknown prompt style {style!r}: use question, short, caption or raw")
        if not text:
            raise PromptError("the question is empty: ask something about the picture")
        if text.lower().startswith("question:"):
            return text  # someone wrote the frame by hand
        if style == "own" and not self.question_prompt:
            style = self.question_style
        if style == "question" and self.has_chat_frame:
            return self._chat_frame(text, history, description)
        own = self.question_prompt if style == "own" else None
        earlier, frame = own or FRAMES["question"], own or FRAMES[style]
        turns = [f"{earlier.replace('{}', question)} {reply.rstrip('.')}." for question, reply in history]
        if description:
            turns.insert(0, f"{description.strip().rstrip('.')}.")
        return " ".join([*turns, frame.replace("{}", text)])

    @property
    def has_chat_frame(self) -> bool:
        """Whether the style "question" means the frame of a chat model: its tokenizer has a template."""
        return self.family == "opt" and bool(getattr(self.tokenizer, "chat_template", None))

    def _chat_frame(self, question: str, history: Sequence[Turn], description: str) -> str:
        """The conversation as the tokenizer's chat template frames it, up to where the answer begins."""
        asked = [*(earlier for earlier, _ in history), question]
        if description:
            asked[0] = f"{description.strip().rstrip('.')}. {asked[0]}"
        turns = []
        for number, text in enumerate(asked):
            turns.append({"role": "user", "content": text})
            if number < len(history):
                turns.append({"role": "assistant", "content": history[number][1]})
        framed = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        start = self.tokenizer.bos_token  # `text` puts it in front where the tokenizer does
        return str(framed).removeprefix(start or "") if self._adds_start else str(framed)

    @property
    def _adds_start(self) -> bool:
        return self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]

    @property
    def question_style(self) -> Style:
        """The frame for questions: the model's own where it was fine-tuned, or the paper's for its family."""
        if self.question_prompt:
            named: dict[str, Style] = {FRAMES["question"]: "question", FRAMES["short"]: "short"}
            return named.get(self.question_prompt, "own")
        return "question" if self.family == "opt" else "short"

    def text(self, prompts: str | Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """Tokenize prompts, padded on the side the family needs.

        Args:
            prompts: one or many.
            max_length: cut each to so many tokens (training); None: refuse what does not fit the context.

        Returns:
            input_ids and attention_mask: int (B, T). Nothing of the prompt is cut silently when asking.
        """
        many = [prompts] if isinstance(prompts, str) else list(prompts)
        cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
        tokens = self.tokenizer(many, padding=True, return_tensors="pt", **cut)
        tokens = {name: tokens[name].long() for name in ("input_ids", "attention_mask")}  # floats if empty
        length = tokens["input_ids"].shape[1]
        if self.context is not None and length + self.num_query_tokens >= self.context:
            raise PromptError(
                f"the prompt has {length} tokens; beside the picture's {self.num_query_tokens} this model "
                f"reads fewer than {self.context - self.num_query_tokens}: shorten it"
            )
        return tokens

    def question(self, questions: str | Sequence[str]) -> dict[str, Tensor]:
        """Questions for a Q-Former that reads them: qformer_input_ids and _attention_mask, or nothing."""
        if self.qformer_tokenizer is None:
            return {}
        many = [questions] if isinstance(questions, str) else list(questions)
        tokens = self.qformer_tokenizer(many, padding=True, return_tensors="pt")
        return {f"qformer_{name}": tokens[name] for name in ("input_ids", "attention_mask")}

    def decode(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Generated tokens (B, T) to text, without special tokens and surrounding space."""
        rows = ids.tolist() if isinstance(ids, torch.Tensor) else [list(row) for row in ids]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def spellings(self, words: Iterable[str]) -> list[list[int]]:
        """The token sequences that words are made of: as given, in lower case, capitalized, after a space.

        Spellings with a token that stands for all unknown words are left out.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for spelling in (word, word.lower(), word.capitalize()):
                for text in (spelling, f" {spelling}"):
                    ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
                    if ids and self.tokenizer.unk_token_id not in ids:
                        found[ids] = None
        return [list(ids) for ids in found]

    def unknown_words(self, text: str) -> list[str]:
        """Words that the tokenizer has no token for; only small word-level vocabularies lack any."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            return []
        words = [word.strip(".,?!:;\"'()") for word in text.split()]
        return [w for w in words if w and unknown in self.tokenizer(w, add_special_tokens=False)["input_ids"]]


def question_prompt(config: Any) -> str | None:
    """The frame of questions that a model was fine-tuned with, as its configuration says; None: it was not.

    Raises:
        CheckpointError: no place for the question in it.
    """
    frame = getattr(config, "question_prompt", None)
    if frame is not None and (not isinstance(frame, str) or frame.count("{}") != 1):
        raise CheckpointError(f"question_prompt is {frame!r}: one {{}} in it says where the question goes")
    return frame


def pixel_size(settings: Any) -> int:
    """Pixels a side of what an image processor of transformers makes: of its crop, or of its resized image.

    Raises:
        ValueError: it does not make squares.
    """
    cropped = getattr(settings, "do_center_crop", None)
    size = getattr(settings, "crop_size" if cropped else "size", None) or {}
    sides = {size[name] for name in ("height", "width", "shortest_edge", "longest_edge") if size.get(name)}
    if len(sides) != 1:
        raise ValueError(
            f"its image processor makes pictures of {dict(size)}: one side for squares is needed"
        )
    return int(sides.pop())


def _end(tokenizer: PreTrainedTokenizerBase, text_config: Any) -> str:
    """What ends a decoder's captions: the first of the tokens that end its answers."""
    ends = text_config.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    return "\n" if first is None else tokenizer.decode([first])
