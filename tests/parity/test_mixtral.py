"""Routed experts against transformers' Mixtral block, random weights copied across, in float32 to 1e-5.

The router is the same by design: a softmax over all experts, the k largest, divided by their sum. The balance loss differs in
two ways: transformers counts all k choices of a token and joins the layers before it multiplies, ours is Switch's and that of
MoE-LLaVA's code, the first choice alone and a sum over layers. It is compared where both say the same: one choice, layer by
layer.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from xfusion.fusion.sparse_experts import Experts, Routed, RoutedByAll, SparseExperts
from xfusion.objectives.load_balance import LoadBalance, balance

WIDTH, MLP, EXPERTS = 24, 40, 5
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def pair(
    active: int, *, frozen_expert: bool = False, seed: int = 0
) -> tuple[MixtralSparseMoeBlock, Experts, nn.Module]:
    """Mixtral's block, our experts with its weights, and the frozen MLP that they stand in the place of."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=MLP, num_local_experts=EXPERTS, num_experts_per_tok=active
    )
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    made = []
    for both, down in zip(theirs.experts.gate_up_proj, theirs.experts.down_proj, strict=True):
        mlp = LlamaMLP(SimpleNamespace(hidden_size=WIDTH, intermediate_size=MLP, hidden_act="silu", mlp_bias=False))
        gate, up = both.chunk(2)
        mlp.load_state_dict({"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down})
        made.append(mlp)
    settings = SparseExperts.Config(experts=EXPERTS, active=active, frozen_expert=frozen_expert)
    own = Experts(settings, WIDTH, made[1:] if frozen_expert else made)
    own.router.load_state_dict({"weight": theirs.gate.weight})
    return theirs, own, made[0]


def states(seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(2, 9, WIDTH)


EVERY = torch.ones(2, 9, dtype=torch.bool)


@pytest.mark.parametrize("active", [1, 2, 3])
@torch.no_grad()
def test_tokens_choose_the_experts_of_mixtral_with_its_weights(active):
    theirs, own, _ = pair(active)
    logits, weights, chosen = theirs.gate(states())
    probability, taken = own.weights(states().flatten(0, 1))
    torch.testing.assert_close(probability, logits.softmax(-1), **CLOSE)
    assert torch.equal((taken > 0).nonzero(), (torch.zeros_like(taken).scatter(1, chosen, 1.0) > 0).nonzero())
    torch.testing.assert_close(taken.gather(1, chosen), weights, **CLOSE)
    assert len(set(chosen[:, 0].tolist())) >= 3  # else nothing was chosen


@pytest.mark.parametrize("frozen_expert", [False, True])
@pytest.mark.parametrize("active", [1, 2, 3])
@torch.no_grad()
def test_outputs_are_those_of_mixtral(active, frozen_expert):
    """Fast and reference path; with a frozen expert the layer's own MLP is the router's first."""
    theirs, own, frozen = pair(active, frozen_expert=frozen_expert)
    expected = theirs(states())
    for kind in (Routed, RoutedByAll):
        torch.testing.assert_close(kind(own, EVERY, [])(frozen, states()), expected, **CLOSE)
    rest = EVERY.clone()
    rest[0, :4] = False  # words before any picture
    found = Routed(own, rest, [])(frozen, states())
    torch.testing.assert_close(found[rest], expected[rest], **CLOSE)
    assert torch.equal(found[~rest], frozen(states())[~rest])


def test_router_and_experts_have_the_gradients_of_mixtral():
    theirs, own, frozen = pair(2)
    one, other = states().requires_grad_(), states().requires_grad_()
    theirs(one).square().sum().backward()
    Routed(own, EVERY, [])(frozen, other).square().sum().backward()
    pairs = [(other.grad, one.grad), (own.router.weight.grad, theirs.gate.weight.grad)]
    for i, expert in enumerate(own.experts):
        gradient = torch.cat([expert.gate_proj.weight.grad, expert.up_proj.weight.grad])
        pairs.append((gradient, theirs.experts.gate_up_proj.grad[i]))
        pairs.append((expert.down_proj.weight.grad, theirs.experts.down_proj.grad[i]))
    for found, expected in pairs:
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max()) > 0


def test_the_balance_loss_is_that_of_transformers_for_one_choice_layer_by_layer():
    own, expected, gradients, routers = [], [], [], []
    for seed in (0, 1):
        theirs, experts, _ = pair(1, seed=seed)
        logits, *_ = theirs.gate(states(seed).flatten(0, 1))
        expected.append(load_balancing_loss_func((logits,), EXPERTS, top_k=1))
        gradients.append(torch.autograd.grad(expected[-1], theirs.gate.weight)[0])
        own.append(experts.weights(states(seed).flatten(0, 1))[0])
        routers.append(experts.router.weight)
    run = SimpleNamespace(states={f"router.{i}": p for i, p in enumerate(own)} | {"text": states()})
    value, count = (
        LoadBalance.Config().build().loss(lambda _: run, SimpleNamespace(media={"image": None}))["load_balance"]
    )
    torch.testing.assert_close(value / count, torch.stack(expected).sum(), **CLOSE)
    for found, wanted in zip(torch.autograd.grad(value, routers), gradients, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    # What differs, named above: both of two choices count there.
    theirs, experts, _ = pair(2)
    logits, *_ = theirs.gate(states().flatten(0, 1))
    chosen = logits.topk(2).indices
    both = torch.zeros_like(logits).scatter(1, chosen, 1.0).mean(0)
    probability = experts.weights(states().flatten(0, 1))[0]
    two = load_balancing_loss_func((logits,), EXPERTS, top_k=2)
    torch.testing.assert_close(EXPERTS * (both * probability.mean(0)).sum(), two, **CLOSE)
    assert abs(float((two - balance(probability)).detach())) > 0.5
