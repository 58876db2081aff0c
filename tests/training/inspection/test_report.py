"""The report, opened from a file in a real browser that may fetch nothing."""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routing.errors import UserError
from training.inspection.report import page_of, write_report
from training.inspection.schema import Stats

EXAMPLE = Path(__file__).with_name("example_stats.json")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"><b>bold</b> &amp;"

OF_DATA = {"token", "tokens", "path", "files", "groups", "sentence", "summary", "notes"}

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Open a report; afterwards nothing may have been complained of or fetched."""
    pages, complaints = [], []

    def open_page(stats: dict[str, Any], width: int = 1440, scheme: str = "light") -> Any:
        file = tmp_path / "report.html"
        write_report(stats, file)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:", "blob:")) else complaints.append(request.url)
            ),
        )
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


@pytest.fixture
def stats() -> dict[str, Any]:
    given: dict[str, Any] = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    return given


def drawn(page: Any) -> list[bool]:
    """Whether each plot shows something: marks of some size."""
    marks = ".heatmaplayer image, .bars path, .scatterlayer path.point, .sankey-node rect"
    return page.evaluate(
        f"""[...document.querySelectorAll('.plot')].map((plot) =>
            [...plot.querySelectorAll('{marks}')].some((mark) => mark.getBoundingClientRect().width > 0))"""
    )


@needs_browser
@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_plot_is_drawn_and_nothing_scrolls_sideways(
    opened: Open, stats: dict[str, Any], width: int, scheme: str
) -> None:
    page = opened(stats, width, scheme)
    assert len(drawn(page)) > 25
    assert all(drawn(page))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(n) for n in paper[4:-1].split(",")) < 300) == (scheme == "dark")


@needs_browser
def test_the_verdict_stands_first_and_needs_no_script(opened: Open, stats: dict[str, Any]) -> None:
    page = opened(stats)
    assert page.locator("main section").first.get_attribute("id") == "verdict"
    for sentence in stats["verdict"]["summary"]:
        assert page.locator("#verdict .ill", has_text=sentence).count() == 1
    assert stats["verdict"]["summary"][0] in page_of(stats).split("<script")[0]


@needs_browser
def test_pointing_at_a_token_tells_its_gates(opened: Open, stats: dict[str, Any]) -> None:
    page = opened(stats)
    name = page.locator("#router").input_value()
    page.locator(".token").first.hover()
    choice, gate = (
        stats["examples"][0]["routing"][name]["choices"][0][0],
        stats["examples"][0]["routing"][name]["gates"][0][0],
    )
    assert f"choice {choice}: gate {gate:.3f}" in page.locator("#tooltip").text_content()
    page.mouse.move(0, 0)
    assert page.locator("#tooltip").is_hidden()


@needs_browser
def test_pointing_at_a_plot_tells_its_figures(opened: Open, stats: dict[str, Any]) -> None:
    page = opened(stats)
    page.locator("#load .plot .nsewdrag").first.hover()
    assert page.locator("#load .hoverlayer .hovertext").first.text_content().startswith("router ")


@needs_browser
def test_another_router_can_be_chosen(opened: Open, stats: dict[str, Any]) -> None:
    page = opened(stats)
    assert page.locator("#router").input_value() == stats["verdict"]["findings"][0]["router"]  # what is ill comes first
    page.locator("#router").select_option("0.heads")
    page.wait_for_function("document.querySelector('#router-detail h3').textContent == '0.heads'")
    page.wait_for_function("document.querySelectorAll('#router-detail .main-svg').length > 20")
    assert all(drawn(page))
    assert page.locator("#router-detail tbody").first.locator("tr").count() == stats["routers"][0]["choices"]


@needs_browser
def test_the_slider_goes_through_the_checkpoints(opened: Open, stats: dict[str, Any]) -> None:
    page = opened(stats)
    slider, loads = page.locator("#checkpoint"), "document.querySelector('#history > figure .plot').data[0].z[0][0]"
    points = stats["compare"]["points"]
    router = next(iter(points[0]["routers"]))
    for index in (0, len(points) - 1):
        slider.fill(str(index))
        assert page.locator("#history output").text_content() == points[index]["name"]
        load = points[index]["routers"][router]["load"]
        assert page.evaluate(loads) == pytest.approx(load[0] * len(load))


@needs_browser
def test_light_turns_to_dark_while_the_page_is_open(opened: Open, stats: dict[str, Any]) -> None:
    page = opened(stats)
    ink = "document.querySelector('#load .plot').layout.font.color"
    before = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{ink} != '{before}'")
    page.emulate_media(media="print")
    page.wait_for_function(f"{ink} == '{before}'")  # paper is white
    assert all(drawn(page))


@needs_browser
def test_text_of_the_data_is_never_markup(opened: Open, stats: dict[str, Any]) -> None:
    def poison(value: Any, key: str = "") -> Any:
        """Every text that comes from the data or from paths, replaced."""
        if isinstance(value, dict):
            return {name: poison(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [poison(inner, key) for inner in value]
        return EVIL if isinstance(value, str) and key in OF_DATA else value

    poisoned = poison(stats)
    poisoned["model"]["name"] = EVIL
    for n, point in enumerate(poisoned["compare"]["points"]):
        point["name"] = f"{n} {EVIL}"
    page = opened(poisoned)
    assert page.title() == f"Routing of {EVIL}"
    assert page.locator("img, main b").count() == 0
    assert page.locator(".token").first.text_content().startswith(EVIL)
    assert all(drawn(page))


@needs_browser
def test_what_was_not_looked_at_is_left_out(opened: Open, stats: dict[str, Any]) -> None:
    for router in stats["routers"]:
        router |= {"similarity": {"weight": None, "output": None}, "context": None, "together": None}
        router |= {"known_by_token": None, "known_by_position": None, "takes": {}}
    stats |= {"ablation": None, "exits": None, "compare": None, "heads": [], "examples": [], "flows": [], "paths": []}
    Stats.model_validate(stats)
    page = opened(stats)
    assert page.locator("#exits, #history, #heads, #earnings").count() == 0
    assert all(drawn(page))


def large(layers: int = 12, experts: int = 64, seed: int = 0) -> dict[str, Any]:
    """The example's figures, as a model of many layers and experts would have them."""
    rng = np.random.default_rng(seed)
    stats: dict[str, Any] = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    routed = next(router for router in stats["routers"] if router["routes"] == "experts")

    def shares(*shape: int) -> Any:
        return (
            np.round(rng.dirichlet(np.ones(experts), shape), 4).tolist()
            if shape
            else np.round(rng.dirichlet(np.ones(experts)), 4).tolist()
        )

    square = np.round(rng.uniform(-0.1, 0.3, (experts, experts)), 4).tolist()
    names = [f"{layer}.experts" for layer in range(layers)]
    stats["routers"] = [
        {
            **routed,
            "name": name,
            "layer": layer,
            "choices": experts,
            **{field: shares() for field in ("load", "first", "probability", "gate", "dropped")},
            "similarity": {"weight": square, "output": square},
            "together": [[0.0123] * experts] * experts,
            "typical": [routed["typical"][n % len(routed["typical"])] for n in range(experts)],
            "takes": {
                kind: {**taken, "share": shares(len(taken["groups"]))} for kind, taken in routed["takes"].items()
            },
        }
        for layer, name in enumerate(names)
    ]
    flow = np.round(rng.dirichlet(np.ones(experts * experts)), 6).reshape(experts, experts).tolist()
    stats["flows"] = [{"source": one, "target": other, "share": flow} for one, other in pairwise(names)]
    path = {**stats["paths"][0]["top"][0], "choices": [63] * layers}
    stats["paths"] = [{**stats["paths"][0], "routers": names, "top": [path] * 20}]
    stats["agreement"] = {"routers": names, "nmi": [[0.1234] * layers] * layers}
    length = 64
    chosen = {
        name: {"choices": [[63, 7]] * length, "gates": [[0.6123, 0.3877]] * length, "kept": [[True, True]] * length}
        for name in names
    }
    stats["examples"] = [{"tokens": ["token"] * length, "continues": [False] * length, "routing": chosen}] * 6
    earning = stats["ablation"]["switched"][0]["choices"][0]
    stats["ablation"]["switched"] = [
        {
            "layer": layer,
            "routes": "experts",
            "router": name,
            "choices": [{**earning, "choice": n} for n in range(experts)],
        }
        for layer, name in enumerate(names)
    ]
    stats["verdict"]["findings"], stats["compare"] = [], None
    Stats.model_validate(stats)
    return stats


@needs_browser
def test_many_layers_and_experts_fit(opened: Open, tmp_path: Path) -> None:
    page = opened(large(), 360)
    assert (tmp_path / "report.html").stat().st_size < 6e6
    assert all(drawn(page))
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_page_that_cannot_be_written_is_told(stats: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report(stats, tmp_path / "file" / "report.html")
