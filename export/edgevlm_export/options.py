"""What a user can choose about an export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from edgevlm.errors import OptionError
from edgevlm.manifest import LANGUAGE, SUBMODELS, TEXT_EMBEDDINGS, VISION

Precision: TypeAlias = Literal["fp32", "fp16", "int8", "int4", "w8a8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")
UNCOMPRESSED = ("fp32", "fp16")
Route: TypeAlias = Literal["native", "optimum", "onnx", "auto"]
MERGED_SHARES = (0, 0.25, 0.5)
"""Shares of the vision encoder's tokens that may be merged."""
VERIFY_TOKENS = 32
"""Positions of each case whose logits are compared."""


@dataclass(frozen=True)
class Int4Recipe:
    """How weights become INT4; the defaults are the best trade measured in docs/int4.md."""

    group_size: int = 32
    """Weights that share a scale; lowered where it does not divide the channels, -1 for one scale a channel."""
    ratio: float = 0.8
    """Share of the weights that become INT4, the most sensitive layers staying INT8."""
    sym: bool = False
    """Symmetric: no zero point."""
    all_layers: bool = False
    """Also the token embeddings and the LM head, which otherwise stay INT8."""
    awq: bool = False
    scale_estimation: bool = True
    gptq: bool = False

    def __post_init__(self) -> None:
        if self.group_size != -1 and self.group_size < 2:
            raise OptionError(f"group size must be -1 (one group a channel) or at least 2, not {self.group_size}")
        if not 0 <= self.ratio <= 1:
            raise OptionError(f"ratio must be between 0 and 1, not {self.ratio}")

    @property
    def needs_data(self) -> bool:
        """Whether calibration pictures and questions are read."""
        return self.awq or self.scale_estimation or self.gptq


@dataclass(frozen=True)
class ExportOptions:
    """All choices of one export."""

    precision: Precision = "int8"
    vision_precision: Precision | None = None
    """None: as `precision`, but `w8a8` where the weights are compressed: INT8 weights and activations, calibrated on
    pictures, the fastest vision tower. INT8 or INT4 weights alone buy no speed there."""
    lm_precision: Precision | None = None
    """None: as `precision`."""
    int4: Int4Recipe = Int4Recipe()
    calibration: Path | None = None
    """A folder or JSONL of pictures and questions; None is the set that ships with the exporter."""
    via: Route = "auto"
    """`native` makes the graphs itself, `optimum` has optimum-intel trace them in torch, `onnx` reads the
    checkpoint's own ONNX files; `auto` is native if it can, and onnx where there are no safetensors."""
    verify: bool = True
    force: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str = "default"
    """Which of the checkpoint's chat templates, where it has several."""
    ignore_config_keys: tuple[str, ...] = ()
    """Keys of the checkpoint's JSON files, known to change nothing, that edgevlm does not know."""
    merge_tokens: float = 0.0
    """Share of the vision encoder's tokens that its early layers merge: 0, 0.25 or 0.5."""
    adapters: tuple[Path, ...] = ()
    """Folders of PEFT adapters that are merged into the checkpoint."""
    adapter_weights: tuple[float, ...] = ()
    """By which each adapter's difference from the checkpoint is multiplied, in their order; none is 1 for each."""

    def __post_init__(self) -> None:
        if "w8a8" in (self.precision, self.lm_precision):
            raise OptionError("w8a8 is for the vision part alone: use it as vision precision")
        if self.merge_tokens not in MERGED_SHARES:
            raise OptionError(f"merge_tokens must be one of {MERGED_SHARES}, not {self.merge_tokens}")
        if self.merge_tokens and self.via in ("optimum", "onnx"):
            raise OptionError(f"--via {self.via} merges no tokens; leave out --merge-tokens, or use --via native")
        if self.adapters and self.via in ("optimum", "onnx"):
            raise OptionError(f"--via {self.via} merges no adapters; leave out --adapter, or use --via native")
        if self.adapter_weights and len(self.adapter_weights) != len(self.adapters):
            raise OptionError(
                f"--weight is given {len(self.adapter_weights)} times and --adapter {len(self.adapters)} times;"
                " give one weight for each adapter, in their order, or none"
            )
        if not all(math.isfinite(weight) for weight in self.adapter_weights):
            raise OptionError("--weight must be a finite number")

    @property
    def native_only(self) -> str:
        """The chosen option that the native route alone covers, empty where there is none."""
        return "--adapter" if self.adapters else "--merge-tokens" if self.merge_tokens else ""

    @property
    def dtype(self) -> str:
        """The element type to convert in: the submodels', or the checkpoint's own if all are compressed."""
        plain = [precision for part in SUBMODELS if (precision := self.part_precision(part)) in UNCOMPRESSED]
        return min(plain, key=UNCOMPRESSED.index, default="auto")

    def part_precision(self, part: str) -> Precision:
        """Return the precision of one submodel."""
        language = self.lm_precision or self.precision
        if part == LANGUAGE:
            return language
        if part == TEXT_EMBEDDINGS:
            return "int8" if language == "int4" and not self.int4.all_layers else language
        if part == VISION:
            return self.vision_precision or (self.precision if self.precision in UNCOMPRESSED else "w8a8")
        raise AssertionError(part)
