"""Distances between sets of images, as pure functions of their features."""

import numpy as np
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric


def frechet_distance(features1, features2):
    """Fréchet distance of Gaussians fitted to two sets of features (N, D), tensors, in float64.

    Heusel et al. 2017; with Inception's features it is the FID. Raises ValueError for features
    that are not finite or too few for a covariance.
    """
    statistics = []
    for features in (features1, features2):
        if len(features) < 2:
            raise ValueError(f"{len(features)} images: expected at least 2, for a covariance")
        if not features.isfinite().all():
            raise ValueError("features that are not finite have no Fréchet distance")
        statistics.append(fid_features_to_statistics(features.double()))
    value = fid_statistics_to_metric(*statistics, verbose=False)
    return float(np.asarray(next(iter(value.values()))))
