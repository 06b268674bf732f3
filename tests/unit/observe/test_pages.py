"""What the pages say and to whom, without sockets."""

import json

import pytest

from ckptd.core.identity import Identity, Role
from ckptd.core.quantities import Address
from ckptd.observe.pages import Answer, Health, Pages, Target

SICK = Health({"worker": ["the medium failed: EIO"], "coordinator": []})
WELL = Health({"worker": []})
TARGETS = [
    Target("pi2", Address("10.0.0.2", 9701), ["worker"], "home"),
    Target("mac", Address("fd00::1", 9701), ["worker", "coordinator"], "home", tls=False),
]


def pages(*, loopback: bool, health: Health = WELL, forgotten: str = "") -> Pages:
    return Pages(
        loopback=loopback,
        metrics=lambda: b"ckptd_x 1\n",
        health=lambda: health,
        targets=lambda: TARGETS,
        forgotten=lambda serial: serial == forgotten,
    )


def identity(*roles: Role) -> Identity:
    return Identity(cluster="home", roles=frozenset(roles), node_id="grafana", serial="0a")


def get(target: str, *, loopback: bool = True, health: Health = WELL) -> Answer:
    return pages(loopback=loopback, health=health).answer("GET", target, None)


def test_health_needs_a_role_and_no_reason_against_any() -> None:
    assert WELL.ok
    assert not SICK.ok
    assert not Health({}).ok


def test_on_loopback_healthz_tells_roles_and_reasons() -> None:
    answer = get("/healthz", health=SICK)
    assert (answer.status, answer.content_type) == (503, "application/json")
    assert json.loads(answer.body) == {
        "ok": False,
        "roles": {
            "coordinator": {"ok": True, "reasons": []},
            "worker": {"ok": False, "reasons": ["the medium failed: EIO"]},
        },
    }
    assert get("/healthz").status == 200


@pytest.mark.parametrize(("health", "status", "text"), [(WELL, 200, "ok"), (SICK, 503, "not ok")])
def test_off_loopback_healthz_says_one_word_to_everybody(
    health: Health, status: int, text: str
) -> None:
    shown = pages(loopback=False, health=health)
    for peer in (None, identity(Role.ADMIN)):
        answer = shown.answer("GET", "/healthz", peer)
        assert (answer.status, answer.body.decode()) == (status, f"{text}\n")


@pytest.mark.parametrize("path", ["/metrics", "/sd"])
@pytest.mark.parametrize(
    ("roles", "status"),
    [
        ({Role.MONITOR}, 200),
        ({Role.CLIENT}, 200),
        ({Role.ADMIN}, 200),
        ({Role.WORKER}, 403),
        ({Role.WORKER, Role.COORDINATOR}, 403),
        (None, 403),
    ],
)
def test_off_loopback_numbers_are_for_roles_that_may_scrape(
    path: str, roles: set[Role] | None, status: int
) -> None:
    peer = None if roles is None else identity(*roles)
    assert pages(loopback=False).answer("GET", path, peer).status == status
    assert pages(loopback=True).answer("GET", path, peer).status == 200


def test_a_forgotten_certificate_sees_no_numbers() -> None:
    peer = identity(Role.MONITOR)
    assert pages(loopback=False, forgotten="0a").answer("GET", "/metrics", peer).status == 403
    assert pages(loopback=False, forgotten="0b").answer("GET", "/metrics", peer).status == 200


def test_service_discovery_lists_every_node_in_the_form_of_prometheus() -> None:
    answer = get("/sd")
    assert answer.content_type == "application/json"  # Prometheus insists on it
    assert json.loads(answer.body) == [
        {
            "targets": ["[fd00::1]:9701"],
            "labels": {
                "node": "mac",
                "roles": ",coordinator,worker,",
                "cluster": "home",
                "__scheme__": "http",
            },
        },
        {
            "targets": ["10.0.0.2:9701"],
            "labels": {
                "node": "pi2",
                "roles": ",worker,",
                "cluster": "home",
                "__scheme__": "https",
            },
        },
    ]


def test_metrics_are_in_the_text_format() -> None:
    answer = get("/metrics?name[]=x")
    assert answer.body == b"ckptd_x 1\n"
    assert answer.content_type.startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "http://pi1:9701/healthz", 200),
        ("HEAD", "/healthz", 200),
        ("GET", "/", 404),
        ("GET", "/metrics/", 404),
        ("GET", "//metrics", 404),
        ("GET", "/../metrics", 404),
        ("POST", "/nothing", 404),
        ("OPTIONS", "*", 404),
        ("POST", "/metrics", 405),
        ("DELETE", "/healthz", 405),
        ("GET", "http://[/metrics", 400),
    ],
)
def test_nothing_else_is_here(method: str, target: str, status: int) -> None:
    answer = pages(loopback=True).answer(method, target, None)
    assert answer.status == status
    assert (("Allow", "GET, HEAD") in answer.headers) == (status == 405)
