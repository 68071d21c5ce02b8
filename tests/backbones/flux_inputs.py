"""What tests of FLUX transformers call them with."""

import torch

from linearize.backbones import find_backbone


def sites(transformer):
    return find_backbone(transformer).sites(transformer)


def flux_inputs(grids=((9, 19),), num_text_tokens=5, batch=2):
    torch.manual_seed(1)
    ids = [
        torch.tensor([[number, y, x] for y in range(height) for x in range(width)], dtype=torch.float32)
        for number, (height, width) in enumerate(grids)
    ]
    img_ids = torch.cat(ids)
    return dict(
        hidden_states=torch.randn(batch, len(img_ids), 16),
        encoder_hidden_states=torch.randn(batch, num_text_tokens, 32),
        pooled_projections=torch.randn(batch, 24),
        timestep=torch.linspace(0.2, 0.9, batch),
        guidance=torch.full((batch,), 3.5),
        img_ids=img_ids,
        txt_ids=torch.zeros(num_text_tokens, 3),
        return_dict=False,
    )
