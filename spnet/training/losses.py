"""The terms of the SP-Net objective, one function each, and their weighted sum.

Source: SP-Net (ECCV 2022) and its official repository where the paper leaves a choice open.
All terms are float32 scalars whatever the dtype of their inputs.

A batch in equal parts, one per rank or micro-batch: L_cls, L_path, L_logits and L_evo are means over samples of what
depends on that sample alone (given the statistics of BatchNorm), so the mean of the parts' terms and gradients is
the whole batch's. L_act is not: a square (or a hinge) of a mean over the batch. The mean of the parts' L_act exceeds
the whole batch's by the variance of the rate between parts, which pushes every rate away from 1/2. It needs the rates
of the whole batch: see the argument `rates` of :func:`activation_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spnet.analysis.stability import Differences, differences_across, differences_within
from spnet.models import SPNetOutput

PAIRINGS = ("final", "equal")
EVOLUTION_FORMS = ("within", "across")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, got {value!r}")


def _weighted_sum(stage_weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    if len(stage_weights) != len(terms):
        raise ValueError(f"stage_weights: expected {len(terms)}, one per stage, got {len(stage_weights)}")
    return torch.stack([w * term for w, term in zip(stage_weights, terms, strict=True)]).sum()


def classification_loss(stage_logits: Sequence[Tensor], labels: Tensor, stage_weights: Sequence[float]) -> Tensor:
    """L_cls = sum_s w_s * cross_entropy(stage_logits[s], labels).

    Args:
        stage_logits: per stage [B, classes], first to last.
        labels: int64 [B].
        stage_weights: w_s, first to last.
    """
    return _weighted_sum(stage_weights, [F.cross_entropy(z.float(), labels) for z in stage_logits])


def activation_loss(
    decisions: Tensor, target_rates: Tensor, hinge: bool = False, rates: Tensor | None = None
) -> Tensor:
    """L_act = mean over blocks of (t_l - rate_l)^2, where rate_l is the mean of block l's decisions over the batch.

    Args:
        decisions: float [B, L], 0/1 with the straight-through gradient.
        target_rates: float [L] in [0, 1]; a block whose target is 1 is exempt.
        hinge: count a block only where rate_l > t_l (the ImageNet form).
        rates: float [L], rate_l of a batch of which `decisions` are one of several equal parts; gets no gradient.
            The value is then the whole batch's, and so is the mean over the parts of the gradients.

    Source: ConvNet-AIG (ECCV 2018), section 3.3, with SP-Net's hinge.
    """
    counted = (target_rates < 1).float()  # a factor: as an index, the host would wait for the device
    part = decisions.float().mean(0)
    if rates is not None:
        # With rate = mean over N parts of part_i: d f(rate) = f'(rate) * (1/N) sum_i d part_i. So every part gives
        # f'(rate) * d part_i, and the mean over the parts, which is taken anyway, does the rest: no communication.
        part = part + (rates - part).detach()
    excess = (part - target_rates) * counted
    if hinge:
        excess = excess.clamp(min=0)
    return excess.square().sum() / counted.sum().clamp(min=1)


def executing_path_loss(router_logits: Tensor, auxiliary_router_logits: Tensor) -> Tensor:
    """L_path = MSE between the router logits of the network and of the auxiliary module, over all blocks.

    Args:
        router_logits, auxiliary_router_logits: float [B, L, 2]; the latter get no gradient.

    Source: SP-Net, executing path regularization.
    """
    return F.mse_loss(router_logits.float(), auxiliary_router_logits.detach().float())


def logits_loss(
    stage_logits: Sequence[Tensor],
    auxiliary_stage_logits: Sequence[Tensor],
    stage_weights: Sequence[float],
    pairing: str = "final",
) -> Tensor:
    """L_logits = sum_s w_s * MSE(stage_logits[s], the auxiliary module's logits).

    Args:
        stage_logits, auxiliary_stage_logits: per stage [B, classes], first to last; the latter get no gradient.
        stage_weights: w_s, first to last.
        pairing: "final" compares every stage with the auxiliary module's last one (the official code);
            "equal" with its own stage (the paper's framework figure).
    """
    check_choice("pairing", pairing, PAIRINGS)
    followed = auxiliary_stage_logits if pairing == "equal" else [auxiliary_stage_logits[-1]] * len(stage_logits)
    terms = [F.mse_loss(z.float(), f.detach().float()) for z, f in zip(stage_logits, followed, strict=True)]
    return _weighted_sum(stage_weights, terms)


def _misalignment(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the batch of 1 - cos(a, b), [B, C] each; a zero vector has cos = 0 and gets no gradient."""
    # A sample that skips every block between two features makes their difference exactly zero. PyTorch's gradient
    # is 1e8 there: with weight 1e-4 it still filled a fifth of the router gradients beyond the clamp of 0.5.
    a, b = (v.masked_fill(~v.any(dim=1, keepdim=True), 0) for v in (a, b))
    return (1 - F.cosine_similarity(a.float(), b.float(), dim=1)).mean()


def _total_misalignment(differences: Differences, like: Tensor) -> Tensor:
    return sum((_misalignment(a, b) for a, b in differences), like.new_zeros((), dtype=torch.float32))


def evolution_loss_within(features: Sequence[Tensor]) -> Tensor:
    """L_evo of the CIFAR form: sum over stages of 1 - cos(f_mid - f_first, f_last - f_mid).

    Args:
        features: see :func:`spnet.analysis.stability.differences_within`; a stage of fewer than three blocks
            contributes nothing.

    Source: SP-Net, feature evolution regularization.
    """
    return _total_misalignment(differences_within(features), features[0])


def evolution_loss_across(stage_features: Sequence[Tensor]) -> Tensor:
    """L_evo of the ImageNet form: sum over pairs (i, j) of 1 - cos(f_S - f_i, f_S - f_j), stages i < j < S.

    Args:
        stage_features: per stage [B, C], aligned to one width.

    Source: SP-Net, feature evolution regularization.
    """
    return _total_misalignment(differences_across(stage_features), stage_features[-1])


class SPNetLoss:
    """The whole objective: L_cls + w_act L_act + w_path L_path + w_logits L_logits + w_evo L_evo.

    Args:
        target_rates: float, or one per block, in [0, 1].
        stage_weights: w_s of L_cls and L_logits, first stage to last.
        activation, path, logits, evolution: weights of the terms; a term of weight 0 is not computed.
        hinge, pairing: see :func:`activation_loss` and :func:`logits_loss`.
        evolution_form: "within" or "across".

    Raises:
        ValueError: a target rate outside [0, 1]; a weight that is negative or not finite; an unknown form or pairing.
            When called: as many target rates as neither one nor the blocks, as many stage weights as not the stages, or
            no auxiliary output.
    """

    def __init__(
        self,
        target_rates: float | Sequence[float],
        *,
        stage_weights: Sequence[float] = (0.1, 0.2, 1.0),
        activation: float = 2.0,
        path: float = 0.1,
        logits: float = 0.1,
        evolution: float = 1e-4,
        hinge: bool = False,
        pairing: str = "final",
        evolution_form: str = "within",
    ):
        rates = torch.as_tensor(target_rates, dtype=torch.float32).reshape(-1)
        if not ((rates >= 0) & (rates <= 1)).all():
            raise ValueError(f"target_rates: expected values in [0, 1], got {target_rates}")
        weights = dict(activation=activation, path=path, logits=logits, evolution=evolution)
        for name, weight in [*weights.items(), *(("stage_weights", w) for w in stage_weights)]:
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}: expected at least 0 and finite, got {weight}")
        check_choice("evolution_form", evolution_form, EVOLUTION_FORMS)
        check_choice("pairing", pairing, PAIRINGS)
        self.target_rates, self.stage_weights = rates, tuple(stage_weights)
        self.weights = {"act": activation, "path": path, "logits": logits, "evo": evolution}
        self.hinge, self.pairing, self.evolution_form = hinge, pairing, evolution_form

    @property
    def needs_auxiliary(self) -> bool:
        return bool(self.weights["path"] or self.weights["logits"])

    def __call__(
        self,
        output: SPNetOutput,
        labels: Tensor,
        auxiliary: SPNetOutput | None = None,
        rates: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted total and the unweighted terms, by the names cls, act, path, logits, evo.

        Args:
            output: of the trained network, in training mode.
            labels: int64 [B].
            auxiliary: output of the auxiliary module for the same batch; needed where L_path or L_logits counts.
            rates: execution rates [L] of the whole batch where `output` is of a part; see :func:`activation_loss`.

        Raises:
            TypeError: output or auxiliary is of a network in evaluation mode, or of one whose forward gives the logits
                alone.
            ValueError: see the class.
        """
        outputs = {"output": output} if auxiliary is None else {"output": output, "auxiliary": auxiliary}
        for name, given in outputs.items():
            if not isinstance(given, SPNetOutput):
                raise TypeError(
                    f"{name}: expected the SPNetOutput of a network in training mode, got {type(given).__name__}; "
                    "call model.train(), and a network of others by spnet.forward_training(model, x)"
                )
        weights = self.weights
        blocks = output.decisions.shape[1]
        terms = {"cls": classification_loss(output.stage_logits, labels, self.stage_weights)}
        if weights["act"] and blocks:
            if len(self.target_rates) not in (1, blocks):
                raise ValueError(f"target_rates: expected 1 or {blocks} rates, got {len(self.target_rates)}")
            self.target_rates = self.target_rates.to(output.decisions.device)  # once: it would wait for the device
            targets = self.target_rates.expand(blocks)
            terms["act"] = activation_loss(output.decisions, targets, self.hinge, rates)
        if self.needs_auxiliary and blocks:
            if auxiliary is None:
                raise ValueError("auxiliary: L_path and L_logits need the auxiliary module's output, got None")
            if weights["path"]:
                terms["path"] = executing_path_loss(output.router_logits, auxiliary.router_logits)
            if weights["logits"]:
                terms["logits"] = logits_loss(
                    output.stage_logits, auxiliary.stage_logits, self.stage_weights, self.pairing
                )
        if weights["evo"] and blocks:
            if self.evolution_form == "within":
                terms["evo"] = evolution_loss_within(output.features)
            else:
                terms["evo"] = evolution_loss_across(output.stage_features)
        total = sum(weights.get(name, 1.0) * term for name, term in terms.items())
        return total, terms
