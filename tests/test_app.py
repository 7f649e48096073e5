"""The page of demo/app.py: what it does, and one visit with a browser. Run: pytest this file"""

import io
import json
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import kinds
import numpy as np
import pytest
import torch
from cli import ROOT, complain
from PIL import Image

import engine_mar as engine
import models
from demo import app
from demo.studio import Pace, Studio, columns_of, frame, painted, read_seed, summary, zoom
from models.settings import Sampling
from util import provenance

CHECKPOINT = ROOT / "tests" / "fixtures" / "checkpoint.pth"


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """The small model of the digits that an earlier version trained, at work for the page."""
    return Studio(CHECKPOINT, tmp_path_factory.mktemp("page"))


def tiny(name, **more):
    """A model of 4 tokens with random weights, in evaluation mode."""
    torch.manual_seed(0)
    size = {"img_size": 4, "vae_stride": 1, "patch_size": 2, "vae_embed_dim": 1}
    model = models.build_model(name, **{**size, "class_num": 3, "num_sampling_steps": "3", **more})
    for parameter in model.parameters():  # some begin as zeros
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


# ---- settings ------------------------------------------------------------------------------------


def test_an_empty_field_is_the_checkpoints_own(studio):
    """Whatever is on the page at first is the checkpoint's; a number may come as text or float."""
    assert studio.settings({}) == studio.settings({"cfg": None, "order": ""}) == studio.sampling
    chosen = studio.settings({"cfg": 2, "num_iter": 8.0, "cfg_interval": "0 0.5", "order": "raster"})
    assert chosen == studio.sampling.but(cfg=2.0, num_iter=8, cfg_interval=(0.0, 0.5), order="raster")
