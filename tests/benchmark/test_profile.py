"""Where time goes: kernels by kind, in rows and on pages."""

import dataclasses

import pytest
import torch

from linearize.benchmark.model import ModelSettings, model_rows
from linearize.benchmark.profile import kind_of, profile_tables, profiled
from linearize.teachers import load_teacher

KERNELS = {
    "attention": (
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0",
        "void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, cutlass::bfloat16_t>>",
        "triton_tem_fused_flex_attention_0",
        "forward_kernel",
        "key_gradient_kernel",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ),
    "products": (
        "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_gelubias_TNN",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>",
        "aten::addmm",
        "aten::bmm",
        "aten::mm",
    ),
    "rest": (
        "triton_red_fused_add_mul_native_layer_norm_split_unsqueeze_1",
        "norm_rotate_kernel",
        "norm_modulate_kernel",
        "Memcpy DtoD (Device -> Device)",
        "triton_poi_fused_cat_gelu_transpose_view_3",
        "aten::copy_",
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL",
    ),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KERNELS.items() for name in names])
def test_kernels_are_known_by_their_names(kind, name):
    assert kind_of(name) == kind


def test_a_call_is_its_kernels_the_longest_first():
    wide, narrow = torch.randn(400, 300), torch.randn(300, 500)
    found = profiled(lambda: (wide @ narrow).exp(), torch.device("cpu"))
    kernels = {kernel["name"]: kernel for kernel in found["kernels"]}
    assert kernels["aten::mm"]["kind"] == "products" and kernels["aten::exp"]["kind"] == "rest"
    assert kernels["aten::mm"]["calls"] == 1
    seconds = [kernel["seconds"] for kernel in found["kernels"]]
    assert seconds == sorted(seconds, reverse=True) and min(seconds) > 0
    assert sum(found["seconds"].values()) == pytest.approx(sum(seconds))
    assert found["seconds"]["attention"] == 0


def test_models_are_profiled_where_it_is_asked_for(tiny_flux_folder):
    teacher = load_teacher(tiny_flux_folder, dtype="float32", device="cpu")
    settings = ModelSettings(1, 8, 1, 0, 1, compile=False, profile=True)
    (row,) = model_rows(teacher, settings, kind="transformer", sizes=[64], students={})
    seconds = row["profile"]["seconds"]
    assert all(seconds[kind] > 0 for kind in ("attention", "products", "rest"))
    overview, longest = profile_tables([row])[-2:]
    assert "| teacher | 64 | 1 |" in overview and "aten::addmm" in longest
    plain = dataclasses.replace(settings, profile=False)
    (row,) = model_rows(teacher, plain, kind="transformer", sizes=[64], students={})
    assert "profile" not in row and profile_tables([row, {"model": "x", "size": 1, "batch": 1, "error": "no"}]) == []
