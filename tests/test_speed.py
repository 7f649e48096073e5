"""The benchmarks measure only what computes the same. Run: python -m pytest tests/test_speed.py"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import main_mar
from benchmarks import approximate, cpu, differences, kv_cache, machine, plain, profiling, speed
from benchmarks.cases import CASES
from benchmarks.sides import Sides
from models import presets
from models.fast import denoiser, products
from models.fast.denoiser import Denoiser
from models.mar import mar_tiny
from models.settings import Sampling
from util import processor

ARGUMENTS = "--model tiny --rounds 1 --num_sampling_steps 4 --num_iter 8 --timed_steps 2"


def test_differences_come_first(capsys, monkeypatch):
    """Then the speed, of each section that was asked for."""
    monkeypatch.setattr(profiling, "STEPS", 1)
    speed.main(
        [*ARGUMENTS.split(), "--sections", "head", "sampling", "training", "profile", "optimizer"]
    )
    out = capsys.readouterr().out
    assert out.index("Largest relative differences") < out.index("plain / ours")
    for section in ("The head", "Sampling", "Training", "Where a training step", "Optimizer"):
        assert section in out
    assert "autoregressive step 6, batch 2" in out


def test_the_demos_model():
    """--model digits is what --preset digits trains and how it samples."""
    args, given = presets.apply(main_mar.get_parser(), ["--preset", "digits"])
    config, sampling, _ = main_mar.configure(args, given, {}, None, None)
    case = CASES["digits"]
    assert case.model.items() <= config["model"].items()
    assert case.sampling.items() <= sampling.asdict().items()
    assert case.train_batch == args.batch_size


@pytest.mark.parametrize("name", ["digits", "small"])
def test_plain_trains_the_head_on_all_tokens(name, monkeypatch):
    """And masks afterwards; ours computes the masked ones alone."""
    case = cpu.case_of(name, quick=True)
    sides = Sides(case.model, Sampling.of(**case.sampling), torch.device("cpu"), "fp32")
    rows, model = {}, sides.model
    for side, net in (("ours", model.diffloss.net), ("plain", sides.plain.diffloss.net)):
        net.input_proj.register_forward_hook(
            lambda layer, inputs, _, side=side: rows.update({side: inputs[0].shape[:-1].numel()})
        )
    for run in sides.training(2):
        run()
    assert rows["plain"] == 2 * model.seq_len * model.diffloss.diffusion_batch_mul
    assert 0 < rows["ours"] < rows["plain"]


def test_a_small_model_with_its_products(capsys, monkeypatch):
    """The processor by name, the model's own settings, and the rate of every kind of product."""
    monkeypatch.setattr(products, "mode", products.mode)  # restores it
    flags = "--model digits --rounds 1 --num_sampling_steps 4 --timed_steps 1 --products torch"
    speed.main([*flags.split(), "--num_iter", "4", "--sections", "products"])
    out = capsys.readouterr().out
    assert processor.name() in out and torch.__version__ in out
    assert "MAR digits" in out and "from 950, guidance 1.5" in out and "products: torch" in out
    assert "| 2,304 × 64 → 192 | **" in out


def test_the_table_of_a_cpu(capsys, monkeypatch, tmp_path):
    """One section: differences, then plain and each way of ours, and the file is what is shown."""
    monkeypatch.setattr(processor, "instructions", lambda: ["AVX512-BF16"])
    out = tmp_path / "cpu.md"
    cpu.main(["--quick", "--rounds", "1", "--models", "digits", "--out", str(out)])
    said, text = capsys.readouterr(), out.read_text()
    assert said.out.strip() == text.strip() and "digits, 2 samples" in said.err
    assert text.startswith("## On a CPU\n\n```\npython -m benchmarks.cpu --quick")
    assert f"--out FILE\n```\n\n{processor.name()}" in text
    headings = ["Largest relative differences", "Plain and ours", "Ours in bf16", "Products of"]
    places = [text.index(f"\n### {heading}") for heading in headings]
    assert places == sorted(places)
    rows = [line for line in text.splitlines() if line.startswith("| digits, 2 training steps")]
    assert [row.count("|") for row in rows] == [8, 5]


def test_a_cpus_table_without_what_differs(capsys, monkeypatch):
    """A model whose plain side computes other numbers is not timed; the status is 1."""
    forward = plain.PlainMLP.forward
    monkeypatch.setattr(plain.PlainMLP, "forward", lambda *args: forward(*args) * 1.001)
    with pytest.raises(SystemExit, match="1"):
        cpu.main(["--quick", "--models", "digits"])
    out = capsys.readouterr().out
    assert "is not the same computation" in out and "| digits, " not in out


def test_another_system(monkeypatch):
    """Without Linux' file of the processor there is still a line that says what is known."""
    monkeypatch.setattr(processor, "_facts", dict)
    said = machine.describe(torch.device("cpu"))
    assert "threads: " in said and torch.__version__ in said
    facts = {"avx512_f": True, "amx_bf16": True, "avx2": False, "l1d_cache_size": 1}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: facts, raising=False)
    assert processor.instructions() == ["AVX-512", "AMX-BF16"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"neon": True, "bf16": True})
    assert {*processor.instructions()} == {"NEON", "BF16"}


def test_a_processor_without_a_name(monkeypatch):
    """On ARM, Linux tells processors apart by numbers alone."""
    facts = {"CPU implementer": "0x41", "CPU part": "0xd4f", "Features": "asimd bf16"}
    monkeypatch.setattr(processor, "_facts", lambda: facts)
    assert processor.name().endswith(" (implementer 0x41, part 0xd4f)")
    assert {*processor.instructions()} == {"NEON", "BF16"}


def test_no_speed_of_something_else(capsys, monkeypatch):
    """A baseline that computes other numbers ends it, with status 1."""
    forward = plain.PlainMLP.forward
    monkeypatch.setattr(plain.PlainMLP, "forward", lambda *args: forward(*args) * 1.001)
    with pytest.raises(SystemExit, match="1"):
        speed.main(ARGUMENTS.split())
    out = capsys.readouterr().out
    assert "not the same computation" in out and "plain / ours" not in out


@pytest.mark.parametrize("wrong", ["temperature", "variance", "last noise", "guidance"])
def test_small_errors_are_seen(capsys, monkeypatch, wrong):
    """Of ours: hardly a hundredth less noise, no learned variance, no noise in the last steps, a
    thousandth less guidance."""
    run, network, loop = Denoiser.run, Denoiser._network, denoiser.reverse
    guided = denoiser.guided

    def cold(self, *args, temperature=1.0):
        return run(self, *args, temperature=0.99 * temperature)

    def fixed(self, *args, **kwargs):
        noise, v = network(self, *args, **kwargs).chunk(2, dim=-1)
        return torch.cat([noise, 0 * v], dim=-1)

    def quiet(steps, predict, x, noise, temperature):
        return loop(steps, predict, x, torch.cat([0 * noise[:3], noise[3:]]), temperature)

    place, name, function = {
        "temperature": (Denoiser, "run", cold),
        "variance": (Denoiser, "_network", fixed),
        "last noise": (denoiser, "reverse", quiet),
        "guidance": (denoiser, "guided", lambda both, cfg, *c: guided(both, 0.999 * cfg, *c)),
    }[wrong]
    monkeypatch.setattr(place, name, function)
    with pytest.raises(SystemExit, match="1"):
        speed.main(ARGUMENTS.replace("steps 4", "steps 20").split())
    assert "plain / ours" not in capsys.readouterr().out


def test_a_lower_precision_is_compared_with_float32(capsys, monkeypatch):
    """Ours may be as far off as plain is, not further."""
    flags = [*ARGUMENTS.split(), "--precision", "bf16", "--sections", "optimizer"]
    speed.main(flags)
    assert "The head in bf16, from plain in float32" in capsys.readouterr().out
    run = Denoiser.run
    monkeypatch.setattr(differences, "in_float32", lambda *args: {})  # it would see this at once
    monkeypatch.setattr(
        Denoiser, "run", lambda *args, temperature=1.0: run(*args, temperature=0.8 * temperature)
    )
    with pytest.raises(SystemExit, match="1"):
        speed.main(flags)
    assert "further off" in capsys.readouterr().out


def test_the_cache_changes_no_sample(capsys):
    """Samples with and without the cache of keys and values agree, and both are timed."""
    kv_cache.main(["--sides", "2", "4", "--width", "64", "--depth", "2", "--rounds", "1"])
    for line, tokens in zip(capsys.readouterr().out.splitlines()[2:], (4, 16), strict=True):
        count, difference, *times = map(float, line.split())
        assert count == tokens and difference < 1e-4 and min(times) > 0


@pytest.mark.parametrize("script", ["speed", "approximate", "cpu", "kv_cache"])
def test_flags_need_no_torch(script):
    """--help answers at once."""
    code = f"import benchmarks.{script}, sys; print('torch' in sys.modules)"
    run = [sys.executable, "-c", code]
    root = Path(__file__).parent.parent
    assert subprocess.run(run, cwd=root, capture_output=True, text=True).stdout == "False\n"


def test_modes_are_compared_with_exact_samples(capsys):
    """Each mode has a time and a distance; those a model does not know are left out, by name."""
    model = mar_tiny(img_size=64, class_num=10, buffer_size=4, num_sampling_steps="4").eval()
    exact = Sampling(num_iter=4, cfg=2.0)

    def sample(seed, sampling):
        generator = torch.Generator().manual_seed(seed)
        return model.sample_tokens(2, generator=generator, **sampling.asdict()).numpy()

    modes = approximate.pick_modes(["solver", "refresh", "a quarter"])
    rows = approximate.measure(model, sample, exact, rounds=2, modes=modes)
    assert [name for name, *_ in rows] == list(modes)
    assert rows[0][2] == 1.0 and rows[0][3].startswith("0 (another seed:")
    distances = {name: float(far) for name, _, _, far in rows[1:]}
    assert all(np.isfinite(list(distances.values())))
    assert distances["--solver ddim, 10"] > 0

    class NoLazy(type(model)):
        def start_cache(self, sampling):
            if sampling.refresh_every != 1:
                raise ValueError("none here")

    model.__class__ = NoLazy
    measured = approximate.measure(model, sample, exact, rounds=1, modes=modes)
    names = [name for name, *_ in measured]
    assert "--refresh_every 2" not in names and "exact" in names
    assert "--refresh_every 2: left out, none here" in capsys.readouterr().out


def test_modes_are_picked_by_part_of_their_name():
    """With exact, in the order of the table."""
    assert list(approximate.pick_modes(["ddim", "cosine"])) == [
        "exact",
        "--solver ddim, 25",
        "--solver ddim, 10",
        "--anneal cosine",
    ]
    assert approximate.pick_modes([""]) == approximate.MODES
    with pytest.raises(ValueError, match="modes 'fast': expected part of a mode's name"):
        approximate.pick_modes(["ddim", "fast"])


def test_where_a_step_goes():
    """Kernels count as the part that they do, and time in which two overlap counts once."""
    kernels = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "void pytorch_flash::flash_bwd_dq_kernel<cutlass::bfloat16_t>": "attention",
        "void at::native::(anonymous namespace)::fused_dropout_kernel_vec<float>": "dropout",
        "void at::native::elementwise_kernel<128, bfloat16_copy_kernel_cuda>": "copies",
        "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>": "elementwise",
        "multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>": "optimizer",
        "void at::native::vectorized_layer_norm_kernel<float>": "norms",
        "triton_per_fused_native_layer_norm_0": "fused",
    }
    for name, part in kernels.items():
        assert profiling.part_of(name).startswith(part), name
    spans = [("a", 0.0, 4.0), ("b", 2.0, 6.0), ("c", 8.0, 9.0)]
    assert profiling.busy_ms(spans) == 7.0
    assert profiling.outermost([*spans, ("in c", 8.2, 8.5)])[-1][0] == "c"
    rows = profiling.shares(spans, str.upper)
    assert [row[0] for row in rows] == ["A", "B", "C"] and rows[0][2] == "44%"
