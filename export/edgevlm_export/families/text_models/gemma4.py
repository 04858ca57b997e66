"""The text model of Gemma 4 (E2B, E4B): layers with token embeddings of their own, the last of which add no keys."""

from __future__ import annotations

from typing import Any

from edgevlm.errors import SourceError
from edgevlm_export.families.base import read_activation
from edgevlm_export.families.text_models.common import Names
from edgevlm_export.families.text_models.gemma3 import layer_types
from edgevlm_export.families.text_models.rotation import GLOBAL, LOCAL, read_ropes
from edgevlm_export.graphs.attention import Attention, ReusingAttention
from edgevlm_export.graphs.decoder import Decoder, GatedMLP, Layer, PerLayerEmbedding
from edgevlm_export.graphs.modules import Embedding, Linear, Norm, Tensor
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError


def read_gemma4(text: ConfigReader, names: Names) -> Decoder:
    """Return the decoder of `text_config`. Raises `SourceError`, and `UnsupportedError` for what is not built here."""
    for key in ("enable_moe_block", "attention_k_eq_v"):
        if text.flag(key):
            raise UnsupportedError(f"the native route does not build text_config.{key}")
    if (both := text.get("use_bidirectional_attention")) is not None:
        raise UnsupportedError(f"the native route does not build text_config.use_bidirectional_attention {both!r}")
    return _Reader(text, names).read()


class _Reader:
    """Reads `text_config` of one checkpoint."""

    def __init__(self, text: ConfigReader, names: Names) -> None:
        self.text, self.names = text, names
        self.hidden, self.eps = text.size("hidden_size"), text.number("rms_norm_eps")
        self.heads, self.kv_heads = text.size("num_attention_heads"), text.size("num_key_value_heads")
        self.kinds = [*layer_types(text)[:-1], GLOBAL]  # the last one always, as in transformers
        self.head_dims = {LOCAL: text.size("head_dim"), GLOBAL: self._global_head_dim()}
        self.ropes = read_ropes(text, self.head_dims)
        self.act, self.window = read_activation(text, "hidden_activation"), text.size("sliding_window")
        self.vocab, self.inner = text.size("vocab_size"), text.size("intermediate_size")
        shared = text.get("num_kv_shared_layers")
        if isinstance(shared, bool) or not isinstance(shared, int) or not 0 <= shared < len(self.kinds):
            raise SourceError(f"config.json: text_config.num_kv_shared_layers must be fewer than all, not {shared!r}")
        self.first_shared = len(self.kinds) - shared
        self.sources = {kind: index for index, kind in enumerate(self.kinds[: self.first_shared])}
        if self.heads % self.kv_heads or not {*self.kinds[self.first_shared :]} <= self.sources.keys():
            raise SourceError("config.json contradicts itself: layers that share keys have none of their kind before")

    def read(self) -> Decoder:
        """Return the decoder."""
        prefix, cap = self.names.prefix, self.text.get("final_logit_softcapping")
        table = Embedding(f"{prefix}.embed_tokens", self.vocab, self.hidden, self.hidden**0.5)
        layers = tuple(self._layer(index) for index in range(len(self.kinds)))
        norm, head = self._norm(f"{prefix}.norm"), Linear(self.names.head, self.vocab, self.hidden)
        softcap = None if cap is None else self.text.number("final_logit_softcapping")
        return Decoder(table, layers, norm, head, logit_softcap=softcap)

    def _global_head_dim(self) -> int:
        """Return the channels of each head of global layers, which files of transformers 5 state layer by layer."""
        stated = self.text.section("per_layer_config").stated
        found = {each.get("head_dim") for each in stated.values() if isinstance(each, dict)}
        if any(isinstance(each, dict) and each.keys() - {"head_dim"} for each in stated.values()) or len(found) > 1:
            raise UnsupportedError("the native route does not build this text_config.per_layer_config")
        return self.text.size("global_head_dim", next(iter(found), 512))

    def _norm(self, name: str, size: int | None = None, *, scaled: bool = True) -> Norm:
        return Norm(name, size or self.hidden, self.eps, scaled=scaled)

    def _layer(self, index: int) -> Layer:
        at = f"{self.names.prefix}.layers.{index}"
        names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        before, mixed, between, after = (self._norm(f"{at}.{name}_layernorm") for name in names)
        return Layer(
            at,
            before,
            self._attention(f"{at}.self_attn", index),
            between,
            self._mlp(f"{at}.mlp", index),
            mixer_output_norm=mixed,
            mlp_output_norm=after,
            per_layer=self._per_layer(at, index),
            scalar=Tensor(f"{at}.layer_scalar", (1,)),
        )

    def _attention(self, at: str, index: int) -> Attention | ReusingAttention:
        kind = self.kinds[index]
        head_dim, window = self.head_dims[kind], self.window if kind == LOCAL else None
        q, k, v = (
            Linear(f"{at}.{name}_proj", rows * head_dim, self.hidden, self.text.flag("attention_bias"))
            for name, rows in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        o = Linear(f"{at}.o_proj", self.hidden, self.heads * head_dim, self.text.flag("attention_bias"))
        q_norm, rope = self._norm(f"{at}.q_norm", head_dim), self.ropes[kind]
        sizes: dict[str, Any] = {"num_heads": self.heads, "num_kv_heads": self.kv_heads, "head_dim": head_dim}
        options: dict[str, Any] = {"rope": rope, "q_norm": q_norm, "scale": 1.0, "window": window, **sizes}
        if index >= self.first_shared:
            return ReusingAttention(q, o, source=self.sources[kind], **options)
        k_norm, v_norm = self._norm(f"{at}.k_norm", head_dim), self._norm(f"{at}.v_norm", head_dim, scaled=False)
        is_reused = index == self.sources[kind] and kind in self.kinds[self.first_shared :]
        return Attention(q, k, v, o, k_norm=k_norm, v_norm=v_norm, is_reused=is_reused, **options)

    def _mlp(self, at: str, index: int) -> GatedMLP:
        double = self.text.flag("use_double_wide_mlp") and index >= self.first_shared
        inner = self.inner * (2 if double else 1)
        gate, up = (Linear(f"{at}.{name}_proj", inner, self.hidden) for name in ("gate", "up"))
        return GatedMLP(gate, up, Linear(f"{at}.down_proj", self.hidden, inner), self.act)

    def _per_layer(self, at: str, index: int) -> PerLayerEmbedding | None:
        prefix, rows = self.names.prefix, self.text.size("vocab_size_per_layer_input")
        if self.text.get("hidden_size_per_layer_input") == 0:
            return None
        width = self.text.size("hidden_size_per_layer_input")
        columns = width * len(self.kinds)
        return PerLayerEmbedding(
            index,
            width,
            Embedding(f"{prefix}.embed_tokens_per_layer", rows, columns, width**0.5),
            Linear(f"{prefix}.per_layer_model_projection", columns, self.hidden),
            self._norm(f"{prefix}.per_layer_projection_norm", width),
            Linear(f"{at}.per_layer_input_gate", width, self.hidden),
            Linear(f"{at}.per_layer_projection", self.hidden, width),
            self._norm(f"{at}.post_per_layer_input_norm"),
            self.act,
        )
