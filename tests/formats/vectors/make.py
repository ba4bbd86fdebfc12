"""Makes the vectors of this folder with the packages that the formats come from; README.md says
how.

`python make.py autoawq|autogptq|gptqmodel|bitblas`, each where that package can be imported.
Weights are random; everything that is stored was packed, and dequantised, by the package.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

N, K, GROUP = 64, 64, 16
Cases = tuple[dict[str, Any], dict[str, Tensor]]


def random_linear(
    bits: int, group: int, symmetric: bool, act_order: bool, smallest_zero: int, seed: int
) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A linear layer whose weight lies on a grid, the scales `[N, G]` and zero points `[N, G]` of
    the grid, and each channel's group."""
    generator = torch.Generator().manual_seed(seed)
    groups = K // group
    codes = torch.randint(0, 2**bits, (N, K), generator=generator)
    scales = (torch.rand(N, groups, generator=generator) * 0.1 + 0.001).half().float()
    zeros = torch.full((N, groups), 2 ** (bits - 1))
    if not symmetric:
        zeros = torch.randint(smallest_zero, 2**bits, (N, groups), generator=generator)
    index = torch.arange(K) // group
    if act_order:
        index = index[torch.randperm(K, generator=generator)]
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data = (codes - zeros[:, index]) * scales[:, index]
    return linear, scales, zeros.float(), index.int()


def without_init(package: str) -> None:
    """Lets modules of a package be imported without its `__init__`, which asks for what has nothing
    to do with packing."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    module = types.ModuleType(package)
    module.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = module


def autoawq() -> Cases:
    for package in ("awq", "awq.modules", "awq.modules.linear"):
        without_init(package)
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    cases, tensors = {}, {}
    for seed, (symmetric, group) in enumerate([(False, GROUP), (True, GROUP), (False, -1)]):
        size = K if group == -1 else group
        linear, scales, zeros, _ = random_linear(4, size, symmetric, False, 0, seed)
        made = WQLinear_GEMM.from_linear(
            linear, 4, size, scales=scales.t().contiguous(), zeros=zeros.t().contiguous()
        )
        name = f"{'symmetric' if symmetric else 'asymmetric'}_{group}"
        cases[name] = {"bits": 4, "group_size": group, "symmetric": symmetric}
        tensors |= {
            f"{name}.{part}": getattr(made, part) for part in ("qweight", "qzeros", "scales")
        }
        tensors[f"{name}.weight"] = dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, size)
    return cases, tensors


def autogptq() -> Cases:
    for package in ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
        without_init(package)
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    cases, tensors = {}, {}
    # The last one has zero points of 0, which this version spreads over the rest of the word.
    for seed, (bits, symmetric, act_order, smallest) in enumerate(
        [(bits, *rest, 1) for bits in (2, 3, 4, 8) for rest in ((False, True), (True, False))]
        + [(4, False, False, 0)]
    ):
        linear, scales, zeros, index = random_linear(
            bits, GROUP, symmetric, act_order, smallest, 100 + seed
        )
        made = QuantLinear(bits, GROUP, K, N, bias=False)
        made.pack(linear.half(), scales, zeros, index)  # it stores the scales in the weight's dtype
        name = (
            f"{bits}_{'symmetric' if symmetric else 'asymmetric'}"
            + "_act_order" * act_order
            + "_wrapped" * (smallest == 0)
        )
        cases[name] = {"bits": bits, "group_size": GROUP, "symmetric": symmetric}
        tensors |= {
            f"{name}.{part}": getattr(made, part)
            for part in ("qweight", "qzeros", "scales", "g_idx")
        }
        # It dequantises inside forward alone; the identity takes the weight out as it is: each sum
        # has one term.
        tensors[f"{name}.weight"] = made(torch.eye(K, dtype=torch.float16))
    return cases, tensors


def gptqmodel() -> Cases:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    cases, tensors = {}, {}
    for seed, (bits, symmetric, act_order, group) in enumerate(
        [
            (bits, symmetric, act_order, GROUP)
            for bits in (2, 3, 4, 8)
            for symmetric in (True, False)
            for act_order in (True, False)
        ]
        + [(4, False, False, -1)]
    ):
        linear, scales, zeros, index = random_linear(
            bits, K if group == -1 else group, symmetric, act_order, 0, 200 + seed
        )
        made = TorchLinear(
            bits=bits,
            group_size=group,
            sym=symmetric,
            desc_act=act_order,
            in_features=K,
            out_features=N,
            bias=False,
            register_buffers=True,
        )
        made.pack(linear, scales, zeros, index)
        made.qzero_format(format=2)
        made.eval()
        name = (
            f"{bits}_{'symmetric' if symmetric else 'asymmetric'}"
            + "_act_order" * act_order
            + "_channel" * (group == -1)
        )
        cases[name] = {"bits": bits, "group_size": group, "symmetric": symmetric}
        tensors |= {
            f"{name}.{part}": getattr(made, part).clone()
            for part in ("qweight", "qzeros", "scales", "g_idx")
        }
        tensors[f"{name}.weight"] = made.dequantize_weight()
        convert_gptq_v2_to_v1_format_module(made, QuantizeConfig(bits=bits))
        tensors[f"{name}.qzeros_v1"] = made.qzeros
    return cases, tensors


def bitblas() -> Cases:
    for package in ("bitblas", "bitblas.quantization"):
        without_init(package)
    from bitblas.quantization.utils import general_compress, interleave_weight

    cases, tensors = {}, {}
    for seed, bits in enumerate((2, 4, 8)):
        generator = torch.Generator().manual_seed(300 + seed)
        codes = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
        zeros = torch.randint(0, 2**bits, (K // 32, N), generator=generator, dtype=torch.uint8)
        plain = general_compress(codes.numpy().view("int8"), bits)
        cases[str(bits)] = {"bits": bits}
        tensors |= {
            f"{bits}.codes": codes,
            f"{bits}.zeros": zeros,
            f"{bits}.qweight": torch.from_numpy(plain),
            f"{bits}.qzeros": torch.from_numpy(general_compress(zeros.numpy().view("int8"), bits)),
        }
        if bits < 8:
            tensors[f"{bits}.interleaved"] = torch.from_numpy(interleave_weight(plain, bits))
    return cases, tensors


if __name__ == "__main__":
    package = sys.argv[1]
    makers = {"autoawq": autoawq, "autogptq": autogptq, "gptqmodel": gptqmodel, "bitblas": bitblas}
    cases, tensors = makers[package]()
    try:
        version = importlib.metadata.version({"autogptq": "auto-gptq"}.get(package, package))
    except importlib.metadata.PackageNotFoundError:  # sources on the path
        version = sys.argv[2]
    path = Path(__file__).parent / f"{package}.safetensors"
    metadata = {"package": f"{package} {version}", "cases": json.dumps(cases)}
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata
    )
    print(path.name, len(cases), "cases", path.stat().st_size, "bytes")
