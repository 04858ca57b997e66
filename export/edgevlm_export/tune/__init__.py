"""Tuning a small checkpoint on a user's own labelled pictures, on the CPU (extra `[tune]`: torch, transformers)."""

from __future__ import annotations

from edgevlm_export.tune.pipeline import TuneOptions, TuneProgress, TuneReport, tune
from edgevlm_export.tune.scores import Scored

__all__ = ["Scored", "TuneOptions", "TuneProgress", "TuneReport", "tune"]
