import sys

import pytest

from contexts import SHAPE
from linearize.errors import LinearizeError
from linearize.mixers import build_mixer, mixer_class, mixer_defaults, mixer_names
from linearize.mixers.clear import ClearMixer


def test_names_are_found_by_looking():
    assert {"softmax", "clear"} <= set(mixer_names())
    assert mixer_class("clear") is ClearMixer
    assert mixer_defaults("clear") == {"window": 8, "downsample": 1}


def test_a_misspelt_name_lists_the_choices_and_the_nearest():
    with pytest.raises(
        LinearizeError, match=r"unknown mixer 'cleer', choose one of care, clear, .*did you mean 'clear'"
    ):
        mixer_class("cleer")


@pytest.mark.parametrize("name", ["base", "os", "clear.ClearMixer", "..surgery", "linearize.mixers.clear", "", None])
def test_no_name_leads_out_of_the_package(name):
    before = set(sys.modules)
    with pytest.raises(LinearizeError, match="unknown mixer"):
        build_mixer(name, SHAPE, {})
    assert set(sys.modules) == before


def test_an_unknown_argument_names_those_that_there_are():
    with pytest.raises(LinearizeError, match=r"mixer 'clear' has no argument 'radius', it takes window, downsample"):
        build_mixer("clear", SHAPE, {"radius": 4})


@pytest.mark.parametrize("knobs", [{"window": 0}, {"window": -3}, {"window": 2.5}, {"downsample": 0}, {"window": True}])
def test_clear_refuses_what_is_no_size(knobs):
    with pytest.raises(LinearizeError, match=f"got {next(iter(knobs))}=.*1 or more"):
        build_mixer("clear", SHAPE, knobs)


def test_softmax_refuses_an_order_that_there_is_not():
    with pytest.raises(LinearizeError, match="any, raster or tile"):
        build_mixer("softmax", SHAPE, {"token_order": "columns"})
