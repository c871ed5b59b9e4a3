"""A head of several tokens: read beside the model in its published naming, made of its layer, and no part of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from npu_patch import applied
from npu_patch.patches.inference.mtp import head as heads
from tests.support.heads import FAMILIES, GREEDY, counting, loaded, prompt, saved, trained

PUBLISHED = {
    "mtp.fc.weight",
    "mtp.norm.weight",
    "mtp.pre_fc_norm_embedding.weight",
    "mtp.pre_fc_norm_hidden.weight",
    "mtp.layers.0.input_layernorm.weight",
    "mtp.layers.0.post_attention_layernorm.weight",
    *(f"mtp.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mtp.layers.0.self_attn.{name}_norm.weight" for name in "qk"),
}
PARTS = ("gate_proj", "up_proj", "down_proj")
DENSE = {f"mtp.layers.0.mlp.{part}.weight" for part in PARTS}
SPARSE = {
    "mtp.layers.0.mlp.gate.weight",
    "mtp.layers.0.mlp.shared_expert_gate.weight",
    *(f"mtp.layers.0.mlp.shared_expert.{part}.weight" for part in PARTS),
    *(f"mtp.layers.0.mlp.experts.{number}.{part}.weight" for part in PARTS for number in range(5)),
}


def with_head(model: Any, ids: Tensor, tokens: int = 32, **given: Any) -> Tensor:
    found: Tensor = model.generate(ids, use_mtp=True, max_new_tokens=tokens, **GREEDY, **given)
    return found


def kept_head(model: Any) -> Any:
    return next(reversed(heads._HEADS[model].heads.values()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("qwen3_next", tmp_path_factory.mktemp("model"))


def changed(folder: Path, to: Path, change: Any) -> Path:
    """A copy whose tensors are changed, in one file."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    change(tensors)
    save_file({name: each.contiguous() for name, each in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    return to


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_written_read_and_computed_as_it_is_published(family: str, tmp_path: Path) -> None:
    """By hand, with the published names: norms of the next token's embedding and the state, `fc`, a layer, `norm`."""
    folder = saved(family, tmp_path)
    names = {
        name: shard
        for shard in folder.glob("*.safetensors")
        for name in safe_open(shard, "pt").keys()  # noqa: SIM118, it is no mapping
        if name.startswith("mtp.")
    }
    assert names.keys() == PUBLISHED | (DENSE if family == "qwen3_5" else SPARSE)
    weights = {name: safe_open(shard, "pt").get_tensor(name) for name, shard in names.items()}
    model, ids = loaded(folder), prompt()
    plain = model.generate(ids, max_new_tokens=32, **GREEDY)
    with applied(model, device="cpu", mtp=True):
        assert torch.equal(with_head(model, ids), plain)
        head = kept_head(model)
        state = torch.randn(1, 6, 48)
        positions = torch.arange(1, 7)[None]
        with torch.no_grad():
            found = head.forward_layer(0, state, positions, None, input_ids=ids[:, 1:7])
    layer = copy.deepcopy(model.model.layers[1])  # of full attention
    own = {name.removeprefix("mtp.layers.0."): each for name, each in weights.items() if ".layers.0." in name}
    for part in ("gate_up_proj", "down_proj") if family != "qwen3_5" else ():
        asked = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
        of_experts = [torch.cat([own.pop(f"mlp.experts.{n}.{each}.weight") for each in asked]) for n in range(5)]
        own[f"mlp.experts.{part}"] = torch.stack(of_experts)
    layer.load_state_dict(own)
    layer.self_attn.layer_idx = 0
    with torch.no_grad():

        def norm(x: Tensor, name: str) -> Tensor:
            return torch.nn.functional.rms_norm(x, (48,), 1 + weights[f"mtp.{name}.weight"], 1e-6)

        embedded = norm(model.get_input_embeddings()(ids[:, 1:7]), "pre_fc_norm_embedding")
        hidden = torch.cat((embedded, norm(state, "pre_fc_norm_hidden")), -1) @ weights["mtp.fc.weight"].T
        mask = torch.full((6, 6), float("-inf")).triu(1)[None, None]
        hidden = layer(hidden, model.model.rotary_emb(hidden, positions), attention_mask=mask)
        expected = norm(hidden, "norm")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_head_drafts_what_the_model_says(family: str, tmp_path: Path, capsys: Any) -> None:
    model = loaded(trained(family, tmp_path))
    ids = counting(1, 6, torch.Generator().manual_seed(2))
    plain = model.generate(ids, max_new_tokens=128, **GREEDY)
    forwards: list[int] = []
    model.get_decoder().register_forward_hook(lambda *args: forwards.append(1))
    per_forward = []
    with applied(model, device="cpu", mtp=True):
        for drafts in (1, 3):
            forwards.clear()
            assert torch.equal(with_head(model, ids, 128, num_assistant_tokens=drafts), plain)
            per_forward.append(128 / len(forwards))
    with capsys.disabled():
        print(f"\n{family}: tokens per forward of the trunk {per_forward[0]:.2f} (1 draft), {per_forward[1]:.2f} (3)")
    assert per_forward[0] > 1.3 and per_forward[1] > per_forward[0]


@pytest.mark.parametrize("layers", [["full_attention", "linear_attention"], ["linear_attention", "full_attention"]])
@pytest.mark.parametrize("sparse", [True, False])
def test_the_head_has_the_layer_that_is_beside_the_model(layers: list[str], sparse: bool, tmp_path: Path) -> None:
    """Of full attention, whatever the model's last layer is; with experts where its weights are some."""
    own = {"layer_types": layers, **({} if sparse else {"mlp_only_layers": [0]})}
    model, ids = loaded(saved("qwen3_next", tmp_path, **own)), prompt()
    plain = model.generate(ids, max_new_tokens=32, **GREEDY)
    with applied(model, device="cpu", mtp=True):
        assert torch.equal(with_head(model, ids), plain)
        block = kept_head(model).layers[0].mtp_block
    assert block.block_type == "full_attention" and hasattr(block.mlp, "experts") is sparse


def test_shards_and_experts_one_by_one_or_stacked_are_read(tmp_path: Path) -> None:
    sharded = saved("qwen3_5_moe", tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3

    def stack(tensors: dict[str, Tensor]) -> None:
        for part, asked in (("gate_up_proj", PARTS[:2]), ("down_proj", PARTS[2:])):
            name = "mtp.layers.0.mlp.experts."
            of_experts = [torch.cat([tensors.pop(f"{name}{n}.{each}.weight") for each in asked]) for n in range(5)]
            tensors[name + part] = torch.stack(of_experts)

    (tmp_path / "stacked").mkdir()
    stacked = changed(sharded, tmp_path / "stacked", stack)
    found = []
    for each in (sharded, stacked):
        model = loaded(each)
        with applied(model, device="cpu", mtp=True):
            with_head(model, prompt(), 4)
            found.append(kept_head(model).state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_neither_the_model_nor_what_it_saves_has_a_head(folder: Path, tmp_path: Path) -> None:
    model, ids = loaded(folder), prompt()

    def seen() -> Any:
        return json.dumps(model.config.to_dict(), default=str), list(model.state_dict()), [*map(id, model.modules())]

    before = seen()
    with applied(model, device="cpu", mtp=True):
        with_head(model, ids, 8)
        assert before == seen()
        model.save_pretrained(tmp_path)
        assert heads._HEADS
    assert not heads._HEADS
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "mtp" in name]
    assert "mtp" not in (tmp_path / "config.json").read_text()


def test_a_head_is_read_once_and_anew_where_its_file_is_another(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    own = changed(folder, tmp_path / "copy", lambda tensors: None)
    model, ids = loaded(own), prompt()
    with applied(model, device="cpu", mtp=True) as report:
        with_head(model, ids, 8, num_assistant_tokens=3)
        head = kept_head(model)
        weight = head.layers[0].eh_proj.weight
        with_head(model, ids, 8, num_assistant_tokens=2)
        other = kept_head(model)
        assert (len(head.layers), len(other.layers)) == (3, 2) and other.layers[0].eh_proj.weight is weight
        with_head(model, ids, 8, num_assistant_tokens=3)
        assert heads._HEADS[model].heads[3] is head
        changed(own, own, lambda tensors: tensors["mtp.fc.weight"].zero_())
        with_head(model, ids, 8)
        assert kept_head(model) is not other and not kept_head(model).layers[0].eh_proj.weight.any()
    (loads,) = (each for each in report if each.patch == "mtp" and each.site.endswith("from_pretrained"))
    assert loads.calls.ran == 4
    del model, head, other, weight
    import gc

    gc.collect()
    assert not heads._HEADS


def test_a_lora_on_the_trunk_and_its_head_has_exact_tokens_too(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model, ids = loaded(folder), prompt()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "in_proj_qkvz", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    plain = model.generate(input_ids=ids, max_new_tokens=64, **GREEDY)
    with applied(model, device="cpu", mtp=True):
        for _ in range(2):
            found = model.generate(input_ids=ids, max_new_tokens=64, use_mtp=True, num_assistant_tokens=2, **GREEDY)
            assert torch.equal(found, plain)
        lookup = model.generate(input_ids=ids, max_new_tokens=64, prompt_lookup_num_tokens=3, **GREEDY)
        assert torch.equal(lookup, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_lies_beside_the_last_layers_in_their_dtype(dtype: torch.dtype, folder: Path, npu: torch.device) -> None:
    model, ids = loaded(folder).to(npu, dtype), prompt().to(npu)
    with applied(model, mtp=True):
        found = with_head(model, ids, 24, num_assistant_tokens=2)
        weight = kept_head(model).layers[0].eh_proj.weight
        assert weight.dtype == dtype and weight.device == npu
        if dtype == torch.float32:
            assert torch.equal(found, model.generate(ids, max_new_tokens=24, **GREEDY))


def test_a_trunk_spread_by_accelerate_has_its_head_where_its_last_layers_are(folder: Path, npu: torch.device) -> None:
    """There is one device here; accelerate's hooks move between as many as there are."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = loaded(folder), prompt().to(npu)
    model = accelerate.dispatch_model(model, {"model": npu, "lm_head": npu}, force_hooks=True)
    assert hasattr(model.lm_head, "_hf_hook")
    plain = model.generate(ids, max_new_tokens=16, **GREEDY)
    with applied(model, mtp=True):
        assert torch.equal(with_head(model, ids, 16), plain)
        assert kept_head(model).layers[0].eh_proj.weight.device == npu


def test_a_new_head_has_the_first_weights_of_its_model(folder: Path) -> None:
    """Norms that add 1 to their weight start from 0; and each number is one."""
    head = heads.new_head(loaded(folder))
    for name, each in head.named_parameters():
        assert each.isfinite().all() and each.abs().max() < 0.2, name
        assert bool(each.any()) is ("norm" not in name), name


def drop(*names: str) -> Any:
    return lambda tensors: [tensors.pop(each) for each in list(tensors) if each.startswith(names)]


def put(name: str, tensor: Tensor) -> Any:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("mtp."), "has no weights of a head"),
        (drop("mtp.fc"), "missing: layers.0.eh_proj.weight"),
        (put("mtp.fc.weight", torch.zeros(48, 95)), r"of another shape: .*eh_proj.weight \[48, 95\], not \[48, 96\]"),
        (put("mtp.fc.weight_scale", torch.zeros(48)), "of no such head: layers.0.eh_proj.weight_scale"),
        (put("mtp.fc.weight", torch.zeros(48, 96, dtype=torch.int8)), "mtp.fc.weight in .* is I8: of a head, F64, F32"),
        (put("mtp.layers.1.mlp.gate.weight", torch.zeros(5, 48)), r"of the numbers \[0, 1\]: a head of one layer"),
    ],
)
def test_weights_that_are_no_such_heads_are_refused(change: Any, words: str, folder: Path, tmp_path: Path) -> None:
    model = loaded(changed(folder, tmp_path, change))
    with applied(model, device="cpu", mtp=True):
        with pytest.raises(ValueError, match=words):
            with_head(model, prompt())
        assert not heads._HEADS
        assert model.generate(prompt(), max_new_tokens=4, prompt_lookup_num_tokens=2, **GREEDY).shape[1] == 13


def test_what_a_head_cannot_do_is_refused(folder: Path) -> None:
    from transformers import DynamicCache

    model, ids = loaded(folder), prompt()
    with applied(model, device="cpu", mtp=True):
        for drafts in (0, 17):
            with pytest.raises(ValueError, match=f"num_assistant_tokens={drafts} with use_mtp=True: accepted are 1"):
                with_head(model, ids, num_assistant_tokens=drafts)
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :5], past_key_values=cache)
        with pytest.raises(ValueError, match=r"reads the whole prompt, .* goes on from a cache of 5 tokens"):
            with_head(model, ids, past_key_values=cache)
        with pytest.raises(ValueError, match="this one has inputs_embeds"):
            with_head(model, ids, inputs_embeds=model.get_input_embeddings()(ids).detach())


def test_a_model_from_no_checkpoint_has_no_head() -> None:
    from tests.support.tiny_models import tiny

    model = tiny("qwen3_next")
    with applied(model, device="cpu", mtp=True), pytest.raises(ValueError, match="was not loaded from a checkpoint"):
        with_head(model, prompt())
    only_linear = tiny("qwen3_next", layer_types=["linear_attention"] * 2)
    with pytest.raises(ValueError, match="no layer of full attention, which a head is made like"):
        heads.new_head(only_linear)


def test_a_model_with_transformers_own_head_keeps_it(tmp_path: Path) -> None:
    from tests.support.tiny_models import tiny

    model = tiny("glm4_moe", num_mtp_layers=1)
    with applied(model, device="cpu", mtp=True), pytest.raises(Exception) as unpatched:  # it was saved without one
        with_head(model, prompt())
    assert "npu_patch" not in str(unpatched.value)
