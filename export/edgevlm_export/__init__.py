"""The exporter: a Hugging Face checkpoint in, a folder of OpenVINO IR out.

`pipeline.export` is the recipe; `pip install 'edgevlm[export]'` brings what it needs.
"""

from __future__ import annotations

from edgevlm_export.options import ExportOptions
from edgevlm_export.pipeline import ExportReport, export

__all__ = ["ExportOptions", "ExportReport", "export"]
