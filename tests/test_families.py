"""Which tensors are matrices, held to the key names of real models."""

from __future__ import annotations

import pytest
import torch
import transformers

from isomerge.families import FAMILIES, Kind, classify, recognise

Shapes = dict[str, tuple[int, ...]]


def kinds(shapes: Shapes, scope: str = "default") -> tuple[str, dict[str, Kind]]:
    """The family's name, and the kind of every tensor as float32."""
    family = recognise(shapes)
    return family.name, {name: classify(name, shape, torch.float32, family, scope) for name, shape in shapes.items()}


def shapes_of(model: torch.nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if value.is_floating_point()}


BERT = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 8,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 12,
}  # fmt: skip
IMAGE = {"image_size": 8, "patch_size": 4}
MODELS = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**BERT)),
    "bert-mlm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**BERT, num_key_value_heads=1, tie_word_embeddings=False)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, tie_word_embeddings=False
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **IMAGE
        )
    ),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**TOWER, "vocab_size": 32}, vision_config={**TOWER, **IMAGE}, projection_dim=12
        )
    ),
}

# Per model: the family, and the endings of every 2-D tensor that is not a matrix; all other 2-D tensors are.
EXPECTED = {
    "bert": ("bert", ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight",
                      "classifier.weight")),
    "roberta": ("bert", ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight",
                         "classifier.dense.weight", "classifier.out_proj.weight")),
    "bert-mlm": ("bert", ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight",
                          "cls.predictions.transform.dense.weight", "cls.predictions.decoder.weight")),
    "gpt2": ("gpt2", ("wte.weight", "wpe.weight", "lm_head.weight")),
    "llama": ("llama", ("embed_tokens.weight", "lm_head.weight")),
    "t5": ("t5", ("shared.weight", "embed_tokens.weight", "relative_attention_bias.weight", "lm_head.weight")),
    "vit": ("vit", ("classifier.weight",)),
    "clip": ("clip", ("token_embedding.weight", "position_embedding.weight", "text_projection.weight")),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_matrices_of_transformers_models(model: str) -> None:
    shapes = shapes_of(MODELS[model]())
    family, found = kinds(shapes)
    expected_family, others = EXPECTED[model]
    assert family == expected_family
    wrong = []
    for name, shape in shapes.items():
        expected = "matrix" if len(shape) == 2 and not name.endswith(others) else "elementwise"
        if found[name].kind != expected:
            wrong.append((name, shape, found[name]))
    assert wrong == []
    for ending in others:
        assert any(name.endswith(ending) for name in shapes), f"{ending} is not in the model: the test says nothing"


def test_gpt2_stores_in_x_out_and_its_namesakes_do_not() -> None:
    shapes = shapes_of(MODELS["gpt2"]())
    _, found = kinds(shapes)
    assert {name.split(".")[-2] for name, kind in found.items() if kind.transposed} == {"c_attn", "c_proj", "c_fc"}
    bigcode = {"transformer.h.0.attn.c_attn.weight": (48, 16), "transformer.wte.weight": (32, 16)}
    assert not kinds(bigcode)[1]["transformer.h.0.attn.c_attn.weight"].transposed


OPEN_CLIP: Shapes = {
    "positional_embedding": (77, 16), "text_projection": (16, 12), "logit_scale": (), "token_embedding.weight": (9, 16),
    "ln_final.weight": (16,), "visual.class_embedding": (16,), "visual.positional_embedding": (50, 16),
    "visual.proj": (16, 12), "visual.conv1.weight": (16, 3, 4, 4), "visual.ln_pre.weight": (16,),
    "visual.transformer.resblocks.0.attn.in_proj_weight": (48, 16),
    "visual.transformer.resblocks.0.attn.in_proj_bias": (48,),
    "visual.transformer.resblocks.0.attn.out_proj.weight": (16, 16),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": (64, 16),
    "visual.transformer.resblocks.0.mlp.c_proj.weight": (16, 64),
    "transformer.resblocks.0.attn.in_proj_weight": (48, 16),
}  # fmt: skip


def test_open_clip() -> None:
    family, found = kinds(OPEN_CLIP)
    assert family == "clip"
    assert {name for name, kind in found.items() if kind.kind == "matrix"} == {
        "visual.proj",
        "visual.transformer.resblocks.0.attn.in_proj_weight",
        "visual.transformer.resblocks.0.attn.out_proj.weight",
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
        "visual.transformer.resblocks.0.mlp.c_proj.weight",
        "transformer.resblocks.0.attn.in_proj_weight",
    }
    assert [name for name, kind in found.items() if kind.transposed] == ["visual.proj"]


def test_paper_scope_takes_every_2d_tensor_but_text_projection() -> None:
    _, found = kinds(OPEN_CLIP, "paper")
    expected = {name for name, shape in OPEN_CLIP.items() if len(shape) == 2 and name != "text_projection"}
    assert {name for name, kind in found.items() if kind.kind == "matrix"} == expected
    assert "positional_embedding" in expected
    assert not any(kind.transposed for kind in found.values())


MIXTRAL: Shapes = {
    "model.embed_tokens.weight": (32, 16), "lm_head.weight": (32, 16), "model.norm.weight": (16,),
    "model.layers.0.self_attn.q_proj.weight": (16, 16), "model.layers.0.self_attn.q_norm.weight": (8,),
    "model.layers.0.block_sparse_moe.gate.weight": (4, 16),
    "model.layers.0.block_sparse_moe.experts.0.w1.weight": (24, 16),
    "model.layers.0.block_sparse_moe.experts.0.w2.weight": (16, 24),
}  # fmt: skip
QWEN_MOE: Shapes = {
    "model.embed_tokens.weight": (32, 16), "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.gate.weight": (4, 16), "model.layers.0.mlp.shared_expert_gate.weight": (1, 16),
    "model.layers.0.mlp.shared_expert.gate_proj.weight": (24, 16),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 48, 16), "model.layers.0.mlp.experts.down_proj": (4, 16, 24),
}  # fmt: skip
QWEN_VL_MOE: Shapes = {  # as Qwen publishes it; transformers 5 turns the stacks round when it loads them
    "model.visual.pos_embed.weight": (16, 16), "model.visual.patch_embed.proj.weight": (16, 3, 2, 4, 4),
    "model.language_model.embed_tokens.weight": (32, 16),
    "model.language_model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.language_model.layers.0.mlp.gate.weight": (4, 16),
    "model.language_model.layers.0.mlp.experts.gate_up_proj": (4, 16, 48),
    "model.language_model.layers.0.mlp.experts.down_proj": (4, 24, 16),
}  # fmt: skip
JAMBA: Shapes = {  # Llama 4's names, the other way round
    "model.embed_tokens.weight": (32, 16), "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.feed_forward.router.weight": (4, 16),
    "model.layers.0.feed_forward.experts.gate_up_proj": (4, 48, 16),
    "model.layers.0.feed_forward.experts.down_proj": (4, 16, 24),
}  # fmt: skip
GRANITE: Shapes = {
    "model.embed_tokens.weight": (32, 16), "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.block_sparse_moe.router.layer.weight": (4, 16),
    "model.layers.0.block_sparse_moe.input_linear.weight": (4, 48, 16),
    "model.layers.0.block_sparse_moe.output_linear.weight": (4, 16, 24),
}  # fmt: skip
LLAMA4: Shapes = {
    "model.embed_tokens.weight": (32, 16), "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.feed_forward.router.weight": (4, 16),
    "model.layers.0.feed_forward.experts.gate_up_proj": (4, 16, 48),
    "model.layers.0.feed_forward.experts.down_proj": (4, 24, 16),
    "model.layers.0.feed_forward.shared_expert.up_proj.weight": (24, 16),
}  # fmt: skip
GPT_OSS: Shapes = {
    "model.embed_tokens.weight": (32, 16), "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.router.weight": (4, 16), "model.layers.0.mlp.experts.gate_up_proj": (4, 16, 48),
    "model.layers.0.mlp.experts.down_proj": (4, 24, 16),
    "model.layers.0.mlp.experts.gate_up_proj_bias": (4, 48), "model.layers.0.self_attn.sinks": (2,),
}  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "family", "routers"),
    [
        (MIXTRAL, "llama", ["block_sparse_moe.gate"]),
        (QWEN_MOE, "llama", ["mlp.gate", "shared_expert_gate"]),
        (GRANITE, "llama", ["router.layer"]),
        (JAMBA, "llama", ["feed_forward.router"]),
        (QWEN_VL_MOE, "moe-in-out + llama", ["mlp.gate", "pos_embed", "patch_embed.proj"]),
        (LLAMA4, "moe-in-out + llama", ["feed_forward.router"]),
        (GPT_OSS, "moe-in-out + llama", ["mlp.router"]),
    ],
)
def test_mixtures_of_experts(shapes: Shapes, family: str, routers: list[str]) -> None:
    name, found = kinds(shapes)
    assert name == family
    for tensor, kind in found.items():
        plain = tensor.removesuffix(".weight")
        if len(shapes[tensor]) == 3:
            assert kind == Kind("matrix", family == "moe-in-out + llama", 4)
        elif plain.endswith((*routers, "embed_tokens", "lm_head", "_bias")) or len(shapes[tensor]) == 1:
            assert kind == Kind("elementwise")
        else:
            assert kind == Kind("matrix", False, 1)


def test_a_model_of_two_families_has_the_rules_of_both() -> None:
    captioner = {  # ViT and GPT-2
        "encoder.embeddings.cls_token": (1, 1, 16), "encoder.embeddings.patch_embeddings.proj.weight": (16, 3, 4, 4),
        "encoder.encoder.layer.0.attention.attention.query.weight": (16, 16),
        "decoder.transformer.wte.weight": (32, 16), "decoder.transformer.h.0.attn.c_attn.weight": (16, 48),
        "decoder.transformer.h.0.mlp.c_fc.weight": (16, 64),
    }  # fmt: skip
    family, found = kinds({**captioner, **{f"clip.{name}": shape for name, shape in OPEN_CLIP.items()}})
    assert family == "clip + vit + gpt2"
    assert {name for name, kind in found.items() if kind.transposed} == {
        "decoder.transformer.h.0.attn.c_attn.weight",
        "decoder.transformer.h.0.mlp.c_fc.weight",
        "clip.visual.proj",
    }
    assert found["clip.visual.transformer.resblocks.0.mlp.c_fc.weight"] == Kind("matrix", False, 1)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layer1.0.conv1.weight", (16, 8, 3, 3), Kind("matrix", False, 1, True)),
        ("input_blocks.1.1.proj_in.weight", (320, 320, 1, 1), Kind("matrix", False, 1, True)),
        ("visual.patch_embed.proj.weight", (16, 3, 2, 4, 4), Kind("matrix", False, 1, True)),
        ("embeddings.patch_embedding.weight", (16, 3, 4, 4), Kind("matrix", False, 1, True)),
        ("encoder.conv1.weight", (16, 8, 3), Kind("matrix", False, 1, True)),
        ("middle.qkv.weight", (48, 16, 1), Kind("matrix", False, 1, True)),
        ("mlp.fc1.weight", (48, 16, 1), Kind("matrix", False, 1, True)),
        ("layer.0.deconv.weight", (16, 8, 4, 4), Kind("matrix", True, 1, True)),
        ("up.conv_transpose1.weight", (16, 8, 4, 4), Kind("matrix", True, 1, True)),
        ("mask.convt_pre.weight", (16, 8, 4), Kind("matrix", True, 1, True)),
        ("dense.conv_transition.weight", (16, 8, 1, 1), Kind("matrix", False, 1, True)),
        ("stages.0.dwconv.weight", (16, 1, 7, 7), Kind("elementwise")),
        ("mixer.conv1d.weight", (16, 1, 4), Kind("elementwise")),
        ("decode_head.classifier.weight", (2, 16, 1, 1), Kind("elementwise")),
        ("pos_conv.weight_v", (16, 4, 8), Kind("elementwise")),
        ("norm.weight", (16, 1, 1), Kind("elementwise")),
        ("linears.weight", (8, 16, 24), Kind("elementwise")),  # Moshi's linear layers, one for each codebook
        ("attn.decay", (1, 2, 16, 16), Kind("elementwise")),
        ("h.experts.w1.weight", (8, 16, 24), Kind("matrix", False, 8)),
        ("h.experts.w1.weight", (1, 16, 24), Kind("matrix", False, 1)),
    ],
)
def test_kernels(name: str, shape: tuple[int, ...], expected: Kind) -> None:
    family = FAMILIES[-1]
    assert classify(name, shape, torch.float32, family, "default", flatten_conv=True) == expected
    plain = Kind("elementwise") if expected.kernel else expected
    assert classify(name, shape, torch.float32, family, "default") == plain
    if expected.kernel:
        assert classify(name, shape, torch.float32, family, "paper", flatten_conv=True) == expected
        assert classify(name, (0, *shape[1:]), torch.float32, family, "default", flatten_conv=True) == Kind("keep")


def test_current_transformers_fuse_experts_as_three_dimensions() -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, head_dim=8,
    )  # fmt: skip
    shapes = shapes_of(transformers.Qwen3MoeForCausalLM(config))
    family, found = kinds(shapes)
    assert family == "llama"
    stacks = [name for name, shape in shapes.items() if len(shape) == 3]
    experts = stacks or [name for name in shapes if ".experts." in name]
    assert experts
    assert all(found[name].kind == "matrix" for name in experts)
    assert found["model.layers.0.mlp.gate.weight"].kind == "elementwise"


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("encoder.layers.0.fc1.weight", (4, 3), "matrix"),
        ("blocks.0.attn.qkv.weight", (12, 4), "matrix"),
        ("lstm.weight_ih_l0", (12, 4), "matrix"),
        ("encoder.embedding_hidden_mapping_in.weight", (8, 4), "matrix"),  # ALBERT: a linear layer
        ("tok_embeddings.weight", (9, 4), "elementwise"),
        ("output.weight", (9, 4), "elementwise"),
        ("embed_out.weight", (9, 4), "elementwise"),
        ("head.weight", (5, 4), "elementwise"),
        ("score.weight", (2, 4), "elementwise"),
        ("qa_outputs.weight", (2, 4), "elementwise"),
        ("reward_head.weight", (1, 4), "elementwise"),
        ("mixer.A_log", (8, 4), "elementwise"),
        ("mixer.conv1d.weight", (8, 1, 4), "elementwise"),
        ("conv.weight", (8, 4, 3, 3), "elementwise"),
        ("norm.weight", (8, 1), "elementwise"),
        ("mixer.gate.weight", (8, 4), "elementwise"),
        ("altup.modality_router.weight", (8, 4), "elementwise"),
        ("layers.0.router.proj.weight", (8, 4), "elementwise"),
        ("gate.weight", (8, 4), "matrix"),
        ("fc.weight", (0, 4), "keep"),
    ],
)
def test_generic_names(name: str, shape: tuple[int, ...], expected: str) -> None:
    assert recognise({name: shape}).name == "generic"
    assert classify(name, shape, torch.bfloat16, FAMILIES[-1], "default").kind == expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_whole_numbers_are_kept(dtype: torch.dtype) -> None:
    for scope in ("default", "paper"):
        assert classify("embeddings.position_ids", (1, 512), dtype, FAMILIES[0], scope) == Kind("keep")


def test_rows_have_distinct_names_and_the_last_takes_everything() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert recognise({}).name == "generic"
