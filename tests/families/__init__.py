"""The families in the parity suite: one builder each, by the names of the runtime's table."""

from tests.families import (
    gemma3,
    gemma4,
    granite_docling,
    idefics3,
    internvl,
    lfm2_vl,
    lighton_ocr,
    llava,
    llava_onevision,
    minicpm,
    qwen_vl,
)
from tests.families.base import Builder

BUILDERS: dict[str, Builder] = {
    "gemma3": gemma3.BUILDER,
    "gemma4": gemma4.BUILDER,
    "granite_docling": granite_docling.BUILDER,
    "idefics3": idefics3.builder("idefics3"),
    "internvl": internvl.BUILDER,
    "lfm2_vl": lfm2_vl.BUILDER,
    "lighton_ocr": lighton_ocr.BUILDER,
    "llava": llava.BUILDER,
    "llava_onevision": llava_onevision.BUILDER,
    "minicpmv4_6": minicpm.BUILDER,
    "qwen2_5_vl": qwen_vl.builder("qwen2_5_vl"),
    "qwen2_vl": qwen_vl.builder("qwen2_vl"),
    "qwen3_5": qwen_vl.builder("qwen3_5"),
    "qwen3_vl": qwen_vl.builder("qwen3_vl"),
    "smolvlm": idefics3.builder("smolvlm"),
}
