"""From the command line and `speculative_config` to what the workers get; and every refusal."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import DRAFT, TARGET
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from vllm_longspec import plugin
from vllm_longspec.config import TreeConfig, draft_config_for
from vllm_longspec.errors import LongSpecError
from vllm_longspec.train.model import load_draft
from vllm_longspec.tree.budget import Plan, gpu_named, node_budgets

plugin.register()

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup  # noqa: E402

from vllm_longspec.runtime import options as options_module  # noqa: E402
from vllm_longspec.runtime.menus import (  # noqa: E402
    Menu,
    menu_of_each_batch,
    only,
    plans_of,
    schedule_of,
    with_copies,
)
from vllm_longspec.runtime.options import (  # noqa: E402
    MAX_BATCH,
    SCHEDULE,
    LongSpecSpeculativeConfig,
    cost_shape,
)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the options are the same; dtype float32 is for CPUs"
)


def resolve(**options: Any) -> LongSpecSpeculativeConfig:
    args = EngineArgs(**{"model": str(TARGET), "dtype": "float32", **options})
    return args.create_engine_config().speculative_config


def command_line(*flags: str) -> EngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(
        parser.parse_args(["--model", str(TARGET), "--dtype", "float32", *flags])
    )


def test_three_ways_to_ask_give_the_same() -> None:
    as_dict = {"method": "longspec", "model": str(DRAFT)}
    by_dict = EngineArgs(model=str(TARGET), dtype="float32", speculative_config=as_dict)
    asked = [
        command_line("--speculative-model", str(DRAFT)),
        command_line("--speculative-config", json.dumps(as_dict)),
        command_line("--speculative-config", json.dumps({"model": str(DRAFT)})),
        command_line("--spec-method", "longspec", "--spec-model", str(DRAFT)),
        by_dict,
    ]
    for args in asked:
        config = args.create_engine_config()
        spec = config.speculative_config
        assert isinstance(spec, LongSpecSpeculativeConfig)
        assert (spec.method, spec.model) == ("longspec", str(DRAFT))
        assert trees(spec) == {31: (4, 16, 16, 16, 16)} and spec.num_speculative_tokens == 31


def test_flags_and_json_merge_by_key() -> None:
    args = command_line(
        "--speculative-model", str(DRAFT),
        "--speculative-config", '{"tree_shape": [2, 2, 2], "num_speculative_tokens": 5}',
    )  # fmt: skip
    spec = args.create_engine_config().speculative_config
    assert trees(spec) == {5: (2, 2, 2)} and spec.num_speculative_tokens == 5
    args = command_line(
        "--speculative-model", str(DRAFT), "--spec-tokens", "7",
        "--speculative-config.tree_shape", "4 4",
    )  # fmt: skip
    spec = args.create_engine_config().speculative_config
    assert trees(spec) == {7: (4, 4)} and spec.num_speculative_tokens == 7
    args = command_line(
        "--speculative-model", str(DRAFT), "--speculative-config", '{"model": "elsewhere"}'
    )
    with pytest.raises(LongSpecError, match=r"--speculative-model: .*\['model'\] sets the same"):
        args.create_engine_config()


def trees(spec: Any) -> dict[int, tuple[int, ...]]:
    """Shapes by nodes verified."""
    return {plan.m: plan.tree_shape for plan in plans_of(spec.menus)}


def test_the_config_survives_pickling() -> None:
    import pickle

    spec = resolve(speculative_config={"method": "longspec", "model": str(DRAFT)})
    copy = pickle.loads(pickle.dumps(spec))
    assert (copy.menus, copy.method) == (spec.menus, "longspec") and spec.menus


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DRAFT, tmp_path / "draft"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 512),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 32),
        ("vocab_size", 4097),
    ],
)
def test_a_draft_of_another_shape(draft: Path, field: str, value: int) -> None:
    edit_config(draft, **{field: value})
    with pytest.raises(LongSpecError, match=rf"^{field}: the draft has {value}, the target "):
        resolve(spec_model=str(draft))


def test_missing_extra_and_misshapen_tensors(draft: Path) -> None:
    edit_tensors(draft, lambda t: t.pop("mlp.up_proj.weight"))
    with pytest.raises(LongSpecError, match=r"lacks mlp\.up_proj\.weight"):
        resolve(spec_model=str(draft))
    edit_tensors(draft, lambda t: t.update({"mlp.up_proj.weight": torch.zeros(704, 255)}))
    with pytest.raises(LongSpecError, match=r"tensor mlp\.up_proj\.weight .* \[704, 255\]"):
        resolve(spec_model=str(draft))
    edit_tensors(
        draft,
        lambda t: t.update({"mlp.up_proj.weight": torch.zeros(704, 256), "fc.weight": t.pop(
            "input_layernorm.weight")}),
    )  # fmt: skip
    with pytest.raises(LongSpecError, match=r"lacks input_layernorm.* unknown fc\.weight"):
        resolve(spec_model=str(draft))
    (draft / "model.safetensors").unlink()
    with pytest.raises(LongSpecError, match="holds no "):
        resolve(spec_model=str(draft))


def test_drafts_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(LongSpecError, match=r"--speculative-model: /no/such/draft does not exist"):
        resolve(speculative_config={"method": "longspec", "model": "/no/such/draft"})
    with pytest.raises(LongSpecError, match=r"holds no config\.json"):
        resolve(speculative_config={"method": "longspec", "model": str(tmp_path)})
    with pytest.raises(LongSpecError, match="is not a LongSpec draft"):
        resolve(speculative_config={"method": "longspec", "model": str(TARGET)})
    with pytest.raises(LongSpecError, match="--speculative-model: name the LongSpec draft"):
        resolve(speculative_config={"method": "longspec"})


def test_unknown_options_are_named() -> None:
    with pytest.raises(LongSpecError, match="prompt_lookup_max is not an option of LongSpec"):
        resolve(
            speculative_config={
                "method": "longspec", "model": str(DRAFT), "prompt_lookup_max": 3,
            }
        )  # fmt: skip


LOOKUP = {"method": "longspec", "draft": "lookup"}


def test_copies_alone() -> None:
    for asked, nodes in ((LOOKUP, 16), (LOOKUP | {"num_speculative_tokens": 3}, 3)):
        spec = resolve(speculative_config=asked)
        assert (spec.draft, spec.num_speculative_tokens, trees(spec)) == (
            "lookup", nodes, {nodes: ()},
        )  # fmt: skip
        assert spec.draft_model_config is spec.target_model_config
    trained = longspec(draft="longspec")
    assert resolve(speculative_config=trained).draft == "longspec"


@pytest.mark.parametrize(
    ("options", "begins"),
    [
        ({"draft": "ngram"}, "draft: 'ngram' is none of longspec, lookup;"),
        ({"draft": ["lookup"]}, r"draft: \['lookup'\] is none of longspec, lookup;"),
        ({"draft": "longspec"}, "--speculative-model: name the LongSpec draft"),
        ({"model": str(DRAFT)}, "draft: 'lookup' copies from the text .*; leave out model, or"),
        ({"tree_shape": "4 4", SCHEDULE: [[1, 2, 3]]}, "draft: .*leave out .*tree_shape"),
        *(
            (
                {"num_speculative_tokens": nodes},
                f"num_speculative_tokens: {nodes!r} is not a number",
            )
            for nodes in (0, 17, -1, True, "many")
        ),
    ],
)
def test_refused_beside_copies_alone(options: dict[str, Any], begins: str) -> None:
    with pytest.raises(LongSpecError, match=f"^{begins}"):
        resolve(speculative_config=LOOKUP | options)
    if "model" in options:
        with pytest.raises(LongSpecError, match=f"^{begins}"):
            resolve(speculative_config=LOOKUP, spec_model=options["model"])


def scaled(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1e6, "factor": 4.0, **more}


@pytest.mark.parametrize(
    "rope, target_length, draft_length",
    [
        (scaled("yarn", original_max_position_embeddings=8192), 32768, 8192),
        (scaled("dynamic"), 8192, 2048),
        (scaled("longrope", original_max_position_embeddings=8192, long_factor=[1.0] * 32,
                short_factor=[1.0] * 32), 32768, 8192),
    ],
    ids=lambda x: x["rope_type"] if isinstance(x, dict) else "",
)  # fmt: skip
def test_a_draft_does_not_shorten_the_engine(
    rope: dict[str, Any], target_length: int, draft_length: int, draft: Path, tmp_path: Path
) -> None:
    """Of the draft's config alone vLLM makes 8,192."""
    target = Path(shutil.copytree(TARGET, tmp_path / "target"))
    edit_config(target, rope_parameters=rope, max_position_embeddings=target_length)
    edit_config(draft, rope_parameters=rope, max_position_embeddings=draft_length)
    config = EngineArgs(
        model=str(target), dtype="float32", max_model_len=32768,
        speculative_config={"method": "longspec", "model": str(draft)},
    ).create_engine_config()  # fmt: skip
    assert config.speculative_config.draft_model_config.max_model_len == 8192
    assert config.model_config.max_model_len == 32768


def longspec(**options: Any) -> dict[str, Any]:
    return {"method": "longspec", "model": str(DRAFT), **options}


def test_a_schedule_of_nodes() -> None:
    ranges = [[5, 32, 7], [1, 4, 12], [33, 64, 0]]
    spec = resolve(speculative_config=longspec(tree_shape=[4, 8], **{SCHEDULE: ranges}))
    assert spec.num_speculative_tokens_per_batch_size == [(1, 4, 12), (5, 32, 7), (33, 64, 0)]
    assert trees(spec) == {12: (4, 8), 7: (4, 8)}
    assert [menu.default for menu in spec.menus] == [Plan((4, 8), 12), Plan((4, 8), 7), None]
    assert spec.num_speculative_tokens == 12


def test_a_schedule_of_more_nodes_than_kernels_hold() -> None:
    options = longspec(tree_shape=[64] * 8, **{SCHEDULE: [[1, 4, 256]]})
    with pytest.raises(LongSpecError, match=r"256 nodes .*; use 1 to 255 "):
        resolve(speculative_config=options)


@pytest.mark.parametrize(
    ("schedule", "named"),
    [
        ([[1, 4, 69]], ["69", "tree_shape 4 16 16 16 16", "1 to 68"]),
        ([[1, 4, 0], [5, 9, 0]], ["0 nodes", "1 to 68"]),
        ([[2, 4, 5]], ["must start at 1"]),
        ([[1, 4, 8], [3, 6, 2]], ["non-overlapping"]),
        ([[4, 1, 2]], ["start must be <= end"]),
        ([[1, 4, -2]], [">= 0"]),
        ([[1, 4]], ["3-item"]),
        ([7], ["3-item"]),
        ([[1, 4, "many"]], ["'many'"]),
        ([[1, 4, None]], ["NoneType"]),
        ([[1, float("inf"), 4]], ["infinity"]),
        ([], ["not be empty"]),
        (31, ["list"]),
        ("1 4 31", ["list"]),
    ],
)
def test_wrong_schedules(schedule: Any, named: list[str]) -> None:
    with pytest.raises(LongSpecError) as error:
        resolve(speculative_config=longspec(**{SCHEDULE: schedule}))
    sentence = str(error.value)
    assert sentence.startswith(f"{SCHEDULE}: ") and sentence.count(SCHEDULE + ": ") == 1
    assert all(part in sentence for part in named), sentence
    assert "\n" not in sentence and ". " not in sentence.replace("...", ""), sentence


def test_one_tree_for_all_batch_sizes_on_a_cpu() -> None:
    spec = resolve(speculative_config=longspec())
    assert spec.num_speculative_tokens_per_batch_size is None
    assert trees(spec) == {31: (4, 16, 16, 16, 16)}


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(
        is_cuda=lambda: True, is_cpu=lambda: False, get_device_name=lambda: "NVIDIA H200",
        supports_fp8=lambda: True,
    )  # fmt: skip
    monkeypatch.setattr(options_module, "current_platform", device)


def expected_menus(draft: Path = DRAFT) -> list[Menu]:
    configs = (AutoConfig.from_pretrained(folder) for folder in (draft, TARGET))
    shape = cost_shape(*configs, 1, "fp8")
    budgets = node_budgets(gpu_named("NVIDIA H200"), shape, MAX_BATCH)
    return [with_copies(Menu(b.first_batch, b.last_batch, b.plans, b.default)) for b in budgets]


def test_the_cost_models_menus_on_a_gpu(h200: None) -> None:
    spec = resolve(dtype="bfloat16", speculative_config=longspec())
    menus = expected_menus()
    assert list(spec.menus) == menus and len(menus[0].plans) > 1 and spec.adaptive
    schedule = spec.num_speculative_tokens_per_batch_size
    assert schedule == [(menu.first_batch, menu.last_batch, menu.m) for menu in menus]
    assert spec.num_speculative_tokens == max(menu.m for menu in menus)


@pytest.mark.parametrize("chosen", [True, False])
def test_adaptive_verification_is_a_switch(chosen: bool) -> None:
    options = longspec(enable_adaptive_verification=chosen)
    assert resolve(speculative_config=options).adaptive is chosen
    # vLLM's own field would make it trim chains.
    assert not resolve(speculative_config=options).enable_adaptive_verification


def test_engines_that_share_experts_keep_one_plan() -> None:
    """Their steps wait for each other; those of a dense model do not."""
    shared, alone = (SimpleNamespace(data_parallel_size=n) for n in (2, 1))
    experts, dense = SimpleNamespace(is_moe=True), SimpleNamespace(is_moe=False)
    adaptive: Any = options_module.resolve_adaptive
    assert not adaptive(None, experts, shared) and not adaptive(False, experts, shared)
    assert adaptive(None, dense, shared) and adaptive(None, experts, alone)
    with pytest.raises(LongSpecError, match=r"^enable_adaptive_verification: engines that share"):
        adaptive(True, experts, shared)


@pytest.mark.parametrize("wrong", ["yes", 1, [True]])
def test_a_switch_that_is_none(wrong: Any) -> None:
    with pytest.raises(LongSpecError, match=r"enable_adaptive_verification: .* neither true nor"):
        resolve(speculative_config=longspec(enable_adaptive_verification=wrong))


def test_a_chosen_tree_has_no_schedule(h200: None, draft: Path) -> None:
    chosen = [
        (longspec(tree_shape=[2, 2]), {4: (2, 2)}),
        (longspec(num_speculative_tokens=9), {9: (4, 16, 16, 16, 16)}),
    ]
    edit_config(draft, tree_shape=[2, 4], num_speculative_tokens=5)
    chosen.append((longspec(model=str(draft)), {5: (2, 4)}))
    for options, shapes in chosen:
        spec = resolve(dtype="bfloat16", speculative_config=options)
        assert spec.num_speculative_tokens_per_batch_size is None, options
        assert trees(spec) == shapes
    asked = longspec(model=str(draft), **{SCHEDULE: [[1, 2, 3]]})
    spec = resolve(dtype="bfloat16", speculative_config=asked)
    assert trees(spec) == {3: (2, 4)}


@pytest.mark.parametrize("max_num_seqs, batch", [(256, 16), (4, 2)])
@pytest.mark.parametrize("experts", [False, True])
def test_trees_with_data_parallelism(
    h200: None, experts: bool, max_num_seqs: int, batch: int
) -> None:
    """vLLM drops a schedule there and makes room for the most nodes at every batch size: for those
    of a mean batch. Engines that share experts verify that one tree."""
    menus = expected_menus()
    one = next(menu for menu in menus if menu.first_batch <= batch <= menu.last_batch)
    assert one.default is not None
    found = options_module.resolve_menus(
        longspec(), TreeConfig(), AutoConfig.from_pretrained(DRAFT), target_of(experts),
        IN_PARALLEL, "fp8", max_num_seqs,
    )  # fmt: skip
    if experts:
        assert found == [only(1, MAX_BATCH, one.default)]
        return
    assert max(menu.m for menu in found) == one.default.m
    for menu, alone in zip(found, menus, strict=True):
        assert set(menu.plans) <= {*alone.plans, one.default}
        if alone.default is not None and alone.default.m > one.default.m:
            assert menu.default == one.default in menu.plans
        else:
            assert menu.default == alone.default


IN_PARALLEL: Any = SimpleNamespace(data_parallel_size=2, tensor_parallel_size=1)


def target_of(experts: bool) -> Any:
    config = AutoConfig.from_pretrained(TARGET)
    return SimpleNamespace(hf_text_config=config, quantization=None, is_moe=experts)


def test_a_schedule_with_data_parallelism() -> None:
    asked = longspec(**{SCHEDULE: [[1, 2, 3], [3, 8, 1]]})
    arguments = (TreeConfig(), AutoConfig.from_pretrained(DRAFT))
    found = options_module.resolve_menus(
        asked, *arguments, target_of(experts=False), IN_PARALLEL, None
    )
    assert [menu.m for menu in found] == [3, 1]
    with pytest.raises(LongSpecError, match=rf"^{SCHEDULE}: engines that share experts"):
        options_module.resolve_menus(asked, *arguments, target_of(experts=True), IN_PARALLEL, None)


@pytest.mark.parametrize(
    "limit, batches, said",
    [
        (2048, {31: range(1, 65)}, None),
        (2047, {31: range(1, 65)}, "64 requests at once verify 1 + 31 tokens each"),
        (512, {31: range(1, 9), 7: range(9, 100)}, "65 requests at once verify 1 + 7"),
        (64, {0: range(1, 65)}, None),
    ],
)
def test_steps_that_cannot_hold_every_verification(
    limit: int, batches: dict[int, range], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_longspec.runtime import proposer

    lines: list[str] = []
    monkeypatch.setattr(
        proposer.logger, "warning_once", lambda text, *args: lines.append(text % args)
    )
    menus = [
        only(sizes[0], sizes[-1], Plan((m,), m) if m else None) for m, sizes in batches.items()
    ]
    proposer.warn_of_a_full_step(menu_of_each_batch(menus, menus[-1].last_batch), limit)
    assert not lines if said is None else said in lines[0] and str(limit) in lines[0]


def test_no_schedule_where_no_tree_pays(h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_longspec.tree.budget.MARGIN", 1e9)
    assert expected_menus() == [only(1, MAX_BATCH, None)]
    spec = resolve(dtype="bfloat16", speculative_config=longspec())
    assert spec.num_speculative_tokens_per_batch_size is None
    assert trees(spec) == {31: (4, 16, 16, 16, 16)}


def test_cost_shape_counts_the_weights() -> None:
    config = AutoConfig.from_pretrained(TARGET)
    target = AutoModelForCausalLM.from_pretrained(TARGET)
    layer = target.model.layers[0]
    counted = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    drafts = sum(
        p.numel()
        for name, p in load_draft(DRAFT).named_parameters()
        if p.dim() == 2 and not name.startswith(("cross_attn.k_proj", "cross_attn.v_proj"))
    )
    shape = cost_shape(AutoConfig.from_pretrained(DRAFT), config, 1, None)
    assert (shape.num_layers, shape.layer_weights) == (len(target.model.layers), counted)
    assert shape.draft_layer_weights == drafts
    assert shape.head_weights == shape.draft_head_weights == target.lm_head.weight.numel()
    keys = layer.self_attn.k_proj.weight.shape[0]
    assert shape.kv_bytes == 2 * 2 * keys
    trimmed = AutoConfig.from_pretrained(DRAFT, draft_vocab_size=1000)
    assert cost_shape(trimmed, config, 1, None).draft_head_weights == 1000 * config.hidden_size
    half = cost_shape(trimmed, config, 2, "fp8")
    assert half.layer_weights * 2 == counted and half.kv_bytes * 2 == shape.kv_bytes
    assert half.draft_weight_bytes < shape.draft_weight_bytes == 2


EXPERTS = {
    "num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 100, "intermediate_size": 256, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "config, experts",
    [
        (Qwen3MoeConfig(num_experts=8, moe_intermediate_size=32, **EXPERTS), (6, 8, 2, 32, 0)),
        (
            Qwen3MoeConfig(
                num_experts=8, moe_intermediate_size=32, decoder_sparse_step=2,
                mlp_only_layers=[1], **EXPERTS,
            ),
            (2, 8, 2, 32, 0),
        ),
        (
            Qwen2MoeConfig(
                num_experts=8, moe_intermediate_size=32, shared_expert_intermediate_size=48,
                **EXPERTS,
            ),
            (6, 8, 2, 32, 48),
        ),
        (MixtralConfig(num_local_experts=4, **EXPERTS), (6, 4, 2, 256, 0)),
        (GptOssConfig(num_local_experts=4, **EXPERTS), (6, 4, 2, 256, 0)),
        (
            Glm4MoeConfig(
                n_routed_experts=8, n_shared_experts=2, first_k_dense_replace=1,
                moe_intermediate_size=32, **EXPERTS,
            ),
            (5, 8, 2, 32, 64),
        ),
        (AutoConfig.from_pretrained(TARGET), (0, 0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_experts_are_read_from_the_config(config: Any, experts: tuple[int, ...]) -> None:
    assert dataclasses.astuple(options_module.experts_of(config)) == experts
    draft = draft_config_for(config)
    shape = cost_shape(draft, config, 1, None)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    num_layers, num_experts, per_token, inner, shared = experts
    assert (shape.num_expert_layers, shape.num_experts) == (num_layers, num_experts)
    assert (shape.experts_per_token, shape.expert_weights) == (per_token, 3 * hidden * inner)
    # The draft's own MLP is a dense one.
    query = config.num_attention_heads * config.head_dim
    attention = hidden * (2 * query + 2 * config.num_key_value_heads * config.head_dim)
    assert shape.draft_layer_weights == (
        attention + 2 * hidden * query + 3 * hidden * config.intermediate_size
    )
    mlps = 3 * hidden * ((layers - num_layers) * config.intermediate_size + num_layers * shared)
    assert shape.layer_weights == attention + mlps // layers
    half = cost_shape(draft, config, 2, None)
    assert (half.expert_weights * 2, half.num_devices) == (shape.expert_weights, 2)


def test_every_rank_holds_a_trimmed_head() -> None:
    target = AutoConfig.from_pretrained(TARGET)
    full = cost_shape(draft_config_for(target), target, 2, None)
    trimmed = cost_shape(draft_config_for(target, draft_vocab_size=1000), target, 2, None)
    assert full.draft_head_weights * 2 == target.hidden_size * target.vocab_size
    assert trimmed.draft_head_weights == 1000 * target.hidden_size


@pytest.mark.parametrize(
    "written, asked, expected",
    [
        (None, None, 2.0),
        (None, "fp8", 1.0),
        (None, "mxfp4", 0.56),
        ({"quant_method": "fp8"}, None, 1.0),
        ({"quant_method": "gptq", "bits": 8}, "gptq_marlin", 1.0),
        ({"quant_method": "awq", "bits": 4}, "awq_marlin", 0.56),
        ({"quant_method": "awq"}, None, 0.56),
        (
            {"quant_method": "compressed-tensors",
             "config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
            None, 1.0,
        ),
        ({"quant_method": "unheard of"}, None, 2.0),
    ],
)  # fmt: skip
def test_bytes_of_a_targets_weights(
    written: dict[str, Any] | None, asked: str | None, expected: float
) -> None:
    target = AutoConfig.from_pretrained(TARGET)
    if written is not None:
        target.quantization_config = written
    assert cost_shape(draft_config_for(target), target, 1, None, asked).weight_bytes == expected


def test_a_draft_is_rounded_where_the_gpu_has_fp8(
    h200: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantization(**options: Any) -> str | None:
        return resolve(dtype="bfloat16", speculative_config=longspec(**options)).quantization

    assert quantization() == quantization(quantization="fp8") == "fp8"
    assert quantization(quantization="none") is None
    monkeypatch.setattr(options_module.current_platform, "supports_fp8", lambda: False)
    assert quantization() is quantization(quantization="none") is None
    with pytest.raises(LongSpecError, match=r"quantization: this GPU has no fp8 .*leave it out"):
        quantization(quantization="fp8")


def test_a_draft_is_left_as_it_is_on_a_cpu() -> None:
    assert resolve(speculative_config=longspec()).quantization is None
    assert resolve(speculative_config=longspec(quantization="fp8")).quantization == "fp8"
    with pytest.raises(LongSpecError, match=r"quantization: 'awq' is not known.*fp8 or none"):
        resolve(speculative_config=longspec(quantization="awq"))


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    ranges, first = [], 1
    for _ in range(draw(st.integers(1, 4))):
        last = first + draw(st.integers(0, 9))
        ranges.append((first, last, draw(st.integers(0, 31))))
        first = last + draw(st.integers(1, 4))
    return ranges


@given(schedules(), st.integers(1, 40))
def test_menus_follow_vllms_schedule(
    schedule: list[tuple[int, int, int]], max_num_reqs: int
) -> None:
    most = max(1, *(m for _, _, m in schedule))
    menus = [only(first, last, Plan((m,), m) if m else None) for first, last, m in schedule]
    of_each = menu_of_each_batch(menus, max_num_reqs)
    lookup = build_dynamic_sd_schedule_lookup(schedule_of(menus), max_num_reqs, most)
    assert [menu.m for menu in of_each[1:]] == lookup[1:]
