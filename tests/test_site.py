"""The site as it is built, and in a browser: the system's Chromium, by Playwright."""

import functools
import html.parser
import http.server
import re
import sys
import threading
import urllib.parse

import pytest
from test_docs import ROOT, run

pytestmark = pytest.mark.slow
DESK, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site."""
    folder = tmp_path_factory.mktemp("site")
    build = "-m", "mkdocs", "build", "--strict", "-d", folder
    status, said = run(sys.executable, *build, cwd=ROOT)
    assert status == 0, said
    return folder


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served."""
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def pages(site):
    return sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html"))


def opened(browser, address, size):
    """A page on which nothing is had from elsewhere, and what went wrong on it."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    wrong = []
    page.on("console", lambda m: m.type == "error" and wrong.append(m.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda r: r.status >= 400 and wrong.append(r.url))

    def refuse(route):
        wrong.append(route.request.url)
        route.abort()

    page.route(lambda url: not url.startswith((address, "data:", "blob:")), refuse)
    return page, wrong


def test_site_builds_without_a_warning(site):
    """No page, link, anchor or name that leads nowhere."""
    assert {"index.html", "start.html", "reference/flows.html"} <= set(pages(site))
    text = (site / "reference" / "flows.html").read_text("utf-8")
    assert 'id="gradflow.simulate"' in text and 'href="#gradflow.Path"' in text
    assert 'href="#gradflow.Path.slow_speed"' in text  # of `Path.slow_speed`
    text = (site / "reference" / "penalties.html").read_text("utf-8")
    assert "max(1 − h/‖θ<sub>g</sub>‖, 0) θ<sub>g</sub>" in text
    listing = re.search(r'id="gradflow.GroupLasso".*?</pre>', text, re.S)
    assert "groups: Literal[" in re.sub("<[^>]*>", "", listing[0])  # how it is made
    assert not [p for p in pages(site) if "][]" in (site / p).read_text("utf-8")]
    for page in ("concepts", "inside/kkt", "inside/lift", "inside/second-order"):
        text = (site / f"{page}.html").read_text("utf-8")
        assert "<math" in text and "arithmatex" not in text


class Links(html.parser.HTMLParser):
    """What a page links to or shows, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.to, self.anchors = [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs.get("id") or "", attrs.get("name") or ""}
        self.to += [attrs[k] for k in ("href", "src") if attrs.get(k)]


def test_no_link_leads_nowhere(site):
    """Of what is built: navigation, headings and links that mkdocs does not see too."""
    known = {page: Links((site / page).read_text("utf-8")) for page in pages(site)}
    seen = 0
    for page, links in known.items():
        for link in links.to:
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                assert url.scheme in ("https", "data"), (page, link)
                continue
            here = urllib.parse.urljoin("/" + page, urllib.parse.unquote(url.path))
            name = here.lstrip("/") or "index.html"
            assert (site / name).exists(), (page, link)
            anchor = urllib.parse.unquote(url.fragment)
            if name in known and not anchor.startswith("__"):
                assert anchor in known[name].anchors, (page, link)
            seen += 1
    assert seen > 1000


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_pages_in_a_browser(site, address, browser, size):
    """Every page: no error, no picture that is missing, nothing wider than the screen;
    and formulas that have been set."""
    page, wrong = opened(browser, address, size)
    formulas = 0
    for name in pages(site):
        page.goto(f"{address}/{name}")
        assert not wrong, (name, wrong)
        page.evaluate(  # those further down are had once they are scrolled to
            "Promise.all([...document.images].map(i => {i.loading = 'eager';"
            " return i.decode().catch(() => 0)}))"
        )
        shown = page.evaluate("[...document.images].map(i => [i.src, i.naturalWidth])")
        assert all(width > 0 for _, width in shown), (name, shown)
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, (name, wide)
        sizes = page.evaluate(
            "[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect())"
            ".map(r => [r.width, r.height])"
        )
        assert all(w > 2 and h > 5 for w, h in sizes), (name, sizes)
        formulas += len(sizes)
    page.close()
    assert formulas > 20


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("limit_map", "reference/manifold.html"),
        ("KKT4", "reference/solvers.html"),
        ("slow time", "glossary.html"),
        ("grokking_time", "reference/theory.html"),
        ("weight decay schedule", "how-to/stop.html"),
        ("freeze a layer", "how-to/frozen.html"),
        ("slid", "what-can-go-wrong.html"),
        ("critical manifold", "glossary.html"),
        ("edge of stability", "how-to/finite_steps.html"),
        ("PINN", "gallery/physics_informed.html"),
        ("CNN", "how-to/layers.html"),
        ("save a figure", "start.html"),
    ],
)
def test_search_finds(address, browser, words, where):
    page, wrong = opened(browser, address, DESK)
    page.goto(f"{address}/index.html")
    page.keyboard.press("/")
    page.keyboard.type(words)
    results = page.locator(".md-search-result__link")
    results.first.wait_for(timeout=20_000)
    links = [urllib.parse.urlsplit(a.get_attribute("href")) for a in results.all()]
    found = dict.fromkeys(link.path.lstrip("/") for link in links)  # in order
    assert where in list(found)[:4]
    assert not wrong
    page.close()
