import copy

import pytest
import torch
from torch import nn

from backbones.flux_inputs import flux_inputs, sites
from linearize.backbones.flux_site import rotary_angles
from linearize.errors import LinearizeError
from linearize.layout import TILE, Grid, Layout
from linearize.mixers import Mixer

SIZES = [(9, 19), (16, 32), (1, 7), (13, 4)]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_text_tokens", [0, 5])
def test_softmax_surgery_is_the_teacher_bit_for_bit(untouched, student, predict, size, num_text_tokens):
    expected = predict(untouched, *size, num_text_tokens=num_text_tokens)
    assert torch.equal(predict(student("softmax"), *size, num_text_tokens=num_text_tokens), expected)


@torch.no_grad()
def test_softmax_surgery_is_the_teacher_bit_for_bit_in_bf16(untouched, student, predict):
    expected = predict(copy.deepcopy(untouched).bfloat16())
    assert torch.equal(predict(student("softmax").bfloat16()), expected)


@torch.no_grad()
def test_a_softmax_plan_is_never_permuted(student, predict):
    layouts = []
    transformer = student("softmax")
    for site in sites(transformer).values():
        site.mixer.register_forward_pre_hook(lambda _, arguments: layouts.append(arguments[3].layout))
    predict(transformer)
    assert layouts == [Layout(5, (Grid(9, 19),))] * 4


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_tile_order_changes_nothing_but_the_order(untouched, student, predict, size):
    expected = predict(untouched, *size)
    torch.testing.assert_close(predict(student("softmax", token_order="tile"), *size), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_sites_of_different_orders_live_in_one_transformer(untouched, student, predict):
    def order(glob, name):
        return {"layers": glob, "mixer": "softmax", "token_order": name}

    for plan in (
        [order("transformer_blocks.*", "tile"), order("single_transformer_blocks.*", "raster")],
        [order("*.0.attn", "raster"), order("transformer_blocks.1.attn", "tile")],
    ):
        transformer = student(None, plan=plan)
        seen = {}
        for name, site in sites(transformer).items():
            site.mixer.register_forward_pre_hook(
                lambda _, arguments, name=name, seen=seen: seen.update({name: arguments[3].layout.tile})
            )
        torch.testing.assert_close(predict(transformer), predict(untouched), rtol=1e-5, atol=1e-6)
        for rule in transformer.config.linearize_plan:
            wanted = {"tile": TILE, "raster": None}[rule["arguments"]["token_order"]]
            assert {seen[name] for name in rule["layers"]} == {wanted}


class Recorder(nn.Module):
    """Stands before a site's mixer and keeps what it was called with."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer, self.calls = mixer, []

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("mixer",) else getattr(super().__getattr__("mixer"), name)

    def forward(self, query, key, value, context):
        self.calls.append((query, key, value, context))
        return self.mixer(query, key, value, context)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["softmax", "clear"])
def test_every_site_calls_its_mixer_with_query_and_key_that_are_not_rotated(student, predict, mixer):
    transformer, norms = student(mixer), {}
    for name, site in sites(transformer).items():
        site.mixer = Recorder(site.mixer)
        site.norm_q.register_forward_hook(lambda *a, name=name: norms.update({name + ".query": a[2]}))
        site.norm_k.register_forward_hook(lambda *a, name=name: norms.update({name + ".key": a[2]}))
    predict(transformer)
    for name, site in sites(transformer).items():
        ((query, key, value, context),) = site.mixer.calls
        assert query.shape == key.shape == value.shape == (2, 2, 176, 16)
        image = slice(5, None) if name.startswith("transformer_blocks") else slice(None)
        for got, kind in ((query, "query"), (key, "key")):
            assert torch.equal(got[:, :, image].transpose(1, 2), norms[f"{name}.{kind}"])
            assert not torch.allclose(context.rotate(got), got, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["softmax", "clear"])
def test_a_perturbed_mixer_changes_the_output(student, predict, mixer):
    for name in sites(student(mixer)):
        transformer = student(mixer)
        before = predict(transformer)
        sites(transformer)[name].mixer.register_forward_hook(lambda _, __, output: 1.1 * output)
        assert (predict(transformer) - before).abs().max() > 1e-4


@torch.no_grad()
def test_the_context_carries_the_familys_own_rotation_and_softmax(student, predict):
    transformer, contexts = student("clear", window=4), []
    site = sites(transformer)["single_transformer_blocks.0.attn"]
    site.mixer.register_forward_pre_hook(lambda _, arguments: contexts.append(arguments[3]))
    predict(transformer)
    (context,) = contexts
    assert context.layout == Layout(5, (Grid(9, 19),), tile=TILE)
    assert context.positions.shape == (176, 3)
    rows = context.positions[5:, 1][context.layout.tile_to_raster()]
    assert torch.equal(rows, torch.arange(9.0).repeat_interleave(19))
    cosine, sine = transformer.pos_embed(context.positions)
    angles = context.angles(context.positions, 16)
    torch.testing.assert_close(angles.cos().repeat_interleave(2, dim=-1).float(), cosine)
    torch.testing.assert_close(angles.sin().repeat_interleave(2, dim=-1).float(), sine)
    assert context.angles(context.positions, 6).shape == (176, 3)
    query, key, value = torch.randn(3, 1, 2, 176, 16).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(context.softmax(query, key, value), expected)


def test_angles_of_another_width_share_channels_out_as_the_family_does():
    positions = torch.tensor([[1.0, 2.0, 3.0]])
    assert rotary_angles(positions, 128, (16, 56, 56), 10000).shape == (1, 64)
    assert rotary_angles(positions, 32, (16, 56, 56), 10000)[0, [0, 2, 9]].tolist() == [1.0, 2.0, 3.0]


class EchoMixer(Mixer):
    """Gives back what it was told beside query, key and value."""

    token_order = "tile"
    uses_hidden_states = True
    uses_timestep_embedding = True

    def forward(self, query, key, value, context):
        self.seen = (context.hidden_states, context.timestep_embedding, context.layout)
        return context.softmax(context.rotate(query), context.rotate(key), value)


@torch.no_grad()
@pytest.mark.parametrize("tiled_neighbours", [False, True])
def test_mixers_that_ask_get_hidden_states_and_the_timestep_embedding(student, untouched, predict, tiled_neighbours):
    transformer, captured = student("softmax", token_order="tile" if tiled_neighbours else "any"), []
    for site in sites(transformer).values():
        site.mixer = EchoMixer(site.mixer.shape)
        site.register_forward_pre_hook(lambda _, args, kwargs: captured.append(kwargs), with_kwargs=True)
    transformer.time_text_embed.register_forward_hook(lambda *a: captured.append(a[2]))
    torch.testing.assert_close(predict(transformer), predict(untouched), rtol=1e-5, atol=1e-6)
    embedding, _, *calls = captured
    for site, kwargs in zip(sites(transformer).values(), calls, strict=True):
        hidden_states, timestep_embedding, layout = site.mixer.seen
        assert layout.tile == TILE
        assert torch.equal(timestep_embedding, embedding)
        parts = [kwargs.get("encoder_hidden_states"), kwargs["hidden_states"]]
        assert torch.equal(hidden_states, torch.cat([part for part in parts if part is not None], dim=1))


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["softmax", "clear"])
def test_each_sample_of_a_batch_is_itself(student, mixer):
    transformer, inputs = student(mixer), flux_inputs(batch=3)
    together = transformer(**inputs)[0]
    for i in range(3):
        one = {
            key: value[i : i + 1] if key not in ("img_ids", "txt_ids", "return_dict") else value
            for key, value in inputs.items()
        }
        torch.testing.assert_close(transformer(**one)[0], together[i : i + 1], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_resolution_and_text_length_may_change_between_calls(student, predict):
    transformer = student("clear", window=3, downsample=2)
    for size, num_text_tokens in [((9, 19), 5), ((16, 8), 2), ((9, 19), 0), ((9, 19), 5)]:
        fresh = predict(student("clear", window=3, downsample=2), *size, num_text_tokens=num_text_tokens)
        assert torch.equal(predict(transformer, *size, num_text_tokens=num_text_tokens), fresh)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:window=60 covers")
def test_two_images_as_in_kontext(untouched, student):
    inputs = flux_inputs(grids=((9, 19), (6, 10)))
    expected = untouched(**inputs)[0]
    assert torch.equal(student("softmax")(**inputs)[0], expected)
    torch.testing.assert_close(student("clear", window=60)(**inputs)[0], expected, rtol=1e-5, atol=1e-6)
    assert (student("clear", window=3)(**inputs)[0] - expected).abs().max() > 1e-3


@torch.no_grad()
def test_irregular_ids_are_refused(student):
    inputs = flux_inputs()
    inputs["img_ids"] = inputs["img_ids"].flip(0)
    with pytest.raises(LinearizeError, match="do not form rectangles"):
        student("clear")(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("repeat", [False, True])
def test_controlnet_residuals_reach_the_tokens_that_they_are_for(untouched, student, repeat):
    inputs = flux_inputs() | {"controlnet_blocks_repeat": repeat}
    inputs["controlnet_block_samples"] = list(torch.randn(2, 2, 171, 32))
    inputs["controlnet_single_block_samples"] = list(torch.randn(1, 2, 171, 32))
    expected = untouched(**inputs)[0]
    assert torch.equal(student("softmax")(**inputs)[0], expected)
    torch.testing.assert_close(student("softmax", token_order="tile")(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
