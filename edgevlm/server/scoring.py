"""`POST /v1/score`: a request understood, and the scores of its choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgevlm.decoding.config import GenerationConfig
from edgevlm.decoding.scoring import YES_NO, AnyScores, LabelScores
from edgevlm.decoding.structured import check_choices
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.messages import about_label
from edgevlm.server.completion import timings, usage
from edgevlm.server.engine import ScoreTask
from edgevlm.server.errors import ApiError, blaming
from edgevlm.server.messages import Conversation
from edgevlm.server.plan import Plan
from edgevlm.server.schemas import MAX_CHOICES, ScoreRequest
from edgevlm.server.settings import ServeConfig

_OF_ONE_TYPE = {"minimum": "score", "maximum": "score", "threshold": "multi_label"}
"""Fields that one type alone has."""


def make_score_plan(request: ScoreRequest, config: ServeConfig, caller: str) -> Plan:
    """Understand a request, its pictures' headers included. Raises `ApiError` and edgevlm's own errors."""
    conversation = Conversation(request.messages, config)
    choices = _choices(request)
    with blaming("choices"):
        check_choices(choices)
        conversation.count(choices)
    are_labels = request.type == "multi_label"
    if are_labels:
        with blaming("messages"):
            about_label(conversation.messages, choices[0])
    return Plan(
        conversation,
        GenerationConfig(chat_template_kwargs=conversation.variables(request.chat_template_kwargs), think=False),
        ImageBudget(conversation.detail, request.max_image_tokens, request.max_tiles),
        None,
        caller,
        ScoreTask(choices, are_labels, request.calibration_temperature),
    )


def _choices(request: ScoreRequest) -> Sequence[str]:
    """Return the texts that are scored. Raises `ApiError`."""
    kind, choices = request.type or "choice", request.choices
    for param, its_type in _OF_ONE_TYPE.items():
        if getattr(request, param) is not None and kind != its_type:
            raise ApiError(400, "invalid_value", f'{param}: is for the type "{its_type}" alone', param=param)
    if kind == "score":
        return _scale(request)
    if kind == "bool":
        if choices is not None and len(choices) != 2:
            message = f"choices: a bool has two, what is true and what is false, not {len(choices)}"
            raise ApiError(400, "invalid_value", message, param="choices")
        return choices or YES_NO
    if choices is None:
        raise ApiError(400, "invalid_request", "choices: is missing", param="choices")
    return choices


def _scale(request: ScoreRequest) -> Sequence[str]:
    """Return the integers of a range."""
    if request.choices is not None:
        message = "choices: a score has none; minimum and maximum are its range"
        raise ApiError(400, "invalid_value", message, param="choices")
    for param, limit in (("minimum", request.minimum), ("maximum", request.maximum)):
        if limit is None:
            raise ApiError(400, "invalid_request", f"{param}: is missing", param=param)
    assert request.minimum is not None and request.maximum is not None
    if not 0 < request.maximum - request.minimum < MAX_CHOICES:
        message = f"maximum: must be above minimum, and the range hold at most {MAX_CHOICES} integers"
        raise ApiError(400, "invalid_value", message, param="maximum")
    return [str(number) for number in range(request.minimum, request.maximum + 1)]


def scores_body(request: ScoreRequest, scores: AnyScores, waited_s: float) -> dict[str, Any]:
    """Return what a caller is told of the scores, but for the model's name."""
    total = scores.total_probabilities if isinstance(scores, LabelScores) else scores.total_probability
    return {
        "type": request.type or "choice",
        "value": _value(request, scores),
        "probabilities": scores.probabilities,
        "log_likelihoods": dict(scores.log_likelihoods),
        "total_probability": total,
        "temperature": scores.temperature,
        "usage": usage(scores),
        "timings": timings(scores, waited_s),
    }


def _value(request: ScoreRequest, scores: AnyScores) -> str | bool | float | list[str]:
    """Return the decision in its own type: the likeliest choice, the mean of a score, or the labels that apply."""
    if isinstance(scores, LabelScores):
        return scores.above(0.5 if request.threshold is None else request.threshold)
    if request.type == "score":
        return sum(int(number) * probability for number, probability in scores.probabilities.items())
    return scores.best == next(iter(scores.log_likelihoods)) if request.type == "bool" else scores.best
