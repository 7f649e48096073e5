"""The held-out loss: of images that are not trained on, with the same random draws every time.

It compares models, and one model at two times, with far less noise than a Fréchet distance. The
draws of an image (its latents, its order of tokens, timesteps, noise) depend on its place among the
held-out images alone; no label is dropped. What is drawn at random in training is spread evenly:
of the tokens of an image 1/32, 3/32, … or 31/32 are masked, as in the course of sampling, and every
token that is predicted has a timestep in each quarter of the process.

A masked model is thus measured at all mask ratios alike, whatever --mask_ratio_min: the mean over
them of cross-entropy bounds −log p(x) / L from above, which a causal model computes exactly
(Hoogeboom et al. 2022, Autoregressive Diffusion Models).
"""

import time
from contextlib import nullcontext
from pathlib import Path

import torch

from models.found import open_training_data
from util import dist, jsonl
from util.data import match_channels
from util.data.held_out import Part, open_val, spread
from util.data.loader import batch_loader
from util.data.settings import plain_reading
from util.logger import Progress
from util.precision import autocast
from util.rng import image_generators
from util.sizes import sides
from util.weights import digest

SEED = 0
LEVELS = 16  # mask ratios
MOST = 2000  # images


class HeldOut:
    """Latents of held-out images, and the loss of a model on them.

    dataset: (image or moments, label), of which at most `most` are used, spread evenly. cached:
    whether it has moments. batch_size: images at once, on each process. The latents of this
    process's images are kept in memory, on the CPU. Raises ValueError for images that cannot be
    read.
    """

    @torch.no_grad()
    def __init__(
        self,
        dataset,
        tokenizer,
        device,
        *,
        cached=False,
        most=MOST,
        batch_size=64,
        num_workers=0,
        name="held-out images",
    ):
        dataset = Part(dataset, spread(len(dataset), most))
        self.device, self.count, self.name = device, len(dataset), name
        own = batches_of(self.count, batch_size)[dist.rank() :: dist.world_size()]
        loader = batch_loader(dataset, [indices for _, indices in own], num_workers)
        self.batches, bar = [], Progress(len(own), "encoding held-out images", "batch")
        for (ratio, indices), (x, labels) in zip(own, loader, strict=True):
            x = x.to(device)
            moments = x.float() if cached else tokenizer.encode(x)
            latents = tokenizer.sample(moments, image_generators(SEED, indices))
            self.batches.append((ratio, indices, latents.cpu(), labels))
            bar.update()
        bar.close()

    @torch.no_grad()
    def losses(self, model, precision="fp32"):
        """Means over all held-out images, name -> float; see `held_out_losses` of a model.

        The same on every process and, but for rounding, for any number of processes and any batch
        size. A collective call.
        """
        sums, was_training = {}, model.training
        model.eval()
        with eager(model):
            for ratio, indices, latents, labels in self.batches:
                inputs = latents.to(self.device), labels.to(self.device)
                with autocast(self.device, precision):
                    generators = image_generators(SEED + 1, indices)
                    found = model.held_out_losses(*inputs, generators, ratio)
                for name, values in found.items():
                    sums[name] = sums.get(name, 0.0) + values.cpu().double().sum().item()
        model.train(was_training)
        everyone = dist.all_gather(sums)
        names = dict.fromkeys(name for each in everyone for name in each)
        return {n: sum(each.get(n, 0.0) for each in everyone) / self.count for n in names}

    def report(self, losses, weights, output_dir, logger, step):
        """Print losses as a line, log them, and append them to results.jsonl.

        losses: name -> number. weights: name of the weights. step: optimizer steps done.
        """
        shown = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        dist.print0(f"held-out loss ({weights}): {shown}")
        losses = {f"val_{name}": value for name, value in losses.items()}
        if dist.is_main():
            how = {"weights": weights, "val_data": self.name, "val_images": self.count}
            when = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
            jsonl.append(Path(output_dir) / "results.jsonl", {**losses, **how, **when})
        logger.scalars({f"eval_{weights}/{name}": value for name, value in losses.items()}, step)


def batches_of(count, batch_size):
    """(mask ratio, indices of images) of each batch; all images once, the ratios spread evenly."""
    levels = min(LEVELS, count)
    groups = [list(range(level, count, levels)) for level in range(levels)]
    return [
        ((level + 0.5) / levels, group[i : i + batch_size])
        for level, group in enumerate(groups)
        for i in range(0, len(group), batch_size)
    ]


def eager(model):
    """A context in which nothing of a model is compiled, for shapes that training does not have."""
    return torch.compiler.set_stance("force_eager") if model.compiled else nullcontext()


def held_out_losses(model, tokenizer, dataset, device="cpu", precision="fp32", **more):
    """The held-out losses of a model, name -> float. dataset: (image, label), not mirrored.

    more: further arguments of `HeldOut`, which compares several models without encoding again.
    """
    return HeldOut(dataset, tokenizer, torch.device(device), **more).losses(model, precision)


def open_held_out(args, given, config, tokenizer, device, data=None):
    """The HeldOut that --val_path or --val_share denote; None if neither is given.

    With --evaluate and no images to sample, that of the checkpoint's own share.

    given: names of the flags on the command line. config: the configuration, see models. data: the
    training data; opened for --val_share if None. Raises ValueError for data that do not fit.
    """
    own = not args.num_images and config["data"].get("val_share")
    if not (args.val_path or args.val_share or own):
        if args.num_images:
            return None
        raise ValueError("--num_images 0: nothing to evaluate without --val_path or --val_share")
    size = config["model"]["img_size"]
    if args.val_path:
        classes = config["data"].get("classes") or config["model"]["class_num"]
        reading = plain_reading(config["data"], {})
        training = args.data_path, args.use_cached and args.cached_path
        dataset, cached = open_val(args.val_path, size, classes, reading, training)
    else:
        data = open_training_data(args, given, config) if data is None else data
        dataset, cached = data.rest(), args.use_cached
    if cached:
        from util.data.cached import check_cache

        folder = args.val_path or args.cached_path
        check_cache(folder, digest(tokenizer.state_dict()), size)
        dataset.expect((tokenizer.moment_channels, *sides(size, tokenizer.stride)))
    else:
        match_channels(dataset, tokenizer, None, follow=True)
    found = HeldOut(
        dataset,
        tokenizer,
        device,
        cached=cached,
        most=args.val_images,
        batch_size=args.eval_bsz,
        num_workers=args.num_workers,
        name=args.val_path or f"{args.val_share:g} of the training data",
    )
    dist.print0(f"held-out loss on {found.count} of {len(dataset)} images: {found.name}")
    return found
