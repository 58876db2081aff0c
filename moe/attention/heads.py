"""How a model's width divides into heads."""


def check_heads(width: int, heads: int, pairs: bool) -> None:
    """Raise ValueError unless `width` divides into `heads`, of an even number of channels if `pairs`."""
    step = 2 if pairs else 1
    if width % (step * heads):
        valid = [str(h) for h in range(1, width + 1) if width % (step * h) == 0]
        what = "heads of even width (rotary positions turn pairs)" if pairs else "heads of equal width"
        raise ValueError(
            f"width {width} does not divide into {heads} {what}; valid numbers of heads: {', '.join(valid) or 'none'}"
        )
