"""How a model is run on this machine, and what that means in OpenVINO's properties."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import Any, Literal

from edgevlm.errors import OptionError

InferencePrecision = Literal["auto", "f32", "bf16", "f16"]
PRECISIONS = ("auto", "f32", "bf16", "f16")
KVCachePrecision = Literal["auto", "u8", "f16", "f32"]
KV_CACHE_PRECISIONS = ("auto", "u8", "f16", "f32")
KVCache = Literal["paged", "stateful"]
KV_CACHES = ("paged", "stateful")
VisionArithmetic = Literal["auto", "exported", "compressed", "float32"]
VISION_ARITHMETICS = ("auto", "exported", "compressed", "float32")

CPU_KERNEL_CACHE = 64
"""Kernels for shapes met before that a submodel keeps on a CPU: some for each length of prompt, or each number of
patches of pictures at their own shape, and one never met costs about 4 ms more. With OpenVINO's own 5,000 a process
that meets prompts of many lengths grows for thousands of requests; on SmolVLM-256M's shape 16 suffice to keep the next
token as fast. oneDNN keeps some as well: see `ONEDNN_PRIMITIVE_CACHE`."""


@dataclass(frozen=True)
class RuntimeConfig:
    """How a model is run on this machine."""

    device: str = "AUTO"
    """`AUTO` is the GPU where OpenVINO sees one, else the CPU."""
    threads: int | None = None
    """CPU threads; None leaves it to OpenVINO."""
    inference_precision: InferencePrecision = "auto"
    """`auto` is OpenVINO's own choice; `f32` also keeps the KV cache and the activations in float32."""
    vision_arithmetic: VisionArithmetic = "auto"
    """What the vision encoder computes with: its graph as `exported`, that is W8A8 where it is; with its weights still
    `compressed`, but activations that are not quantized; or with weights decompressed to `float32` at load, quicker on
    a CPU without VNNI, for four times the memory of INT8 weights. `auto` chooses for the machine, as
    `VLM.vision_arithmetic` tells. A graph that was not compressed stays as it is."""
    kv_cache_precision: KVCachePrecision = "auto"
    """`auto` is what the export asks for, 16 bits, or float32 with an `inference_precision` of `f32`; `u8` halves the
    memory of a conversation and moves its answers a little."""
    kv_cache: KVCache = "stateful"
    """`stateful` leaves it to OpenVINO's own state. `paged` keeps it in blocks that paged attention reads, on a CPU and
    where the graph allows it: quicker answers after a slower start, for a process that stays, because OpenVINO 2026.4
    cannot import a compiled model with paged attention, which is so compiled at every start
    (docs/upstream/openvino-paged-attention-import.md)."""
    cache: bool = True
    """Keep compiled models on disk, so that the next start is fast."""
    cache_limit_bytes: int = 2 * 2**30
    """The longest unused compiled models are deleted beyond this; the one in use stays whole."""
    image_cache_bytes: int = 64 * 2**20
    """Memory for the embeddings of pictures already looked at; 0 keeps none."""
    view_tolerance: float = 0.0
    """Take a view for the one last encoded in its place when their pixels differ by at most this on average (levels of
    0 to 255): for the sensor noise of a fixed camera. 0 asks for equal pixels."""
    kept_sessions: int = 2
    """Conversations whose KV cache is kept for a prompt that begins alike; 0 keeps none."""

    tile_tolerance: InitVar[float | None] = None
    """What `view_tolerance` was called before."""

    def __post_init__(self, tile_tolerance: float | None) -> None:
        if tile_tolerance is not None:
            object.__setattr__(self, "view_tolerance", tile_tolerance)
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise OptionError(f"threads must be between 1 and 1024, not {self.threads}")
        for name in ("image_cache_bytes", "view_tolerance", "kept_sessions"):
            if not getattr(self, name) >= 0:
                raise OptionError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.inference_precision not in PRECISIONS:
            raise OptionError(f"inference precision must be one of {', '.join(PRECISIONS)}")
        if self.kv_cache_precision not in KV_CACHE_PRECISIONS:
            raise OptionError(f"KV cache precision must be one of {', '.join(KV_CACHE_PRECISIONS)}")
        if self.kv_cache not in KV_CACHES:
            raise OptionError(f"KV cache must be one of {', '.join(KV_CACHES)}")
        if self.vision_arithmetic not in VISION_ARITHMETICS:
            raise OptionError(f"vision arithmetic must be one of {', '.join(VISION_ARITHMETICS)}")

    def properties(self, device: str) -> dict[str, Any]:
        """Return OpenVINO's properties for a submodel without a KV cache."""
        properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if device.startswith("CPU"):
            properties["CPU_RUNTIME_CACHE_CAPACITY"] = CPU_KERNEL_CACHE
            properties["ENABLE_CPU_PINNING"] = False  # else every process with one thread takes the same core
            if self.threads is not None:
                properties["INFERENCE_NUM_THREADS"] = self.threads
        if self.inference_precision != "auto":
            properties["INFERENCE_PRECISION_HINT"] = self.inference_precision
        if self.inference_precision == "f32" and device.startswith("CPU"):
            properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        return properties

    def language_properties(self, device: str) -> dict[str, Any]:
        """Return OpenVINO's properties for the language model."""
        properties = self.properties(device)
        if self.kv_cache_precision != "auto":
            properties["KV_CACHE_PRECISION"] = self.kv_cache_precision
        elif self.inference_precision == "f32" and device.startswith("CPU"):
            properties["KV_CACHE_PRECISION"] = "f32"
        return properties
