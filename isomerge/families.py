"""Which tensors of a checkpoint are matrices of linear layers, known by the tensors' names and shapes alone.

`FAMILIES` has one row per family; a model has the rules of every row that accepts its shapes, for its vision tower and
its language model are of two families, and those of the last row where no other accepts them.
A row adds to the rules that hold everywhere: what is called an embedding, an output head, a router or a norm
is not a matrix, whatever its shape, unless the row's `linear` says so.

Kernels of convolutions [out, in, *k] are matrices [out, in * prod(k)] where the recipe asks for it (`flatten_conv`), as
far as names and shapes tell:
- a `weight` of four or five dimensions is a kernel; one of three is where its name says `conv` or k is 1, for there are
  stacks of linear layers of three as well;
- a depthwise kernel [out, 1, *k] mixes no channels: it is averaged, and so is a first layer for images of one channel,
  which looks the same. Other grouped kernels [out, in / groups, *k] look like any and are taken as they stand;
- a transposed convolution is stored [in, out, *k] and maps an input to a patch of the output: [out * prod(k), in]. One
  whose name does not tell is read the other way round, of which Iso-C and TSV-M notice nothing;
- what is stored as direction and length (weight_v, weight_g) is averaged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a tensor is to a merge.

    matrix:       one matrix [m, n], or `slices` of them stacked in the first dimension; `transposed`: stored [in, out];
                  `kernel`: stored with more dimensions, the first is one side and all others together are the other
    elementwise:  averaged, whatever its shape
    keep:         not floating-point, or empty: the base's bytes
    """

    kind: Literal["matrix", "elementwise", "keep"]
    transposed: bool = False
    slices: int = 0
    kernel: bool = False

    def sides(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """m x n = out x in of each matrix of a tensor of this kind."""
        rows, columns = (shape[0], math.prod(shape[1:])) if self.kernel else shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    def stacked(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this kind is a stack of matrices, be it of one alone."""
        return self.kind == "matrix" and len(shape) == 3 and not self.kernel


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
    r"(^|\.)(((mlp|(\w+_)?moe|feed_forward|ffn|mixer|experts)\.gate|shared_expert_gate)(\.(wg|layer))?(\.weight)?$"
    r"|(\w+_)?router(\.|$))"
)
_NORMS = re.compile(r"(^|[._])(norm|layernorm|layer_norm|rmsnorm|ln)\d*\.weight$", re.IGNORECASE)
_LINEAR = re.compile(r"(^|[._])weight(_[ih]h_l\d+)?$")  # `weight`, `in_proj_weight`, `q_proj_weight`, an LSTM's
_STACKS = re.compile(
    r"(^|\.)((shared_)?experts|(\w+_)?moe)\.(mlp\.)?(gate_up_proj|gate_proj|up_proj|down_proj|w([123]|13)|wi(_[01])?|wo"
    r"|fc[123])([._]weight)?$|(^|\.)(in|out)put_linear\.weight$"
)
_UP = re.compile(r"(?<=\.)(gate_up_proj|fc1)(?=(\.weight)?$)")  # of the stacks, what `down_proj` or `fc2` comes after
_KERNEL = re.compile(r"(^|\.)weight$")  # of a convolution
_CONVOLUTION = re.compile(r"conv", re.IGNORECASE)
_DECONVOLUTION = re.compile(r"deconv|conv_?t(r|ransposed?)?\d*([._]|$)|transposed?_?conv", re.IGNORECASE)


def _has(*patterns: str) -> Callable[[Shapes], bool]:
    """Accepts shapes in which every pattern is found in some name."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda shapes: all(any(pattern.search(name) for name in shapes) for pattern in compiled)


def _has_conv1d(shapes: Shapes) -> bool:
    """GPT-2's Conv1D keeps weights as [in, out], so c_attn is [d, 3d]; the same names in BigCode models are [3d, d]."""
    packed = [s for name, s in shapes.items() if name.endswith("attn.c_attn.weight") and len(s) == 2]
    return bool(packed) and all(3 * s[0] == s[1] for s in packed)


def _has_stacks_in_out(shapes: Shapes) -> bool:
    """Stacks [experts, in, out]: gate and up projection, side by side, have twice the columns that `down` has rows.

    Names do not tell: Qwen3-VL's files have in x out where transformers 5 has out x in in memory. Stacks of gates and
    of up projections by themselves are taken as out x in.
    """
    for name, up in shapes.items():
        if len(up) == 3 and _STACKS.search(name) and (found := _UP.search(name)):
            partner = "down_proj" if found[0] == "gate_up_proj" else "fc2"
            down = shapes.get(name[: found.start()] + partner + name[found.end() :], ())
            if len(down) == 3 and up[2] == 2 * down[1]:
                return True
    return False


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
        # open_clip's `resblocks`, maybe of the same model, have nn.Linear under these names
        transposed=r"^(?!.*resblocks)(.*\.)?(c_attn|q_attn|c_proj|c_fc)\.weight$",
        tied=(("lm_head.weight", "wte.weight"), ("lm_head.weight", "tokens_embed.weight")),
    ),
    Family(
        "t5",
        _has(r"(^|\.)shared\.weight$", r"SelfAttention\.relative_attention_bias\.weight$"),
        tied=(("lm_head.weight", "shared.weight"),),
    ),
    Family(
        "moe-in-out",  # Llama 4, gpt-oss, Aria, Qwen3-VL: beside the row of the model that the stacks are in
        _has_stacks_in_out,
        transposed=r"(^|\.)experts\.(gate_up_proj|down_proj|fc[12])(\.weight)?$",
    ),
    Family(
        "llama",  # Llama, Qwen, Mistral, Gemma, Phi and others of this plan; Mixtral's and Qwen's experts too
        _has(r"(^|\.)embed_tokens\.weight$", r"self_attn\.(q_proj|qkv_proj|q_a_proj|q_b_proj)\.weight$"),
        transposed=r"(^|\.)mm_input_projection_weight$",  # Gemma 3: `x @ weight`
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
    """The rows of FAMILIES that accept the shapes, as one family; the last row where no other does."""
    rows = [family for family in FAMILIES[:-1] if family.recognise(shapes)] or [FAMILIES[-1]]
    if len(rows) == 1:
        return rows[0]
    return Family(
        " + ".join(row.name for row in rows),
        lambda shapes: all(row.recognise(shapes) for row in rows),
        linear="|".join(row.linear for row in rows),
        other="|".join(row.other for row in rows),
        transposed="|".join(row.transposed for row in rows),
        tied=tuple(dict.fromkeys(pair for row in rows for pair in row.tied)),
    )


def classify(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, family: Family, scope: str, flatten_conv: bool = False
) -> Kind:
    """What the tensor is under a scope.

    default: matrices are the 2-D weights of linear layers and each slice of a 3-D stack of experts.
    paper: every 2-D tensor whose name lacks `text_projection`, as it is stored.
    flatten_conv adds, to either, the kernels of convolutions.
    """
    if not dtype.is_floating_point or 0 in shape:
        return Kind("keep")
    if flatten_conv and is_kernel(name, shape) and shape[1] > 1 and not _excluded(name, family, _HEADS, _ROUTERS):
        return as_matrix(name, shape, family)
    if scope == "paper":
        matrix = len(shape) == 2 and "text_projection" not in name
        return Kind("matrix", slices=1) if matrix else Kind("elementwise")
    return as_matrix(name, shape, family) if is_linear(name, shape, family) else Kind("elementwise")


def is_linear(name: str, shape: tuple[int, ...], family: Family) -> bool:
    """Whether a tensor holds the weights of one linear layer, or a stack of them in three dimensions."""
    if len(shape) == 3:
        return _STACKS.search(name) is not None
    if len(shape) != 2:
        return False
    if re.search(family.linear, name):
        return True
    return _LINEAR.search(name) is not None and not _excluded(name, family, _EMBEDDINGS, _HEADS, _ROUTERS, _NORMS)


def is_kernel(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the kernel of a convolution over one, two or three dimensions, depthwise ones included."""
    if len(shape) == 3 and (_STACKS.search(name) or not (_CONVOLUTION.search(name) or shape[2] == 1)):
        return False
    return 3 <= len(shape) <= 5 and _KERNEL.search(name) is not None and _NORMS.search(name) is None


def as_matrix(name: str, shape: tuple[int, ...], family: Family) -> Kind:
    """The tensor as one matrix, or a stack of them, in the orientation of its family; elementwise if it cannot be."""
    if len(shape) == 2 or (len(shape) == 3 and _STACKS.search(name)):
        transposed = re.search(family.transposed, name) is not None
        return Kind("matrix", transposed, shape[0] if len(shape) == 3 else 1)
    if is_kernel(name, shape):
        return Kind("matrix", _DECONVOLUTION.search(name) is not None, 1, kernel=True)
    return Kind("elementwise")


def _excluded(name: str, family: Family, *patterns: re.Pattern[str]) -> bool:
    return re.search(family.other, name) is not None or any(pattern.search(name) for pattern in patterns)


def tied_embedding(name: str, family: Family) -> tuple[str, ...]:
    """Names of the input embedding that the output head `name` may be tied to, prefix not included; () if none."""
    return tuple(embedding for head, embedding in family.tied if name == head or name.endswith("." + head))
