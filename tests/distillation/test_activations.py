"""Which blocks compute again in the backward pass, and what a block keeps."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from distillation.conftest import MakeModule
from linearize.costs import GIB
from linearize.distillation.activations import KEPT_PER_INPUT

TOKENS, CHANNELS, BLOCKS = 65, 32, 4


@pytest.mark.parametrize(("kept", "recomputed"), [(0.0, 4), (0.9, 4), (1.1, 3), (3.5, 1), (9.0, 0)])
def test_the_last_blocks_keep_what_the_budget_holds(make_module: MakeModule, batch, kept: float, recomputed: int):
    per_block = KEPT_PER_INPUT * 4 * 2 * TOKENS * CHANNELS  # float32, a batch of two
    module = make_module("clear", window=2, options={"activation_memory_gib": kept * per_block / GIB}).train()
    calls: dict[str, int] = {}
    for name in ("transformer_blocks.0", "transformer_blocks.1", *(f"single_transformer_blocks.{i}" for i in (0, 1))):
        block = module.student.get_submodule(name)
        block.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    module.backbone.predict(module.student, batch["latents"], torch.tensor([0.4, 0.6]), batch).mean().backward()
    assert module.activations.num_recomputed == recomputed
    assert list(calls.values()) == [2] * recomputed + [1] * (BLOCKS - recomputed)


def test_a_compiled_block_keeps_what_the_budget_reckons_with(make_module: MakeModule, batch):
    """Counted on tensors as they are saved; of the weights only their casts to bfloat16 are left out."""
    module = make_module("softmax", options={"compile_backend": "aot_eager_decomp_partition"}).train()
    module.student.to(torch.bfloat16)
    batch["latents"] = torch.randn(1, 4, 64, 96)
    conditioning = {name: value[:1] for name, value in batch.items()}
    input_bytes = 2 * (5 + 32 * 48) * CHANNELS
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if 1536 in tensor.shape or 1541 in tensor.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        module.backbone.predict(module.student, batch["latents"].bfloat16(), torch.tensor([0.4]), conditioning)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    torch.compiler.reset()
    assert size / input_bytes / BLOCKS == pytest.approx(KEPT_PER_INPUT, rel=0.25)
