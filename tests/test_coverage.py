"""Whole merges of the kinds of models that people have: mixtures of experts, models of several parts, convolutions,
layers that stayed frozen, dtypes and files that differ between base and experts.

What a merge must give is computed here from each tensor's layout as the model's own code uses it, tensor by tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from checkpoints import write_sharded
from safetensors.torch import save_file
from tiny import assert_same
from torch import Tensor, nn

from isomerge.checkpoint import from_state_dict
from isomerge.errors import InputError
from isomerge.merge import merge, merge_state_dicts
from isomerge.methods import METHODS
from isomerge.moments import Moments
from isomerge.plan import build_plan
from isomerge.report import Report
from isomerge.settings import Model, Settings

State = dict[str, Tensor]
# How a tensor is merged: "matrix" [m, n], "stack" of them, "kernel" [m, *n]; "in-out": each is stored [n, m].
Layout = Callable[[str, Tensor], str]


def save(folder: Path, *states: Mapping[str, Tensor]) -> dict[str, object]:
    """Saves `base`, `e0`, `e1`, ...; the models of the recipe that merges them."""
    for index, state in enumerate(states):
        tiny.save_model(folder / (f"e{index - 1}" if index else "base"), state)
    experts = [{"model": str(folder / f"e{index}")} for index in range(len(states) - 1)]
    return {"base_model": str(folder / "base"), "models": experts}


def merged_by(method: str, states: list[State], layout: Layout) -> State:
    """base + method(deltas) of every tensor in its layout; those without one are averaged."""
    result = {}
    for name, base in states[0].items():
        deltas = torch.stack([state[name].float() - base.float() for state in states[1:]])
        how = layout(name, base)
        if how:
            stack = deltas.transpose(0, 1) if "stack" in how else deltas.flatten(2)[None]
            stack = stack.mT if "in-out" in how else stack
            update = METHODS[method].function(stack.contiguous())
            update = update.mT if "in-out" in how else update
        else:
            update = METHODS["average"].function(deltas.reshape(len(deltas), 1, -1))
        result[name] = (base.float() + update.reshape(base.shape)).to(base.dtype)
    return result


def by_ending(layouts: Mapping[str, str]) -> Layout:
    """The layout of the first ending that a name has; of 2-D tensors with none "matrix"."""

    def layout(name: str, value: Tensor) -> str:
        found = next((how for ending, how in layouts.items() if name.endswith(ending)), None)
        return ("matrix" if value.dim() == 2 else "") if found is None else found

    return layout


def numbers(model: nn.Module) -> State:
    """The model's tensors, all random: a new norm is ones and a new bias zeros."""
    random = torch.Generator().manual_seed(0)
    state = model.state_dict()
    return {name: torch.randn(v.shape, generator=random) if v.is_floating_point() else v for name, v in state.items()}


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Equal bits; == takes 0 and -0 for equal."""
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


# Mixtures of experts ----------------------------------------------------------------------------------------------

TEXT = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 8, "head_dim": 8,
}  # fmt: skip
VISION = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"image_size": 8, "patch_size": 4}
AVERAGED = {"embed_tokens.weight": "", "lm_head.weight": "", "mlp.gate.weight": "", "router.weight": "", "_bias": ""}


def llama4() -> nn.Module:
    config = transformers.Llama4TextConfig(**TEXT, intermediate_size_mlp=20, num_local_experts=3)
    return transformers.Llama4ForCausalLM(config)


def gpt_oss() -> nn.Module:
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**TEXT, num_local_experts=3))


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**TEXT, moe_intermediate_size=12, num_experts=3)
    return transformers.Qwen3MoeForCausalLM(config)


def lfm2_moe() -> nn.Module:
    """Llama 4's names of the stacks, the other way round; and depthwise convolutions."""
    layers = {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}
    return transformers.Lfm2MoeForCausalLM(
        transformers.Lfm2MoeConfig(**TEXT, num_experts=3, moe_intermediate_size=12, **layers)
    )


@pytest.mark.parametrize(
    ("model", "stacks"),
    [(qwen3_moe, "stack"), (lfm2_moe, "stack"), (llama4, "stack in-out"), (gpt_oss, "stack in-out")],
)
def test_fused_experts(tmp_path: Path, model: Callable[[], nn.Module], stacks: str) -> None:
    states = [numbers(model())]
    states += [tiny.tuned(states[0], seed) for seed in (1, 2)]
    fused = {"experts.gate_up_proj": stacks, "experts.down_proj": stacks}
    expected = merged_by("iso_cts", states, by_ending({**AVERAGED, "feed_forward.gate.weight": "", **fused}))
    turned = {name: how.replace("in-out", "") if "in-out" in how else "stack in-out" for name, how in fused.items()}
    wrong = merged_by("iso_cts", states, by_ending({**AVERAGED, **turned}))
    stack = next(name for name in states[0] if name.endswith("experts.down_proj"))
    assert not torch.equal(wrong[stack], expected[stack]), "the method does not tell the orientation"
    report = merge({"merge_method": "iso_cts", **save(tmp_path, *states)}, tmp_path / "out")
    assert_same(tiny.load_output(tmp_path / "out"), expected)
    record = next(record for record in report.tensors if record.name == stack)
    assert (record.kind, record.matrices) == ("matrix", 3)


def mixtral(seed: int) -> State:
    """Mixtral as its checkpoints have it: a 2-D tensor for each expert."""
    random = torch.Generator().manual_seed(seed)
    block = "model.layers.{}.block_sparse_moe"
    shapes = {"model.embed_tokens.weight": (24, 16), "lm_head.weight": (24, 16), "model.norm.weight": (16,)}
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (16, 16)
        shapes[f"{block.format(layer)}.gate.weight"] = (4, 16)
        for expert in range(4):
            experts = f"{block.format(layer)}.experts.{expert}"
            shapes |= {f"{experts}.w1.weight": (12, 16), f"{experts}.w2.weight": (16, 12)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def test_an_expert_per_tensor(tmp_path: Path) -> None:
    states = [mixtral(0)]
    states += [tiny.tuned(states[0], seed) for seed in (1, 2, 3)]
    report = merge({"merge_method": "tsvm", **save(tmp_path, *states)}, tmp_path / "out")
    assert_same(
        tiny.load_output(tmp_path / "out"), merged_by("tsvm", states, by_ending({**AVERAGED, "moe.gate.weight": ""}))
    )
    assert report.totals.matrices == 2 * (1 + 4 * 2)


def test_experts_in_another_layout_are_told() -> None:
    base = mixtral(0)
    fused = {name: value for name, value in base.items() if ".experts." not in name}
    fused["model.layers.0.mlp.experts.down_proj"] = torch.zeros(4, 16, 12)
    expected = (
        r"experts.0.w1.weight is missing \(and 15 more\).* stored as model.layers.0.mlp.experts.down_proj; save both"
    )
    with pytest.raises(InputError, match=expected):
        merge_state_dicts(base, [fused], method="average")
    with pytest.raises(
        InputError, match=r"down_proj is missing.* stored as model.layers.0.block_sparse_moe.experts.0.w1"
    ):
        merge_state_dicts(fused, [base], method="average")


def test_packed_weights_are_not_taken_for_buffers() -> None:
    """gpt-oss is published with its experts as blocks of 4-bit numbers."""
    blocks = "model.layers.0.mlp.experts.down_proj_blocks"
    base = {"model.norm.weight": torch.ones(4), blocks: torch.zeros(2, 4, 1, 16, dtype=torch.uint8)}
    with pytest.raises(InputError, match=f"{blocks}: integers of type uint8; quantised weights"):
        merge_state_dicts(base, [base], method="average")


# Models of several parts ------------------------------------------------------------------------------------------


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**VISION, **IMAGE)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**TEXT))
    )


def gemma3() -> nn.Module:
    vision = transformers.SiglipVisionConfig(**VISION, **IMAGE, vision_use_head=False)
    text = transformers.Gemma3TextConfig(**TEXT)
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=4)
    )


def qwen2_vl() -> nn.Module:
    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    )


@pytest.mark.parametrize("model", [llava, gemma3, qwen2_vl])
def test_towers_and_projectors(tmp_path: Path, model: Callable[[], nn.Module]) -> None:
    states = [numbers(model())]
    states += [tiny.tuned(states[0], seed) for seed in (1, 2)]
    layout = by_ending({**AVERAGED, "position_embedding.weight": "", "mm_input_projection_weight": "matrix in-out"})
    merge({"merge_method": "iso_cts", **save(tmp_path, *states)}, tmp_path / "out")
    assert_same(tiny.load_output(tmp_path / "out"), merged_by("iso_cts", states, layout))


def test_layers_of_two_towers_are_of_two_types() -> None:
    state = numbers(llava())
    models = (Model("e0", statistics="s"), Model("e1", statistics="s"))
    settings = Settings("esm", Model("base"), models)
    opened = from_state_dict(state, "base")
    plan = build_plan(settings, opened, [opened] * 2, statistics=[Moments({}, "s")] * 2)
    types = {a.name: a.layer_type for a in plan.assignments if a.name.endswith("layers.1.self_attn.q_proj.weight")}
    assert len(types) == 2
    assert all(found == name.replace(".1.", ".*.") for name, found in types.items())
    assert not any(a.layer_type for a in plan.assignments if "projector" in a.name)


def renamed(state: State, *prefixes: tuple[str, str]) -> State:
    """The state with names that start with one of the first prefixes starting with the second instead."""
    result = {}
    for name, value in state.items():
        old, new = next(((old, new) for old, new in prefixes if name.startswith(old)), ("", ""))
        result[new + name.removeprefix(old)] = value
    return result


def test_other_prefixes_are_told_and_refused() -> None:
    model = numbers(llava())
    older = renamed(  # transformers 4
        model,
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", ""),
    )
    text = {
        name.replace("model.language_model.", "model."): value
        for name, value in model.items()
        if "language_model" in name
    }
    tower = {name.removeprefix("model.vision_tower."): v for name, v in model.items() if "vision_tower" in name}
    embedding = next(name for name in model if name.endswith("embeddings.class_embedding"))
    for base, expert, close in [
        (older, model, embedding),
        (model, older, embedding.removeprefix("model.")),
        (text, model, "model.language_model.embed_tokens.weight"),
        (tower, model, embedding),
    ]:
        expected = rf"is missing \(and \d+ more\).* closest name there is {close}: names differ in their prefixes; save"
        with pytest.raises(InputError, match=expected):
            merge_state_dicts(base, [expert], method="average")
    for longer in (model, {f"layers.{i}.fc.weight": torch.ones(2, 2) for i in range(2)}):
        other = {name.replace("layers.1", "layers.2"): value for name, value in longer.items()}
        with pytest.raises(InputError, match="merge models of one architecture"):
            merge_state_dicts(longer, [other], method="average")


# Tied embeddings --------------------------------------------------------------------------------------------------

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_tied_head_may_be_stored_or_not(tmp_path: Path) -> None:
    """The base leaves it out, as safetensors files do; one expert has both names for one tensor, as pickles do."""
    base = {name: value for name, value in mixtral(0).items() if name != HEAD}
    experts = [tiny.tuned(base, seed) for seed in (1, 2)]
    recipe = {"merge_method": "iso_c", **save(tmp_path, base, *experts)}
    merge(recipe, tmp_path / "out")
    for order in ((EMBED, HEAD), (HEAD, EMBED)):
        both = {**dict.fromkeys(order, experts[0][EMBED]), **experts[0]}
        torch.save(both, tmp_path / "e0.bin")
        models = [{"model": str(tmp_path / "e0.bin")}, {"model": str(tmp_path / "e1")}]
        report = merge({**recipe, "models": models}, tmp_path / "again", overwrite=True)
        assert report.warnings == []
        assert_same(tiny.load_output(tmp_path / "again"), tiny.load_output(tmp_path / "out"))


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
    ],
)
def test_the_text_part_may_say_that_the_head_is_tied(tmp_path: Path, config: dict[str, object], tied: bool) -> None:
    base = mixtral(0)
    recipe = {"merge_method": "average", **save(tmp_path, base, {n: v for n, v in base.items() if n != HEAD})}
    (tmp_path / "e0" / "config.json").write_text(json.dumps(config))
    if not tied:
        with pytest.raises(InputError, match=f"{HEAD} is missing"):
            merge(recipe, tmp_path / "out")
        return
    (warning,) = merge(recipe, tmp_path / "out").warnings
    assert warning.endswith(f"ties {HEAD} to {EMBED} and the base does not: its {EMBED} is read for both")


# Dtypes -----------------------------------------------------------------------------------------------------------


def cast(state: State, dtype: torch.dtype, norms: torch.dtype | None = None) -> State:
    return {name: value.to(norms or dtype if "norm" in name else dtype) for name, value in state.items()}


def test_models_of_several_dtypes(tmp_path: Path) -> None:
    """A base in bfloat16 with norms in float32; experts in float32, in float16, and in bfloat16 throughout."""
    base = cast(mixtral(0), torch.bfloat16, torch.float32)
    wide = cast(base, torch.float32)
    experts = [tiny.tuned(wide, seed) for seed in (1, 2, 3)]
    states = [base, experts[0], cast(experts[1], torch.float16), cast(experts[2], torch.bfloat16)]
    report = merge({"merge_method": "iso_c", **save(tmp_path, *states)}, tmp_path / "out")
    expected = merged_by("iso_c", states, by_ending({**AVERAGED, "moe.gate.weight": ""}))
    assert expected["model.norm.weight"].dtype == torch.float32
    assert_same(tiny.load_output(tmp_path / "out"), expected)
    assert report.warnings == [
        f"{tmp_path / name}: 1 tensors are {dtype} where the base has float32: their rounding is part of the updates: "
        "model.norm.weight"
        for name, dtype in (("e1", "float16"), ("e2", "bfloat16"))
    ]


# Frozen layers ----------------------------------------------------------------------------------------------------

FROZEN = (EMBED, "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.experts.down_proj", "model.norm.weight")


def partly_frozen(dtype: torch.dtype) -> list[State]:
    """A base with zeros of both signs and two experts that left the tensors FROZEN as they were."""
    base = cast(numbers(qwen3_moe()), dtype)
    for value in base.values():
        value.view(-1)[:2] = torch.tensor([-0.0, 0.0])
    experts = [tiny.tuned(base, seed) for seed in (1, 2)]
    for expert in experts:
        expert |= {name: base[name].clone() for name in FROZEN}
        expert[EMBED].view(-1)[:2] = 0.0  # equal to the base's -0, in other bits
        stack = expert["model.layers.1.mlp.experts.down_proj"]
        stack[1:] = base["model.layers.1.mlp.experts.down_proj"][1:]  # frozen but for its first slice
    return [base, *experts]


def check_frozen(base: State, found: Mapping[str, Tensor], report: Report) -> None:
    for name, value in base.items():
        assert same_bytes(found[name], value) == (name in FROZEN), name
    assert [record.name for record in report.tensors if record.frozen] == [name for name in base if name in FROZEN]
    assert report.totals.frozen == len(FROZEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", tiny.WITHOUT_STATISTICS)
def test_frozen_tensors_keep_their_bytes_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("isomerge.deltas.PIECE_ELEMENTS", 96)
    states = partly_frozen(dtype)
    recipe = {"merge_method": method, "parameters": {"alpha": 1.5}, **save(tmp_path, *states)}
    report = merge(recipe, tmp_path / "out")
    check_frozen(states[0], tiny.load_output(tmp_path / "out"), report)
    assert json.loads((tmp_path / "out" / "isomerge_report.json").read_text())["totals"]["frozen"] == len(FROZEN)
    assert "4 of these tensors are equal in all models" in (tmp_path / "out" / "README.md").read_text()


def test_frozen_layers_of_a_type_that_waits_for_its_norms(tmp_path: Path) -> None:
    """ESM's updates go through a file, and a frozen layer has no share in its type's norms."""
    states = [tiny.bert_state(0)]
    states += [tiny.tuned(states[0], seed) for seed in (1, 2)]
    frozen = "encoder.layer.1.output.dense.weight"
    states[0][frozen][0, 0] = -0.0
    recipe = {"merge_method": "esm", **save(tmp_path, *states)}
    for index, expert in enumerate(states[1:]):
        expert[frozen] = states[0][frozen].clone()
        tiny.save_model(tmp_path / f"e{index}", expert)
        moments = tiny.second_moments(states[0], expert, index)
        path = tiny.save_statistics(tmp_path / f"e{index}.stats.safetensors", states[0], expert, moments)
        recipe["models"][index]["statistics"] = str(path)  # type: ignore[index]
    report = merge(recipe, tmp_path / "out")
    assert same_bytes(tiny.load_output(tmp_path / "out")[frozen], states[0][frozen])
    assert [record.name for record in report.tensors if record.frozen] == [frozen]


def test_no_update_is_too_small_to_count() -> None:
    """Squares of 1e-30 are zero in float32."""
    base = {"fc.weight": torch.tensor([[-0.0, 0.0]])}
    found = merge_state_dicts(base, [{"fc.weight": torch.tensor([[1e-30, 0.0]])}], method="average")
    assert float(found["fc.weight"][0, 0]) == pytest.approx(1e-30, rel=1e-6, abs=0)


# Convolutions -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Convolutions of every kind, as the state dict of a network has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3)
        self.conv_1d = nn.Conv1d(8, 6, 5)
        self.conv_3d = nn.Conv3d(4, 6, 2)
        self.proj_in = nn.Conv2d(8, 8, 1)
        self.qkv = nn.Conv1d(8, 24, 1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.dwconv = nn.Conv2d(8, 8, 3, groups=8)
        self.deconv = nn.ConvTranspose2d(8, 5, 2)
        self.norm = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8, 6)
        self.classifier = nn.Conv2d(8, 4, 1)


KERNELS = {
    "conv_in.weight": "kernel", "conv_1d.weight": "kernel", "conv_3d.weight": "kernel", "proj_in.weight": "kernel",
    "qkv.weight": "kernel", "grouped.weight": "kernel", "deconv.weight": "kernel in-out",
}  # fmt: skip


def conv_states() -> list[State]:
    base = numbers(Block())
    return [base, *(tiny.tuned(base, seed) for seed in (1, 2))]


@pytest.mark.parametrize("scope", ["default", "paper"])
def test_flattened_kernels(tmp_path: Path, scope: str) -> None:
    states = conv_states()
    recipe = {"merge_method": "iso_cts", "scope": scope, **save(tmp_path, *states)}
    merge(recipe, tmp_path / "averaged")
    assert_same(tiny.load_output(tmp_path / "averaged"), merged_by("iso_cts", states, by_ending({})))
    report = merge({**recipe, "flatten_conv": True}, tmp_path / "out")
    expected = merged_by("iso_cts", states, by_ending(KERNELS))
    assert_same(tiny.load_output(tmp_path / "out"), expected)
    assert report.totals.matrices == len(KERNELS) + 1
    assert "flatten_conv: true" in (tmp_path / "out" / "isomerge_recipe.yaml").read_text()
    assert_same(merge_state_dicts(states[0], states[1:], method="iso_cts", scope=scope, flatten_conv=True), expected)


def test_a_kernel_is_one_unit_and_a_stack_of_one_expert_a_stack() -> None:
    stack = "layers.0.experts.down_proj"
    opened = from_state_dict({**conv_states()[0], stack: torch.zeros(1, 4, 6)}, "base")
    plan = build_plan(Settings("tsvm", Model("base"), (Model("e0"),), flatten_conv=True), opened, [opened])
    labels = {unit.label for step in plan.steps for unit in step.group.units if step.kind == "matrix"}
    assert labels == {*KERNELS, "fc.weight", f"{stack}[0]"}


def test_a_rule_that_names_a_method_takes_kernels() -> None:
    states = conv_states()
    rules = [{"filter": "*conv*", "merge_method": "tsvm"}, {"filter": "grouped.*", "parameters": {"alpha": 0}}]
    found = merge_state_dicts(states[0], states[1:], method="iso_c", rules=rules)
    named = {name: how for name, how in KERNELS.items() if "conv" in name} | {"dwconv.weight": "kernel"}
    expected = merged_by("tsvm", states, by_ending(named))
    expected |= {"fc.weight": merged_by("iso_c", states, by_ending({}))["fc.weight"]}
    expected |= {name: states[0][name] for name in ("grouped.weight", "grouped.bias")}
    assert_same(found, expected)
    linear = merge_state_dicts(states[0], states[1:], method="ties", flatten_conv=True)
    assert_same(linear, merge_state_dicts(states[0], states[1:], method="ties"))


def test_kernels_have_no_statistics() -> None:
    states = conv_states()
    moments = [{"fc.weight": torch.eye(8)}] * 2
    found = merge_state_dicts(states[0], states[1:], method="esm", statistics=moments, flatten_conv=True)
    expected = merged_by("tsvm", states, by_ending(KERNELS))
    assert_same({name: found[name] for name in KERNELS}, {name: expected[name] for name in KERNELS})


def test_flatten_conv_is_true_or_false(tmp_path: Path) -> None:
    states = conv_states()
    with pytest.raises(InputError, match="flatten_conv: expected a valid boolean, got 'yes'"):
        merge({"merge_method": "iso_c", "flatten_conv": "yes", **save(tmp_path, *states)}, tmp_path / "out")
    with pytest.raises(InputError, match="flatten_conv: expected True or False, got 'yes'"):
        merge_state_dicts(states[0], states[1:], method="iso_c", flatten_conv="yes")  # type: ignore[arg-type]


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2)
    return transformers.ConvNextForImageClassification(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(hidden_sizes=[8, 12], depths=[1, 1], embedding_size=8)
    return transformers.ResNetForImageClassification(config)


@pytest.mark.parametrize(
    ("model", "averaged"),
    [(convnext, {"dwconv.weight": "", "classifier.weight": ""}), (resnet, {"classifier.1.weight": ""})],
)
def test_image_models(model: Callable[[], nn.Module], averaged: dict[str, str]) -> None:
    base = numbers(model())
    base = {name: value for name, value in base.items() if value.is_floating_point()}
    states = [base, *(tiny.tuned(base, seed) for seed in (1, 2))]
    kernels = {name: "kernel" for name, value in base.items() if value.dim() == 4}
    assert len(kernels) >= 4
    found = merge_state_dicts(base, states[1:], method="iso_cts", flatten_conv=True)
    assert_same(found, merged_by("iso_cts", states, by_ending({**averaged, **kernels})))


# Files ------------------------------------------------------------------------------------------------------------


def shards(state: State, count: int, ending: str) -> dict[str, State]:
    """The tensors dealt out to `count` shards, the last names first."""
    names = sorted(state, reverse=True)
    stem = "pytorch_model" if ending == "bin" else "model"
    return {
        f"{stem}-{i + 1:05}-of-{count:05}.{ending}": {name: state[name] for name in names[i::count]}
        for i in range(count)
    }


def in_many_layouts(folder: Path, name: str, state: State) -> Iterable[Path]:
    """The model in a folder, in shards, as a single file of each kind, and with its tensors in another order."""
    yield tiny.save_model(folder / name, state)
    yield write_sharded(folder / f"{name}-shards", shards(state, 3, "safetensors"))
    yield write_sharded(folder / f"{name}-bin-shards", shards(state, 2, "bin"))
    single, pickled = folder / f"{name}.safetensors", folder / f"{name}.pt"
    save_file(state, single)
    torch.save({"state_dict": dict(reversed(state.items()))}, pickled)
    yield from (single, pickled)


def test_bytes_do_not_depend_on_the_files_of_the_models(tmp_path: Path) -> None:
    states = [cast(numbers(gpt_oss()), torch.bfloat16)]
    states += [tiny.tuned(states[0], seed) for seed in (1, 2)]
    bases, first, second = (
        list(in_many_layouts(tmp_path, name, state)) for name, state in zip(("base", "e0", "e1"), states, strict=True)
    )

    def merged(number: int, base: Path, *experts: Path) -> Path:
        models = [{"model": str(path)} for path in experts]
        merge({"merge_method": "iso_cts", "base_model": str(base), "models": models}, tmp_path / f"out{number}")
        return tmp_path / f"out{number}"

    expected = merged(0, bases[0], first[0], second[0])
    for number, (one, other) in enumerate(zip(first, reversed(second), strict=True)):
        again = merged(10 + number, bases[0], one, other)
        assert (again / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    for number, base in enumerate(bases[1:]):
        assert_same(tiny.load_output(merged(20 + number, base, first[0], second[0])), tiny.load_output(expected))
