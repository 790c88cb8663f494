"""The app in a real Chromium: from disk and served, with hostile data, without one message on the console."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unmix.viewer.report import write_report
from unmix.viewer.shapes import ReportData
from viewer.makebelieve import DEAD_LATENT, HOSTILE_LATENT, FakeReader, make_report_data

pytestmark = pytest.mark.browser

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("Chromium is not installed (apt-get install chromium)", allow_module_level=True)
expect = sync_api.expect

N, PAGED = 900, 240


@pytest.fixture(scope="module")
def data() -> ReportData:
    return make_report_data(N, 200, PAGED)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page at laptop width that fails its test over any error, warning or refused request."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    tab = context.new_page()
    troubles: list[str] = []
    tab.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.set_default_timeout(8000)
    yield tab
    pwned = tab.evaluate("window.pwned")
    context.close()
    assert pwned is None
    assert troubles == []


@pytest.fixture(scope="module")
def report(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(data, tmp_path_factory.mktemp("run") / "report").as_uri()


@pytest.fixture(scope="module")
def served(data: ReportData) -> Iterator[str]:
    pytest.importorskip("starlette", reason="the viewer's extra is not installed")
    from unmix.viewer.server import start

    with start(data, FakeReader(N), port=0) as viewer:
        yield viewer.url


def ids(page: Any) -> list[int]:
    return [int(text) for text in page.locator("tbody th a").all_inner_texts()]


def test_the_overview_shows_run_metrics_and_histograms(page: Any, report: str) -> None:
    page.goto(report)
    expect(page.locator("h1")).to_have_text("demo")
    assert page.title() == "Overview · demo · unmix"
    expect(page.get_by_role("row", name=re.compile("^FVU"))).to_contain_text("18.7\u202f%")
    expect(page.get_by_role("row", name=re.compile("^CE recovered"))).to_contain_text("95.3\u202f% … 95.8\u202f%")
    expect(page.get_by_role("row", name=re.compile("^ngram *random"))).to_contain_text("0.420")
    expect(page.get_by_text("290 never fired")).to_be_visible()
    assert page.locator("svg rect.bar").count() > 20
    assert page.locator("svg path.outline").count() == 1
    page.get_by_role("button", name="CE recovered").hover()
    expect(page.get_by_role("tooltip")).to_contain_text("Where spliced lies between zero-ablated")
    page.get_by_role("button", name="KL", exact=True).focus()
    expect(page.get_by_role("tooltip")).to_contain_text("KL(original ‖ spliced)")
    page.keyboard.press("Escape")
    expect(page.get_by_role("tooltip", include_hidden=True)).to_be_hidden()
    page.get_by_label("Which scores").select_option(index=1)
    assert page.locator("svg path.outline").count() == 0


def test_the_table_draws_only_what_is_seen(page: Any, report: str, data: ReportData) -> None:
    page.goto(report + "#/latents")
    expect(page.locator(".found")).to_have_text(f"{N} of {N}")
    assert ids(page)[:5] == data.latents["ids"][:5]
    assert len(ids(page)) < 60
    page.locator(".box").evaluate("box => box.scrollTop = box.scrollHeight")
    expect(page.locator("tbody tr", has_text="never fires")).to_be_visible()
    assert ids(page)[-1] == DEAD_LATENT


def test_search_looks_into_explanations_tokens_and_numbers(page: Any, report: str) -> None:
    page.goto(report + "#/latents")
    page.keyboard.press("/")
    page.keyboard.type("negations WORD")
    expect(page.locator(".found")).to_have_text(f"10 of {N}")
    assert all("other negations" in text for text in page.locator("tbody td.text").all_inner_texts())
    page.get_by_label("Search latents").fill("metaclass")
    expect(page.locator(".found")).to_have_text(f"45 of {N}")
    page.get_by_label("Search latents").fill("#321")
    assert ids(page) == [321]
    page.get_by_label("Search latents").fill("no such words")
    expect(page.get_by_text("No latent has these words")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".found")).to_have_text(f"{N} of {N}")
    page.get_by_role("button", name="Explained").click()
    expect(page.locator(".found")).to_have_text(f"199 of {N}")


def test_columns_sort_both_ways_and_missing_comes_last(page: Any, report: str, data: ReportData) -> None:
    page.goto(report + "#/latents")
    page.get_by_role("button", name="Frequency").click()
    expect(page.locator("th.frequency")).to_have_attribute("aria-sort", "descending")
    frequencies = dict(zip(data.latents["ids"], data.latents["frequencies"], strict=True))
    assert ids(page)[0] == max(frequencies, key=lambda i: frequencies[i] or 0)
    page.get_by_role("button", name="Frequency").click()
    expect(page.locator("th.frequency")).to_have_attribute("aria-sort", "ascending")
    assert ids(page)[0] == DEAD_LATENT
    page.get_by_role("button", name="F1 (pattern)").click()
    page.get_by_role("button", name="F1 (pattern)").click()
    scores = {i: s for i, s in zip(data.latents["ids"], data.latents["scores"], strict=True) if s is not None}
    assert ids(page)[0] == min(scores, key=lambda i: scores[i])
    page.get_by_role("button", name="F1 (pattern)").click()
    assert ids(page)[0] == data.latents["ids"][0]


def test_a_latent_page_from_the_table_and_along_the_list(page: Any, report: str, data: ReportData) -> None:
    page.goto(report + "#/latents")
    page.get_by_label("Search latents").fill("negations")
    order = ids(page)
    page.locator("tbody tr td.text").first.click()
    expect(page.locator(".number")).to_have_text(str(order[0]))
    expect(page.locator("h1")).to_have_text("the word “not” and other negations")
    expect(page.locator("nav .soft")).to_contain_text("1 of")
    expect(page.locator("li .t.hot").nth(19)).to_be_attached()  # waits for the windows, which come after the heading
    page.keyboard.press("j")
    expect(page.locator(".number")).to_have_text(str(order[1]))
    page.keyboard.press("k")
    expect(page.locator(".number")).to_have_text(str(order[0]))
    page.get_by_role("link", name="next").click()
    expect(page.locator(".number")).to_have_text(str(order[1]))
    page.go_back()
    page.go_back()
    expect(page.locator(".number")).to_have_text(str(order[1]))
    page.get_by_role("link", name="Latents").first.click()
    expect(page.get_by_label("Search latents")).to_have_value("negations")


def test_shading_goes_by_activation(page: Any, report: str, data: ReportData) -> None:
    latent = next(i for i in data.paged if i not in (HOSTILE_LATENT, DEAD_LATENT))
    page.goto(report + f"#/latent/{latent}")
    window = data.page(latent)["top"][5]
    hot = page.locator("ul").first.locator("li").nth(5).locator(".t.hot.peak")
    expect(hot).to_have_text(window["tokens"][window["peak"]])
    strength = float(hot.evaluate("token => token.style.getPropertyValue('--a')"))
    value, most = window["values"][window["peak"]], data.page(latent)["max"]
    assert value is not None
    assert most is not None
    assert strength == pytest.approx(value / most, rel=1e-3)
    colours = page.locator("li .t.peak").evaluate_all("all => all.map(t => getComputedStyle(t).backgroundColor)")
    assert len(set(colours)) > 8
    hot.hover()
    expect(page.get_by_role("tooltip")).to_contain_text(re.compile(rf"{value:.3g}"[:3]))
    for mode in ("Flowing", "Lines", "Aligned"):
        page.get_by_role("button", name=mode).click()
        expect(page.get_by_role("button", name=mode)).to_have_attribute("aria-pressed", "true")
        assert page.locator("li .t.peak").count() == len(data.page(latent)["top"]) + len(data.page(latent)["quantiles"])


def test_aligned_windows_have_their_peaks_in_one_column(page: Any, report: str, data: ReportData) -> None:
    page.goto(report + f"#/latent/{data.paged[0]}")
    page.locator("li .t.peak").first.wait_for()
    places = page.locator("li .t.peak").evaluate_all("all => all.map(t => Math.round(t.getBoundingClientRect().left))")
    assert len(set(places)) == 1


def test_hostile_data_are_shown_as_text(page: Any, report: str, served: str) -> None:
    for url in (report, served):
        page.goto(f"{url}#/latent/{HOSTILE_LATENT}")
        expect(page.locator("h1")).to_contain_text('<img src=x onerror="window.pwned=1"> </script>')
        expect(page.locator("h1")).to_contain_text("‹U+2028› ‹U+202E› ‹U+D800›")
        expect(page.locator("ul").first.locator("li").first).to_contain_text("<img src=x onerror=window.pwned=1>")
        expect(page.locator("aside")).to_contain_text("</script><script>window.pwned=1</script>")
        expect(page.locator("aside")).to_contain_text("{{constructor}}{@html 1}")
        assert page.locator("main img, main script").count() == 0
        page.get_by_role("button", name="Lines").click()
        page.goto(f"{url}#/latents")
        page.get_by_label("Search latents").fill("<img")
        assert ids(page) == [HOSTILE_LATENT]


def test_latents_without_a_page_say_where_it_is(page: Any, report: str, served: str, data: ReportData) -> None:
    absent = next(i for i in data.latents["ids"] if i not in data.paged)
    page.goto(report + f"#/latent/{absent}")
    expect(page.locator(".notice")).to_contain_text(f"This report holds the pages of {PAGED} latents")
    expect(page.locator(".notice code")).to_have_text("unmix view runs/demo")
    page.goto(served + f"#/latent/{absent}")
    page.locator("li .t.peak").first.wait_for()
    page.goto(served + f"#/latent/{DEAD_LATENT}")
    expect(page.locator("h1")).to_have_text("Never fires")


def test_addresses_that_lead_nowhere(page: Any, report: str) -> None:
    page.goto(report + "#/nonsense")
    expect(page.locator("h1")).to_have_text("Nothing here")
    page.goto(report + "#/latent/99999")
    expect(page.get_by_role("alert")).to_have_text("There is no latent 99999.")
    page.goto(report + "#/")
    expect(page.locator("h1")).to_have_text("demo")


def test_a_report_on_disk_says_how_to_get_the_prompt(page: Any, report: str) -> None:
    page.goto(report + "#/prompt")
    expect(page.locator(".notice")).to_contain_text("Reading a text of your own needs the language model")
    assert page.locator("textarea").count() == 0


def test_a_prompt_is_read_token_by_token(page: Any, served: str) -> None:
    page.goto(served + "#/prompt")
    box = page.get_by_label("Text to read")
    box.fill("<b>must</b> not\nreturn return")
    page.keyboard.press("Control+Enter")
    tokens = page.get_by_role("option")
    expect(tokens.last).to_have_text(" return")
    expect(tokens.filter(has_text="↵")).to_have_count(1)
    over_all = page.locator("section").nth(1).locator("li")
    assert over_all.count() == 24
    tokens.first.click()
    expect(page.get_by_text("No latent fires here")).to_be_visible()
    tokens.last.click()
    expect(tokens.last).to_have_attribute("aria-selected", "true")
    on_token = page.locator("section").nth(0).locator("li")
    assert on_token.count() > 5
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    expect(tokens.last).to_have_attribute("aria-selected", "false")
    on_token.first.locator("a").hover()
    assert page.locator("[role=option].hot").count() >= 1
    number = on_token.first.locator(".id").inner_text()
    on_token.first.click()
    expect(page.locator(".number")).to_have_text(number)
    page.go_back()
    expect(page.get_by_label("Text to read")).to_have_value("<b>must</b> not\nreturn return")


def test_a_refused_prompt_says_why(chromium: Any, served: str) -> None:
    tab = chromium.new_page()
    tab.goto(served + "#/prompt")
    tab.get_by_label("Text to read").fill("a " * 600)
    tab.get_by_role("button", name="Read").click()
    expect(tab.get_by_role("alert")).to_contain_text("tokens, allowed: 512")
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_text_can_be_read(chromium: Any, report: str, scheme: str) -> None:
    """At phone and laptop width the page is as wide as the window, and text has a contrast of 4.5 or more."""
    contrast = """() => {
      const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
      const solid = (colours) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
      };
      const light = (rgb) => {
        const [r, g, b] = rgb.map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const bad = [];
      const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        const skipped = element.closest(".ghost, .sr, .off, option, [aria-hidden=true]");
        if (skipped || !walker.currentNode.data.trim()) continue;
        const grounds = [];
        for (let e = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
        const [a, b] = [light(solid(grounds)), light(solid([...grounds, getComputedStyle(element).color]))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) bad.push([walker.currentNode.data.slice(0, 30), element.className, ratio.toFixed(2)]);
      }
      return bad;
    }"""
    for width in (420, 1280):
        context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab = context.new_page()
        for place in ("#/", "#/latents", "#/latent/16", f"#/latent/{HOSTILE_LATENT}", "#/prompt"):
            tab.goto(report + place)
            tab.locator("h1").first.wait_for(state="attached")
            tab.wait_for_timeout(150)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, (place, width)
            assert tab.evaluate(contrast) == [], (place, width, scheme)
        context.close()


def test_a_torn_report_says_what_is_missing(chromium: Any, data: ReportData, tmp_path: Path) -> None:
    url = write_report(data, tmp_path / "report").as_uri()
    (tmp_path / "report" / "data" / "latents.js").unlink()
    tab = chromium.new_page()
    tab.goto(url + "#/latents")
    expect(tab.get_by_role("alert")).to_have_text("data/latents.js is missing: this copy of the report is not whole.")
    tab.close()
