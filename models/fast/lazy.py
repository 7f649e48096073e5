"""Sampling that does not recompute what hardly changes between steps (in LazyMAR's spirit).

Yan et al. 2025 found that the features of most tokens change little from one autoregressive step to
the next, and so does the difference that guidance makes. Every few steps everything is computed and
stored. In between, only the conditional z is computed, and its difference to the unconditional one
is that of the last full step; after the decoder's first blocks, only the tokens whose features
changed most since are computed, attending to stored features of the others. An approximation.
"""

import torch
from torch.nn import functional as F

FIRST = 0.25  # fraction of the decoder's blocks that compute all tokens, to find which changed
RECOMPUTED = 0.25  # fraction of the tokens computed after them, besides those to predict


class Lazy:
    """Features stored while a MAR is sampled. refresh_every: number of steps per full step.

    Also the key/value cache of the blocks, whose recomputed rows `append` replaces.
    """

    def __init__(self, refresh_every):
        self.refresh_every, self.since = refresh_every, None
        self.features = None  # (N, B + L, D), after the first blocks
        self.held = {}  # block -> keys and values, each (N, heads, B + L, D / heads)
        self.difference = None  # z without the class minus z with it, (N, unknown then, D)
        self.chosen = None  # rows (N, S) that this step recomputes; None: all

    def keep(self, count):
        """Forget the unconditional half: only its difference is stored."""
        self.difference = None

    def predict(self, model, tokens, orders, to_predict, classes):
        """z (S·N, n, D), as `MAR.predict`."""
        bsz, known = len(tokens), slice(to_predict.stop, None)
        guided = len(classes) == 2 * bsz
        full = self._is_full(guided)
        if not full:
            classes = classes[:bsz]
        x = model.encode(tokens[:, known], orders[:, known], classes)
        x = model.decoder_input(x, orders, to_predict.stop)
        first = max(1, round(FIRST * len(model.decoder_blocks)))
        x = model.decoder_blocks(x, last=first, positions=orders)
        if full:
            unknown = slice(0, to_predict.stop)
            z = self._all(model, x, first, orders, unknown)
            if guided:
                self.difference = z[bsz:] - z[:bsz]
            return z[:, to_predict]
        z = self._changed(model, x, first, orders, to_predict)
        return torch.cat([z, z + self.difference[:, to_predict]]) if guided else z

    def _is_full(self, guided):
        """Whether this step computes everything."""
        full = self.since is None or self.since + 1 == self.refresh_every
        full = full or (guided and self.difference is None)
        self.since = 0 if full else self.since + 1
        return full

    def _all(self, model, x, first, orders, unknown):
        """z of all unknown tokens; stores the features of the conditional half."""
        self.features, self.chosen, self.held = x[: len(orders)], None, {}
        rows = model.decoder_rows(unknown)
        x = model.decoder_blocks(x, rows, cache=self, first=first, positions=orders)
        return model.decoder_output(x, orders, unknown)

    def _changed(self, model, x, first, orders, to_predict):
        """z of the tokens to predict, computed along with those that changed most."""
        rows = model.decoder_rows(to_predict)
        alike = F.cosine_similarity(x, self.features, dim=-1)  # (N, B + L)
        alike[:, rows] = -2.0  # these first, however similar they are
        wanted = rows.stop - rows.start
        count = min(x.shape[1], wanted + round(RECOMPUTED * x.shape[1]))
        self.chosen = alike.topk(count, dim=1, largest=False).indices.sort(dim=1).values  # (N, S)
        index = self.chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        x = x.gather(1, index)
        self.features = self.features.scatter(1, index, x)
        positions = F.pad(orders, (model.buffer_size, 0)).gather(1, self.chosen)
        x = model.decoder_blocks(x, cache=self, first=first, positions=positions)
        # the rows to predict are consecutive among the chosen, which are sorted
        begin = (self.chosen < rows.start).sum(1, keepdim=True)
        places = begin + torch.arange(wanted, device=x.device)
        x = x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return model.decoder_output(x, orders, to_predict)

    def append(self, block, k, v):
        """Replace the keys and values of the recomputed rows of a block, and return all of them."""
        if self.chosen is None:
            bsz = len(self.features)
            self.held[block] = k[:bsz].contiguous(), v[:bsz].contiguous()
            return k, v
        keys, values = self.held[block]
        there = self.chosen[:, None, :, None].expand_as(k)
        return keys.scatter_(2, there, k), values.scatter_(2, there, v)
