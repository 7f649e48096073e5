"""Loss and throughput of a training loop between two lines of its log."""

import time

import torch

from util import dist
from util.files import first_few
from util.logger import Stopwatch

SHOWN = 64  # images that a message names


class Meter:
    """Sums over the batches since the last `pop`, on the device, so that no step waits for it.

    accum_iter: batches per optimizer step. start: batches of the epoch that an earlier run did.
    `waiting` times the loader; `note` is a line with the latest metrics, for a progress bar.
    """

    def __init__(self, device, accum_iter, start=0):
        self.accum_iter = accum_iter
        self.never = torch.iinfo(torch.int64).max
        self.bad_loss = torch.tensor(self.never, device=device)  # batch · processes + rank
        self.bad_gradient = torch.tensor(self.never, device=device)  # batch
        self.loss = torch.zeros((), device=device)
        self.bad_latents = torch.zeros(0, dtype=torch.bool, device=device)  # of that batch
        self.batches, self.note, self.waiting = start, "", Stopwatch()
        self._restart()

    def add(self, loss, latents):
        """Add a batch. loss: its loss, a scalar tensor. latents: (N, ...), one per image."""
        loss = loss.detach()
        place = self.batches * dist.world_size() + dist.rank()
        found = self._first(self.bad_loss, loss, place)
        bad = ~latents.flatten(1).isfinite().all(1) & (found != self.bad_loss)
        before = self.bad_latents
        self.bad_latents = bad | before if len(bad) == len(before) else bad
        self.bad_loss = found
        self.loss += loss
        self.batches += 1
        self.recent += 1
        self.images += len(latents)

    def note_gradient(self, norm):
        """Record where the gradient norm, the same on all processes, first was not finite."""
        self.bad_gradient = self._first(self.bad_gradient, norm, self.batches - 1)

    def _first(self, place, value, here):
        return torch.minimum(place, torch.where(value.isfinite(), self.never, here))

    def check(self, epoch, name_images=None):
        """Raises FloatingPointError, on all processes, if a loss or gradient was not finite.

        name_images: function of the number of a batch that returns the names of its images.
        """
        places = torch.stack([self.bad_loss, self.bad_gradient])
        mine = self.bad_loss
        loss, gradient = dist.all_reduce(places, "min").tolist()
        if min(loss, gradient) == self.never:
            return
        batch, rank = divmod(loss, dist.world_size())
        what, where = f"loss is not finite at epoch {epoch}", f", rank {rank}"
        images = self._images(batch, name_images) if name_images and mine.item() == loss else ""
        images = "".join(dist.all_gather(images))
        if gradient < batch:  # a non-finite loss also makes the gradient of its step non-finite
            what, where, images, batch = what.replace("loss", "gradient"), "", "", gradient
        raise FloatingPointError(
            f"the {what}, step {batch // self.accum_iter}{where}{images}; the last checkpoint is "
            "from before. Try --precision bf16 or fp32, or a lower --lr"
        )

    def _images(self, batch, name_images):
        """The images of a batch of this process with the first bad loss, in words."""
        names, bad = name_images(batch), self.bad_latents.tolist()
        found = [name for name, is_bad in zip(names, bad, strict=False) if is_bad]
        if found:
            return f": the latents are not finite of {first_few(found, SHOWN)}"
        return f", images {first_few(names, SHOWN)}" if names else ""

    def pop(self, epoch, norm, lr):
        """Metrics since the last call, over all processes: name -> float.

        norm: latest gradient norm, a scalar tensor. lr: learning rate.
        """
        seconds = time.perf_counter() - self.start
        sums = torch.stack([self.loss / self.recent, self.loss.new_tensor(self.waiting.seconds)])
        loss, waited = (dist.all_reduce(sums) / dist.world_size()).tolist()
        speed = self.images * dist.world_size() / seconds
        self.note = f"epoch {epoch} loss {loss:.4f} lr {lr:.1e} {speed:.0f} img/s"
        self._restart()
        return {
            "loss": loss,
            "grad_norm": norm.item(),
            "lr": lr,
            "images_per_s": speed,
            "data_wait": waited / seconds,
        }

    def _restart(self):
        self.loss.zero_()
        self.recent = self.images = 0  # batches, and their images, since the last `pop`
        self.start, self.waiting.seconds = time.perf_counter(), 0.0
