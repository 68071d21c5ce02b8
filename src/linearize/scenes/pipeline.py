"""Builds a complete FluxPipeline of small configuration with random weights."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from linearize.scenes.tokenizers import build_clip_tokenizer, build_t5_tokenizer

Config = dict[str, Any]


def build_flux_pipeline(
    words: Iterable[str],
    *,
    transformer: Config,
    vae: Config,
    text: Config,
    clip: Config,
    scheduler: Config | None = None,
    seed: int = 0,
) -> FluxPipeline:
    """Builds a FLUX pipeline whose every part is an ordinary diffusers or transformers class.

    Widths that have to agree are derived: the transformer reads `4 * latent_channels` (packed 2 x 2 latents), the T5
    width and the CLIP width, and the vocabularies are those of tokenizers made from `words`.

    Args:
        words: Vocabulary of both tokenizers.
        transformer: Arguments of `FluxTransformer2DModel`; `axes_dims_rope` must add up to `attention_head_dim`.
        vae: Arguments of `AutoencoderKL`; three `block_out_channels` give pictures four times the latent's size.
        text: Arguments of `T5Config`.
        clip: Arguments of `CLIPTextConfig`.
        scheduler: Arguments of `FlowMatchEulerDiscreteScheduler`; default a fixed shift of 3.
        seed: Seed of the weights.

    Returns:
        The pipeline on the CPU in float32 and evaluation mode.
    """
    words = list(words)
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(words), build_t5_tokenizer(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = _build_clip(clip, clip_tokenizer)
        text_encoder_2 = _build_t5(text, t5_tokenizer)
        autoencoder = _build_autoencoder(vae)
        backbone = FluxTransformer2DModel(
            **{
                "in_channels": 4 * autoencoder.config.latent_channels,
                "joint_attention_dim": text_encoder_2.config.d_model,
                "pooled_projection_dim": text_encoder.config.hidden_size,
                **transformer,
            }
        )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, "use_dynamic_shifting": False, **(scheduler or {})}),
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5_tokenizer,
        transformer=backbone,
    )
    for part in (text_encoder, text_encoder_2, autoencoder, backbone):
        part.eval()
    return pipeline


def _build_clip(config: Config, tokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            **{
                "vocab_size": len(tokenizer),
                "max_position_embeddings": tokenizer.model_max_length,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                **config,
            }
        )
    )


def _build_t5(config: Config, tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            **{
                "vocab_size": len(tokenizer),
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "feed_forward_proj": "gated-gelu",
                "dropout_rate": 0.0,
                **config,
            }
        )
    )


def _build_autoencoder(config: Config) -> AutoencoderKL:
    num_blocks = len(config["block_out_channels"])
    return AutoencoderKL(
        **{
            "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * num_blocks,
            "up_block_types": ("UpDecoderBlock2D",) * num_blocks,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
            **config,
        }
    )
