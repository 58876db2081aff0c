"""The routers that the contracts are tested on."""

from tests.routing.routers import ROUTERS, config_of


def test_every_kind_is_among_the_routers() -> None:
    kinds = {config_of(config).kind for config in ROUTERS.values()}
    assert kinds == {"token_choice", "expert_choice", "threshold", "hash", "learned"}
