"""The page where it changes something: what it was not told to change stays, and what has changed is seen at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from testkit.browser import Browser
from tests.ui.kit import Shown

PATIENTLY_S = 30.0  # for what is read again every few seconds
KEPT = ("envVars", "annotations", "labels", "secrets", "limits", "requests", "constraints")


@pytest.fixture
def deploying() -> Iterator[Shown]:
    """A system of the test's own, with the namespace blue and a secret in each namespace."""
    with Shown(settings={"deploy": "process", "limits": "ignore"}) as system:
        tell(system, "POST", "/system/namespace/blue", name="blue")
        tell(system, "POST", "/system/secrets", name="mine", value="x")
        tell(system, "POST", "/system/secrets", name="token", namespace="blue", value="x")
        yield system


def tell(system: Shown, method: str, path: str, **members: Any) -> None:
    """Have the gateway change something, as another client does."""
    answer = system.request(method, path, json.dumps(members).encode(), {"Content-Type": "application/json"})
    assert answer.status in (200, 201, 202), answer


def deploy(system: Shown, **members: Any) -> None:
    tell(system, "POST", "/system/functions", image="process", **members)


def shows(browser: Browser, name: str) -> None:
    """Wait until the view of a function has come."""
    browser.until(lambda: [each.text for each in browser.all("h1")] == [name], f"the view of {name}", PATIENTLY_S)


def test_change_keeps_what_it_was_not_told_to_change(deploying: Shown, browser: Browser) -> None:
    deploy(
        deploying,
        service="keeper",
        namespace="blue",
        envProcess="cat",
        secrets=["token"],
        envVars={"PLAIN": "a=b", "PEM": "BEGIN\nMII=b\nEND", "EMPTY": ""},
        annotations={"com.faashound.schedule.body": "x\ny=z", "a=b": "c", "note": " as it is"},
        labels={"team": "blue"},
        limits={"memory": "64Mi"},
        requests={"cpu": "100m"},
        constraints=["zone=b"],
    )
    before = deploying.ask("/system/function/keeper.blue")
    browser.open(f"{deploying.url}#/deploy/keeper.blue")
    browser.type("input[name=envProcess]", "cat -u")
    browser.click("button", "Change")
    shows(browser, "keeper.blue")
    after = deploying.ask("/system/function/keeper.blue")
    assert after["envProcess"] == "cat -u"
    assert {name: after.get(name) for name in KEPT} == {name: before[name] for name in KEPT}

    browser.click("a", "Change")
    browser.see("PEM", ".hint")
    browser.type("textarea[name=envVars]", "PEM=none")
    browser.click("label", "token")
    browser.click("button", "Change")
    shows(browser, "keeper.blue")
    after = deploying.ask("/system/function/keeper.blue")
    assert after["envVars"] == {"PEM": "none"}, "a line takes the place of what was kept"
    assert "secrets" not in after


def test_secrets_offered_are_those_of_the_namespace(deploying: Shown, browser: Browser) -> None:
    browser.open(f"{deploying.url}#/deploy")
    browser.see("mine", "label")
    browser.choose("select[name=namespace]", "blue")
    browser.see("token", "label")
    assert not browser.all("label", "mine")
    browser.type("input[name=service]", "fresh")
    browser.type("input[name=envProcess]", "cat")
    browser.click("label", "token")
    browser.click("button", "Deploy")
    shows(browser, "fresh.blue")
    assert deploying.ask("/system/function/fresh.blue")["secrets"] == ["token"]


def test_secret_is_made_in_the_namespace_that_was_chosen(deploying: Shown, browser: Browser) -> None:
    browser.open(f"{deploying.url}#/secrets")
    browser.click("button", "New secret")
    browser.type("dialog input[name=name]", "later")
    browser.choose("dialog select[name=namespace]", "blue")
    browser.type("dialog textarea[name=value]", "x")
    browser.click("dialog button", "Save")
    browser.see("later", "td")
    assert {"name": "later", "namespace": "blue"} in deploying.ask("/system/secrets?namespace=blue")
    browser.click("tr[data-key='token.blue'] button", "New value")
    browser.type("dialog textarea[name=value]", "y")
    browser.click("dialog button", "Save")
    browser.until(lambda: not browser.all("dialog"), "it is saved where it is")


def test_view_of_a_function_follows_what_changes(deploying: Shown, browser: Browser) -> None:
    deploy(deploying, service="fresh", envProcess="cat")
    browser.open(f"{deploying.url}#/functions/fresh")
    browser.see("1 of 1", ".facts dd")
    browser.click("button", "Scale")
    browser.type("dialog input[name=replicas]", "2")
    browser.click("dialog button", "Scale")
    browser.see("of 2", ".facts dd")
    tell(deploying, "PUT", "/system/functions", service="fresh", image="process", envProcess="cat -u")
    browser.until(lambda: browser.all(".facts dd", "cat -u"), "the new command", PATIENTLY_S)
    tell(deploying, "POST", "/system/scale-function/fresh", serviceName="fresh", replicas=0)
    browser.until(lambda: browser.all(".head .state", "stopped"), "it is stopped", PATIENTLY_S)
    assert "started when a call comes" in (browser.find(".head .state").get_attribute("title") or "")
    browser.click("form.panel button", "Call")
    browser.see("200", "form.panel b")
    tell(deploying, "DELETE", "/system/functions", functionName="fresh")
    browser.until(
        lambda: browser.all(".note.bad", "no function has this name"),
        "it says that there is none any more",
        PATIENTLY_S,
    )
