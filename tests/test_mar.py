"""MAR against the published numbers, and what must hold of any such model.

Run: python -m pytest tests/test_mar.py
"""

import json

import numpy as np
import pytest
import torch
from rule import GOLDEN, by_rule, rule_input

import models.diffloss
from models.autoregressive import take
from models.fast.denoiser import Denoiser, guided
from models.mar import mar_base, mar_huge, mar_large, mar_tiny
from models.order import cosine, token_counts
from util.rng import image_generators

TAGS = {"p1": {"img_size": 64, "patch_size": 1}, "p2": {"img_size": 128, "patch_size": 2}}
LABELS = torch.tensor([1, 7, 4])


def tiny(**kwargs):
    settings = {
        "img_size": 64,
        "class_num": 10,
        "buffer_size": 8,
        "diffloss_d": 2,
        "diffloss_w": 64,
        "num_sampling_steps": "10",
    }
    return mar_tiny(**{**settings, **kwargs})


@pytest.fixture(scope="module", params=TAGS)
def golden(request):
    """A model by the rule, its input latents and the published numbers of one tag."""
    tag, model = request.param, by_rule(tiny(**TAGS[request.param]))
    side = 4 * TAGS[tag]["patch_size"]
    latents = rule_input(f"mar/{tag}/latents", (3, 16, side, side))
    file = np.load(GOLDEN / "mar.npz")
    values = {k[3:]: torch.from_numpy(file[k]) for k in file.files if k.startswith(tag)}
    return model, latents, values


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mar_base-d6-w1024", "mar_large-d8-w1280", "mar_huge-d12-w1536"])
def test_published_names_and_shapes(name):
    """Parameter names, their order and their shapes are those of the published checkpoints."""
    check_shapes(name)


def test_ablation_default_names_and_shapes():
    """The same for the paper's default head, 3 blocks of width 1024."""
    check_shapes("mar_large-d3-w1024")


def check_shapes(name):
    expected = json.loads((GOLDEN / "checkpoint_shapes.json").read_text())[name]
    size, depth, width = name.split("-")
    build = {"mar_base": mar_base, "mar_large": mar_large, "mar_huge": mar_huge}[size]
    with torch.device("meta"):
        model = build(diffloss_d=int(depth[1:]), diffloss_w=int(width[1:]))
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert shapes == expected["shapes"]
    assert list(shapes) == list(expected["shapes"])
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]


def test_tokens(golden):
    """patchify orders rows, columns and channels as published, and unpatchify undoes it."""
    model, latents, values = golden
    tokens = model.patchify(latents)
    close(tokens, values["tokens"])
    assert torch.equal(model.unpatchify(tokens), latents)
    close(model.unpatchify(tokens), values["roundtrip"])


@pytest.mark.parametrize("masked", [16, 15, 12])
def test_encoder_and_z(golden, masked):
    """Encoder output and z with the first tokens of each order unknown."""
    model, latents, values = golden
    tokens, orders = model.patchify(latents), values["orders"]
    orders = torch.cat([orders[:, :masked], orders[:, masked:].sort(1).values], dim=1)
    tokens, to_predict = take(tokens, orders), slice(0, masked)
    with torch.no_grad():
        classes = model.embed_labels(LABELS, 3)
        encoded = model.encode(tokens[:, masked:], orders[:, masked:], classes)
        close(encoded, values[f"masked{masked}/encoder"])
        z = model.decode(encoded, orders, to_predict)
        close(z, take(values[f"masked{masked}/z"], orders[:, to_predict]))
        if masked == 12:
            both = torch.cat([classes, model.embed_labels(None, 3)])
            z, z_uncond = model.predict(tokens, orders, to_predict, both).chunk(2)
            close(z, take(values["masked12/z"], orders[:, to_predict]))
            close(z_uncond, take(values["masked12/z_uncond"], orders[:, to_predict]))


@pytest.mark.parametrize("num_iter", [1, 4, 16])
@pytest.mark.parametrize(("cfg", "schedule"), [(1.0, "linear"), (3.0, "linear"), (3.0, "constant")])
def test_sampled_latents(golden, monkeypatch, num_iter, cfg, schedule):
    """Whole sampling loops from x_T = 0 at temperature 0, with and without guidance."""
    model, _, values = golden
    monkeypatch.setattr(models.diffloss, "randn", lambda shape, *_: torch.zeros(shape))
    latents = model.sample_tokens(
        bsz=3,
        num_iter=num_iter,
        cfg=cfg,
        cfg_schedule=schedule,
        labels=LABELS,
        temperature=0.0,
        orders=values["orders"],
    )
    expected = values[f"sample/cfg{cfg}-{schedule}-iter{num_iter}"]
    assert (latents - expected).abs().max() / expected.abs().max() < 1e-4


def test_sampled_without_labels(golden, monkeypatch):
    """The same without a class."""
    model, _, values = golden
    monkeypatch.setattr(models.diffloss, "randn", lambda shape, *_: torch.zeros(shape))
    latents = model.sample_tokens(bsz=3, num_iter=4, temperature=0.0, orders=values["orders"])
    expected = values["sample/unconditional-iter4"]
    assert (latents - expected).abs().max() / expected.abs().max() < 1e-4


def test_tokens_per_step():
    """The cosine schedule for every length and number of steps on record."""
    file = np.load(GOLDEN / "mar.npz")
    names = [k for k in file.files if k.startswith("schedule/")]
    assert names
    for name in names:
        length, num_iter = (int(part.lstrip("Liter")) for part in name.split("/")[1].split("-"))
        assert token_counts(cosine, length, num_iter) == file[name].tolist(), name


# ---- what must hold of any such model -------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """By the rule, but started below the singularity: samples stay of the data's size."""
    return by_rule(tiny(max_timestep=950))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_unknown_tokens_do_not_leak(model):
    """Changing tokens that are not known leaves z alone; changing a known one does not."""
    tokens = rule_input("tokens", (2, 16, 16))  # in the order of generation
    orders, to_predict = model.sample_orders(2, generator()), slice(4, 10)
    changed_unknown, changed_known = tokens.clone(), tokens.clone()
    changed_unknown[:, :10] = 99.0
    changed_known[:, 10] = 99.0
    with torch.no_grad():
        classes = model.embed_labels(torch.tensor([3, 5]), 2)
        z = model.predict(tokens, orders, to_predict, classes)
        assert torch.equal(z, model.predict(changed_unknown, orders, to_predict, classes))
        assert not torch.allclose(z, model.predict(changed_known, orders, to_predict, classes))


def test_every_parameter_gets_a_gradient():
    """One training step, with labels kept and dropped, reaches all of them."""
    torch.manual_seed(0)
    model = tiny(label_drop_prob=0.5).train()
    # layers that start at zero pass nothing on: move them off it
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model(torch.randn(8, 16, 4, 4), torch.arange(8), generator()).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # the class embeddings of classes that are not in the batch get none: rows, not the table
    assert not missing


def test_training_loss_follows_from_the_generator():
    """The same generator gives the same loss; another one does not. No global state is used."""
    model = tiny(attn_dropout=0.0, proj_dropout=0.0).train()
    latents, labels = rule_input("latents", (4, 16, 4, 4)), torch.arange(4)
    first = model(latents, labels, generator(1))
    torch.rand(100)
    assert torch.equal(first, model(latents, labels, generator(1)))
    assert not torch.equal(first, model(latents, labels, generator(2)))


def test_untrained_loss_is_that_of_predicting_zero():
    """At the start ε_θ = 0: the noise error is 1, the variational term adds little at most t."""
    torch.manual_seed(0)
    model = tiny(vlb=False).train()
    losses = [model(torch.randn(8, 16, 4, 4), torch.arange(8)).item() for _ in range(20)]
    # 20 × 8 × ~14 tokens × 16 channels of a χ²: its mean is 1 to 1% at four standard errors
    assert abs(np.mean(losses) - 1) < 0.04


def test_diffusion_batch_mul_draws_as_many_timesteps():
    """Four timesteps per token are four draws of the same loss: their mean varies half as much."""
    torch.manual_seed(0)
    latents, labels = torch.randn(4, 16, 4, 4), torch.arange(4)
    spread = {}
    for mul in (1, 4):
        model = by_rule(tiny(diffusion_batch_mul=mul, vlb=False))
        model.mask_ratio_min = 0.999  # the same number of tokens each time
        losses = [model(latents, labels, generator(s)).item() for s in range(60)]
        spread[mul] = np.std(losses)
        assert np.mean(losses) == pytest.approx(2.3, rel=0.5)
    assert 0.3 < spread[4] / spread[1] < 0.75


def test_mask_ratios():
    """Ratios lie in [0.7, 1] and have the mean and standard deviation of the truncated normal."""
    model, draw = tiny(), generator()
    ratios = np.array([model.sample_mask_ratio(draw) for _ in range(4000)])
    assert ratios.min() >= 0.7 and ratios.max() <= 1
    # scipy.stats.truncnorm(-1.2, 0, 1, 0.25): mean 0.8681, std 0.0813
    assert abs(ratios.mean() - 0.8681) < 0.006
    assert abs(ratios.std() - 0.0813) < 0.005


def test_orders_are_permutations_of_their_own(model):
    """Each image has its own order, and each order is a permutation."""
    orders = model.sample_orders(64, generator())
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand(64, -1))
    assert len({tuple(o) for o in orders.tolist()}) > 60


def sample(model, n=3, **kwargs):
    settings = {"num_iter": 4, "labels": torch.arange(n), "generator": generator()}
    return model.sample_tokens(n, **{**settings, **kwargs})


def test_known_tokens_stay(model):
    """A token that was generated, or given to keep, is the same at the end."""
    latents = rule_input("keep", (3, 16, 4, 4))
    mask = torch.ones(3, 4, 4)
    mask[0, :2], mask[1, 2:], mask[2, :, :2] = 0, 0, 0
    before = latents * (1 - mask).unsqueeze(1)
    steps = model.sample_steps(3, 4, labels=LABELS, latents=latents, mask=mask, cfg=2.0)
    remaining = [8]
    for after, still in steps:
        known = ~mask.bool().unsqueeze(1).expand_as(after)
        assert torch.equal(after[known], before[known])
        mask, before = still.view(3, 4, 4), after
        remaining.append(int(still[0].sum()))
    assert remaining == [8, 7, 5, 3, 0]
    assert after.ne(0).all()


def test_temperature_zero_is_deterministic_but_for_the_start(model):
    """At τ = 0 the same start gives the same sample, whatever noise is drawn later."""
    z, start = rule_input("z", (4, 64)), torch.randn(1, 4, 16)
    draws = [torch.cat([start, torch.randn(10, 4, 16)]) for _ in range(2)]
    cold = [model.diffloss.sample(z, temperature=0.0, noise=d) for d in draws]
    warm = [model.diffloss.sample(z, temperature=1.0, noise=d) for d in draws]
    assert torch.equal(*cold)
    assert not torch.allclose(*warm)


def test_guidance_one_is_no_guidance(model):
    """ω = 1 needs no unconditional z; with one, guidance at ω = 1 gives the same noise."""
    cond, uncond = rule_input("cond", (5, 32)), rule_input("uncond", (5, 32))
    noise, v = guided(torch.cat([cond, uncond]), 1.0)
    torch.testing.assert_close(torch.cat([noise, v], dim=-1), cond)
    near = sample(model, cfg=1.0 + 1e-6)
    torch.testing.assert_close(sample(model, cfg=1.0), near, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(near, sample(model, cfg=3.0), atol=1e-3, rtol=1e-3)


def test_stacked_guidance_is_the_published_form(model):
    """A head given both halves in one z returns both, each equal to the two-argument form."""
    z, zu = rule_input("z", (5, 64)), rule_input("zu", (5, 64))
    noise = torch.randn(11, 5, 16)
    stacked = model.diffloss.sample(torch.cat([z, zu]), 1.0, 2.0, noise=noise)
    single = model.diffloss.sample(z, 1.0, 2.0, zu, noise=noise)
    assert torch.equal(stacked, torch.cat([single, single]))


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_one_batch_equals_many(model, cfg):
    """With one generator per image, image i is the same alone, in pairs and in one batch."""
    labels = torch.tensor([1, 4, 7, 2])

    def images(indices):
        return model.sample_tokens(
            len(indices),
            num_iter=5,
            cfg=cfg,
            labels=labels[indices],
            generator=image_generators(3, indices),
        )

    together = images([0, 1, 2, 3])
    for parts in ([[0], [1], [2], [3]], [[0, 1], [2, 3]], [[3, 2, 1, 0]]):
        for part in parts:
            torch.testing.assert_close(images(part), together[part], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1])


def test_bfloat16_weights_work(model):
    """A model cast to bfloat16 trains and samples; diffusion stays in float32."""
    half = tiny(max_timestep=950).to(torch.bfloat16)
    loss = half(torch.randn(2, 16, 4, 4).bfloat16(), torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite()
    assert sample(half.eval()).isfinite().all()


def test_the_first_reverse_step_is_in_float32(model, monkeypatch):
    """Under autocast too: it magnifies the network's error by hundreds, the others hardly do."""
    used = []
    first, rest = Denoiser._first, Denoiser._network

    def noted(name, function):
        def call(self, *args, **kwargs):
            x = function(self, *args, **kwargs)
            used.append((name, x.dtype))
            return x

        return call

    head = model.diffloss
    monkeypatch.setattr(Denoiser, "_first", noted("first", first))
    monkeypatch.setattr(Denoiser, "_network", noted("rest", rest))
    head.net.final_layer.linear.register_forward_hook(
        lambda module, x, y: used.append(("linear", y.dtype))
    )
    with torch.autocast("cpu", torch.bfloat16):
        head.sample(rule_input("z", (4, 64)))
    assert used[:2] == [("linear", torch.float32), ("first", torch.float32)]
    assert len(used) > 5 and set(used[2:]) == {("rest", torch.bfloat16)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_iter": 17}, "num_iter 17: expected 1 to 16"),
        ({"num_iter": 0}, "num_iter 0: expected 1 to 16"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule 'cosine': expected one of linear, constant"),
        ({"labels": torch.arange(2)}, r"labels of shape \(2,\): expected \(3,\)"),
        ({"orders": torch.zeros(3, 4)}, r"orders of shape \(3, 4\): expected \(3, 16\)"),
        ({"labels": [1, 2, 3]}, r"labels of type list: expected \(3,\) integers .*, a tensor"),
        (
            {"labels": torch.rand(3)},
            r"type torch.float32: expected \(3,\) integers from 0 to 9",
        ),
        ({"labels": torch.tensor([0, 1, 10])}, "labels from 0 to 10: expected .* from 0 to 9"),
        ({"n": 0}, "bsz 0: expected 1 or more"),
        (
            {"latents": torch.zeros(2, 16, 4, 4), "mask": torch.ones(3, 16)},
            r"latents of shape \(2, 16, 4, 4\) .*: expected 3 latents, and a mask of \(3, 16\)",
        ),
        (
            {"latents": torch.zeros(3, 16, 4, 4), "mask": torch.ones(3, 64)},
            r"mask of shape \(3, 64\): expected 3 latents, and a mask of \(3, 16\)",
        ),
        ({"temperature": -1.0}, r"temperature -1\.0: expected 0 or more"),
        ({"latents": torch.zeros(3, 16, 4, 4)}, "latents and mask: expected both"),
        ({"generator": [generator()]}, "1 generators for a batch of 3"),
    ],
)
def test_wrong_sampling_arguments(model, arguments, message):
    """What does not fit is named, with what was expected."""
    with pytest.raises(ValueError, match=message):
        sample(model, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 65}, "img_size 65: expected a multiple"),
        ({"mask_ratio_min": 1.5}, r"mask_ratio_min 1\.5"),
        ({"num_sampling_steps": "2000"}, "2000"),
        ({"max_timestep": -1}, "max_timestep -1"),
    ],
)
def test_wrong_construction(arguments, message):
    """A model that cannot be is refused when it is built."""
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_wrong_latents(model):
    """Latents of another size are refused, with both sizes."""
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 8\): expected \(N, 16, 4, 4\)"):
        model.patchify(torch.zeros(2, 4, 8, 8))


@pytest.mark.slow
def test_blocks_are_compiled_few_times(monkeypatch):
    """At 256 tokens as many times as the encoder's input has lengths, and not for every ratio."""
    torch._dynamo.reset()
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: compile_module(self, backend="eager", **kw)
    )
    model = tiny(img_size=256, mask_ratio_min=0.5).train()
    for module, dynamic in model.to_compile():
        module.compile(dynamic=dynamic)
    graphs = torch._dynamo.utils.counters["stats"]
    before, lengths = graphs["unique_graphs"], set()
    model.encoder_norm.register_forward_hook(lambda m, x, y: lengths.add(y.shape[1]))
    for seed in range(30):
        model(torch.randn(1, 16, 16, 16), torch.tensor([1]), generator(seed))
    assert len(lengths) > 8
    # a length of the encoder each, one of the decoder, and the head
    assert graphs["unique_graphs"] - before <= len(lengths) + 4


def test_compiled_training_is_the_same(monkeypatch):
    """Known tokens are filled up to few lengths, which changes neither loss nor gradients."""
    compile_module, lengths = torch.nn.Module.compile, set()
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: compile_module(self, backend="eager", **kw)
    )
    settings = {"attn_dropout": 0.0, "proj_dropout": 0.0, "mask_ratio_min": 0.2}
    plain, compiled = (by_rule(tiny(**settings)).train() for _ in range(2))
    names = list(compiled.state_dict())
    for module, dynamic in compiled.to_compile():
        module.compile(dynamic=dynamic)
    assert list(compiled.state_dict()) == names
    compiled.encoder_norm.register_forward_hook(lambda m, x, y: lengths.add(y.shape[1]))
    latents, labels = rule_input("latents", (2, 16, 4, 4)), torch.arange(2)
    for seed in range(8):
        for model in (plain, compiled):
            model.zero_grad()
            model(latents, labels, generator(seed)).backward()
        for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=1e-3)
    assert lengths <= {8, 16, 24} and len(lengths) > 1
    torch.testing.assert_close(sample(compiled.eval()), sample(plain.eval()))


def test_the_mask_ratio_has_a_source_of_its_own():
    """What is drawn for the whole step can be shared by processes that draw all else apart."""
    model, counts = tiny().train(), []
    predict = model.predict

    def noted(tokens, orders, to_predict, classes):
        counts.append((to_predict.stop, orders.clone()))
        return predict(tokens, orders, to_predict, classes)

    model.predict = noted
    latents, labels = rule_input("latents", (2, 16, 4, 4)), torch.arange(2)
    shared = [generator(5) for _ in range(2)]
    for _ in range(6):
        for rank, step_generator in enumerate(shared):
            model(latents, labels, generator(rank), step_generator)
    assert [n for n, _ in counts[::2]] == [n for n, _ in counts[1::2]]
    assert len({n for n, _ in counts}) > 1
    assert not torch.equal(counts[0][1], counts[1][1])
