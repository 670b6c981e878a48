"""Which tensors of a checkpoint are matrices of linear layers, known by the tensors' names and shapes alone.

`FAMILIES` has one row per family; the first whose `recognise` accepts the shapes is taken, and the last accepts all.
A row adds to the rules that hold everywhere: what is called an embedding, an output head, a router or a norm
is not a matrix, whatever its shape, unless the row's `linear` says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a tensor is to a merge.

    matrix:       one matrix [m, n], or `slices` of them stacked in the first dimension; `transposed`: stored [in, out]
    elementwise:  averaged, whatever its shape
    keep:         not floating-point, or empty: the base's bytes
    """

    kind: Literal["matrix", "elementwise", "keep"]
    transposed: bool = False
    slices: int = 0


@dataclass(frozen=True, slots=True)
class Family:
    """One row: patterns are regular expressions searched in a tensor's whole name."""

    name: str
    recognise: Callable[[Shapes], bool]
    linear: str = r"(?!)"  # matrices that the common rules would take for something else
    other: str = r"(?!)"  # 2-D tensors that are not matrices, beside the common ones
    transposed: str = r"(?!)"  # matrices stored [in, out]
    tied: tuple[tuple[str, str], ...] = ()  # (output head, the input embedding it may be tied to), as name endings


# The last module of a parameter's path is what names it: `encoder.embeddings.LayerNorm.weight` is a norm,
# `albert.encoder.embedding_hidden_mapping_in.weight` a linear layer.
_EMBEDDINGS = re.compile(
    r"(^|[._])(embed(s|ding|dings|_tokens\w*|_positions|_in|_out)?|wte|wpe|shared|embedding_table"
    r"|relative_attention_bias|relative_position_bias_table|rel_pos_[hw])(\.weight)?$"
)
_HEADS = re.compile(
    r"(^|\.)(\w*_head|heads?|classifier|pre_classifier|score|qa_outputs|text_projection|vocab_transform"
    r"|vocab_projector|embed_out)(\.|$)|^cls\.|^output\.weight$"
)
_ROUTERS = re.compile(
    r"(^|\.)((mlp|moe|block_sparse_moe|feed_forward|ffn|experts)\.gate|router|shared_expert_gate)(\.(wg|layer))?(\.weight)?$"
)
_NORMS = re.compile(r"(^|[._])(norm|layernorm|layer_norm|rmsnorm|ln)\d*\.weight$", re.IGNORECASE)
_LINEAR = re.compile(r"(^|[._])weight(_[ih]h_l\d+)?$")  # `weight`, `in_proj_weight`, `q_proj_weight`, an LSTM's
_EXPERTS = re.compile(
    r"(^|\.)experts\.(mlp\.)?(gate_up_proj|gate_proj|up_proj|down_proj|w[123]|wi(_[01])?|wo)(\.weight)?$"
)


def _has(*patterns: str) -> Callable[[Shapes], bool]:
    """Accepts shapes in which every pattern is found in some name."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda shapes: all(any(pattern.search(name) for name in shapes) for pattern in compiled)


def _has_conv1d(shapes: Shapes) -> bool:
    """GPT-2's Conv1D keeps weights as [in, out], so c_attn is [d, 3d]; the same names in BigCode models are [3d, d]."""
    packed = [s for name, s in shapes.items() if name.endswith("attn.c_attn.weight") and len(s) == 2]
    return bool(packed) and all(3 * s[0] == s[1] for s in packed)


FAMILIES: tuple[Family, ...] = (
    Family(
        "clip",  # open_clip and OpenAI (`visual.`, `in_proj_weight`), transformers (`visual_projection`, or one tower)
        _has(
            r"(^|\.)(text_projection|visual_projection|visual\.proj)(\.weight)?$|^visual\.conv1\.weight$"
            r"|(^|\.)embeddings\.class_embedding$"
        ),
        linear=r"(^|\.)visual\.(proj|head\.proj\.weight)$|(^|\.)visual_projection\.weight$",
        other=r"(^|\.)(text_projection|logit_scale|class_embedding|positional_embedding)(\.weight)?$",
        # `x @ proj` with proj [width, output]: the layer's matrix is its transpose
        transposed=r"(^|\.)visual\.proj$",
    ),
    Family(
        "vit",
        _has(
            r"(^|\.)(patch_embed(ding)?s?|conv_proj)\.",
            r"(^|\.)(cls_token|class_token|pos_embed\w*|position_embeddings)$",
        ),
        other=r"(^|\.)(cls_token|class_token|mask_token|pos_embed\w*|position_embeddings)$",
    ),
    Family(
        "bert",  # BERT, RoBERTa, MiniLM, DistilBERT, ELECTRA, ALBERT and sentence-transformers' copies of them
        _has(r"(^|\.)embeddings\.word_embeddings\.weight$"),
        tied=(
            ("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
            ("lm_head.decoder.weight", "embeddings.word_embeddings.weight"),
            ("vocab_projector.weight", "embeddings.word_embeddings.weight"),
        ),
    ),
    Family(
        "gpt2",
        _has_conv1d,
        transposed=r"(^|\.)(c_attn|q_attn|c_proj|c_fc)\.weight$",
        tied=(("lm_head.weight", "wte.weight"), ("lm_head.weight", "tokens_embed.weight")),
    ),
    Family(
        "t5",
        _has(r"(^|\.)shared\.weight$", r"SelfAttention\.relative_attention_bias\.weight$"),
        tied=(("lm_head.weight", "shared.weight"),),
    ),
    Family(
        "llama-moe-in-out",  # Llama 4 and gpt-oss keep the fused stacks of experts as [experts, in, out]
        _has(r"feed_forward\.experts\.gate_up_proj$|mlp\.experts\.gate_up_proj_bias$"),
        transposed=r"(^|\.)experts\.(gate_up_proj|down_proj)$",
        tied=(("lm_head.weight", "embed_tokens.weight"),),
    ),
    Family(
        "llama",  # Llama, Qwen, Mistral, Gemma, Phi and others of this plan; Mixtral's and Qwen's experts too
        _has(r"(^|\.)embed_tokens\.weight$", r"self_attn\.(q_proj|qkv_proj|q_a_proj|q_b_proj)\.weight$"),
        tied=(("lm_head.weight", "embed_tokens.weight"),),
    ),
    Family(
        "generic",
        lambda shapes: True,
        tied=(
            ("lm_head.weight", "embed_tokens.weight"),
            ("lm_head.weight", "wte.weight"),
            ("lm_head.weight", "shared.weight"),
            ("embed_out.weight", "embed_in.weight"),
            ("output.weight", "tok_embeddings.weight"),
        ),
    ),
)


def recognise(shapes: Shapes) -> Family:
    """The first row of FAMILIES that accepts the shapes."""
    return next(family for family in FAMILIES if family.recognise(shapes))


def classify(name: str, shape: tuple[int, ...], dtype: torch.dtype, family: Family, scope: str) -> Kind:
    """What the tensor is under a scope.

    default: matrices are the 2-D weights of linear layers and each slice of a 3-D stack of experts.
    paper: every 2-D tensor whose name lacks `text_projection`, as it is stored.
    """
    if not dtype.is_floating_point or 0 in shape:
        return Kind("keep")
    if scope == "paper":
        matrix = len(shape) == 2 and "text_projection" not in name
        return Kind("matrix", slices=1) if matrix else Kind("elementwise")
    return as_matrix(name, shape, family) if is_linear(name, shape, family) else Kind("elementwise")


def is_linear(name: str, shape: tuple[int, ...], family: Family) -> bool:
    """Whether a tensor holds the weights of one linear layer, or a stack of them in three dimensions."""
    if len(shape) == 3:
        return _EXPERTS.search(name) is not None
    if len(shape) != 2:
        return False
    if re.search(family.linear, name):
        return True
    excluded = (_EMBEDDINGS, _HEADS, _ROUTERS, _NORMS)
    return (
        _LINEAR.search(name) is not None
        and re.search(family.other, name) is None
        and not any(pattern.search(name) for pattern in excluded)
    )


def as_matrix(name: str, shape: tuple[int, ...], family: Family) -> Kind:
    """The tensor as one matrix (2-D) or a stack of them (3-D), in the orientation of its family."""
    if len(shape) not in (2, 3):
        return Kind("elementwise")
    transposed = re.search(family.transposed, name) is not None
    return Kind("matrix", transposed, shape[0] if len(shape) == 3 else 1)


def tied_embedding(name: str, family: Family) -> tuple[str, ...]:
    """Names of the input embedding that the output head `name` may be tied to, prefix not included; () if none."""
    return tuple(embedding for head, embedding in family.tied if name == head or name.endswith("." + head))
