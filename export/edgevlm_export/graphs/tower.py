"""The vision tower of LLaVA's kind: CLIP's or SigLIP's transformer on views of one size, run up to one of its layers.

CLIP's has a class token before the patches, a norm before the first layer, and no bias where SigLIP's has one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, named
from edgevlm_export.graphs.layers import layer_norm, patch_embedding, repeated
from edgevlm_export.graphs.modules import Embedding, Norm, PatchConvolution, Tensor, declared
from edgevlm_export.graphs.stages import Stage, Values
from edgevlm_export.graphs.vision_transformer import VisionTransformer, encoder_stages

_POOLING = [f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")]
_POOLING += [f"{module}.{name}" for module in ("layernorm", "mlp.fc1", "mlp.fc2") for name in ("weight", "bias")]


@dataclass(frozen=True)
class Tower(VisionTransformer):
    """The sizes of the transformer, and how much of it is run."""

    layers: int = 0
    """How many layers are run."""

    @property
    def patches(self) -> int:
        """Patches of a view."""
        return self.side**2

    @property
    def positions(self) -> int:
        """Vectors that come out: the class token, if there is one, and the patches."""
        return self.patches + int(self.has_class_token)

    @property
    def patch_embedding(self) -> PatchConvolution:
        """Turns patches into vectors; CLIP's has no bias."""
        return replace(super().patch_embedding, bias=not self.has_class_token)

    @property
    def position_embedding(self) -> Embedding:
        """A vector for each position."""
        return replace(super().position_embedding, rows=self.positions)

    @property
    def class_embedding(self) -> Tensor | None:
        """The class token."""
        return Tensor(f"{self.embeddings}.class_embedding", (self.hidden_size,)) if self.has_class_token else None

    @property
    def pre_layernorm(self) -> Norm | None:
        """Before the first layer; the name is as CLIP's checkpoints misspell it."""
        return self.norm(f"{self.prefix}.pre_layrnorm") if self.has_class_token else None


def unused(tower: Tower) -> tuple[str, ...]:
    """Return the names of tensors that checkpoints have and that are not read: what follows the last layer run."""
    after = [tower.encoder_layer(index) for index in range(tower.layers, tower.num_hidden_layers)]
    return (*(name for name, _ in declared([*after, tower.post_layernorm])), *pooling_head(tower.prefix))


def pooling_head(prefix: str) -> tuple[str, ...]:
    """Return the names of the tensors that make one vector of a picture in SigLIP, which no VLM reads."""
    return tuple(f"{prefix}.head.{name}" for name in ("probe", *_POOLING))


def tower_stages(tower: Tower) -> list[Stage]:
    """Return patches and layers: pixel_values -> hidden_states `(B, positions, D)`."""
    modules = (tower.patch_embedding, tower.position_embedding, tower.class_embedding, tower.pre_layernorm)
    return [Stage(partial(embed_view, tower), modules), *encoder_stages(tower, tower.layers)]


def embed_view(tower: Tower, values: Values, constants: Constants) -> None:
    """Set the class token and the patches as vectors, their positions added."""
    opset = import_openvino().opset13
    row = patch_embedding(values["pixel_values"], constants, tower.patch_embedding)
    if tower.class_embedding:
        row = opset.concat([repeated(constants.vector(tower.class_embedding.name), row), row], 1)
    row = opset.add(row, constants.vector(f"{tower.position_embedding.name}.weight")[None])
    row = named(row, tower.embeddings)
    if tower.pre_layernorm:
        row = layer_norm(row, constants, tower.pre_layernorm)
    values["hidden_states"] = row
