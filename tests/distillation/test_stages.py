from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.distillation.losses import FlowMatching
from linearize.distillation.schedules import constant, cosine
from linearize.distillation.stages import Stage, allot_steps, stage_at
from linearize.errors import LinearizeError


def test_the_open_stage_takes_the_rest() -> None:
    assert allot_steps({"transfer": 30, "distill": None}, 100) == {"transfer": 30, "distill": 70}
    assert allot_steps({"transfer": 0, "distill": None}, 100) == {"distill": 100}
    assert allot_steps({"transfer": None, "distill": 0}, 5) == {"transfer": 5}
    assert allot_steps({"transfer": 5, "distill": None}, 5) == {"transfer": 5}
    assert allot_steps({"transfer": 0.25, "distill": None}, 40) == {"transfer": 10, "distill": 30}
    assert allot_steps({"transfer": 0.5, "middle": 0.5, "distill": 0}, 40) == {"transfer": 20, "middle": 20}


@pytest.mark.parametrize(
    ("stages", "max_steps", "words"),
    [
        ({"transfer": 30, "distill": None}, 20, "30 steps and trainer.max_steps is 20"),
        ({"transfer": 5, "distill": 5}, 11, "10 steps and trainer.max_steps is 11"),
        ({"transfer": None, "distill": None}, 10, "transfer and distill both"),
        ({"transfer": -1, "distill": None}, 10, "stages.transfer=-1"),
        ({"transfer": 1.5, "distill": None}, 10, "stages.transfer=1.5 is no number of steps"),
        ({"distill": None}, 0, "trainer.max_steps=0"),
    ],
)
def test_stages_that_do_not_add_up(stages: dict[str, int | None], max_steps: int, words: str) -> None:
    with pytest.raises(LinearizeError, match=words):
        allot_steps(stages, max_steps)


def test_a_stage_without_a_loss() -> None:
    with pytest.raises(LinearizeError, match="stage distill has no term"):
        Stage("distill", {"flow_matching": FlowMatching(weight=0)}, 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trains": "gates"}, "transfer_trains=gates is unknown: use all or mixer"),
        ({"lr": 0.0}, "transfer_lr=0.0 trains nothing"),
    ],
)
def test_wrong_settings_of_a_stage(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(LinearizeError, match=words):
        Stage("transfer", {"flow_matching": FlowMatching()}, 3, **settings)


def test_a_negative_weight() -> None:
    with pytest.raises(LinearizeError, match=r"-0\.5 is negative"):
        FlowMatching(weight=-0.5)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.data())
def test_stage_at_counts_every_step_once(lengths: list[int], data: st.DataObject) -> None:
    stages = [Stage(str(number), {"loss": FlowMatching()}, length) for number, length in enumerate(lengths)]
    walk = [(stage.name, done) for stage in stages for done in range(stage.num_steps)]
    step = data.draw(st.integers(0, sum(lengths) - 1))
    stage, done = stage_at(stages, step)
    assert (stage.name, done) == walk[step]
    assert stage_at(stages, sum(lengths)) == (stages[-1], lengths[-1])


def test_schedules() -> None:
    factors = [cosine(step, 1000, num_warmup_steps=100, final_factor=0.1) for step in range(1001)]
    assert factors[0] < 0.01 and max(factors) == pytest.approx(1.0, abs=0.03)
    assert factors[-1] == pytest.approx(0.1)
    assert factors[100:] == sorted(factors[100:], reverse=True)
    assert factors[:100] == sorted(factors[:100])
    assert constant(0, 1000, num_warmup_steps=9) == pytest.approx(0.1)
    assert constant(9, 1000, num_warmup_steps=9) == 1.0
    # A warm-up never takes more than a tenth of a short stage.
    assert constant(2, 20, num_warmup_steps=500) == 1.0
