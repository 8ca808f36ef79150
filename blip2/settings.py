"""How to ask and how to answer: prompt styles, and decoding settings with the paper's defaults.

Without torch, as are `blip2.errors` and `blip2.presets`: the app's page is built from these and served while
torch is still being imported.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

Style = Literal["own", "question", "short", "caption", "raw"]  # the frame around a prompt
FRAMES = {"question": "Question: {} Answer:", "short": "Question: {} Short answer:"}
Method = Literal["greedy", "beam", "nucleus"]


@dataclass(frozen=True)
class Generation:
    """Decoding settings: greedy by default; `caption` and `answer` are the paper's (Sec. 4.1, 4.2).

    Attributes:
        method: "greedy", "beam" (cannot stream), or "nucleus" (sampling).
        num_beams: for beam.
        top_p: for nucleus, the probability mass to sample from, in (0, 1].
        temperature: for nucleus, above 0.
        max_new_tokens: length of an answer at most, tokens.
        min_new_tokens: and at least.
        length_penalty: for beam; below 0 favors short answers.
        repetition_penalty: above 1 discourages tokens already said.
        num_captions: how many answers a prompt gets; more than one needs nucleus, or as many beams.
        avoid: words never said, in any case; nor longer words that start with their tokens.
        seed: makes nucleus repeatable.
    """

    method: Method = "greedy"
    num_beams: int = 5
    top_p: float = 0.9
    temperature: float = 1.0
    max_new_tokens: int = 30
    min_new_tokens: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    num_captions: int = 1
    avoid: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that no method could follow."""
        allowed = {
            "method": (self.method in ("greedy", "beam", "nucleus"), "greedy, beam or nucleus"),
            "num_beams": (self.num_beams >= 1, "1 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "temperature": (self.temperature > 0, "above 0"),
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "num_captions": (1 <= self.num_captions <= 64, "1 to 64"),
        }
        for name, (fine, values) in allowed.items():
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {values}")
        most = {"greedy": 1, "beam": self.num_beams}.get(self.method)
        if most is not None and self.num_captions > most:
            raise ValueError(
                f"num_captions is {self.num_captions}; {self.method} gives at most {most}: "
                "use nucleus, or more beams"
            )

    @classmethod
    def caption(cls, **changes: Any) -> "Generation":
        """Five beams, up to 30 tokens (Sec. 4.2)."""
        return cls(**{"method": "beam", **changes})

    @classmethod
    def answer(cls, **changes: Any) -> "Generation":
        """Zero-shot VQA: five beams, up to 10 tokens, length penalty -1 (Sec. 4.1)."""
        return cls(**{"method": "beam", "max_new_tokens": 10, "length_penalty": -1.0, **changes})

    def with_(self, **changes: Any) -> "Generation":
        """These settings with some changed."""
        return replace(self, **changes)

    def options(self) -> dict[str, Any]:
        """The same for transformers' `generate` with beams."""
        return {
            "do_sample": False,
            "num_beams": self.num_beams,
            "num_return_sequences": self.num_captions,
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "length_penalty": self.length_penalty,
            "repetition_penalty": self.repetition_penalty,
        }
