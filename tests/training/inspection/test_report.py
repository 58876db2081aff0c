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

INK = "document.querySelector('#load .plot').layout.font.color"

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
Open = Callable[..., Any]


class Reports:
    """Opens reports; what any page complained of or fetched is kept."""

    def __init__(self, browser: Any, folder: Path) -> None:
        self.browser, self.file = browser, folder / "report.html"
        self.complaints: list[str] = []

    def open(self, stats: dict[str, Any], width: int = 1440, scheme: str = "light") -> Any:
        write_report(stats, self.file)
        page = self.browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._requested(request.url))
        page.goto(self.file.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    def taken(self) -> list[str]:
        """What was complained of since it was asked last."""
        told, self.complaints = self.complaints, []
        return told

    def _requested(self, url: str) -> None:
        if not url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(url)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reports]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield Reports(started, tmp_path_factory.mktemp("report"))
        started.close()


@pytest.fixture
def opened(reports: Reports) -> Iterator[Open]:
    """Open a report; afterwards nothing may have been complained of or fetched."""
    pages = []

    def open_page(*given: Any) -> Any:
        pages.append(reports.open(*given))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()
    assert reports.taken() == []


@pytest.fixture(scope="module")
def example(reports: Reports) -> Any:
    """The example's page, which tests share: opening one costs more than all that is asked of it."""
    return reports.open(json.loads(EXAMPLE.read_text(encoding="utf-8")))


@pytest.fixture
def page(example: Any, reports: Reports) -> Iterator[Any]:
    """The example's page as it was opened, but for the router and the checkpoint that an earlier test chose."""
    yield example
    example.mouse.move(0, 0)
    example.emulate_media(media="screen", color_scheme="light")
    example.wait_for_function(f"{INK} == '#1b1f24'")
    assert reports.taken() == []


@pytest.fixture
def stats() -> dict[str, Any]:
    given: dict[str, Any] = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    return given


MARKS = ".heatmaplayer image, .bars path, .scatterlayer path.point, .sankey-node rect"
DRAWN = f"""[...document.querySelectorAll('.plot')].map((plot) =>
    [...plot.querySelectorAll('{MARKS}')].some((mark) => mark.getBoundingClientRect().width > 0))"""


def drawn(page: Any) -> list[bool]:
    """Whether each plot shows something: marks of some size."""
    found: list[bool] = page.evaluate(DRAWN)
    return found


def is_whole(page: Any, width: int, scheme: str) -> bool:
    page.wait_for_function(f"{DRAWN}.every(Boolean)")  # a plot is there before its marks where colours change
    assert len(drawn(page)) > 25
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(n) for n in paper[4:-1].split(",")) < 300) == (scheme == "dark")
    fits: bool = page.evaluate("document.documentElement.scrollWidth") <= width
    return fits


@needs_browser
def test_a_phone_shows_every_plot_and_nothing_scrolls_sideways(opened: Open, stats: dict[str, Any]) -> None:
    page = opened(stats, 360, "dark")
    assert is_whole(page, 360, "dark")
    # What is most to be read is there without scrolling a table.
    words = page.locator("#router-detail td.text").first.bounding_box()
    assert words["x"] + words["width"] <= 360
    page.emulate_media(color_scheme="light")  # while it is open
    page.wait_for_function(f"{INK} == '#1b1f24'")
    assert is_whole(page, 360, "light")


@needs_browser
def test_a_wide_screen_does_so_too(page: Any) -> None:
    assert is_whole(page, 1440, "light")


@needs_browser
def test_the_verdict_stands_first_and_needs_no_script(page: Any, stats: dict[str, Any]) -> None:
    assert page.locator("main section").first.get_attribute("id") == "verdict"
    for sentence in stats["verdict"]["summary"]:
        assert page.locator("#verdict .ill", has_text=sentence).count() == 1
    assert stats["verdict"]["summary"][0] in page_of(stats).split("<script")[0]


def test_what_cannot_be_told_is_not_called_healthy(stats: dict[str, Any]) -> None:
    for healthy, untold, word in (
        (True, [], "healthy"),
        (True, ["0.experts"], "untold"),
        (False, ["0.experts"], "ill"),
    ):
        stats["verdict"] |= {"healthy": healthy, "untold": untold}
        assert f'<div class="verdict {word}">' in page_of(stats)


def test_a_checkpoint_is_named_with_its_run(stats: dict[str, Any]) -> None:
    stats["model"] |= {"path": "runs/mine/checkpoints/step-000250", "name": "step 250", "step": 250}
    assert "<title>Routing of mine, step 250</title>" in page_of(stats)
    stats["model"] |= {"path": "runs/mine/model", "name": "mine", "step": None}
    assert "<title>Routing of mine</title>" in page_of(stats)


@needs_browser
def test_the_router_that_is_ill_comes_first_and_another_can_be_chosen(page: Any, stats: dict[str, Any]) -> None:
    assert page.locator("#router").input_value() == stats["verdict"]["findings"][0]["router"]
    for chooser, name in (("#router", "0.heads"), ("#text-router", "0.experts")):  # by its figures, or by the text
        page.locator(chooser).select_option(name)
        page.wait_for_function(f"document.querySelector('#router-detail h3').textContent == '{name}'")
        page.wait_for_function("document.querySelectorAll('#router-detail .main-svg').length > 20")
        assert all(drawn(page))
        assert [page.locator(one).input_value() for one in ("#router", "#text-router")] == [name, name]
        router = next(one for one in stats["routers"] if one["name"] == name)
        assert page.locator("#router-detail tbody").first.locator("tr").count() == router["choices"]
        assert page.locator("#router-examples h3").text_content() == name


@needs_browser
def test_pointing_at_a_token_tells_its_gates(page: Any, stats: dict[str, Any]) -> None:
    name = page.locator("#router").input_value()
    page.locator(".token").first.hover()
    routing = stats["examples"][0]["routing"][name]
    what = "head" if name.endswith("heads") else "expert"
    told = f"{what} {routing['choices'][0][0]}: gate {routing['gates'][0][0]:.3f}"
    assert told in page.locator("#tooltip").text_content()
    page.mouse.move(0, 0)
    assert page.locator("#tooltip").is_hidden()


@needs_browser
def test_pointing_at_a_plot_tells_its_figures(page: Any) -> None:
    page.locator("#load .plot .nsewdrag").first.hover()
    assert page.locator("#load .hoverlayer .hovertext").first.text_content().startswith("router ")


@needs_browser
def test_the_slider_goes_through_the_checkpoints(page: Any, stats: dict[str, Any]) -> None:
    slider, loads = page.locator("#checkpoint"), "document.querySelector('#history > figure .plot').data[0].z[0][0]"
    points = stats["compare"]["points"]
    router = next(iter(points[0]["routers"]))
    for index in (0, len(points) - 1):
        slider.fill(str(index))
        assert page.locator("#history output").text_content() == points[index]["name"]
        caption = page.locator("#history > figure figcaption").text_content()
        assert caption.startswith(f"Load of {points[index]['name']}, ")  # on paper there is no slider
        load = points[index]["routers"][router]["load"]
        assert page.evaluate(loads) == pytest.approx(load[0] * len(load))


@needs_browser
def test_dark_is_dark_and_paper_white_with_whole_tables(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{INK} != '#1b1f24'")
    assert is_whole(page, 1440, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_function(f"{INK} == '#1b1f24'")
    colours = "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    assert page.evaluate(colours) == ["rgb(27, 31, 36)", "rgb(255, 255, 255)"]
    page.wait_for_function(f"{DRAWN}.every(Boolean)")
    edges = "[...document.querySelectorAll('table')].map((one) => one.getBoundingClientRect().right)"
    page.evaluate("document.body.style.width = '45rem', document.body.style.margin = 0")
    assert max(page.evaluate(edges)) <= 720
    page.evaluate("document.body.removeAttribute('style')")


@needs_browser
def test_what_choices_earn_is_summed_up(page: Any, stats: dict[str, Any]) -> None:
    told = page.locator("#earnings p").nth(1).text_content()
    for kind in ("heads", "experts"):
        all_of = [one for layer in stats["ablation"]["switched"] if layer["routes"] == kind for one in layer["choices"]]
        earning = sum(one["low"] > 0 for one in all_of)
        assert f"Of {len(all_of)} {kind}, {earning} earn something" in told


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
    stats |= {"ablation": None, "exits": None, "heads": [], "examples": [], "flows": [], "paths": []}
    stats["compare"]["points"] = stats["compare"]["points"][-2:]
    Stats.model_validate(stats)
    page = opened(stats)
    assert page.locator("#exits, #heads, #earnings").count() == 0
    assert all(drawn(page))
    # Two models make a table, not lines of two points.
    assert page.locator("#history .plot").count() == 1
    before, after = (point["routers"]["0.experts"]["max_over_mean"] for point in stats["compare"]["points"])
    churn = stats["compare"]["points"][1]["drift"]["0.experts"]["churn"]
    row = page.locator("#history tr", has_text="0.experts").text_content()
    assert f"{before:.2f} → {after:.2f}" in row
    assert f"{100 * churn:.1f} %" in row


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
def test_many_layers_and_experts_fit(opened: Open, reports: Reports) -> None:
    page = opened(large(), 360)
    assert reports.file.stat().st_size < 6e6
    assert all(drawn(page))
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_page_that_cannot_be_written_is_told(stats: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report(stats, tmp_path / "file" / "report.html")
