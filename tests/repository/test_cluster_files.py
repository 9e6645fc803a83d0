from __future__ import annotations

import copy
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from s4g_ray.config.loading import load_config
from s4g_ray.config.schema import CheckpointConfig, RunConfig
from s4g_ray.distributed.placement import Node, NoRoomError
from s4g_ray.pipeline.preflight import check_resources
from tests.support.kubernetes_manifests import check_manifest, pod_templates
from tests.support.linters import find_linter

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
FILES = [path for path in CLUSTER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
LAUNCHERS = ("aws.yaml", "onprem.yaml")
MANIFESTS = tuple(path.name for path in sorted((CLUSTER / "kuberay").glob("*.yaml")))
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")


def launcher(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / name).read_text()))


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / name).read_text()))


def cluster_spec() -> dict[str, Any]:
    (cluster,) = manifests("raycluster.yaml")
    return dict(cluster["spec"])


def instructions(name: str) -> list[str]:
    """Return the arguments of one kind of instruction of the Dockerfile, in order."""
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)


def pod_nodes(spec: dict[str, Any]) -> list[Node]:
    """Return the nodes of a Kubernetes cluster with the most workers, sized by its pods' limits."""
    nodes = [Node(float(spec["headGroupSpec"]["rayStartParams"]["num-cpus"]))]
    for group in spec["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        node = Node(float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0)), group["labels"])
        nodes += [node] * group["maxReplicas"]
    return nodes


def ec2_nodes() -> list[Node]:
    """Return the nodes of a cluster of aws.yaml with the largest number of workers."""
    # vCPUs and GPUs, from EC2's description of instance types
    sizes = {"g6e.4xlarge": (16, 1), "m7i.4xlarge": (16, 0)}
    kinds = launcher("aws.yaml")["available_node_types"]
    nodes = [Node(kinds.pop("head")["resources"]["CPU"])]
    for kind in kinds.values():
        node = Node(*sizes[kind["node_config"]["InstanceType"]], kind["labels"])
        nodes += [node] * kind["max_workers"]
    return nodes


def onprem_nodes() -> list[Node]:
    """Return the machines of onprem.yaml, as small nodes."""
    num_workers = len(launcher("onprem.yaml")["provider"]["worker_ips"])
    return [Node(4, 0, {"pool": "cpu"})] * (1 + num_workers)


def check_waits_for_room(config: RunConfig, nodes: list[Node]) -> None:
    """Check that the head, the first node, cannot hold a run alone, and that all nodes can."""
    with pytest.raises(NoRoomError):
        check_resources(config, nodes[:1])
    check_resources(config, nodes)
    # long enough to start machines first
    assert min(config.ray.nodes_timeout_s, config.ray.start_timeout_s) > 600


# the image


def test_the_dockerfiles_linter_finds_nothing_and_ignores_nothing() -> None:
    path = CLUSTER / "Dockerfile"
    found = subprocess.run(
        [find_linter("hadolint"), "--no-color", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout) == (0, "")
    assert "hadolint ignore" not in path.read_text()


def test_the_image_has_a_target_with_and_one_without_cuda_and_neither_runs_as_root() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    last_user = {
        stage.split()[2]: re.findall(r"^USER (.*)$", stage, re.MULTILINE)[-1:] for stage in stages
    }
    assert last_user == {"base": [], "cpu": ["1000:1000"], "cuda": ["1000:1000"]}
    assert stages[0].startswith("python:3.11-")  # the version of constraints.txt


def test_the_image_installs_what_make_installs_in_the_pinned_versions() -> None:
    (made,) = re.findall(
        r"pip install .*-c constraints\.txt -e '\.\[\$\(FAISS\),(.*dev)\]'",
        (ROOT / "Makefile").read_text(),
    )
    lines = [line for line in instructions("RUN") if "pip install" in line]
    for line, faiss in zip(lines, ("cpu", "gpu"), strict=True):
        words = shlex.split(line)
        assert words[words.index("-c") + 1] == "constraints.txt"
        (extras,) = re.findall(r"\.\[(.*)\]", line)
        assert extras.split(",") == [faiss, *(extra for extra in made.split(",") if extra != "dev")]
        asked = PROJECT["dependencies"] + words[words.index(f".[{extras}]") + 1 :]
        for extra in extras.split(","):
            asked += PROJECT["optional-dependencies"][extra]
        named = {
            re.split(r"[\[>=]", requirement)[0].replace("-", "_").lower() for requirement in asked
        }
        assert named <= {name.replace("-", "_").lower() for name in PINNED}


def test_the_images_build_sends_what_it_copies_and_nothing_else() -> None:
    (copied,) = instructions("COPY")
    sources = copied.split()[:-1]
    assert all((ROOT / source).is_file() for source in sources)
    rules = [
        line
        for line in (CLUSTER / "Dockerfile.dockerignore").read_text().split("\n")
        if line[:1] not in ("", "#")
    ]
    assert rules == ["*", *(f"!{source}" for source in sources)]


# launchers: EC2 and machines of one's own


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_launcher_accepts_the_file_and_refuses_a_misspelt_key(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = launcher(name)
    monkeypatch.chdir(ROOT)
    validate_config(prepare_config(copy.deepcopy(config)))
    for target, source in config["file_mounts"].items():
        assert source == "~/.ray/auth_token" or Path(source).is_file(), target
    with pytest.raises(jsonschema.ValidationError, match="head_start_ray_command"):
        validate_config(prepare_config({**config, "head_start_ray_command": []}))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launched_cluster_requires_the_token_and_keeps_the_dashboard_on_its_head(
    name: str,
) -> None:
    config = launcher(name)
    head, worker = (" ".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    for commands in (head, worker):
        assert re.search(r"RAY_AUTH_MODE=token (\w+=\w+ )*ray start", commands)
    assert "--dashboard-host=127.0.0.1" in head
    assert "~/.ray/auth_token" in config["file_mounts"].values()  # copied to every node
    assert stopping_time(head) > CheckpointConfig().grace_s


def test_on_ec2_the_file_in_which_ray_lists_its_nodes_is_also_outside_the_container() -> None:
    config = launcher("aws.yaml")
    options = [word for option in config["docker"]["run_options"] for word in shlex.split(option)]
    # the same path: Ray's link to the file is absolute
    assert options[options.index("-v") + 1] == "/tmp/ray:/tmp/ray"
    (user,) = set(instructions("USER"))
    uid, gid = user.split(":")
    (made,) = (
        command for command in config["initialization_commands"] if command.endswith(" /tmp/ray")
    )
    assert shlex.split(made)[-6:] == ["-d", "-o", uid, "-g", gid, "/tmp/ray"]


def stopping_time(text: str) -> float:
    """Return the seconds that a file gives a job after SIGTERM."""
    (seconds,) = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", text)
    return float(seconds)


def test_on_ec2_nothing_but_ssh_is_open_to_the_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config

    for variable, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(f"AWS_{variable}", value)
    monkeypatch.setenv("HOME", str(tmp_path))  # the launcher writes its key there
    (tmp_path / ".ssh").mkdir()
    config = launcher("aws.yaml")
    kinds = config["available_node_types"].values()
    with mock_aws():
        for profile in {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in kinds}:
            boto3.client("iam").create_instance_profile(InstanceProfileName=profile)
        made = bootstrap_aws(prepare_config(config))  # type: ignore[no-untyped-call]
        used = {
            g
            for kind in made["available_node_types"].values()
            for g in kind["node_config"]["SecurityGroupIds"]
        }
        groups = boto3.client("ec2", "eu-central-1").describe_security_groups(GroupIds=list(used))[
            "SecurityGroups"
        ]
    rules = [rule for group in groups for rule in group["IpPermissions"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in rules if rule["IpRanges"]] == [(22, 22)]


def test_ec2_knows_every_key_of_the_instances() -> None:
    import boto3
    from botocore.validate import ParamValidator

    model = (
        boto3.client("ec2", "eu-central-1")
        .meta.service_model.operation_model("RunInstances")
        .input_shape
    )
    for kind in launcher("aws.yaml")["available_node_types"].values():
        asked = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        assert ParamValidator().validate(asked, model).generate_report() == ""
        assert "Typo" in ParamValidator().validate({**asked, "Typo": 1}, model).generate_report()


# KubeRay


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_and_kuberay_accept_every_manifest(name: str) -> None:
    for manifest in manifests(name):
        check_manifest(manifest)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("", "authOption"),
        ("authOptions", "secret"),
        ("autoscalerOptions", "idleTimeout"),
        ("autoscalerOptions.securityContext", "runAsNonroot"),
        ("headGroupSpec", "rayStartParameters"),
        ("workerGroupSpecs.0", "label"),
        ("workerGroupSpecs.0.template.spec", "toleration"),
        ("workerGroupSpecs.0.template.spec.containers.0.resources", "limit"),
    ],
)
def test_a_key_that_kubernetes_would_silently_drop_is_found(path: str, key: str) -> None:
    (job,) = manifests("rayjob.yaml")
    part = job["spec"]["rayClusterSpec"]
    for step in filter(None, path.split(".")):
        part = part[int(step) if step.isdecimal() else step]
    part[key] = {}
    with pytest.raises(jsonschema.ValidationError, match=key):
        check_manifest(job)


def test_the_cluster_of_a_job_equals_the_cluster_that_stays() -> None:
    (job,) = manifests("rayjob.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster_spec()


def test_the_service_is_one_that_serve_accepts_on_the_cluster_that_stays() -> None:
    from ray.serve.schema import ServeDeploySchema

    from s4g_ray.serving.config import make_config
    from s4g_ray.serving.deployment import build_service

    (service,) = manifests("rayservice.yaml")
    cluster = service["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    settings = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    # KubeRay makes a Service for the port of this name alone
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    port = head["ports"].pop()
    assert port == {"name": "serve", "containerPort": settings.http_options.port}
    assert cluster == cluster_spec()
    (application,) = settings.applications
    module, name = application.import_path.split(":")
    assert (module, name) == (build_service.__module__, build_service.__name__)
    config = make_config(application.args)
    (container,) = groups["cpu"]["template"]["spec"]["containers"]
    assert config.cpus_per_replica <= float(container["resources"]["limits"]["cpu"])
    assert config.threads_per_replica == config.cpus_per_replica


def test_a_cluster_in_kubernetes_requires_the_token_and_hides_its_dashboard() -> None:
    spec = cluster_spec()
    assert spec["authOptions"] == {"mode": "token", "secretName": "s4g-ray-token"}
    assert spec["rayVersion"] == PINNED["ray"]
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    kinds = {manifest["kind"]: manifest for manifest in manifests("namespace.yaml")}
    policy = kinds["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    open_ports = {port["port"] for rule in policy["ingress"] for port in rule.get("ports", [])}
    outside = [rule for rule in policy["ingress"] if rule["from"] != [{"podSelector": {}}]]
    assert all(rule["ports"] and rule["from"] for rule in outside)
    assert open_ports == {8265, 8080}  # for the operator and for Prometheus
    assert "Ingress" not in kinds


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_pods_meet_the_restricted_standard_and_request_their_limits(name: str) -> None:
    (manifest,) = manifests(name)
    templates = list(pod_templates(manifest))
    assert len(templates) == {"raycluster.yaml": 3, "rayjob.yaml": 4}[name]
    for template in templates:
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert re.fullmatch(r".*/s4g-ray:[\d.]+-(cpu|cuda)", container["image"])
            assert "env" not in container  # neither the token nor a key of the store


def test_pods_reach_the_store_as_the_service_account_and_only_the_head_reaches_kubernetes() -> None:
    spec = cluster_spec()
    (account,) = (
        manifest for manifest in manifests("namespace.yaml") if manifest["kind"] == "ServiceAccount"
    )
    pods = [
        group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]
    assert {pod["serviceAccountName"] for pod in pods} == {account["metadata"]["name"]}
    assert [pod.get("automountServiceAccountToken", True) for pod in pods] == [True, False, False]


def test_a_cluster_scales_gpu_and_cpu_workers_and_its_head_does_no_work() -> None:
    spec = cluster_spec()
    assert spec["enableInTreeAutoscaling"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert group["labels"] == {"pool": group["groupName"]}
        assert group["minReplicas"] < group["maxReplicas"]
        has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert has_gpu == (group["groupName"] == "gpu") == container["image"].endswith("-cuda")


def test_the_job_is_a_run_that_resumes_when_it_is_retried_and_fits_the_workers() -> None:
    (job,) = manifests("rayjob.yaml")
    spec = job["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:3] == ["python", "jobs/train.py", "--config"]
    assert (ROOT / words[1]).is_file()
    assert "--resume" in words
    assert spec["backoffLimit"] == 1  # a configuration error is retried too
    config = load_config(ROOT / words[3], [word for word in words[4:] if not word.startswith("--")])
    groups = {group["groupName"]: group for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
    check_waits_for_room(config, pod_nodes(spec["rayClusterSpec"]))
    assert config.train.use_gpu
    assert config.checkpoint.every_steps is not None  # pods stop without warning
    assert config.mining.label_selector == groups["cpu"]["labels"]
    assert yaml.safe_load(spec["runtimeEnvYAML"])["working_dir"].endswith(".zip")


# all of them


def test_no_file_holds_a_credential() -> None:
    secret = re.compile(
        r"AKIA[0-9A-Z]{16}|aws_secret_access_key\W+[\w/+]{20,}|password:|auth_token: (?!~/)"
        r"|BEGIN [A-Z ]*PRIVATE KEY",
        re.IGNORECASE,
    )
    for path in FILES:
        assert not secret.search(path.read_text()), path


def test_a_stopped_job_has_more_time_than_a_checkpoint_may_take() -> None:
    assert stopping_time(DOCKERFILE) > CheckpointConfig().grace_s
    assert re.search(r"RAY_AUTH_MODE=token", DOCKERFILE)


def test_the_readmes_jobs_use_the_object_store_and_wait_for_nodes_that_can_hold_them() -> None:
    text = (CLUSTER / "README.md").read_text().replace("\\\n", " ")
    jobs = [
        shlex.split(line.split(" -- ")[1])
        for line in text.split("\n")
        if line.startswith("    ray job submit")
    ]
    assert len(jobs) == 2
    for words, nodes in zip(jobs, (ec2_nodes(), pod_nodes(cluster_spec())), strict=True):
        config = load_config(ROOT / words[words.index("--config") + 1], words[4:])
        assert config.run_dir.startswith("s3://")
        assert config.data.uri.startswith("s3://")
        check_waits_for_room(config, nodes)
        check_resources(config, onprem_nodes())


def test_the_readme_names_every_file() -> None:
    text = (CLUSTER / "README.md").read_text()
    for path in FILES:
        assert path.name == "README.md" or path.name in text, path
