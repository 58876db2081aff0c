"""How a model's width divides into heads."""


def check_heads(width: int, heads: int, pairs: bool, channels: int | None = None) -> None:
    """Raise ValueError unless `width` divides into `heads`, of an even number of channels if `pairs`.

    Heads that have their own number of `channels` needn't divide the width.
    """
    if channels is not None:
        if pairs and channels % 2:
            raise ValueError(
                f"head_width is {channels}, but rotary positions turn pairs; set an even head_width or positions: null"
            )
        return
    step = 2 if pairs else 1
    if width % (step * heads):
        valid = [str(h) for h in range(1, width + 1) if width % (step * h) == 0]
        what = "heads of even width (rotary positions turn pairs)" if pairs else "heads of equal width"
        raise ValueError(
            f"width {width} does not divide into {heads} {what}; valid numbers of heads: {', '.join(valid) or 'none'}"
        )


def channels_of(width: int, heads: int, channels: int | None) -> int:
    """Of one head: as configured, or the width divided among the heads."""
    return channels if channels is not None else width // heads
