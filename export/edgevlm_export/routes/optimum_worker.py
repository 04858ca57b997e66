"""The torch side of an export, run as a child process so that its memory is returned before compression.

    python -m edgevlm_export.routes.optimum_worker JOB_DIR

reads `job.json` (and `cases.npz`) in JOB_DIR, writes the uncompressed IR submodels there, the reference's outputs as
`reference.npz`, and last `result.json`. A line `@ stage` on stdout announces each stage.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from edgevlm.errors import one_line
from edgevlm.metrics import peak_memory
from edgevlm.runtime.core import import_openvino

JOB, CASES, REFERENCE, RESULT = "job.json", "cases.npz", "reference.npz", "result.json"


class RefusedError(Exception):
    """The checkpoint cannot be converted; the message is for the user."""


class UnwrittenError(Exception):
    """The result cannot be written; the message is for the user."""


def main() -> None:
    job_dir = Path(sys.argv[1])
    job = json.loads((job_dir / JOB).read_text(encoding="utf-8"))
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import_openvino()
    result: dict[str, Any] = {}
    try:
        if job["verify"]:
            say("reference")
            write_reference(job, job_dir)
        say("convert")
        convert(job, job_dir)
        result["versions"] = versions()
    except RefusedError as error:
        result["refused"] = str(error)
    except UnwrittenError as error:
        result["unwritten"] = str(error)
    result["peak_memory_bytes"] = peak_memory()
    (job_dir / RESULT).write_text(json.dumps(result), encoding="utf-8")


def say(stage: str) -> None:
    """Announce a stage to the parent."""
    print(f"@ {stage}", flush=True)


def load(job: dict[str, Any], dtype: Any) -> Any:
    """Load the checkpoint with transformers; weights that are missing or do not fit are refused, not invented."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            job["checkpoint"],
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=job["trust_remote_code"],
            output_loading_info=True,
        )
    except Exception as error:
        raise RefusedError(f"transformers cannot load the checkpoint: {one_line(error)[:300]}") from error
    if info["missing_keys"]:
        raise RefusedError(
            f"the checkpoint lacks weights that its config asks for, such as {min(info['missing_keys'])}"
        )
    if info["mismatched_keys"]:
        name, stored, wanted = min(info["mismatched_keys"])
        raise RefusedError(f"weight {name} has shape {tuple(stored)}, its config asks for {tuple(wanted)}")
    return model.eval()


def write_reference(job: dict[str, Any], job_dir: Path) -> None:
    """Run the reference in FP32 on every case: image embeddings, greedy tokens, and the logits that chose them."""
    import numpy as np
    import torch

    from edgevlm_export.families import FAMILIES

    model = load(job, torch.float32)
    encode = FAMILIES[job["family"]].encode_in_torch
    assert encode is not None
    outputs: dict[str, Any] = {}
    with np.load(job_dir / CASES) as cases, torch.inference_mode():
        constants = {key.removeprefix("family."): cases[key] for key in cases.files if key.startswith("family.")}
        for name in sorted({key.split(".")[0] for key in cases.files if key.endswith(".input_ids")}):
            ids = torch.from_numpy(cases[f"{name}.input_ids"])[None]
            pictures: dict[str, Any] = {}
            if f"{name}.pixel_values" in cases:
                image_embeds, pictures = encode(model, torch.from_numpy(cases[f"{name}.pixel_values"]), constants)
                outputs[f"{name}.image_embeds"] = image_embeds.numpy()
            tokens, logits = greedy(model, ids, pictures, job["verify_tokens"])
            outputs[f"{name}.token_ids"], outputs[f"{name}.logits"] = tokens, logits
            seen = torch.cat([ids[0], torch.from_numpy(tokens[:-1])])
            outputs[f"{name}.text_embeds"] = model.get_input_embeddings()(seen).numpy()
    np.savez(job_dir / REFERENCE, **outputs)


def greedy(model: Any, ids: Any, pictures: dict[str, Any], count: int) -> tuple[Any, Any]:
    """Return `count` greedy token ids and the logits `(count, V)` they were chosen from, the end of text ignored.

    The end is ignored so that every case yields the same number of positions to compare.
    """
    import numpy as np

    tokens, logits = [], []
    past, step_ids = None, ids
    for _ in range(count):
        output = model(input_ids=step_ids, past_key_values=past, use_cache=True, logits_to_keep=1, **pictures)
        past, pictures = output.past_key_values, {}
        logits.append(output.logits[0, -1].float().numpy())
        tokens.append(int(logits[-1].argmax()))
        step_ids = ids.new_tensor([[tokens[-1]]])
    return np.asarray(tokens, np.int64), np.stack(logits)


def convert(job: dict[str, Any], job_dir: Path) -> None:
    """Write the IR submodels through optimum-intel, stateful, in the element type that `job` names."""
    import torch
    from optimum.exporters.openvino import convert as optimum_convert
    from optimum.exporters.openvino import export_from_model
    from optimum.intel import OVConfig

    # torch.jit would trace all again to see that it gets the same graph, which is most of the time of a conversion.
    # Comparing the finished submodels with the reference sees that too, and more.
    optimum_convert.allow_skip_tracing_check = lambda *_: True
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(job["dtype"], "auto")
    model = load(job, dtype)
    try:
        export_from_model(
            model,
            job_dir,
            task="image-text-to-text",
            ov_config=OVConfig(dtype="fp16" if job["dtype"] == "fp16" else "fp32"),
            stateful=True,
            patch_16bit_model=model.dtype in (torch.float16, torch.bfloat16),
            preprocessors=[],
        )
    except Exception as error:
        if is_write_error(error):
            raise UnwrittenError("OpenVINO could not write the model; the disk may be full") from error
        raise RefusedError(f"optimum-intel cannot convert the checkpoint: {one_line(error)[:300]}") from error


def is_write_error(error: Exception) -> bool:
    """Tell whether OpenVINO failed to write a file: its stream errors name no cause."""
    return isinstance(error, OSError) or "iostream error" in str(error)


def versions() -> dict[str, str]:
    """Return the versions of what made the IR."""
    from importlib.metadata import version

    return {name: version(name) for name in ("openvino", "optimum-intel", "transformers", "torch", "nncf")}


if __name__ == "__main__":
    main()
