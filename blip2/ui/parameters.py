"""The settings of one tab: every control of `Generation`, greyed out where the method ignores it."""

from typing import Any

import gradio as gr

from blip2.settings import Generation

METHODS = [
    ("Beam search", "beam"),
    ("Nucleus sampling", "nucleus"),
    ("Greedy", "greedy"),
]
USED_BY = {
    "num_beams": {"beam"},
    "length_penalty": {"beam"},
    "top_p": {"nucleus"},
    "temperature": {"nucleus"},
    "seed": {"nucleus"},
    "num_captions": {"beam", "nucleus"},
}
DESCRIBE = {
    "As the model does best": None,
    "Answer at once": 0,
    "Describe the picture first, in one caption": 1,
    "Describe the picture first, in many captions": 12,
}
KEPT = ("describe", "num_captions")  # by a preset
WHOLE = {"num_beams", "num_captions", "max_new_tokens", "min_new_tokens"}


class Parameters:
    """A folded panel of settings.

    Args:
        defaults: where the controls stand at first.
        several: offer more than one answer.
        questions: offer to describe the picture before answering.
    """

    def __init__(self, defaults: Generation, *, several: bool = False, questions: bool = False):
        method = defaults.method
        self.controls: dict[str, Any] = {}
        if several:
            self._slider(defaults, "num_captions", "Captions", 1, 10, 1, "each is a line of its own")
        paper = Generation.answer() if questions else Generation.caption()
        self.presets = {
            "Paper": paper,
            "Precise": paper.with_(method="greedy", length_penalty=1.0),
            "Creative": paper.with_(method="nucleus", length_penalty=1.0, max_new_tokens=40),
        }
        with gr.Accordion("Parameters", open=False, elem_classes="settings"):
            preset = gr.Radio(
                list(self.presets),
                label="Preset",
                info="sets all below: the paper's beams, the likeliest words, or words drawn at random",
            )
            if questions:
                self.controls["describe"] = gr.Dropdown(
                    list(DESCRIBE),
                    label="Way of answering",
                    info="its own captions, which the model then reads before the question",
                    filterable=False,
                )
            self.controls["method"] = gr.Radio(
                METHODS, value=method, label="Method", info="greedy and nucleus stream; beams cannot"
            )
            with gr.Row():
                self._slider(defaults, "num_beams", "Beams", 1, 10, 1, "candidates kept at each step")
                self._slider(defaults, "length_penalty", "Length penalty", -2, 2, 0.1, "below 0: shorter")
            with gr.Row():
                self._slider(defaults, "top_p", "Top p", 0.05, 1, 0.05, "probability mass to draw from")
                self._slider(defaults, "temperature", "Temperature", 0.1, 2, 0.1, "higher: more varied")
            with gr.Row():
                self._slider(defaults, "max_new_tokens", "Longest answer", 1, 100, 1, "tokens")
                self._slider(defaults, "min_new_tokens", "Shortest answer", 0, 100, 1, "tokens")
            with gr.Row():
                self._slider(
                    defaults, "repetition_penalty", "Repetition penalty", 1, 3, 0.1, "above 1: fewer repeats"
                )
                self.controls["seed"] = gr.Textbox(
                    value="" if defaults.seed is None else str(defaults.seed),
                    label="Seed",
                    info="a whole number repeats a sample",
                    placeholder="a new one each time",
                    interactive="seed" in _used(method),
                    max_lines=1,
                    min_width=220,
                )
        preset.input(
            self.preset,
            preset,
            [control for name, control in self.controls.items() if name not in KEPT],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        changing = {name: control for name, control in self.controls.items() if name in USED_BY}
        self.controls["method"].change(
            lambda chosen: [gr.update(interactive=name in _used(chosen)) for name in changing],
            self.controls["method"],
            list(changing.values()),
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )

    def _slider(
        self, defaults: Generation, name: str, label: str, low: float, high: float, step: float, info: str
    ) -> None:
        self.controls[name] = gr.Slider(
            low,
            high,
            value=getattr(defaults, name),
            step=step,
            label=label,
            info=info,
            interactive=name in _used(defaults.method),
            buttons=[],
            min_width=220,
        )

    def preset(self, chosen: str) -> list[Any]:
        """The controls as a preset has them; how many captions, and how to describe, stay as they are."""
        settings = self.presets[chosen]
        used = _used(settings.method)
        return [
            gr.update(value="" if name == "seed" else getattr(settings, name), interactive=name in used)
            for name in self.controls
            if name not in KEPT
        ]

    @property
    def inputs(self) -> list[Any]:
        """The controls, as inputs of an event."""
        return list(self.controls.values())

    def describe(self, values: tuple[Any, ...]) -> int | None:
        """How many captions the model is to read before the question; None leaves it to the model."""
        return DESCRIBE.get(str(dict(zip(self.controls, values, strict=True)).get("describe")))

    def generation(self, values: tuple[Any, ...]) -> Generation:
        """The settings that the controls' values mean; what the method ignores keeps its default.

        Raises:
            ValueError: a control was emptied, or its value fits no method.
        """
        chosen = dict(zip(self.controls, values, strict=True))
        used = _used(str(chosen["method"]))
        settings: dict[str, Any] = {}
        for name, value in chosen.items():
            if name not in used or (name == "seed" and not str(value or "").strip()):
                continue
            if value is None:
                raise ValueError(f"{self.controls[name].label} is empty: set it under Parameters.")
            if name == "seed":
                value = _seed(value)
            elif name != "method":  # the page sends 1.0 as 1
                value = int(value) if name in WHOLE else float(value)
            settings[name] = value
        return Generation(**settings)


def _seed(text: Any) -> int:
    digits = str(text).strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18):
        raise ValueError(f"The seed is {digits[:30]!r}: use a whole number of at most 18 digits, or nothing.")
    return int(digits)


def _used(method: str) -> set[str]:
    """The settings that a method heeds."""
    always = {"method", "max_new_tokens", "min_new_tokens", "repetition_penalty"}
    return always | {name for name, methods in USED_BY.items() if method in methods}
