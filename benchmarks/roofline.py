"""How near edgevlm comes to this machine: bytes read a token and operations a tile, against what it can do at most.

    python -m benchmarks.roofline build/side_by_side/edgevlm-int4 [--threads 2] [-o benchmarks/results/roofline.json]

The machine's limits are measured in the same run: reading memory with NumPy from as many threads, and square products
of matrices through OpenVINO itself, in the arithmetic that the vision encoder runs in: INT8 where it is quantized, or
else BF16 on a CPU that has it and FP32 on others.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.results import write_result
from edgevlm import VLM, RuntimeConfig
from edgevlm.bench.conditions import Conditions, Meter
from edgevlm.bench.measure import QUESTION, ask, perturb, sample_picture
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.image import load_image
from edgevlm.manifest import LANGUAGE, VISION
from edgevlm.runtime.core import core, import_openvino, read_ir
from edgevlm.runtime.cpu import cpu_features

SIDE = 2048


def seconds(work: Callable[[], object], repeat: int = 7) -> float:
    """Return the median time of `work` after one warm-up."""
    work()
    times = []
    for _ in range(repeat):
        started = perf_counter()
        work()
        times.append(perf_counter() - started)
    return median(times)


def memory_bandwidth(threads: int) -> float:
    """Return the bytes a second that `threads` threads read together from blocks larger than any cache."""
    blocks = [np.ones(2**25, np.float64) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return sum(block.nbytes for block in blocks) / seconds(lambda: list(pool.map(np.sum, blocks)))


def matmul_peak(threads: int, quantized: bool) -> float:
    """Return the operations a second (two for each multiply and add) of a large product in OpenVINO."""
    openvino = import_openvino()
    opset = openvino.opset13
    x = opset.parameter([SIDE, SIDE], np.float32, name="x")
    weights = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    left, right = x, opset.constant(weights)
    if quantized:
        low, high = np.float32(-4), np.float32(4)
        left = opset.fake_quantize(left, low, high, low, high, 256)
        right = opset.fake_quantize(right, low, high, low, high, 255)
    model = openvino.Model([opset.matmul(left, right, False, True)], [x])
    compiled = core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
    request, data = compiled.create_infer_request(), np.ones((SIDE, SIDE), np.float32)
    return 2 * SIDE**3 / seconds(lambda: request.infer([data], share_inputs=True, share_outputs=True))


def matrix_operations(model: Any) -> int:
    """Return the operations of all matrix products of a model with static shapes, those of attention among them."""
    total = 0
    for node in model.get_ops():
        if node.get_type_name() == "MatMul":
            shape = list(node.input_value(0).get_shape())
            inner = shape[-2] if node.get_attributes().get("transpose_a") else shape[-1]
            total += 2 * int(np.prod(list(node.get_output_shape(0)))) * inner
        elif node.get_type_name() == "ScaledDotProductAttention":
            query, keys = (list(node.input_value(index).get_shape()) for index in (0, 1))
            total += 2 * 2 * int(np.prod(query)) * keys[-2]  # query by keys, and their weights by values
    return total


def measure(folder: Path, threads: int) -> tuple[dict[str, Any], Conditions]:
    """Return the machine's limits, what the model needs and reaches, the shares, and the conditions of its answers."""
    from edgevlm.runtime.graph_passes import make_static

    vlm = VLM(folder, RuntimeConfig(threads=threads, image_cache_bytes=0, kept_sessions=0))
    family, parts = vlm.processor.family, vlm.manifest.submodels
    vision = make_static(read_ir(folder / parts[VISION].file), family.constants, family.view_size)
    budget = ImageBudget("low")
    with tempfile.TemporaryDirectory() as scratch:
        image = load_image(sample_picture(Path(scratch)))
    ask(vlm, perturb(image, 0), QUESTION, budget, 33)
    meter, answers = Meter(threads), []
    for number in range(1, 6):
        with meter.part():
            answers.append(ask(vlm, perturb(image, number), QUESTION, budget, 33).timings)
    tile_s, token_s = median(each.vision_s for each in answers), median(each.tpot_s or 0.0 for each in answers)
    operations, weights = matrix_operations(vision), parts[LANGUAGE].size_bytes
    quantized = vlm.vision_arithmetic.name == "W8A8"
    arithmetic = "INT8" if quantized else "BF16" if {"avx512_bf16", "amx_bf16"} & {*cpu_features()} else "FP32"
    peak, bandwidth = matmul_peak(threads, quantized), memory_bandwidth(threads)
    figures = {
        "memory bandwidth, GB/s": bandwidth / 1e9,
        f"{arithmetic} matrix products, Gop/s": peak / 1e9,
        "operations a tile, attention included, Gop": operations / 1e9,
        "tile, s": tile_s,
        "tile at the peak, s": operations / peak,
        "share of the peak": operations / peak / tile_s,
        "bytes a token, MB": weights / 1e6,
        "token, ms": token_s * 1e3,
        "token at the bandwidth, ms": weights / bandwidth * 1e3,
        "share of the bandwidth": weights / bandwidth / token_s,
    }
    return figures, meter.conditions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    found, conditions = measure(arguments.model, arguments.threads)
    for name, value in found.items():
        print(f"{name:40} {value:10.3f}")
    print(conditions.line)
    result = {"model": arguments.model.name, "figures": found, "conditions": conditions.to_dict()}
    write_result(arguments.output, result)


if __name__ == "__main__":
    main()
