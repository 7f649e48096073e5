"""The optimizers of a model. Run: python -m pytest tests/test_optimizers.py"""

import pytest
import timm.optim
import torch
from test_checkpoint import CONFIG, MODEL

from engine_mar import new_state, optimizer_step, parameter_groups
from models import build_model
from models.ar import ar_tiny
from models.dit import dit_tiny
from util.checkpoint import load_checkpoint, steps_done
from util.optimizers import hidden_matrices
from util.recipe import Recipe
from util.stored import check_optimizer_fits

CPU = torch.device("cpu")
SIZES = {k: v for k, v in MODEL.items() if k not in ("name", "buffer_size")}


def started(**recipe):
    """The TrainState of a tiny model whose weights are all used: some would start at 0."""
    torch.manual_seed(0)
    model = build_model(**MODEL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return new_state(model, Recipe(**{"optimizer": "muon", "lr": 1e-2, **recipe}), CPU, "fp32", 4)


def step(state, scale=1.0):
    loss = state.model(torch.randn(4, 1, 8, 8), torch.arange(4))
    state.scaler.scale(loss * scale).backward()
    optimizer_step(state.model, state.optimizer, state.scaler, 0)
    return loss.item()


def test_muon_takes_the_matrices_of_hidden_layers():
    """Those of the blocks of backbone and denoising MLP; no embedding, table or last layer. The
    published groups stay as they are but for these."""
    state = started(weight_decay=0.3)
    names = {id(p): name for name, p in state.model.named_parameters()}
    groups = [{names[id(p)] for p in g["params"]} for g in state.optimizer.param_groups]
    assert [g["weight_decay"] for g in state.optimizer.param_groups] == [0.0, 0.3, 0.0, 0.3]
    assert [g["use_muon"] for g in state.optimizer.param_groups] == [False, False, True, True]
    for published, i in zip(parameter_groups(state.model, 0.3), (0, 1), strict=True):
        assert {names[id(p)] for p in published["params"]} == groups[i] | groups[i + 2]
    head = [f"diffloss.net.res_blocks.{i}." for i in range(2)]
    matrices = ("mlp.0.weight", "mlp.2.weight", "adaLN_modulation.1.weight")
    assert groups[2] == {f"{block}{name}" for block in head for name in matrices}
    layers = {name.split(".", 2)[2] for name in groups[3]}
    assert layers == {f"{x}.weight" for x in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert {name.split(".")[0] for name in groups[3]} == {"encoder_blocks", "decoder_blocks"}


@pytest.mark.parametrize("build", [ar_tiny, dit_tiny])
def test_hidden_layers_of_other_models(build):
    """The blocks of each."""
    model = build(**SIZES) if build is ar_tiny else build(**{k: SIZES[k] for k in [*SIZES][:5]})
    found = {id(p) for p in hidden_matrices(model)}
    expected = [id(p) for n, p in model.named_parameters() if "blocks." in n and p.ndim == 2]
    assert found == {*expected} and len(expected) >= 16


def test_one_learning_rate_serves_both():
    """Muon's step of a matrix has about the root mean square of AdamW's, 0.2 of the rate, whatever
    the shape, and a rate of 0 moves nothing."""
    state = started(weight_decay=0.0)
    before = [p.detach().clone() for p in state.model.parameters()]
    for group in state.optimizer.param_groups:
        group["lr"] = 0.0
    step(state)
    assert all(map(torch.equal, before, state.model.parameters()))
    optimizer = started(weight_decay=0.0).optimizer
    matrices = [p for g in optimizer.param_groups[2:] for p in g["params"]]
    before = [p.detach().clone() for p in matrices]
    for p in matrices:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p, old in zip(matrices, before, strict=True):
        assert (p.detach() - old).square().mean().sqrt().item() == pytest.approx(2e-3, rel=0.2)


def test_it_learns():
    """The loss of fixed pictures and noise falls as with AdamW, by the same rate."""

    def last(optimizer):
        state, losses = started(optimizer=optimizer), []
        for _ in range(8):
            torch.manual_seed(1)
            losses.append(step(state))
        return losses[-1] / losses[0]

    assert last("muon") < 0.8 and last("adamw") < 0.8


def test_the_scaler_skips_its_steps():
    """Gradients that are not finite move nothing, and halve the scale."""
    state = started()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = [p.detach().clone() for p in state.model.parameters()]
    step(state, float("inf"))
    assert all(map(torch.equal, before, state.model.parameters()))
    assert state.scaler.get_scale() == 1.0
    step(state)
    assert not all(map(torch.equal, before, state.model.parameters()))


def test_states_of_others_are_refused(tmp_path):
    """Another optimizer's, and one that is damaged, in one line; its own is loaded."""
    muon, adamw = started(), started(optimizer="adamw")
    for state in (muon, adamw):
        step(state)
        state.save(tmp_path / f"{type(state.optimizer).__name__}.pth", CONFIG, {})
    own, other = (load_checkpoint(tmp_path / f"{name}.pth") for name in ("Muon", "AdamW"))
    assert steps_done(own) == steps_done(other) == 1
    for state, checkpoint in ((muon, other), (adamw, own)):
        with pytest.raises(ValueError, match="it: optimizer's groups is .*, expected of sizes"):
            state.load(checkpoint, "it")
    muon.load(own, "it")
    numbers = own["optimizer"]["param_groups"][2]["params"]
    for name, value in (("use_muon", False), ("momentum_buffer", torch.zeros(2))):
        state = own["optimizer"]["state"]
        damaged = {"state": {**state, numbers[0]: {**state[numbers[0]], name: value}}}
        with pytest.raises(ValueError, match=f"it: optimizer's {name} of parameter {numbers[0]}"):
            check_optimizer_fits({**own["optimizer"], **damaged}, muon.optimizer, "it")


def test_sharded_matrices_are_refused():
    """The orthogonalized matrix is of the whole one."""
    with pytest.raises(ValueError, match="--fsdp: expected no --optimizer muon"):
        started(fsdp=True)


def test_an_old_timm_is_refused(monkeypatch):
    """Its AdamW ignores the schedule of the learning rate."""
    monkeypatch.setattr(timm.optim, "Muon", lambda params, lr, adamw_lr=None: None)
    with pytest.raises(ValueError, match="--optimizer muon: timm .* expected 1.0.27 or newer"):
        started()
