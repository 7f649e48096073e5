"""A small convolutional classifier, whose accuracy and features evaluate small images."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

FEATURES = 64


class Classifier(nn.Module):
    """Images (N, C, H, W) in [-1, 1] to logits (N, classes); `features` gives (N, 64)."""

    def __init__(self, channels, side, classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(64 * (side // 2) ** 2, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images):
        return self.head(self.body(images))

    @torch.no_grad()
    def features(self, images):
        """Features (N, 64), without gradient."""
        return self.body(images)


def fit_classifier(images, labels, classes, epochs=40, batch_size=64, seed=0):
    """A Classifier trained on images (N, C, H, W) with labels (N,), in evaluation mode.

    On one thread, so that all processes of a machine fit the same classifier.
    """
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(images.shape[1], images.shape[2], classes)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            schedule.step()
    return model.eval()


@contextmanager
def one_thread():
    """A context in which torch uses one CPU thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
