from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from s4g_ray.pipeline.prometheus import METRICS
from tests.support.dashboards import (
    OF_GPUS,
    dashboard,
    dashboard_queries,
    exported_name,
    label_names,
    metric_names,
)
from tests.support.kubernetes_manifests import pod_templates

CLUSTER = Path(__file__).parents[2] / "cluster"
EXPORTED = {exported_name(name): metric for name, metric in METRICS.items()}


def panels() -> list[dict[str, Any]]:
    return list(dashboard()["panels"])


def scrape_job(name: str) -> dict[str, Any]:
    (job,) = yaml.safe_load((CLUSTER / "monitoring" / name).read_text())["scrape_configs"]
    return dict(job)


def test_the_dashboard_shows_every_metric_that_a_run_exports_and_no_other_of_s4g() -> None:
    queried = set().union(*map(metric_names, dashboard_queries()))
    assert {name for name in queried if name.startswith("ray_s4g_")} == set(EXPORTED)


def test_the_dashboard_queries_only_those_of_rays_metrics_that_rays_sources_export() -> None:
    dashboards = Path(ray.__file__).parent / "dashboard" / "modules"
    panels_of_ray = (
        dashboards / "metrics" / "dashboards" / "default_dashboard_panels.py"
    ).read_text()
    agent = (dashboards / "reporter" / "reporter_agent.py").read_text()
    queried = set().union(*map(metric_names, dashboard_queries())) - set(EXPORTED)
    assert queried > OF_GPUS
    for name in queried:
        assert f"{name}{{" in panels_of_ray or f'"{name.removeprefix("ray_")}"' in agent, name


def test_the_dashboard_selects_and_groups_only_by_labels_that_the_metrics_have() -> None:
    for query in dashboard_queries():
        for name in metric_names(query) & set(EXPORTED):
            assert label_names(query) <= {"run", *EXPORTED[name].tags}, query


@pytest.mark.parametrize(
    "query", ["sum by (run) (ray_s4g_loss", "rate(ray_s4g_loss)", "ray_s4g_loss{run=~}"]
)
def test_an_invalid_query_is_found(query: str) -> None:
    with pytest.raises(ValueError):
        metric_names(query)


def test_panels_have_unique_ids_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in panels()}) == len(panels())
    occupied: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = set(
            itertools.product(
                range(place["x"], place["x"] + place["w"]),
                range(place["y"], place["y"] + place["h"]),
            )
        )
        assert max(x for x, _ in cells) < 24
        assert not cells & occupied, panel["title"]
        occupied |= cells


def test_the_dashboard_has_a_data_source_variable_and_every_panel_uses_it() -> None:
    made = dashboard()
    assert made["schemaVersion"] >= 39
    assert "id" not in made  # Grafana assigns it on import
    variables = {variable["name"]: variable for variable in made["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert all(
        variable["datasource"] == source
        for name, variable in variables.items()
        if name != "datasource"
    )
    for panel in panels():
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == source
        assert panel["description"].endswith(".")
        assert [target["refId"] for target in panel["targets"]] == list(
            "ABCDEFGH"[: len(panel["targets"])]
        )
        assert all(target["datasource"] == source for target in panel["targets"])


def test_queries_use_only_variables_of_the_dashboard() -> None:
    names = {variable["name"] for variable in dashboard()["templating"]["list"]}
    for query in dashboard_queries():
        used = {
            word.strip('"{}').lstrip("$")
            for word in query.replace("=~", " ").split()
            if "$" in word
        }
        assert {name.split('"')[0] for name in used} <= names, query


def test_on_machines_prometheus_reads_the_file_in_which_ray_lists_its_nodes() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (files,) = scrape_job("prometheus.yaml")["file_sd_configs"]
    assert files == {"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}


def test_on_a_laptop_prometheus_scrapes_the_port_of_the_documented_command() -> None:
    (targets,) = scrape_job("prometheus-laptop.yaml")["static_configs"]
    path = CLUSTER / "monitoring" / "prometheus-laptop.yaml"
    page = CLUSTER.parent / "docs" / "clusters.md"
    ports = {
        port
        for text in (path, page)
        for port in re.findall(r"ray\.metrics_port=(\d+)", text.read_text())
    }
    assert targets == {"targets": [f"127.0.0.1:{port}" for port in ports]}


def test_in_kubernetes_prometheus_finds_a_port_of_every_pod_of_the_cluster() -> None:
    job = scrape_job("prometheus-kuberay.yaml")
    manifest = yaml.safe_load((CLUSTER / "kuberay" / "raycluster.yaml").read_text())
    (discovery,) = job["kubernetes_sd_configs"]
    assert discovery == {
        "role": "pod",
        "namespaces": {"names": [manifest["metadata"]["namespace"]]},
    }
    (keep,) = (rule for rule in job["relabel_configs"] if rule.get("action") == "keep")
    node, port = keep["regex"].split(";")
    namespace = (CLUSTER / "kuberay" / "namespace.yaml").read_text()
    assert f'ray.io/is-ray-node: "{node}"' in namespace  # the label that KubeRay gives its pods
    for template in pod_templates(manifest):
        (container,) = template["spec"]["containers"]
        assert {"name": port, "containerPort": 8080} in container["ports"]
