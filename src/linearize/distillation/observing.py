"""Runs teacher and student on one noisy batch, and shows the terms of a loss what they need to see."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from diffusers import ModelMixin
from torch import Tensor

from linearize.backbones import find_backbone
from linearize.backbones.plan import preferred_order
from linearize.distillation.capture import SiteCapture, join_outputs
from linearize.distillation.losses import LossTerm, Observation
from linearize.distillation.noise import add_noise
from linearize.mixers import Mixer
from linearize.surgery import match_layers

# What a batch holds beside the conditioning of `Backbone.predict`.
_NOT_CONDITIONING = ("latents", "prompt", "index")


class Observer:
    """Looks into teacher and student alike.

    Args:
        teacher: A student with softmax in every site.
        student: The student.
        terms: Every loss term that will be computed.

    Attributes:
        backbone: Of both.
    """

    def __init__(self, teacher: ModelMixin, student: ModelMixin, terms: Sequence[LossTerm]) -> None:
        self.backbone, self._teacher, self._student = find_backbone(student), teacher, student
        self._sites, teacher_sites = self.backbone.sites(student), self.backbone.sites(teacher)
        planned = [name for rule in student.config["linearize_plan"] for name in rule["layers"]]
        self._attention_sites = {id(term): match_layers(term.attention_layers, planned) for term in terms}
        self._transfer_sites = {id(term): match_layers(term.transfer_layers, planned) for term in terms}
        attention = {name for names in self._attention_sites.values() for name in names}
        attention |= {name for term in terms if term.before_projection for name in self._transfer_sites[id(term)]}
        transfer = {name for names in self._transfer_sites.values() for name in names}
        self._teacher_capture = SiteCapture(teacher, teacher_sites, attention, transfer)
        self._student_capture = SiteCapture(student, self._sites, attention, set())
        # Tokens travel through both in one order, so that what is captured is compared as it is, without a copy.
        order = preferred_order([cast(Mixer, site.mixer) for site in self._sites.values()])
        for site in teacher_sites.values():
            cast(Mixer, site.mixer).token_order = order

    def compute_terms(
        self, terms: Mapping[str, LossTerm], batch: Mapping[str, Any], noise: Tensor, sigma: Tensor
    ) -> dict[str, Tensor]:
        """Computes loss terms on given noise.

        Args:
            terms: The terms by name; only what they need is run.
            batch: "latents" [batch, channels, height, width] and the conditioning.
            noise: Like the latents.
            sigma: [batch].

        Returns:
            Each term's value, unweighted.
        """
        values = list(terms.values())
        latents = batch["latents"].float()
        inputs = (add_noise(latents, noise, sigma), sigma, conditioning_of(batch))
        seen = Observation(target=noise - latents)
        attention = {name for term in values for name in self._attention_sites[id(term)]}
        transfer = list(dict.fromkeys(name for term in values for name in self._transfer_sites[id(term)]))
        inner = {name for term in values if term.before_projection for name in self._transfer_sites[id(term)]}
        teacher_inner: dict[str, Tensor] = {}
        if transfer or any(term.needs_teacher for term in values):
            with torch.no_grad(), self._teacher_capture.recording() as (outputs, calls):
                seen.teacher_velocity, seen.teacher_variance = self.backbone.predict_with_variance(
                    self._teacher, *inputs
                )
            seen.teacher_attention = {name: outputs[name] for name in attention}
            teacher_inner = {name: outputs[name] for name in inner}
        if any(term.needs_student for term in values):
            with self._student_capture.recording() as (outputs, _):
                seen.student_velocity, seen.student_variance = self.backbone.predict_with_variance(
                    self._student, *inputs
                )
            seen.student_attention = {name: outputs[name] for name in attention}
        if transfer:
            with self._student_capture.recording() as (outputs, _):
                seen.transfer = {
                    name: (join_outputs(self._sites[name](**calls[name].keywords)), calls[name].output)
                    for name in transfer
                }
            seen.transfer_attention = {name: (outputs[name], output) for name, output in teacher_inner.items()}
        return {name: term(self._shown_to(term, seen)) for name, term in terms.items()}

    def _shown_to(self, term: LossTerm, seen: Observation) -> Observation:
        """What has been seen, of the term's own layers alone."""
        attention, transfer = self._attention_sites[id(term)], self._transfer_sites[id(term)]
        inner = [name for name in transfer if name in seen.transfer_attention]
        return replace(
            seen,
            teacher_attention={name: seen.teacher_attention[name] for name in attention},
            student_attention={name: seen.student_attention[name] for name in attention},
            transfer={name: seen.transfer[name] for name in transfer},
            transfer_attention={name: seen.transfer_attention[name] for name in inner},
        )


def conditioning_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What `Backbone.predict` is to be told beside latents and sigma, with floating point tensors in float32."""
    return {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
        if name not in _NOT_CONDITIONING
    }
