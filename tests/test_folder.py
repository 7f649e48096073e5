"""A folder that is passed on, once it is written. Run: python -m pytest tests/test_folder.py"""

import numpy as np
import pytest
from conftest import TINY_KL16
from rule import by_rule
from test_pretrained import ARGUMENTS, CONFIG, SAMPLING, kl_checkpoint, own_file

import models
import sample
from models.mar import MAR
from models.vae import AutoencoderKL
from util import hub
from util.images import save_image


@pytest.fixture
def folder(tmp_path):
    """A model, passed on."""
    model = by_rule(models.build_model(**ARGUMENTS))
    model.save_pretrained(tmp_path / "mine", config=CONFIG)
    return tmp_path / "mine"


def test_results_are_not_written_among_files_that_are_passed_on(folder, tmp_path):
    """Neither beside the weights; beside a checkpoint of a run they are, as before."""
    places, run = [], tmp_path / "last.pth"
    kl_checkpoint(run, own_file(tmp_path / "vae.ckpt"))
    for path in (folder, folder / hub.WEIGHTS, run):
        args = sample.get_parser().parse_args(["--ckpt", str(path)])
        sample.open_checkpoint(args)
        places.append(sample.folder_of_results(args, str(path)))
    assert places == [".", ".", tmp_path]


def test_settings_of_sampling_can_be_given_when_loading(folder):
    """They replace the stored ones in the configuration, too; the others stay."""
    model = MAR.from_pretrained(folder, num_sampling_steps="7", max_timestep=900)
    sampling = models.sampling_of(model, model.config)
    found = sampling.num_sampling_steps, sampling.max_timestep, sampling.num_iter
    assert found == ("7", 900, SAMPLING["num_iter"])
    assert models.load_model(folder)[1]["sampling"] == SAMPLING


def test_a_tokenizer_that_could_not_be_loaded_again_is_refused(tmp_path):
    """Before any file is written: one whose network is not that of its name."""
    model = kl_checkpoint(tmp_path / "last.pth", "none")
    tokenizer = models.build_tokenizer("kl16", vae_path=own_file(tmp_path / "vae.ckpt"))
    tokenizer.vae = AutoencoderKL(**TINY_KL16 | {"embed_dim": 4})
    with pytest.raises(ValueError, match=r"^[^\n]*kl16 could not [^\n]*\(it does not fit"):
        model.save_pretrained(tmp_path / "out", tokenizer=tokenizer)
    assert not list((tmp_path / "out").iterdir())


def test_nothing_old_is_left_in_a_folder(folder):
    """Saved again: no tokenizer that the model does not have, no picture of other weights."""
    save_image(folder / hub.SAMPLES, np.zeros((8, 8, 3), np.uint8))
    (folder / hub.TOKENIZER).write_text("old")
    model = MAR.from_pretrained(folder)
    model.save_pretrained(folder)
    assert (folder / hub.SAMPLES).exists() and not (folder / hub.TOKENIZER).exists()
    model.mask_token.data += 1
    model.save_pretrained(folder)
    assert not (folder / hub.SAMPLES).exists()
