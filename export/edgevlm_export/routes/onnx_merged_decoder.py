"""A decoder file that holds two decoders, one for the first call and one that reads past key values.

Optimum merges them so: an `If` on the input `use_cache_branch`, whose then branch reads the past. Given an empty past
that branch computes what the other does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgevlm.errors import SourceError

SWITCH = "use_cache_branch"
_MOST_BYTES = 2**31 - 2**24
"""Protobuf's limit for one file; beyond it tensors go into a file beside."""


def check_switch(graph: Any, name: str) -> None:
    """Raise `SourceError` unless `use_cache_branch`, if the graph has it, does nothing but choose between decoders."""
    if SWITCH in {each.name for each in graph.input} and _switched(graph) is None:
        raise SourceError(
            f"{name} has an input {SWITCH} that does not choose between two decoders in one place; give"
            " decoder_with_past_model.onnx alone"
        )


def with_past(path: Path, folder: Path) -> Path:
    """Return a decoder's file, or write the branch of it that reads past key values into `folder` and return that."""
    import onnx

    if SWITCH not in {each.name for each in onnx.load(path, load_external_data=False).graph.input}:
        return path
    model = onnx.load(path)
    graph = model.graph
    chosen = _switched(graph)
    assert chosen is not None  # `check_switch` has seen it
    branch = next(each.g for each in chosen.attribute if each.name == "then_branch")
    ends = zip(branch.output, chosen.output, strict=True)
    inlined = [*branch.node, *(onnx.helper.make_node("Identity", [inner.name], [outer]) for inner, outer in ends)]
    nodes = [each for node in graph.node for each in (inlined if SWITCH in node.input else [node])]
    alone = onnx.helper.make_graph(
        nodes,
        graph.name,
        [each for each in graph.input if each.name != SWITCH],
        graph.output,
        [*graph.initializer, *branch.initializer],
    )
    kept = {"opset_imports": model.opset_import, "ir_version": model.ir_version, "functions": model.functions}
    made = onnx.helper.make_model(alone, **kept)
    folder.mkdir()
    target = folder / "decoder_with_past.onnx"
    onnx.save(made, target, save_as_external_data=made.ByteSize() > _MOST_BYTES, location=f"{target.name}_data")
    return target


def _switched(graph: Any) -> Any | None:
    """Return the only node that reads the switch, if that is an `If` on it."""
    readers = [node for node in graph.node if SWITCH in node.input]
    return readers[0] if len(readers) == 1 and readers[0].op_type == "If" else None
