"""FLOPs and bytes that sampling and training need, from the shapes alone."""


def transformer_flops(model, known):
    """FLOPs of MAR's encoder and decoder for one sequence with `known` known tokens."""
    buffer, width = model.buffer_size, model.fake_latent.shape[1]

    def stack(blocks, tokens):
        return len(blocks) * (24 * tokens * width**2 + 4 * tokens**2 * width)

    return stack(model.encoder_blocks, buffer + known) + stack(
        model.decoder_blocks, buffer + model.seq_len
    )


def head_flops(model):
    """FLOPs of the denoising MLP for one row, without its embeddings of t and z."""
    return 2 * sum(
        p.numel()
        for name, p in model.diffloss.net.named_parameters()
        if p.ndim > 1 and not name.startswith(("time_embed", "cond_embed"))
    )


def step_flops(model, step):
    """FLOPs of an autoregressive step with guidance, as the method states it. step: a Step."""
    rows = 2 * step.bsz * (step.unknown - step.remaining)
    transformer = 2 * step.bsz * transformer_flops(model, model.seq_len - step.unknown)
    return transformer + rows * model.diffloss.gen_diffusion.num_steps * head_flops(model)


def training_flops(model, masked):
    """FLOPs of the forward and backward pass of one image with `masked` masked tokens."""
    rows = model.diffloss.diffusion_batch_mul * masked
    forward = transformer_flops(model, model.seq_len - masked) + rows * head_flops(model)
    return 3 * forward


def bytes_read(model, width):
    """Bytes of weights that an autoregressive step reads, each number `width` bytes.

    The MLPs of the head's blocks are read at each diffusion step, all others once.
    """
    blocks = model.diffloss.net.res_blocks
    mlp = sum(p.numel() for block in blocks for p in block.mlp.parameters())
    others = sum(p.numel() for p in model.parameters()) - mlp
    return width * (others + model.diffloss.gen_diffusion.num_steps * mlp)
