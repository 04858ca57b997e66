"""How an answer is generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from edgevlm.decoding.repetition import RepetitionDetection
from edgevlm.decoding.sampling import make_sampler
from edgevlm.decoding.structured import Constraint
from edgevlm.errors import OptionError
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.messages import check_variables

_OLD_NAMES = {"max_tiles": "max_views"}
"""Options by names that they had before."""


@dataclass(frozen=True)
class GenerationConfig:
    """How an answer is generated; greedy by default."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it. A thought may hold them."""
    draft_tokens: int = 8
    """Longest draft of prompt-lookup decoding, checked in one step; 0 drafts none. In float32 the answer is the same;
    in BF16 a step of several tokens rounds differently from a step of one, and a near tie may fall the other way."""
    constraint: Constraint | None = None
    """What the answer must satisfy; not the thought before it."""
    repetition_detection: RepetitionDetection | None = field(default_factory=RepetitionDetection)
    """When an answer counts as a loop and is ended; None: never. The default needs 512 tokens that say nothing new."""
    top_logprobs: int | None = None
    """Give each token's log-probability with this many of the likeliest in its place; 0: its own alone; None: none."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the answer's text, but for those that are part of it, such as granite-docling's
    `<doctag>`; False shows all but the end token, and stop texts see them."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The chat template's own variables, such as `enable_thinking`."""
    think: bool | None = None
    """Whether the model thinks before it answers; None: as its chat template has it. False closes a thought that the
    template opens whatever it is told; True is an error (`ThinkingError`) for a model that does not think."""
    thinking_budget: int | None = None
    """Most tokens of the thought: then it is closed and the answer begins. They count as new tokens, too."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise OptionError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not isinstance(self.think, bool | None):
            raise OptionError(f"think must be True, False or None, not {self.think!r}")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise OptionError(f"thinking_budget must be 0 or more, not {self.thinking_budget}")
        if not 0 <= self.draft_tokens <= 64:
            raise OptionError(f"draft_tokens must be between 0 and 64, not {self.draft_tokens}")
        if not isinstance(self.constraint, Constraint | None):
            raise OptionError("constraint must be a Constraint, such as Constraint.json_schema(…)")
        if not isinstance(self.repetition_detection, RepetitionDetection | None):
            raise OptionError("repetition_detection must be a RepetitionDetection or None")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= 20:
            raise OptionError(f"top_logprobs must be between 0 and 20, not {self.top_logprobs}")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise OptionError("stop must be a tuple of texts, none of them empty")
        if not isinstance(self.chat_template_kwargs, Mapping):
            raise OptionError("chat_template_kwargs must be a mapping of the template's variables to values")
        check_variables(self.chat_template_kwargs)
        make_sampler(self.temperature, self.top_p, self.top_k, self.seed)


def override(
    config: GenerationConfig | None, budget: ImageBudget | None, options: Mapping[str, Any]
) -> tuple[GenerationConfig, ImageBudget]:
    """Return both with the fields that `options` name changed. Raises `OptionError`, also for an unknown name."""
    config, budget = config or GenerationConfig(), budget or ImageBudget()
    named = {_OLD_NAMES.get(name, name): value for name, value in options.items()}
    of_config = {each.name for each in fields(config)}
    of_budget = {each.name for each in fields(budget)}
    for name in options:
        if _OLD_NAMES.get(name, name) not in of_config | of_budget:
            raise OptionError(f"there is no option {name!r}; {_nearest(name, sorted(of_config | of_budget))}")
    return (
        replace(config, **{name: value for name, value in named.items() if name in of_config}),
        replace(budget, **{name: value for name, value in named.items() if name in of_budget}),
    )


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
