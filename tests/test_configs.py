"""Every config composes into what the code builds, and mistakes on the command line are told in one sentence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from linearize.checks import resolve_precision, warn_of_samples_that_no_step_sees
from linearize.distillation.losses import LossTerm
from linearize.errors import LinearizeError
from linearize.overrides import describe
from linearize.train import build_stages, build_trainer, layer_rules, train
from runs import ROOT, compose_train

CONFIGS = ROOT / "configs"
GROUPS = (
    *("teacher", "data", "mixer", "loss", "adapter", "optimizer", "schedule", "sigma"),
    *("trainer", "callbacks", "logger", "evaluation", "experiment", "sweep", "debug"),
)
CHOICES = [(group, file.stem) for group in GROUPS for file in sorted((CONFIGS / group).glob("*.yaml"))]


def test_every_group_has_choices() -> None:
    assert {group for group, _ in CHOICES} == set(GROUPS)


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{group}={choice}" for group, choice in CHOICES])
def test_every_choice_composes_and_builds(group: str, choice: str, tmp_path: Path) -> None:
    overrides = [f"{group}={choice}", *(["data.path=samples"] if choice == "store" else [])]
    cfg = compose_train(*overrides, run_dir=tmp_path)
    resolved = resolve_precision(cfg)
    OmegaConf.to_container(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True)
    assert resolved.trainer.precision in ("32-true", "bf16-mixed")
    assert sum(stage.num_steps for stage in build_stages(cfg)) == cfg.trainer.max_steps
    assert all(isinstance(term, LossTerm) for stage in build_stages(cfg) for term in stage.terms.values())
    assert layer_rules(cfg)[0]["mixer"] == cfg.mixer.name
    for name in ("optimizer", "schedule", "sigma"):
        assert callable(instantiate(cfg[name]))
    for callback in cfg.callbacks.values():
        instantiate(callback)


def test_the_loss_of_clear_is_weighted_as_published(tmp_path: Path) -> None:
    (stage,) = build_stages(compose_train("loss=clear", run_dir=tmp_path))
    weights = {name: term.weight for name, term in stage.terms.items()}
    assert weights == {"flow_matching": 1.0, "prediction": 0.5, "attention_output": 0.5}


def test_plans_and_layers(tmp_path: Path) -> None:
    cfg = compose_train("window=16", "layers=[single_transformer_blocks.*]", run_dir=tmp_path)
    assert layer_rules(cfg) == [
        {"layers": ["single_transformer_blocks.*"], "mixer": "clear", "window": 16, "downsample": 1}
    ]
    rules = "[{layers: transformer_blocks.*, mixer: clear, window: 4}, {layers: [single*], mixer: softmax}]"
    assert layer_rules(compose_train(f"plan={rules}", run_dir=tmp_path)) == [
        {"layers": "transformer_blocks.*", "mixer": "clear", "window": 4},
        {"layers": ["single*"], "mixer": "softmax"},
    ]
    with pytest.raises(LinearizeError, match="is no list of rules"):
        layer_rules(compose_train("plan=clear", run_dir=tmp_path))


def test_precisions_that_are_not_supported(tmp_path: Path) -> None:
    with pytest.raises(LinearizeError, match=r"trainer\.precision=16-mixed is unknown: use auto, 32-true"):
        resolve_precision(compose_train("trainer.precision=16-mixed", run_dir=tmp_path))
    cfg = compose_train("trainer.precision=bf16-mixed", "trainer.accelerator=cpu", run_dir=tmp_path)
    assert resolve_precision(cfg).teacher.dtype == "bfloat16" and cfg.teacher.dtype == "auto"
    on_cpu = ("teacher=flux_dev_random", "trainer.accelerator=cpu")
    assert resolve_precision(compose_train(*on_cpu, run_dir=tmp_path)).trainer.precision == "bf16-mixed"
    with pytest.raises(LinearizeError, match=r"32-true needs teacher\.dtype=float32"):
        resolve_precision(compose_train(*on_cpu, "trainer.precision=32-true", run_dir=tmp_path))


@pytest.mark.parametrize(("choice", "launcher"), [("local", "LocalLauncher"), ("slurm", "SlurmLauncher")])
def test_launchers_compose_with_a_sweep(choice: str, launcher: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", ["sweep=clear_windows", f"launcher={choice}"], return_hydra_config=True)
    assert cfg.hydra.launcher._target_.endswith(launcher)
    assert cfg.hydra.sweeper.params.window == "2,4,8,16" and cfg.name == "clear_windows"


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["mixer=cleer"], "mixer=cleer does not exist (did you mean clear?): choose mixer= one of care, clear"),
        (["teacher=nope"], "teacher=nope does not exist: choose teacher= one of flux_dev, "),
        (["experiment=scenes_mixer"], "experiment=scenes_mixer does not exist (did you mean scenes_mixers?): choose"),
        (["sweep=mixer"], "sweep=mixer does not exist (did you mean mixers?): choose sweep= one of branches, "),
        (["launcher=locl"], "launcher=locl does not exist (did you mean local?): choose launcher= one of local, "),
        (["debug=slow"], "debug=slow does not exist: choose debug= one of fast."),
        (["windw=3"], "windw is no setting (did you mean window?): mixer=clear has window, downsample, and "),
        (["mixer=softmax", "window=3"], "window is no setting: mixer=softmax has token_order, and "),
        (["trainer.max_step=3"], "trainer.max_step is no setting (did you mean trainer.max_steps?): trainer has "),
        (["-m", "mixer=softmax", "window=3"], "window is no setting of every point of this sweep: "),
        (["windw=3", "mixr=clear"], "windw is no setting: python "),
        (["hydra/launcher=submitit_no"], "This launcher needs submitit, which is not installed: run pip install 'lin"),
        (["layers=[a"], "layers=[a cannot be read (no viable alternative"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(HydraException) as caught:
        composed(*[one for one in overrides if one != "-m"])
    told = describe(caught.value, CONFIGS, "train", overrides)
    assert told.startswith(sentence)
    assert "\n" not in told


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=120)


def test_the_config_can_be_read_before_a_run(tmp_path: Path) -> None:
    shown = run("mixer=clear", "window=16", "--cfg", "job", cwd=tmp_path)
    assert shown.returncode == 0 and "\nwindow: 16\n" in shown.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "words"),
    [("mixer=cleer", "one of care, clear"), ("teacher.path=missing", "missing is no pipeline folder")],
)
def test_a_user_s_mistake_exits_with_2(tmp_path: Path, argument: str, words: str) -> None:
    failed = run(argument, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ") and words in failed.stderr and failed.stderr.count("\n") == 1


def test_a_mistake_in_a_sweep_is_told_in_one_sentence(tmp_path: Path) -> None:
    failed = run("-m", "window=3,4", "teacher.path=missing", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert failed.returncode == 2
    sentence = failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr and sentence.startswith("error: ")
    assert "missing is no pipeline folder" in sentence


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["window=0"], "window=0"),
        (["layers=[nothing.*]"], "nothing"),
        (["layers=nothing"], "layers glob 'nothing' matches none"),
        (["trainer.max_steps=2.5"], r"trainer\.max_steps=2\.5; choose a whole number, 1 or more"),
        (["data.batch_size=0"], r"data\.batch_size=0; choose a whole number, 1 or more"),
        (["trainer.accumulate_grad_batches=-2"], r"accumulate_grad_batches=-2; choose a whole number, 1 or more"),
        (["trainer.gradient_clip_val=-1"], r"gradient_clip_val=-1 is no norm"),
        (["schedule.num_warmup_steps=-5"], r"num_warmup_steps=-5; choose a whole number, 0 or more"),
        (["data.num_samples=-5"], r"data\.num_samples=-5; choose a whole number, 1 or more"),
        (["ema_decay=1"], "ema_decay=1 is a share"),
        (["ema_decay=null"], "ema_decay=None is a share"),
        (["sigma=shifted", "sigma.shift=0"], r"sigma\.shift=0 moves no noise level"),
        (["layers=[]"], r"layers=\[\] names no layer"),
        (["calibration_samples=-1"], "calibration_samples=-1; choose a whole number, 1 or more"),
        (["resume=missing"], "resume=missing is no checkpoint"),
        (["resume=last"], "resume=last finds no checkpoint"),
        (["export=zip"], "export=zip is unknown"),
        (["seed=-1"], "seed=-1 is no seed: give a whole number from 0 to"),
        (["compile=nonsense"], "compile=nonsense is unknown: use auto, true, false or one of .*inductor"),
        (["activation_memory_gib=-1"], "activation_memory_gib=-1 is no amount of memory: give auto, or GiB from 0 up"),
        (["stages.transfer=99"], "99 steps and trainer.max_steps is 40"),
        (["loss=lolcats"], "transfer_trains=mixer trains nothing"),
        (["adapter=lora", "adapter.rank=0"], "adapter.rank=0; choose a whole number, 1 or more"),
        (["window_dropout.probability=0.5"], "finds no mixer with a window and a linear branch"),
        (["plan=[{layers: '*', mixer: cleer}]"], "cleer"),
        (["loss.attention_output.layers=[nothing.*]"], "nothing"),
        (["evaluation.num_prompts=0"], "num_prompts=0"),
        (["evaluation.sigmas=1"], r"sigmas=\[1\] must be noise levels"),
        (["evaluation.sigmas=abc"], r"sigmas=\['abc'\] must be noise levels"),
        (["evaluation.max_sequence_length=600"], "max_sequence_length=600 is more text than a FluxPipeline takes"),
        (["evaluation.width=250"], r"evaluation\.width=250 is no whole number .* choose 248 or 256 pixels"),
        (["trainer.strategy=nonsense"], "invalid strategy name"),
        (["callbacks.pictures.prompts_file=missing.txt", "callbacks.pictures.every_n_steps=1"], "missing.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_samples_are_generated(
    tiny_flux_folder: Path, tmp_path: Path, overrides: list[str], words: str
) -> None:
    cfg = compose_train(
        f"teacher.path={tiny_flux_folder}",
        "data=generated",
        f"data.cache={tmp_path / 'cache'}",
        "trainer.accelerator=cpu",
        "judge=null",
        *overrides,
        run_dir=tmp_path / "run",
    )
    cfg.root = str(tmp_path)
    with pytest.raises((LinearizeError, InstantiationException), match=words):
        train(cfg)
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("trainer.max_steps=many", "trainer.max_steps=many is no number: its default is 40."),
        ("stages=8", "stages=8 replaces several settings: set stages.<name> of transfer, distill."),
        ("hydra.run.dir=file", "file could not be written (File exists)"),
        ("hydra.run.dir=file/run", "file/run could not be written (Not a directory)"),
    ],
)
def test_values_of_a_wrong_kind_are_told(tmp_path: Path, argument: str, sentence: str) -> None:
    (tmp_path / "file").touch()
    failed = run("hydra.run.dir=run", argument, cwd=tmp_path)
    assert failed.returncode == 2
    assert sentence in failed.stderr and failed.stderr.count("\n") == 1


@pytest.mark.skipif(shutil.which("srun") is not None, reason="it tells of machines without Slurm")
def test_a_sweep_on_slurm_without_slurm_is_told(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    failed = run("-m", "launcher=slurm", "window=3,4", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert failed.returncode == 2
    assert "launcher=slurm needs Slurm's srun" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.parametrize(("num_samples", "is_told"), [(10000, True), (336, False)])
def test_samples_that_no_step_sees_are_told(num_samples: int, is_told: bool, tmp_path: Path, caplog: Any) -> None:
    cfg = compose_train("teacher=flux_dev", f"data.num_samples={num_samples}", run_dir=tmp_path)
    warn_of_samples_that_no_step_sees(cfg)
    assert ("40 steps see 320 of them" in caplog.text) == is_told


def test_devices_that_are_not_slurm_s_tasks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {"SLURM_NTASKS": "3", "SLURM_NTASKS_PER_NODE": "3", "SLURM_JOB_NAME": "train"}
    place = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    for name, value in {**tasks, **place}.items():
        monkeypatch.setenv(name, value)
    cfg = compose_train("trainer.devices=2", "trainer.accelerator=cpu", "trainer.precision=32-true", run_dir=tmp_path)
    with pytest.raises(LinearizeError, match=r"set trainer\.devices to a node's tasks"):
        build_trainer(cfg, {})
