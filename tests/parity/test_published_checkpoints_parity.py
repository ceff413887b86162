"""Checkpoints as their makers published them: quantised, with further tensors, without prefix, with further keys."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families_zoo import CASES, MSCALE, OSS, SHORT_YARN, V3, Case
from safetensors.torch import load_file, save_file
from test_families_parity import logits, published, reloaded
from torch import Tensor, nn

from treadle.errors import CheckpointError
from treadle.families.checkpoint import convert, load, save
from treadle.nn.store import load_model

transformers = pytest.importorskip("transformers")


def rewrite(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], config: dict[str, Any] | None = None
) -> None:
    """Change the tensors of a checkpoint, and keys of its config.json."""
    (path,) = folder.glob("*.safetensors")
    save_file({name: t.clone() for name, t in change(load_file(path)).items()}, path, metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **(config or {})}))


def agrees(folder: Path, peer: nn.Module, *, times: float = 1.0, lengths: tuple[int, ...] = (1, 17, 60)) -> None:
    """The model of the folder computes the peer's logits; so does the folder of ours that it is converted to."""
    convert(folder, folder / "ours")
    for model in (load(folder), load_model(folder / "ours")):
        for length in lengths:
            tokens_BS = torch.randint(0, 131, (2, length))
            theirs = times * logits(peer, tokens_BS)
            error = (logits(model, tokens_BS) - theirs).abs().max() / theirs.abs().max().clamp(min=1.0)
            assert error <= 1e-5, f"length {length}: {error:.2e}"


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    """Every byte and every scale is dequantised as transformers does, and a whole model computes the same."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    case = Case("GptOss", {**OSS, "intermediate_size": 64, "rope_parameters": SHORT_YARN})
    published(case, tmp_path)
    peer = reloaded(tmp_path)
    dequantised: dict[str, Tensor] = {}

    def quantise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
        for name in names:
            experts, inputs, outputs = tensors.pop(name).shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(119, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            dequantised[name] = convert_moe_packed_tensors(blocks, scales)
        return tensors

    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    rewrite(tmp_path, quantise, {"quantization_config": method})
    peer.load_state_dict(dequantised, strict=False)
    agrees(tmp_path, peer)
    save(load(tmp_path), tmp_path / "out")
    agrees(tmp_path / "out", peer)


def test_every_byte_and_scale_of_mxfp4(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from treadle.families.quantised import dequantised
    from treadle.nn.weights import WeightsReader

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].repeat(2, 1, 16)  # 255 stands for NaN
    save_file({"w_blocks": blocks, "w_scales": scales, "w_bias": torch.ones(3)}, tmp_path / "model.safetensors")
    reader = dequantised(WeightsReader(tmp_path), {"quantization_config": {"quant_method": "mxfp4"}})
    values = reader.tensor("w")
    assert sorted(reader) == ["w", "w_bias"]
    assert reader.shape("w") == values.shape == (2, 512, 255)
    assert reader.dtype("w") == values.dtype == torch.bfloat16
    assert torch.equal(values, convert_moe_packed_tensors(blocks, scales))
    assert torch.equal(reader.tensor("w_bias"), torch.ones(3))


def fp8(weight: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix in FP8, a factor for each block, and the matrix that the two stand for, block by block in float64."""
    rows, columns = (range(0, size, block) for size in weight.shape)
    stored, meant = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scale = torch.empty(len(rows), len(columns))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            place = slice(row, row + block), slice(column, column + block)
            scale[i, j] = weight[place].abs().max() / 448
            stored[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
            meant[place] = (stored[place].double() * scale[i, j].double()).float()
    return stored, scale, meant.bfloat16()


def test_fp8_of_deepseek_v3_and_its_head_for_later_tokens(tmp_path: Path) -> None:
    published(Case("DeepseekV3", {**V3, "rope_parameters": MSCALE}), tmp_path)
    peer = reloaded(tmp_path)
    expected: dict[str, Tensor] = {}

    def quantise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if not name.endswith("_proj.weight") and "kv_a_proj_with_mqa" not in name:
                changed[name] = tensor
                continue
            changed[name], changed[f"{name}_scale_inv"], expected[name] = fp8(tensor, 20)  # no divisor of the sizes
        last = {name: t for name, t in changed.items() if name.startswith("model.layers.2.")}
        further = {name.replace("layers.2.", "layers.3.", 1): tensor for name, tensor in last.items()}
        return {**changed, **further, "model.layers.3.eh_proj.weight": torch.ones(32, 64)}

    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [20, 20]}
    rewrite(tmp_path, quantise, {"quantization_config": method, "num_nextn_predict_layers": 1})
    rewrite_experts(peer, expected)
    agrees(tmp_path, peer)
    save(load(tmp_path), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    agrees(tmp_path / "out", peer)


def rewrite_experts(peer: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load tensors with published names into transformers' model, which holds all experts of a layer in one."""
    state = peer.state_dict()
    for name, tensor in tensors.items():
        path, _, rest = name.partition(".experts.")
        if not rest:
            state[name].copy_(tensor)
            continue
        expert, matrix, _ = rest.split(".")
        if matrix == "down_proj":
            state[f"{path}.experts.down_proj"][int(expert)] = tensor.float()
        else:
            state[f"{path}.experts.gate_up_proj"][int(expert)].chunk(2)[matrix == "up_proj"].copy_(tensor)


def test_fp8_without_the_head_for_later_tokens_in_the_wrong_place(tmp_path: Path) -> None:
    published(CASES["deepseek-v3"], tmp_path)
    rewrite(tmp_path, lambda tensors: {**tensors, "model.layers.4.eh_proj.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"left over model\.layers\.4\.eh_proj"):
        load(tmp_path)


def test_other_quantisation_is_refused(tmp_path: Path) -> None:
    published(CASES["gpt2"], tmp_path)
    rewrite(tmp_path, dict, {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(CheckpointError, match="quantised by 'gptq', which is not read here"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon-rw"])
def test_names_without_prefix(name: str, tmp_path: Path) -> None:
    """As the bare model was saved, and with the buffers that GPT-2 once had."""
    published(CASES[name], tmp_path)
    peer = reloaded(tmp_path, CASES[name].attention)

    def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        if "h.0.attn.c_attn.weight" in tensors:
            mask = torch.ones(1, 1, 64, 64).tril()
            tensors |= {"h.0.attn.bias": mask, "h.1.attn.bias": mask, "h.1.attn.masked_bias": torch.tensor(-1e4)}
        return tensors

    rewrite(tmp_path, bare)
    agrees(tmp_path, peer)


def test_buffers_of_gpt_neox(tmp_path: Path) -> None:
    published(CASES["gpt-neox"], tmp_path)
    peer = reloaded(tmp_path)
    path = "gpt_neox.layers.0.attention"
    buffers = {f"{path}.bias": torch.ones(1, 1, 64, 64), f"{path}.masked_bias": torch.tensor(-1e9)}
    buffers |= {f"{path}.rotary_emb.inv_freq": torch.ones(1)}
    rewrite(tmp_path, lambda tensors: tensors | buffers)
    agrees(tmp_path, peer)


def test_logit_scale_of_mpt(tmp_path: Path) -> None:
    """transformers leaves `logit_scale` out of the computation; MosaicML's own code multiplies the logits by it."""
    published(CASES["mpt"], tmp_path)
    peer = reloaded(tmp_path)
    rewrite(tmp_path, dict, {"logit_scale": "inv_sqrt_d_model"})
    agrees(tmp_path, peer, times=32**-0.5)
