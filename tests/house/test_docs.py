"""Documentation: the references are the programs' own (settings byte for byte), and links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path

import pytest
from prometheus_client import Metric

from docs import write_settings as reference
from faashound import gateway
from faashound.calls.model import CallbackState, State, Stats
from faashound.calls.names import parse_function_name
from faashound.calls.retries import AttemptOutcome, BadAnnotations, OutcomeKind, parse_annotations
from faashound.calls.steps import TRANSITIONS
from faashound.calls.views import LISTED_COUNT, MAX_LISTED_COUNT, BadQuery, parse_call_filter
from faashound.draining.metrics import InvocationCounters, WorkerMetrics
from faashound.functions import exposure, scaling, schedules
from faashound.functions.table import QUEUE_ANNOTATION, WATCHDOG_ROWS, BadFunctions, Function, parse_functions
from faashound.serving import control_plane
from faashound.serving.call_status import MAX_WAIT_S
from faashound.serving.followers import MAX_FOLLOWERS_COUNT, MAX_OF_ADDRESS_COUNT
from faashound.serving.health import Health
from faashound.serving.metrics import GatewayMetrics
from faashound.watchdog import CLIENT_GONE_STATUS, FaashoundError, HttpMetrics, Scoreboard, Slot, settings_table


def test_reference_in_docs_is_the_generated_one_when_compared() -> None:
    page = reference.PAGE.read_text(encoding="utf-8")
    expected = reference.replace_reference(page, reference.build_reference())
    assert page == expected, "run: python -m docs.write_settings --write"


def test_reference_has_each_setting_of_each_program_once_when_generated() -> None:
    lines = reference.build_reference().splitlines()
    for kind in reference.PROGRAMS.values():
        for row in settings_table(kind).values():
            assert any(line.startswith(f"| `{row.name}`") and row.help.replace("|", "\\|") in line for line in lines)
    row_count = sum(len(settings_table(kind)) for kind in reference.PROGRAMS.values())
    assert sum(line.startswith("| `") for line in lines) == row_count


@pytest.mark.parametrize(
    "page",
    [
        "",
        reference.BEGIN,
        f"{reference.END}\n{reference.BEGIN}",
        f"{reference.BEGIN}\n{reference.BEGIN}\n{reference.END}",
    ],
    ids=["none", "begin-only", "reversed", "twice"],
)
def test_page_is_refused_when_its_markers_are_not_right(page: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        reference.replace_reference(page, "table\n")


def test_text_around_the_markers_is_kept_when_reference_is_replaced() -> None:
    page = f"before\n{reference.BEGIN}\nold\n{reference.END}\nafter\n"
    replaced = reference.replace_reference(page, "new\n")
    assert replaced == f"before\n{reference.BEGIN}\nnew\n{reference.END}\nafter\n"
    assert reference.replace_reference(replaced, "new\n") == replaced


PAGES = sorted([*reference.PAGE.parent.glob("*.md"), *reference.PAGE.parent.parent.glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readme_is_ten_kilobytes_at_most() -> None:
    assert (reference.PAGE.parent.parent / "README.md").stat().st_size <= 10_000


def test_map_names_only_what_is_there() -> None:
    root = reference.PAGE.parent.parent
    page, program = ((root / name).read_text(encoding="utf-8") for name in ("ARCHITECTURE.md", "watchdog.py"))
    paths = re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.(?:py|js))?)`", page)
    assert len(paths) > 50
    assert [path for path in paths if not (root / path).exists()] == []
    sections = re.findall(r'"([A-Z][A-Za-z ]+)"', page)
    assert sections
    assert [section for section in sections if f"# {section}" not in program] == []


CAT = parse_function_name("cat")
ROW = re.compile(r"\| `(\w+)` \| (counter|gauge|histogram) \|([^|]*)\|")


def gateway_metrics() -> Iterable[Metric]:
    slot = Slot(Scoreboard())
    metrics = GatewayMetrics(slot)
    metrics.end(metrics.begin(Function(CAT), listed=True), 200, 0.1)
    metrics.submitted(202)
    metrics.dropped(1)
    Health(slot).queue_is_nearly_full(False)
    metrics.show_queue(Stats(dict.fromkeys(State, 1), {}, {"faas-request": 1}, {"faas-request": 1.0}, 0, 1, 1, 1, 1))
    return metrics.collect()


def worker_metrics() -> Iterable[Metric]:
    metrics = WorkerMetrics()
    invocations = InvocationCounters(metrics.registry)
    invocations.end(invocations.begin(CAT), 200, 0.1)
    outcome = AttemptOutcome(OutcomeKind.ANSWERED, 200)
    metrics.attempt(CAT, outcome)
    metrics.callback(outcome)
    metrics.show([(CAT, 1)], 1, {})
    return metrics.registry.collect()


def watchdog_metrics() -> Iterable[Metric]:
    metrics = HttpMetrics(Slot(Scoreboard()))
    metrics.observe(200, "GET", 0.1)
    return metrics.collect()


def described(metrics: Iterable[Metric]) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Yield the name that a scraper sees, the type and the labels of each metric, all of which have a sample."""
    for metric in metrics:
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        labels = {label for sample in metric.samples for label in sample.labels} - {"le"}
        assert metric.samples, name
        yield name, metric.type, frozenset(labels)


def test_page_of_metrics_has_each_metric_of_each_program_and_no_other() -> None:
    page = (reference.PAGE.parent / "metrics.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0].lower(): part for part in page.split("\n## ")[1:]}
    programs = {"gateway": gateway_metrics(), "worker": worker_metrics(), "watchdog": watchdog_metrics()}
    assert sections.keys() == programs.keys()
    for program, metrics in programs.items():
        rows = ROW.findall(sections[program])
        told = [(name, kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows]
        assert sorted(told, key=itemgetter(0)) == sorted(described(metrics), key=itemgetter(0))
    outcomes = re.findall(r"^\| `([a-z ]+)` \| [^|]+ \|$", sections["worker"], re.MULTILINE)
    assert set(outcomes) == {kind.value for kind in OutcomeKind} - {OutcomeKind.ANSWERED.value}


def test_page_of_metrics_has_each_part_that_may_be_in_trouble_and_no_other() -> None:
    page = (reference.PAGE.parent / "metrics.md").read_text(encoding="utf-8")
    samples = [sample for metric in gateway_metrics() for sample in metric.samples if sample.name == "gateway_trouble"]
    (row,) = (line for line in page.splitlines() if line.startswith("| `gateway_trouble`"))
    assert set(re.findall(r"`(\w+)` \(", row)) == {sample.labels["part"] for sample in samples}


def test_alerts_and_dashboard_ask_for_metrics_that_there_are() -> None:
    page = (reference.PAGE.parent / "metrics.md").read_text(encoding="utf-8")
    there = {name for name, _, _ in ROW.findall(page)}
    deploy = reference.PAGE.parent.parent / "deploy"
    for path in (deploy / "prometheus" / "alerts.yml", deploy / "grafana" / "faashound.json"):
        asked = set(re.findall(r"\b(?:gateway|worker|http)_\w+", path.read_text(encoding="utf-8")))
        assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} <= there


def test_page_of_functions_has_each_key_and_no_other() -> None:
    page = (reference.PAGE.parent / "functions.md").read_text(encoding="utf-8").partition("\n## ")[0]
    with pytest.raises(BadFunctions) as caught:
        parse_functions("[cat]\nfprocess = 'cat'\nzzz = 1", "example")
    keys = set(str(caught.value).partition("allowed: ")[2].split(", "))
    told = {name for cell in re.findall(r"^\| (`.+?) \|", page, re.MULTILINE) for name in re.findall(r"`(.+?)`", cell)}
    assert told == keys - WATCHDOG_ROWS.keys() | {"fprocess"}


def test_page_of_functions_has_each_annotation_and_label_and_no_other() -> None:
    page = (reference.PAGE.parent / "functions.md").read_text(encoding="utf-8")
    annotations, labels = ({*re.findall(r"^\| (`.+?) \|", part, re.MULTILINE)} for part in page.split("\n## ")[1:])
    with pytest.raises(BadAnnotations) as caught:
        parse_annotations("cat", {"com.openfaas.retry.unknown": "1"})
    retries = str(caught.value).partition("allowed: ")[2].split(", ")
    known = {
        *(QUEUE_ANNOTATION, schedules.TOPIC, schedules.SCHEDULE, schedules.BODY, schedules.OVERLAP, schedules.CATCHUP),
        *(exposure.AUTH_ANNOTATION, exposure.DISABLED_ANNOTATION, exposure.PAGES_ANNOTATION, *retries),
    }
    assert {name for cell in annotations for name in re.findall(r"`(.+?)`", cell)} == known
    assert {cell.strip("`") for cell in labels} == set(
        re.findall(r"com\.openfaas\.scale\.[a-z-]+", str(scaling.__doc__))
    )


HTTP = (reference.PAGE.parent / "http.md").read_text(encoding="utf-8")
NAMED_ROUTES = re.compile(r"^\| (`/.+?) \| ([A-Z, ]+?) \|", re.MULTILINE)


def routes_of_page() -> dict[str, set[str]]:
    """Return the methods of each route that a table of the page has in its first cell."""
    rows = NAMED_ROUTES.findall(HTTP)
    return {path: set(methods.split(", ")) for paths, methods in rows for path in re.findall(r"`(/.+?)`", paths)}


def test_page_of_routes_has_each_route_of_the_gateway_with_its_method() -> None:
    table = re.findall(r"^    (ANY|[A-Z]+) +(/\S+) ", str(gateway.__doc__), re.MULTILINE)
    assert len(table) > 15
    told = routes_of_page()
    assert [route for route in table if route[0] not in told.get(route[1], set())] == []
    paths = {path.replace("CALL-ID", "ID") for path in control_plane.PATHS}
    assert paths | {f"/system/{area}" for area in control_plane.NOT_OFFERED} <= told.keys()


@pytest.mark.parametrize("source", ["watchdog.py", "draining/status.py", "gateway.py"])
def test_page_of_routes_has_each_path_that_a_program_compares_with(source: str) -> None:
    text = (reference.PAGE.parent.parent / source).read_text(encoding="utf-8")
    paths = set(re.findall(r'request\.path [=!]= b"(/[^"]*)"', text)) - {"/"}
    assert paths
    assert paths <= routes_of_page().keys()


def test_page_of_routes_has_each_status_that_an_error_of_ours_is_answered_with() -> None:
    kinds = [FaashoundError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    statuses = {kind.status for kind in kinds if kind.__module__.startswith("faashound.")} - {CLIENT_GONE_STATUS}
    told = set(re.findall(r"\b[1-5][0-9]{2}\b", HTTP))
    assert len(statuses) > 20
    assert {str(status) for status in statuses} <= told


def test_page_of_routes_has_the_states_of_calls_and_where_each_leads() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", HTTP, re.MULTILINE))
    for state in State:
        led_to = {after.value for (before, _), after in TRANSITIONS.items() if before is state} - {state.value}
        assert set(re.findall(r"`(\w+)`", rows[state.value])) & {each.value for each in State} == led_to
    assert {f"`{state.value}`" for state in CallbackState} <= set(re.findall(r"`\w+`", HTTP))


def test_page_of_routes_has_the_parameters_and_bounds_of_lists_of_calls() -> None:
    with pytest.raises(BadQuery) as caught:
        parse_call_filter(b"unknown=1")
    names = str(caught.value).partition("allowed: ")[2].split(", ")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|$", HTTP, re.MULTILINE))
    assert set(names) <= rows.keys()
    assert f"1 to {MAX_LISTED_COUNT:,} calls, default {LISTED_COUNT}" in rows["limit"]
    assert f"up to {MAX_WAIT_S / 60:g} m" in HTTP
    assert f"{MAX_FOLLOWERS_COUNT} clients, {MAX_OF_ADDRESS_COUNT} of one address" in HTTP


@pytest.mark.parametrize("name", ["http.md", "metrics.md", "functions.md"])
def test_reference_pages_are_linked_from_the_readme(name: str) -> None:
    assert f"](docs/{name})" in (reference.PAGE.parent.parent / "README.md").read_text(encoding="utf-8")


EXAMPLES = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"^```toml\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.M)
    )
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_functions_file_in_a_page_is_a_right_one(example: str) -> None:
    parse_functions(example, "example")
