"""Sampling that does not compute again what hardly changes between steps (in LazyMAR's spirit).

Yan et al. 2025 found that most tokens' features change little from one autoregressive step to the
next, and so does the difference that guidance makes. Here every few steps all is computed and kept.
In between there is one stream instead of two, the difference to the other being that of the last
full step, and behind the decoder's first blocks only those tokens are computed whose features
changed most since; the others are seen by them as they were. This approximates.
"""

import torch
from torch.nn import functional as F

FIRST = 0.25  # share of the decoder's blocks that compute all tokens, to tell which have changed
RECOMPUTED = 0.25  # share of the tokens that go on from there, beside those asked


class Lazy:
    """What is kept of one sampling of a MAR. refresh_every: steps between full ones."""

    def __init__(self, refresh_every):
        self.refresh_every, self.since = refresh_every, None
        self.features = None  # (N, B + L, D), behind the first blocks
        self.keys, self.values = [], []  # of each block behind them, (N, heads, B + L, D / heads)
        self.difference = None  # z without class − z with it, (N, unknown then, D)

    def keep(self, count):
        """Without guidance there is no second stream; only its difference was kept."""
        self.difference = None

    def predict(self, model, tokens, orders, asked, classes):
        """As `MAR.predict`."""
        bsz, known = len(tokens), slice(asked.stop, None)
        streams = len(classes) // bsz
        full = self.since is None or self.since + 1 == self.refresh_every
        full = full or (streams == 2 and self.difference is None)
        self.since = 0 if full else self.since + 1
        if not full:
            classes = classes[:bsz]
        x = model.encode(tokens[:, known], orders[:, known], classes)
        x = model.join(x, orders, asked.stop)
        first = max(1, round(FIRST * len(model.decoder_blocks)))
        for block in model.decoder_blocks[:first]:
            x = block.forward(x)  # not what was compiled for training
        blocks = model.decoder_blocks[first:]
        if full:
            unknown = slice(0, asked.stop)
            z = model.finish(self._all(blocks, x, bsz, model.rows(unknown)), orders, unknown)
            if streams == 2:
                self.difference = z[bsz:] - z[:bsz]
            return z[:, asked]
        z = model.finish(self._changed(blocks, x, model.rows(asked)), orders, asked)
        return torch.cat([z, z + self.difference[:, asked]]) if streams == 2 else z

    def _all(self, blocks, x, bsz, rows):
        """All tokens through the blocks, kept of the first stream; of the last one only `rows`."""
        self.features = x[:bsz]
        self.keys, self.values = [], []
        for block in blocks:
            wanted = rows if block is blocks[-1] else None
            normed = block.norm1(x)
            q, k, v = block.attn.project(normed, wanted)
            self.keys.append(k[:bsz].contiguous())
            self.values.append(v[:bsz].contiguous())
            x = (x if wanted is None else x[:, rows]) + block.attn.attend(q, k, v)
            x = x + block.mlp(block.norm2(x))
        return x

    def _changed(self, blocks, x, rows):
        """The tokens of `rows`, and those that changed most, through the blocks; gives the rows."""
        alike = F.cosine_similarity(x, self.features, dim=-1)  # (N, B + L)
        alike[:, rows] = -2.0  # these first, whatever they are like
        asked = rows.stop - rows.start
        count = min(x.shape[1], asked + round(RECOMPUTED * x.shape[1]))
        chosen = alike.topk(count, dim=1, largest=False).indices.sort(dim=1).values  # (N, S)
        index = chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        x = x.gather(1, index)
        self.features = self.features.scatter(1, index, x)
        for block, keys, values in zip(blocks, self.keys, self.values, strict=True):
            q, k, v = block.attn.project(block.norm1(x))
            there = chosen[:, None, :, None].expand_as(k)
            keys.scatter_(2, there, k)
            values.scatter_(2, there, v)
            x = x + block.attn.attend(q, keys, values)
            x = x + block.mlp(block.norm2(x))
        # of the chosen, sorted, the rows are consecutive
        begin = (chosen < rows.start).sum(1, keepdim=True)
        places = begin + torch.arange(asked, device=x.device)
        return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
