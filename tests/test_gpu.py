"""What only a GPU shows: local attention in its dtypes, and a whole run in mixed precision. Run by `make test-gpu`."""

import pytest
import torch

from linearize.benchmark.attention import PARITY, LayerSizes, check_parity
from linearize.teachers import load_teacher
from linearize.train import train
from runs import compose_train, tiny_overrides

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", list(PARITY), ids=str)
@pytest.mark.parametrize("window", [4, 16])
@pytest.mark.parametrize("backend", ["auto", "naive", "halo"])
def test_local_attention_computes_its_definition(backend, window, dtype):
    sizes = LayerSizes(4, 64, 33, 2, dtype, torch.device("cuda"), warmup=0, repeats=1)
    assert check_parity(sizes, window, backend) <= PARITY[dtype]


def test_a_run_in_mixed_precision_exports_the_student_that_it_trained(tiny_flux_folder, tmp_path):
    overrides = [
        value for value in tiny_overrides(tiny_flux_folder, tmp_path / "cache") if value != "trainer.accelerator=cpu"
    ]
    cfg = compose_train(*overrides, "trainer.accelerator=gpu", "trainer.devices=1", run_dir=tmp_path / "run")
    metrics = train(cfg)
    assert metrics["summary"]["costs"]["training"]["peak_memory_gib"] > 0
    assert (tmp_path / "run" / "reloaded.png").is_file()


def test_resting_encoders_leave_the_gpu(tiny_flux_folder):
    teacher = load_teacher(tiny_flux_folder)
    encoder = teacher.pipeline.text_encoder_2
    before = teacher.encode(["a red circle"], 8)
    with teacher.resting_encoders():
        assert encoder.device.type == "cpu"
        after = teacher.encode(["a red circle"], 8)
        assert encoder.device.type == "cpu"
    assert encoder.device.type == "cuda"
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name])
