"""Autoguidance: a weaker model guides another. Run: python -m pytest tests/test_guide.py"""

import numpy as np
import pytest
import torch
from cli import complain, read_lines
from PIL import Image
from rule import by_rule

import sample as script
from models.ar import ar_tiny
from models.dit import dit_tiny
from models.fast import lazy
from models.heads import L2
from models.mar import mar_tiny
from models.settings import Sampling
from util.provenance import read
from util.rng import image_generators

TINY = {"img_size": 32, "class_num": 10, "buffer_size": 4}
DIFFUSED = {**TINY, "diffloss_d": 1, "num_sampling_steps": "3", "max_timestep": 950}
CODES = {**TINY, "num_codes": 20, "vae_embed_dim": 1}
NARROW = {"encoder_embed_dim": 32, "decoder_embed_dim": 32, "diffloss_w": 32}
LABELS = torch.tensor([1, 2, 3])
KINDS = ("diffloss", "flow", "energy", "l2", "confidence", "causal")


def make(kind):
    """(a model, a narrower one of the same tokens, settings) of this kind, with new weights."""
    if kind == "causal":
        own = {name: value for name, value in DIFFUSED.items() if name != "buffer_size"}
        return ar_tiny(**own), ar_tiny(**own, embed_dim=32, diffloss_w=32), {"num_iter": 4}
    if kind == "confidence":
        narrow = {name: value for name, value in NARROW.items() if name != "diffloss_w"}
        return mar_tiny(**CODES), mar_tiny(**CODES, **narrow), {"order": "confidence"}
    own = {**DIFFUSED, "head": kind}
    return mar_tiny(**own), mar_tiny(**own, **NARROW), {}


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    model, guide, settings = make(request.param)
    return by_rule(model), by_rule(guide), {"num_iter": 3, "cfg_schedule": "constant", **settings}


def sample(model, rows=(0, 1, 2), **settings):
    labels, generators = LABELS[list(rows)], image_generators(0, rows)
    return model.sample_tokens(len(rows), labels=labels, generator=generators, **settings)


def test_the_model_itself_as_guide_guides_nowhere(pair):
    """ε_w + ω(ε_s − ε_w) is ε_s: the same bits as without guidance, whatever ω."""
    model, _, settings = pair
    plain = sample(model, **settings)
    for cfg in (0.0, 3.0):
        assert torch.equal(sample(model, guide=model, cfg=cfg, **settings), plain)


def test_at_scale_one_the_guide_has_no_part(pair):
    """ω = 1 is the model alone, bit for bit; ω = 0 is nearly the guide, whose variance differs."""
    model, guide, settings = pair
    plain = sample(model, **settings)
    assert torch.equal(sample(model, guide=guide, cfg=1.0, **settings), plain)
    guided = sample(model, guide=guide, cfg=2.0, **settings)
    assert not torch.allclose(guided, plain, atol=1e-3) and guided.isfinite().all()
    weak = sample(guide, **settings)
    other = sample(model, guide=guide, cfg=0.0, **settings)
    if not hasattr(model.head, "vlb"):  # no variance
        torch.testing.assert_close(other, weak, atol=1e-4, rtol=1e-4)


def test_an_image_depends_on_itself_alone(pair):
    """Guided images do not depend on the batch, up to rounding."""
    model, guide, settings = pair
    settings = {**settings, "guide": guide, "cfg": 2.0}
    alone = sample(model, rows=(2,), **settings)
    torch.testing.assert_close(alone, sample(model, **settings)[2:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["l2", "energy"])
def test_tokens_are_led_away_from_those_of_the_guide(kind):
    """x_w + ω(x_s − x_w), where a head draws a token at once, both from the same noise."""
    torch.manual_seed(0)
    model, guide, _ = make(kind)
    z, weak, settings = torch.randn(3, 64), torch.randn(3, 32), Sampling()
    by_rule(model), by_rule(guide)

    def draw(head, *given, **other):
        return head.sampler(settings, **other)(*given, generator=torch.Generator().manual_seed(0))

    strong, other = draw(model.head, z), draw(guide.head, weak)
    guided = draw(model.head, z, 3.0, weak, guide=guide.head)
    torch.testing.assert_close(guided, other + 3 * (strong - other))


def test_noise_is_led_away_from_that_of_the_guide():
    """ε_w + ω(ε_s − ε_w) at each step of Diffusion Loss, with the variance of the model itself."""
    torch.manual_seed(0)
    model, guide, _ = make("diffloss")
    head, other = by_rule(model).head, by_rule(guide).head
    z, weak, noise = torch.randn(3, 64), torch.randn(3, 32), torch.randn(4, 3, 16)

    def network(x, t):
        (strong, v), (away, _) = (net(x, t, c).chunk(2, -1) for net, c in pairs)
        return torch.cat([away + 3 * (strong - away), v], -1)

    pairs = (head.net, z), (other.net, weak)
    expected = head.gen_diffusion.sample(network, noise[0], noise[1:], 1.0, 950)
    guided = head.sampler(Sampling(), guide=other)(z, 3.0, weak, noise=noise)
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)


def test_each_has_its_own_cache(monkeypatch):
    """With features or keys and values kept from step to step, the same as without."""
    settings = {"num_iter": 5, "cfg": 2.0, "cfg_interval": (0.3, 0.9)}
    large = DIFFUSED | {"img_size": 64}
    model, guide = by_rule(mar_tiny(**large)), by_rule(mar_tiny(**large | NARROW))
    model, guide = model.double(), guide.double()
    exact = sample(model, guide=guide, **settings)
    assert not torch.equal(sample(model, guide=guide, refresh_every=3, **settings), exact)
    monkeypatch.setattr(lazy, "RECOMPUTED", 1.0)
    lazily = sample(model, guide=guide, refresh_every=3, **settings)
    torch.testing.assert_close(lazily, exact)

    model, guide, own = make("causal")
    model, guide = by_rule(model).double(), by_rule(guide).double()
    cached = sample(model, guide=guide, **settings | own)
    for each in (model, guide):
        monkeypatch.setattr(each, "start_cache", lambda sampling: None)
    torch.testing.assert_close(cached, sample(model, guide=guide, **settings | own))


def test_a_model_of_one_mode_can_be_guided():
    """One that was never trained without the class has no other guidance."""
    model = by_rule(mar_tiny(**DIFFUSED, label_drop_prob=0.0))
    with pytest.raises(ValueError, match="no unconditional mode"):
        model.check(Sampling(num_iter=4, cfg=2.0))
    model.check(Sampling(num_iter=4, cfg=2.0), mar_tiny(**DIFFUSED))


def test_what_cannot_guide(monkeypatch):
    """A model of other tokens or classes, of another head, or of another kind: one line."""
    model, cfg = mar_tiny(**DIFFUSED).eval(), {"num_iter": 4, "cfg": 2.0}
    others = {
        "its vae_embed_dim is 4, expected the model's, 16": mar_tiny(**DIFFUSED, vae_embed_dim=4),
        "its grid is (4, 4)": mar_tiny(**DIFFUSED | {"img_size": 64}),
        "its num_codes is 20, expected the model's, None": mar_tiny(**CODES),
        "its class_num is 5": mar_tiny(**DIFFUSED | {"class_num": 5}),
        "its head_name is l2": mar_tiny(**DIFFUSED, head="l2"),
        "its one_at_a_time is True": make("causal")[0],
        "its head_name is ": dit_tiny(img_size=32, class_num=10),
    }
    for words, guide in others.items():
        for refuse in (model.check, lambda s, g: sample(model, guide=g, **cfg)):
            with pytest.raises(ValueError) as error:
                refuse(Sampling(**cfg), guide)
            assert words in str(error.value)
    with pytest.raises(ValueError, match="guide: DiT"):
        others["its head_name is "].sample_tokens(1, guide=model)
    monkeypatch.setattr(L2, "sampler", lambda self, sampling: None)
    regression = mar_tiny(**DIFFUSED, head="l2")
    with pytest.raises(ValueError, match="head 'l2' cannot be guided"):
        regression.check(Sampling(**cfg), regression)


# ---- the script ----------------------------------------------------------------------------------


@pytest.fixture
def weaker(ckpt, tmp_path):
    """The checkpoint with its EMA weights at half their size."""
    content = torch.load(ckpt, weights_only=True)
    content["model_ema"] = {name: value / 2 for name, value in content["model_ema"].items()}
    torch.save(content, tmp_path / "weaker.pth")
    return tmp_path / "weaker.pth"


def test_the_script(ckpt, weaker, tmp_path, capsys):
    """--guide changes the picture, which names it and is made again by --like; a folder knows it.
    Refused: without --cfg, in a folder of images without it, and a file that is none."""
    flags = ["--ckpt", ckpt, "--device", "cpu", "--labels", "3", "--per_class", "2", "--cfg", "3"]
    flags = [str(each) for each in (*flags, "--num_iter", "3", "--vae_scale", "9")]
    plain, guided, same = (tmp_path / f"{name}.png" for name in ("plain", "guided", "same"))
    script.main([*flags, "--out", str(plain), str(tmp_path / "folder")])
    script.main([*flags, "--guide", str(weaker), "--out", str(guided)])
    assert read(plain)["guide"] is None and read(plain)["format"] == 1
    said = read(guided)["guide"]
    assert said["ckpt"] == str(weaker) and said["sha256"] != read(plain)["weights_sha256"]
    pixels = [np.asarray(Image.open(path)) for path in (plain, guided)]
    assert not np.array_equal(*pixels)
    script.main(["--like", str(guided), "--device", "cpu", "--out", str(same)])
    assert np.array_equal(np.asarray(Image.open(same)), pixels[1])
    assert "NOTE" not in capsys.readouterr().out
    script.main(
        ["--like", str(guided), "--device", "cpu", "--guide", str(ckpt), "--out", str(same)]
    )
    assert "not the guide that" in capsys.readouterr().out

    given = *flags, "--guide", weaker
    message = complain(capsys, script.main, *given, "--cfg", 1)
    assert message.endswith("weaker.pth: expected --cfg, the scale; at 1 nothing is guided")
    message = complain(capsys, script.main, *given, "--out", tmp_path / "folder")
    assert "holds 2 images of other settings: guide_sha256" in message
    message = complain(capsys, script.main, *flags, "--guide", "none.pth")
    assert message == "error: --guide none.pth: no such file or folder"
    weaker.unlink()
    message = complain(capsys, script.main, "--like", guided)
    assert message.endswith("weaker.pth, which is not there: --guide takes its new place")


def test_a_result_with_a_guide_is_another(ckpt, weaker, tmp_path, capsys):
    """A sweep without a guide does not take points with one for its own, nor the reverse."""
    flags = ["--ckpt", ckpt, "--device", "cpu", "--reference", "digits", "--num_images", "20"]
    flags += ["--num_iter", "1", "--metrics", "pixel_distance", "--output_dir", tmp_path]
    flags = [*map(str, flags), "--sweep", "cfg=2"]
    for given in ([], ["--guide", str(weaker)]):
        script.main([*flags, *given])
        assert "there already" not in capsys.readouterr().out
    script.main(flags)
    assert "there already" in capsys.readouterr().out
    first, second = read_lines(tmp_path / "results.jsonl")
    assert "guide" not in first and second["guide"] == str(weaker) and second["guide_sha256"]
