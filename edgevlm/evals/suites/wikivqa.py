"""WikiVQABench (https://arxiv.org/abs/2605.21479) as a TSV of VLMEvalKit's form: knowledge about pictures of Wikipedia.

The pictures keep their own licences, so none ships: `--data` is the user's own download.
"""

from __future__ import annotations

from edgevlm.evals.suites.mcq import MultipleChoice


class WikiVQA(MultipleChoice):
    """Four options each, so chance is 25 %; the blind arm tells knowing from seeing."""

    name = "wikivqa"
    asks = "knows what pictures of Wikipedia show"
    needs_general_model = True
    form = "WikiVQABench in VLMEvalKit's TSV form (index, image, question, A to D, answer)"
